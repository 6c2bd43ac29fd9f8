"""The output trainer: trains layers 2 and 3 on whatever activations have arrived.

    python train_output.py                      # 24 -> 12 -> 1, listens on 127.0.0.1:5002

train_input.py throws (i, h, y, clock) at it: indices, activations, targets, and how many updates
layer 1 had made. It trains in a loop on what has arrived so far, the last arrival first. The true
gradients g = dL/dh that its backprop gives there go to oracle.py, fire-and-forget. With
train_input.py --gradients delayed they go back to the input trainer: --oracle-server
127.0.0.1:5003.
"""
from plumbing import options, runs, say, serving  # first, see there
import numpy as np

from exchange import Part
from links import UpperEnd
from sgd import HIDDEN, backprop, feed_forward, loss, loss_gradient, make_layers, schedule

DEFAULTS = dict(
    layers=[24, 12, 1], learning_rate=0.1, momentum=0.9, decay=200_000, batch_size=100,
    keep=20_000,  # examples that are stored, the newest ones
    replay=8,     # times that each of them is trained on again, on average
    seed=0, checkpoint_seconds=5, oracle_server="127.0.0.1:5001", progress_dir="output_progress",
    resume=False)


def train(part, minibatches, learning_rate, momentum):
    """The algorithm. Yields the mean loss on each minibatch, before its update."""
    for _, h, y, tell in minibatches:
        y_hat = feed_forward(part.layers, h)
        g = loss_gradient(y_hat, y)
        g = backprop(part.layers, g)                # dL/dh, per example
        part.descend(learning_rate(part.updates), momentum)
        if tell:
            tell(g)                                 # to the oracle, fire-and-forget
        yield loss(y_hat, y).mean()


def main(args, stop):
    listener = serving.listen(args)               # first: if the port is taken, no file is touched
    locked = runs.lock(args.progress_dir)         # until this function returns  # noqa: F841
    rng = np.random.default_rng([args.seed, 2])
    layers = make_layers(args.layers, rng, input_mean=HIDDEN.mean)
    below = UpperEnd(args, Part(layers), rng, args.oracle_server, args.replay)
    below.resume()
    below.open(args.layers)
    app = serving.make_app("output trainer", below.status, args)
    below.routes(app, weights_above=lambda: ([], []))
    serving.serve(app, listener, args)
    say(f"output trainer {args.layers} answers on {args.host}:{args.port}")
    losses = train(below.part, below.minibatches(stop),
                   schedule(args.learning_rate, args.decay), args.momentum)
    below.follow(losses, "the output trainer")


if __name__ == "__main__":
    serving.run(main, options.make_parser(__doc__, 5002, **DEFAULTS))
