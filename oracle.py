"""The oracle: a Keras model that learns to guess the gradients dL/dh from the activations h, and answers at once.

    python oracle.py                            # 24 -> 12 -> 24, listens on 127.0.0.1:5001
    python oracle.py --layers 24 24             # a linear oracle
    python oracle.py --condition-on-labels      # sees y as well: the paper's cDNI (section 3.1)

train_output.py throws examples (h, y, g) at it, with the true gradients g. It keeps the newest of them, because
gradients age as the network learns, and trains over them in a loop, minimising the mean of (ĝ − g)² (paper, eq. 5).
train_input.py asks it for ĝ(h) and waits: that question is the critical path of the whole system.
"""
import contextlib
import ctypes
import os
import threading
import time

import numpy as np

import synthgrad

STEPS = 50    # minibatches in one call of the compiled training function: about 3 ms
TRUST = 10    # questions answered after the last news of true gradients; a guess older than that is worth nothing


@contextlib.contextmanager
def quiet():
    """Keep TensorFlow's C++ greetings, which no setting silences, off the terminal."""
    terminal, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(nowhere)


class NewestExamples:
    """The newest `capacity` examples; the oldest are dropped. Server threads write, the training loop reads: both
    hold the lock, for as long as it takes to copy a few rows, so that nobody waits for a training step."""

    def __init__(self, capacity, width):
        self.rows = np.empty((capacity, width), np.float32)  # h and g side by side: one gather fetches both
        self.received = self.stored = self.dropped = 0
        self.lock = threading.Lock()

    def add(self, h, g):
        """h (batch, input_dim), g (batch, output_dim), together as wide as a row."""
        capacity = len(self.rows)
        with self.lock:
            slots = np.arange(self.received, self.received + len(h))[-capacity:] % capacity
            self.rows[slots] = np.column_stack([h[-capacity:], g[-capacity:]])
            self.received += len(h)
            self.stored = min(self.received, capacity)
            self.dropped = self.received - self.stored

    def minibatches(self, shape, rng):
        """Examples drawn at random with replacement: (*shape, input_dim + output_dim)."""
        with self.lock:
            return self.rows.take(rng.integers(self.stored, size=shape), axis=0, mode="clip")  # twice as fast as [...]


class Oracle:
    """A Keras model between two changes of scale.

    It sees h standardised, and learns g divided by the gradients' present root mean square: true gradients shrink
    as the network learns, and the model should not have to follow that. Its last layer starts at zero, so that the
    first guesses are zero gradients (paper, section 3).
    """

    def __init__(self, dims, learning_rate, batch_size, seed):
        for name, value in (("TF_CPP_MIN_LOG_LEVEL", "3"), ("CUDA_VISIBLE_DEVICES", ""),  # so small a model is fastest
                            ("TF_NUM_INTRAOP_THREADS", "1"), ("TF_NUM_INTEROP_THREADS", "1")):  # on one core
            os.environ.setdefault(name, value)
        with quiet():
            import tensorflow as tf  # here, because it takes seconds: --help and errors need not wait
            tf.zeros(())
        keras = tf.keras
        keras.utils.set_random_seed(seed)
        model = keras.Sequential([keras.Input((dims[0],)),
                                  *(keras.layers.Dense(width, activation="tanh") for width in dims[1:-1]),
                                  keras.layers.Dense(dims[-1], kernel_initializer="zeros")])
        optimizer = keras.optimizers.Adam(learning_rate)
        optimizer.build(model.trainable_variables)

        @tf.function(jit_compile=True)  # one call without Python's lock, so that the threads that answer are never starved
        def train(examples):
            h, g = tf.split(examples, (dims[0], dims[-1]), -1)
            mean, deviation = tf.reduce_mean(h, (0, 1)), tf.math.reduce_std(h, (0, 1)) + 1e-3
            scale = tf.sqrt(tf.reduce_mean(tf.square(g))) + 1e-12
            h, g = (h - mean) / deviation, g / scale

            def step(k, total):
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean(tf.square(model(h[k], training=True) - g[k]))
                optimizer.apply(tape.gradient(loss, model.trainable_variables))
                return k + 1, total + loss

            _, total = tf.while_loop(lambda k, _: k < STEPS, step, (0, 0.0))
            return total / STEPS, scale, mean, deviation, *(weight.value for weight in model.trainable_variables)

        self.model, self.batch_size, self.updates = model, batch_size, 0
        nothing = tf.zeros((STEPS, batch_size, dims[0] + dims[-1]))
        self._tensor, self._train = tf.constant, train.get_concrete_function(nothing)
        self._train(nothing)  # compiles; learns nothing from zero gradients
        with contextlib.suppress(OSError, AttributeError):  # where there is glibc: what the compiler used, 50 MB
            ctypes.CDLL(None).malloc_trim(0)
        self._publish(np.float32(0), np.zeros(dims[0], np.float32), np.ones(dims[0], np.float32), *model.get_weights())

    def _publish(self, scale, mean, deviation, *weights):
        """Take over what guess() needs, whole, by one assignment."""
        self.published = scale, mean, deviation, list(zip(weights[::2], weights[1::2]))

    def guess(self, h):
        """ĝ: (batch, input_dim) -> (batch, output_dim).

        The Keras model's own arithmetic, on a copy of its weights, in NumPy: 0.03 ms, where a compiled TensorFlow
        call takes 0.4 ms, and 2.4 ms behind a training step (2 cores, 100 × 24).
        """
        scale, mean, deviation, (*hidden, (w, b)) = self.published
        h = (h - mean) / deviation
        for hidden_w, hidden_b in hidden:
            h = np.tanh(h @ hidden_w + hidden_b)
        return scale * (h @ w + b)

    def train(self, examples, rng):
        """STEPS minibatches; returns the loss as a fraction: 0 is a perfect guess, 1 no better than zeros."""
        minibatches = self._tensor(examples.minibatches((STEPS, self.batch_size), rng))
        loss, *results = (result.numpy() for result in self._train(minibatches))
        if not loss < 1e6:  # NaN, too
            raise FloatingPointError("the oracle diverged; try a lower --learning-rate")
        self._publish(*results)
        self.updates += STEPS
        return float(loss)


def main(args, stop):
    dims = [args.layers[0] + args.condition_on_labels, *args.layers[1:]]
    if args.layers[0] != args.layers[-1]:
        raise ValueError(f"--layers {args.layers}: the first and the last must be equal, the width of h and of dL/dh")
    examples = NewestExamples(args.keep, dims[0] + dims[-1])
    oracle, loss, answered, withheld, fresh_until = None, None, 0, 0, 0

    def model_input(h, y):
        return np.column_stack([h, y]) if args.condition_on_labels else h

    def status():
        return {"layers": args.layers, "condition_on_labels": args.condition_on_labels,
                "ready": oracle is not None,
                "updates": oracle.updates if oracle else 0, "loss": loss,
                "answered": answered, "withheld": withheld, "received": examples.received, "stored": examples.stored,
                "dropped": examples.dropped}

    app = synthgrad.make_app("oracle", status, args.token)

    @app.post("/estimate_gradients")
    def estimate_gradients():
        nonlocal answered, withheld
        h, y = synthgrad.read(h=(args.layers[0],), y=())
        if oracle is None:
            raise synthgrad.Refused("TensorFlow is still starting", 503)
        answered += 1
        if answered > fresh_until:  # whoever keeps following old gradients runs away from a network that cannot follow
            withheld += 1
            return synthgrad.encode(gradients=np.zeros_like(h))
        return synthgrad.encode(gradients=oracle.guess(model_input(h, y)))

    @app.post("/provide_gradients")
    def provide_gradients():
        _, h, y, g = synthgrad.read(i=(), h=(args.layers[0],), y=(), gradients=(dims[-1],))
        examples.add(model_input(h, y), g)
        return {"accepted": len(h)}

    synthgrad.serve(app, args.host, args.port, args.token)
    synthgrad.yield_to_servers()
    oracle = Oracle(dims, args.learning_rate, args.batch_size, args.seed)
    rng, rest = np.random.default_rng(args.seed), synthgrad.Rest()
    print(f"oracle {args.layers} answers on {args.host}:{args.port}", flush=True)
    seen = 0
    while not stop:
        if rest.due(examples.received):
            time.sleep(0.05)
            continue
        if examples.received > seen:
            seen, fresh_until = examples.received, answered + TRUST
        loss = oracle.train(examples, rng)


if __name__ == "__main__":
    parser = synthgrad.argument_parser(__doc__, 5001, [24, 12, 24], learning_rate=0.005)
    parser.add_argument("--condition-on-labels", action="store_true", help="guess from y too (cDNI)")
    parser.add_argument("--keep", type=int, default=2000, help="newest examples to learn from (%(default)s)")
    synthgrad.run(main, parser)
