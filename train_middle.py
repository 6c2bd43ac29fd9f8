"""The middle trainer: a part between two others, for networks that are cut more than once.

    python train_middle.py                      # 24 -> 12, listens on 127.0.0.1:5012

The part below treats it like train_output.py: it takes activations, and throws the gradients that
its backprop gives at the lower link's oracle. The part above treats it like train_input.py: it
throws its own activations, and asks the upper link's oracle for a guess. So what it tells the lower
oracle is not the true gradient. It is computed from a guess, or bootstrapped, as in the paper's
networks with a synthetic gradient at every layer (section 2.1).
"""
from plumbing import options, runs, say, serving  # first, see there
import numpy as np

from exchange import Part, gradient_source
from links import LowerEnd, UpperEnd
from plumbing.errors import UserError
from sgd import HIDDEN, backprop, feed_forward, make_layers, schedule
from synthgrad import PartClient

DEFAULTS = dict(
    layers=[24, 12], learning_rate=30.0, momentum=0.0, decay=5000, warm_up=1000, batch_size=100,
    keep=2000, staleness=20, patience=600, seed=0, output_server="127.0.0.1:5002",
    oracle_server="127.0.0.1:5011", progress_dir="middle_progress", resume=False,
    checkpoint_seconds=5)


def train(part, minibatches, learning_rate, momentum, throw, gradient):
    """The algorithm. Yields the mean square of the gradient dL/dx, of each minibatch."""
    for i, h, y, tell in minibatches:
        clock = part.updates
        h = feed_forward(part.layers, h)
        throw(i, h, y, clock)                       # to the part above, fire-and-forget
        g = gradient(i, h, y, clock)                # the upper oracle's guess, centered
        g = backprop(part.layers, g)
        part.descend(learning_rate(clock), momentum)
        tell(g)                                     # to the lower oracle
        yield np.square(g).mean()


def main(args, stop):
    listener = serving.listen(args)
    locked = runs.lock(args.progress_dir)  # noqa: F841
    rng = np.random.default_rng([args.seed, 6, *args.layers])
    layers = make_layers(args.layers, rng, last=HIDDEN, input_mean=HIDDEN.mean)
    below = UpperEnd(args, Part(layers), rng, args.lower_oracle_server)
    above = LowerEnd(args, stop)
    gradient = gradient_source(args.gradients, above.bounded, above.ask_above, rng)
    if above.has_oracle and above.oracle.url == below.oracle.url:
        raise UserError(f"{above.oracle.url} is given as the oracle below and as the one above; "
                         "each link needs its own: --oracle-server names the one above, "
                         "--lower-oracle-server the one below")
    below.resume()

    def status():
        return {**below.status(), **above.status(), "loss": None, "ids": [serving.ID, *above.ids]}

    def weights_above():
        return PartClient(args.output_server, args.token).weights(above.network)

    app = serving.make_app("middle trainer", status, args)
    below.routes(app, weights_above)
    serving.serve(app, listener, args)
    above.connect(new=not below.resumed)
    below.save(always=True)  # from now on --resume continues this run
    below.open(args.layers + above.network[1:])
    say(f"middle trainer {args.layers} answers on {args.host}:{args.port}")
    squares = train(below.part, below.minibatches(stop),
                    schedule(args.learning_rate, args.decay, args.warm_up), args.momentum,
                    above.throw, gradient)
    below.follow(squares, "the middle trainer")
    above.poster.close(timeout=5)


if __name__ == "__main__":
    parser = options.make_parser(__doc__, 5012, **DEFAULTS)
    parser.add_argument("--gradients", choices=["synthetic", "true", "zero", "shuffled"],
                        default="synthetic", help="from above (%(default)s)")
    parser.add_argument("--lower-oracle-server", default="127.0.0.1:5001",
                        help="where to throw this part's gradients (%(default)s)")
    serving.run(main, parser)
