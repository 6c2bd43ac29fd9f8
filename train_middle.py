"""The middle trainer: a part between two others, for networks that are cut more than once.

    python train_middle.py                      # 24 -> 12, listens on 127.0.0.1:5012

The part below treats it like train_output.py: it takes activations, and throws the gradients that
its backprop gives at the lower link's oracle. The part above treats it like train_input.py: it
throws its own activations, and asks the upper link's oracle for a guess. So what it tells the lower
oracle is not the true gradient. It is computed from a guess, or bootstrapped, as in the paper's
networks with a synthetic gradient at every layer (section 2.1). With --gradients true or delayed in
every part, true gradients go down from part to part, delayed ones centered at each cut.
"""
from plumbing import options, runs, say  # first, see there
import numpy as np

from replay import Replay
from links import LowerEnd, UpperEnd
from plumbing import process
from plumbing.errors import Refused, UserError
from plumbing.part import Part
from sgd import HIDDEN, backprop, feed_forward, make_layers, schedule
from train_input import LOWER, add_gradients, with_rates

DEFAULTS = LOWER | dict(
    layers=[24, 12], seed=0, output_server="127.0.0.1:5002", oracle_server="127.0.0.1:5011",
    progress_dir="middle_progress", checkpoint_seconds=5)


def train(part, minibatches, learning_rate, momentum, throw, gradients):
    """The algorithm. Yields the mean square of the gradient dL/dx, at each update. A minibatch is
    None if nothing came from below; but a gradient may have come back from above."""
    for minibatch in minibatches:
        h = y = tell = None
        if minibatch:
            i, x, y, _, tell = minibatch
            h = feed_forward(part.layers, x)
            throw(i, h, y, part.clock)                  # to the part above, fire-and-forget
        for g, its_tell in gradients(h, y, part.clock, tell):
            g = backprop(part.layers, g)
            part.descend(learning_rate(part.clock), momentum)
            if its_tell:
                its_tell(g)                             # to the lower oracle
            yield np.square(g).mean()
        part.clock += minibatch is not None


def main(args, stop):
    from over_http import Above, post_gradients, serve_gradients, serve_part
    from plumbing import serving                        # here, for in_process.py serves nothing
    from synthgrad import PartClient
    listener = serving.listen(args)
    locked = runs.lock(args.progress_dir)  # noqa: F841
    rng = np.random.default_rng([args.seed, 6, *args.layers])
    layers = make_layers(args.layers, rng, last=HIDDEN, input_mean=HIDDEN.mean)
    part, above = Part(layers, args.progress_dir, gradients=args.gradients), Above(args, stop)
    if above.source.asks_oracle and args.oracle_server == args.lower_oracle_server:
        raise UserError(f"{args.oracle_server} is given as the oracle below and as the one above; "
                        "each link needs its own: --oracle-server names the one above, "
                        "--lower-oracle-server the one below")
    poster = post_gradients(args.lower_oracle_server, args.token, lambda: below)
    below = UpperEnd(Replay(1, 0), args.batch_size, rng, poster and poster.outbox)
    link = None  # the lower end of the link above, once that answers

    def network():
        return args.layers + above.network[1:] if link else None

    def status():
        return {"layers": args.layers, "network": network(), "updates": part.clock,
                "gradient_mean_square": part.average, "starts": [process.START, *above.starts],
                "gradients": args.gradients, "examples_sent": above.outbox.counters(),
                **below.status(), **(link.status() if link else {})}

    def weights():
        theirs, updates = PartClient(args.output_server, args.token).weights(above.network)
        part.numbers["above"] = min(updates)  # for check_use() of a resumed run
        return part.weights()[0] + theirs, [part.clock, *updates]

    def add(*gradients):
        if not link:
            raise Refused("still waiting for the part above", 503)
        link.take_back(*gradients)
        below.nudge()

    app = serving.make_app("middle trainer", status, args)
    serve_part(app, below, network, weights)
    serve_gradients(app, args.layers[-1], lambda: link and above.network[-1], add)
    serving.serve(app, listener, args)
    k = above.connect()
    lower_end = LowerEnd(part, above, process.START, k, args, rng)
    above.check_use(part.resume(args.resume), part)
    part.save()  # from now on --resume continues this run
    link = lower_end  # last, for now the part below may begin
    say(f"middle trainer {args.layers} answers on {options.address(args.host, args.port)}")
    reporter = process.Reporter(below.line)
    squares = train(part, part.minibatches(below, stop, args.checkpoint_seconds, reporter),
                    schedule(args.learning_rate, args.decay, args.warm_up), args.momentum,
                    link.throw, link.gradients)
    part.train(squares, "the middle trainer")
    for each in filter(None, (above.poster, poster)):
        each.close(timeout=5)


if __name__ == "__main__":
    parser = options.make_parser(__doc__, 5012, **DEFAULTS)
    add_gradients(parser)
    parser.add_argument("--lower-oracle-server", default="127.0.0.1:5001",
                        help="where to throw this part's gradients, or none (%(default)s)")
    process.run(lambda args, stop: main(with_rates(args), stop), parser)
