"""The output trainer: trains layers 2 and 3 on whatever activations have arrived, and tells the oracle the truth.

    python train_output.py                      # 24 -> 12 -> 1, listens on 127.0.0.1:5002

train_input.py throws (i, h, y, clock) at it: indices, activations, targets, and how old layer 1 was. It loops over this
partial training set, what has just arrived first. The true gradients g = dL/dh that fall out of its backprop there it
throws at oracle.py, fire and forget. The gradients at older activations it keeps to itself: they belong to a layer 1
that is no more, and an oracle that learned from them would mislead the present one.
"""
import concurrent.futures
import contextlib
import queue
import threading
import time

import plumbing  # first, see there
import numpy as np

from plumbing import exchange, runs, serving
from sgd import backprop, descend, feed_forward, loss, loss_gradient, make_layers
from synthgrad import Examples, OracleClient, Question, Refused, encode, encode_weights


def train(layers, minibatches, learning_rate, momentum, owned, updates=0):
    """The algorithm. Yields, after each update, the loss there before it. Only this writes to the layers."""
    for updates, (h, y, tell) in enumerate(minibatches, updates):
        with owned:                                # so that nobody reads half an update
            y_hat = feed_forward(layers, h)
            g = loss_gradient(y_hat, y)
            g = backprop(layers, g)                # dL/dh, per example: what layer 1 would like to know
            descend(layers, learning_rate(updates), momentum)
        if tell:
            tell(g)                                # to the oracle, fire and forget; or to who asked for the truth
        yield loss(y_hat, y).mean()


def partial_set(arrived, examples, batch_size, rng, stop):
    """Minibatches of whatever set there is, in a loop: what has just arrived first, else some of the newest examples.

    Yields h (batch, width), y (batch, k), and tell(g), which passes the gradients there on; None where h is old, for
    nobody wants to know those. When the replay is used up it waits for news.
    """
    while not stop:
        drawn = examples.draw(batch_size, rng) if arrived.empty() else None
        try:
            yield (*drawn, None) if drawn else arrived.get(timeout=0.2)
        except queue.Empty:
            pass


def main(args, stop):
    width, k = args.layers[0], args.layers[-1]
    rng = np.random.default_rng([args.seed, 2])
    locked = runs.lock(args.progress_dir)          # for as long as this function runs  # noqa: F841
    layers, checkpoint = make_layers(args.layers, rng, input_mean=0.5), runs.Checkpoint(args.progress_dir)
    state = {"updates": 0} | checkpoint.start(layers, args.resume)
    owned = threading.Lock()                       # whoever holds it may touch the layers
    examples = exchange.NewestExamples(args.keep, args.replay)
    arrived, dropped = queue.Queue(), 0            # minibatches not yet trained on; bounded by arrive()
    oracle = OracleClient(args.oracle_server, args.token)
    sender = exchange.Sender(oracle.provide_gradients, f"the oracle at {oracle.url}", max_rows=args.keep, width=2 * width + k)

    def arrive(h, y, tell):
        """In a server's thread. At most --keep / --batch-size minibatches wait their turn: the oldest are dropped."""
        nonlocal dropped
        examples.add(h, y)
        with contextlib.suppress(queue.Empty):     # the training loop takes them, too
            while arrived.qsize() * args.batch_size >= args.keep:
                arrived.get_nowait()
                dropped += 1
        arrived.put((h, y, tell))

    def status():
        return {"layers": args.layers, "loss": None, **state, "examples": examples.counters(), "waiting": arrived.qsize(),
                "dropped": dropped, "gradients": sender.counters()}

    app = serving.make_app("output trainer", status, args)

    @app.post("/training_examples")
    def training_examples():
        columns = serving.message(Examples, h=width, y=k)
        for start in range(0, len(columns[0]), args.batch_size):
            i, h, y, clock = (column[start:start + args.batch_size] for column in columns)
            arrive(h, y, lambda g, minibatch=(i, h, y, clock): sender.throw(*minibatch, g))
        return {"accepted": len(columns[0])}

    @app.post("/true_gradients")
    def true_gradients():
        h, y = serving.message(Question, h=width, y=k)
        answer = concurrent.futures.Future()
        arrive(h, y, answer.set_result)
        try:
            return serving.as_json(encode(gradients=answer.result(timeout=8)))
        except concurrent.futures.TimeoutError:
            raise Refused("busy: the training loop did not get round to it in 8 s", 503) from None

    @app.get("/weights")
    def weights():
        with owned:
            return serving.as_json(encode_weights([(layer.w, layer.b) for layer in layers], state["updates"]))

    serving.serve(app, args)
    print(f"output trainer {args.layers} answers on {args.host}:{args.port}", flush=True)
    losses = train(layers, partial_set(arrived, examples, args.batch_size, rng, stop),
                   lambda updates: args.learning_rate / (1 + updates / args.decay), args.momentum, owned, state["updates"])
    saved = time.monotonic()
    with np.errstate(all="ignore"):
        for value in map(float, losses):
            if not np.isfinite(value):
                raise FloatingPointError("the output half diverged; try a lower --learning-rate")
            state["updates"] += 1
            state["loss"] = state.get("loss", value) + 0.01 * (value - state.get("loss", value))
            if time.monotonic() - saved > args.checkpoint_seconds:
                saved = time.monotonic()
                checkpoint.save(layers, **state)
    if state["updates"]:                           # a half that was never trained is not to push out an earlier one
        checkpoint.save(layers, **state)
    sender.close(timeout=5)


if __name__ == "__main__":
    parser = serving.argument_parser(
        __doc__, 5002, layers=[24, 12, 1], learning_rate=0.1, momentum=0.9, decay=200_000, batch_size=100, keep=20_000,
        replay=8, seed=0, oracle_server="127.0.0.1:5001", progress_dir="output_progress", resume=False)
    parser.add_argument("--checkpoint-seconds", type=serving.number(float, 0), default=5, help="between checkpoints (%(default)s)")
    serving.run(main, parser)
