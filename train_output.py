"""The output trainer: trains layers 2 and 3 on whatever activations have arrived.

    python train_output.py                      # 24 -> 12 -> 1, listens on 127.0.0.1:5002

train_input.py throws (i, h, y, clock) at it: indices, activations, targets, and the number of the
minibatch. It trains in a loop on what has arrived so far, the last arrival first. The true
gradients g = dL/dh that its backprop gives there go to oracle.py, fire-and-forget. With
train_input.py --gradients delayed they go back to the input trainer: --oracle-server
127.0.0.1:5003. With true, local or zero nobody takes them: --oracle-server none.
"""
from plumbing import options, runs, say  # first, see there
import numpy as np

from replay import Replay
from links import UpperEnd
from plumbing import process
from plumbing.part import Part
from sgd import HIDDEN, backprop, feed_forward, make_layers, schedule, task_of

DEFAULTS = dict(
    layers=[24, 12, 1], learning_rate=0.1, momentum=0.9, decay=200_000,
    batch_size=100,  # of replayed minibatches; the others are as they were thrown
    keep=20_000,     # examples that are stored, the newest ones
    replay=8,        # times that each of them is trained on again, on average
    seed=0, checkpoint_seconds=5, oracle_server="127.0.0.1:5001", progress_dir="output_progress",
    resume=False)


def train(part, minibatches, task, learning_rate, momentum):
    """The algorithm. Yields the mean loss on each minibatch, before its update."""
    for _, h, y, _, tell in minibatches:
        y_hat = feed_forward(part.layers, h)
        g = task.loss_gradient(y_hat, y)
        g = backprop(part.layers, g)                # dL/dh, per example
        part.descend(learning_rate(part.clock), momentum)
        part.clock += 1
        if tell:
            tell(g)                                 # to the oracle, fire-and-forget
        yield task.loss(y_hat, y).mean()


def main(args, stop):
    from over_http import post_gradients, serve_part
    from plumbing import serving                  # here, for in_process.py serves nothing
    listener = serving.listen(args)               # first: if the port is taken, no file is touched
    locked = runs.lock(args.progress_dir)         # until this function returns  # noqa: F841
    rng, network = np.random.default_rng([args.seed, 2]), args.layers
    part = Part(make_layers(network, rng, input_mean=HIDDEN.mean), args.progress_dir)
    part.resume(args.resume)
    poster = post_gradients(args.oracle_server, args.token, lambda: below)
    below = UpperEnd(Replay(args.keep, args.replay), args.batch_size, rng,
                     poster and poster.outbox)

    def status():
        return {"layers": network, "network": network, "updates": part.clock, "loss": part.average,
                **below.status()}

    app = serving.make_app("output trainer", status, args)
    serve_part(app, below, lambda: network, lambda: (part.weights()[0], [part.clock]))
    serving.serve(app, listener, args)
    say(f"output trainer {network} answers on {options.address(args.host, args.port)}")
    minibatches = part.minibatches(below, stop, args.checkpoint_seconds,
                                   process.Reporter(below.line))
    losses = train(part, filter(None, minibatches), task_of(network[-1]),
                   schedule(args.learning_rate, args.decay), args.momentum)
    part.train(losses, "the output trainer")
    if poster:
        poster.close(timeout=5)


if __name__ == "__main__":
    process.run(main, options.make_parser(__doc__, 5002, **DEFAULTS))
