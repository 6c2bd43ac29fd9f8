"""The output trainer: trains layers 2 and 3 on whatever activations have arrived, and tells the oracle the truth.

    python train_output.py                      # 24 -> 12 -> 1, listens on 127.0.0.1:5002

train_input.py throws (i, h, y) at it: indices, activations, targets. It keeps the newest activations per index, and
loops over this partial training set, what has just arrived first. The true gradients g = dL/dh that fall out of its
backprop there it throws at the oracle, fire and forget. The gradients at older activations it keeps to itself: they
belong to a layer 1 that is no more, and an oracle that learns from them misleads the present one.
"""
import collections

import numpy as np

import synthgrad
from sgd import backprop, feed_forward, make_layers


def train(half, examples, inbox, throw, batch_size, rng, stop):
    """The algorithm: train over whatever set there is, in a loop, and throw the true gradients at the oracle."""
    rest = synthgrad.Rest()
    while not stop:
        idle = rest.due(examples.received)
        inbox.work(wait=idle)                  # new activations come in
        if idle:
            continue
        i, h, y = examples.minibatch(batch_size, rng)
        y_hat = feed_forward(half.layers, h)
        error = y_hat - y[:, None]             # dL/dŷ of L = ½ (ŷ − y)²
        g = backprop(half.layers, error)       # dL/dh, per example
        half.descend(error)
        if i is not None:                      # they have just arrived
            throw(i, h, y, g)                  # fire and forget


class OutputHalf:
    """Layers 2 and 3, and how fast they learn. Only the training loop touches them."""

    def __init__(self, dims, learning_rate, momentum, decay, rng):
        self.layers = make_layers(dims, rng, input_mean=0.5)  # of layer 1's sigmoid
        self.learning_rate, self.momentum, self.decay = learning_rate, momentum, decay
        self.updates, self.loss = 0, None

    def descend(self, error):
        """One update, at a rate that falls as 1 / (1 + updates / decay). Changes nothing if the error is not finite."""
        loss = float(np.vdot(error, error)) / len(error)
        if not np.isfinite(loss):
            raise FloatingPointError("the output half diverged; try a lower --learning-rate")
        self.loss = loss if self.loss is None else self.loss + 0.01 * (loss - self.loss)
        self.updates += 1
        learning_rate = self.learning_rate / (1 + self.updates / self.decay)
        for layer in self.layers:
            layer.descend(learning_rate, self.momentum)

    def locked_step(self, h, y):
        """The update-locked alternative: one step on just these examples. h (batch, width) -> dL/dh of that shape."""
        error = feed_forward(self.layers, h) - y[:, None]
        g = backprop(self.layers, error)
        self.descend(error)
        return g

    def weights(self):
        return [(layer.w.copy(), layer.b.copy()) for layer in self.layers], self.updates

    def restore(self, weights, updates):
        for layer, (w, b) in zip(self.layers, weights):
            layer.w[:], layer.b[:] = w, b
        self.updates = updates


class NewestPerIndex:
    """The partial training set: the newest (h, y) per index i, in arrays that only the training loop touches.

    Bounded to `capacity` examples: index i has the slot i % capacity. What arrives for an occupied slot replaces
    what is there; if that had another index, it counts as dropped. received = stored + replaced + dropped.
    """

    def __init__(self, capacity, width):
        self.owner = np.zeros(capacity, np.int64)  # by slot: index + 1, 0 for empty; zeros take no memory until used
        self.row = np.empty(capacity, np.int32)    # by slot: where in `rows` its example is
        self.rows = np.empty((capacity, width + 1), np.float32)  # h and y side by side; the first `stored` are in use
        self.just_arrived = collections.deque(maxlen=20)  # minibatches not yet trained on; a flood pushes the oldest out
        self.received = self.stored = self.replaced = self.dropped = 0

    def add(self, i, h, y):
        """i (batch,), h (batch, width), y (batch,): later rows are newer."""
        newest = synthgrad.newest_rows(i % len(self.owner))
        slots = i[newest] % len(self.owner)
        before = self.owner[slots]
        fresh = slots[before == 0]
        self.row[fresh] = np.arange(self.stored, self.stored + len(fresh))
        self.replaced += int(np.count_nonzero(before == i[newest] + 1)) + len(i) - len(np.unique(i))
        self.owner[slots], self.rows[self.row[slots]] = i[newest] + 1, np.column_stack([h[newest], y[newest]])
        self.received += len(i)
        self.stored += len(fresh)
        self.dropped = self.received - self.stored - self.replaced
        for k in range(0, len(i), 500):
            self.just_arrived.append(tuple(array[k:k + 500].copy() for array in (i, h, y)))

    def counters(self):
        return {name: getattr(self, name) for name in ("received", "stored", "replaced", "dropped")}

    def minibatch(self, batch_size, rng):
        """i, h, y of what has just arrived; if nothing has, None, h, y drawn at random, with replacement."""
        if self.just_arrived:
            return self.just_arrived.popleft()
        rows = self.rows.take(rng.integers(self.stored, size=batch_size), axis=0, mode="clip")  # twice as fast as [...]
        return None, rows[:, :-1], rows[:, -1]


def main(args, stop):
    width = args.layers[0]
    if args.layers[-1] != 1:
        raise ValueError(f"--layers {args.layers}: must end with 1, the target's width")
    rng, inbox = np.random.default_rng(args.seed), synthgrad.Inbox()
    half = OutputHalf(args.layers, args.learning_rate, args.momentum, args.decay, rng)
    examples = NewestPerIndex(args.keep, width)
    sender = synthgrad.Sender(synthgrad.OracleClient(args.oracle_server, args.token).provide_gradients,
                              f"the oracle at {args.oracle_server}",
                              min(2000, synthgrad.examples_per_message(2 * width)))

    def status():
        return {"layers": args.layers, "updates": half.updates, "loss": half.loss, "gradients": sender.counters(),
                "examples": examples.counters()}

    app = synthgrad.make_app("output trainer", status, args.token)

    @app.post("/training_examples")
    def training_examples():
        i, h, y = synthgrad.read(i=(), h=(width,), y=())
        inbox.ask(examples.add, i, h, y)
        return {"accepted": len(i)}

    @app.post("/true_gradients")
    def true_gradients():
        return synthgrad.encode(gradients=inbox.ask(half.locked_step, *synthgrad.read(h=(width,), y=())))

    @app.get("/weights")
    def get_weights():
        return synthgrad.encode_weights(*inbox.ask(half.weights))

    @app.put("/weights")
    def put_weights():
        inbox.ask(half.restore, *synthgrad.decode_weights(synthgrad.read_json(), args.layers))
        return {"accepted": len(half.layers)}

    synthgrad.serve(app, args.host, args.port, args.token)
    synthgrad.yield_to_servers()
    print(f"output trainer {args.layers} answers on {args.host}:{args.port}", flush=True)
    oracle = synthgrad.OracleClient(args.oracle_server, args.token, timeout=1)
    found = synthgrad.until_answered(oracle.status, f"the oracle at {oracle.url}", stop,
                                     pause=lambda: inbox.work(wait=True))  # true gradients are given meanwhile
    if found["layers"][0] != width:
        raise ValueError(f"the oracle guesses gradients of {found['layers'][0]} activations, but --layers begins with {width}")
    train(half, examples, inbox, sender.throw, args.batch_size, rng, stop)
    sender.close(timeout=5)


if __name__ == "__main__":
    parser = synthgrad.argument_parser(__doc__, 5002, [24, 12, 1], learning_rate=0.1)
    parser.add_argument("--oracle-server", default="127.0.0.1:5001", help="%(default)s")
    parser.add_argument("--momentum", type=float, default=0.9, help="%(default)s")
    parser.add_argument("--decay", type=float, default=200_000, help="updates until the rate has halved (%(default)s)")
    parser.add_argument("--keep", type=int, default=20_000, help="bound of the training set, examples (%(default)s)")
    synthgrad.run(main, parser)
