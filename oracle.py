"""The oracle: a Keras model that learns to guess the gradients dL/dh from the activations h, and answers at once.

    python oracle.py                            # 24 -> 12 -> 24, listens on 127.0.0.1:5001
    python oracle.py --layers 24 24             # a linear oracle
    python oracle.py --condition-on-labels      # sees y as well: the paper's cDNI (section 3.1)

train_output.py throws examples (h, y, g, clock) at it, with the true gradients g. It keeps the newest of them, because
gradients age as the network learns, and trains over them in a loop, minimising the mean of (ĝ − g)² (paper, eq. 5).
train_input.py asks it for ĝ(h) and waits: that question is the critical path of the whole system.
"""
import math

import plumbing  # first, see there
import numpy as np

from plumbing import exchange, serving
from synthgrad import Gradients, Question, Refused, encode

STEPS = 20    # minibatches in one call of the compiled training function: 2 ms


def make_model(dims):
    """[24, 12, 24] -> a Keras model h -> ĝ. Its last layer starts at zero (paper, section 3)."""
    import keras
    return keras.Sequential([keras.Input((dims[0],)),
                             *(keras.layers.Dense(width, activation="tanh") for width in dims[1:-1]),
                             keras.layers.Dense(dims[-1], kernel_initializer="zeros")])


def loss(model, h, g):
    """The mean of (ĝ(h) − g)²: h (batch, input_dim), g (batch, width) (paper, eq. 5)."""
    import tensorflow as tf
    return tf.reduce_mean(tf.square(model(h, training=True) - g))


def compiled_training(model, learning_rate, batch_size):
    """STEPS steps of Adam as one call, compiled by XLA: (h, g) (STEPS · batch, dim) -> the mean loss.

    As one call because it runs without Python's lock, so that the threads that answer questions are not starved, and
    because Keras' own train_on_batch takes longer for one step than this for all of them. The first call compiles it.
    """
    import keras
    import tensorflow as tf
    optimizer = keras.optimizers.Adam(learning_rate)
    optimizer.build(model.trainable_variables)

    @tf.function(jit_compile=True)
    def train(h, g):
        h, g = (tf.reshape(each, (STEPS, batch_size, each.shape[1])) for each in (h, g))

        def step(k, total):
            with tf.GradientTape() as tape:
                value = loss(model, h[k], g[k])
            optimizer.apply(tape.gradient(value, model.trainable_variables))
            return k + 1, total + value

        return tf.while_loop(lambda k, _: k < STEPS, step, (0, 0.0))[1] / STEPS

    nothing = [tf.zeros((STEPS * batch_size, dim)) for dim in (model.input_shape[1], model.output_shape[1])]
    train(*nothing)  # compiles; from zero gradients it learns nothing
    return train


class Oracle:
    """The model between two changes of scale: it sees h standardised, and learns g divided by the gradients' present
    root mean square, for true gradients shrink as the network learns, and the model should not have to follow that.

    The training loop owns all of it. Servers' threads read `updates`, and `published`, which is replaced whole.
    """

    def __init__(self, dims, learning_rate, batch_size, seed):
        import keras
        keras.utils.set_random_seed(seed)
        self.model = make_model(dims)
        self.step = compiled_training(self.model, learning_rate, batch_size)
        self.moments, self.updates = None, 0  # mean and deviation of h, and the scale of g
        self.published = None                 # the newest clock learned from, the moments, the weights

    def train(self, h, g, clock):
        """STEPS minibatches; returns the loss as a fraction: 0 is a perfect guess, 1 no better than zeros."""
        moments = h.mean(axis=0), h.std(axis=0) + 1e-3, np.sqrt(np.mean(g**2)) + 1e-12
        if self.moments:  # over the last ten calls or so, for those of one call are noisy
            moments = [old + np.float32(0.1) * (new - old) for old, new in zip(self.moments, moments)]
        mean, deviation, scale = self.moments = moments
        value = float(self.step((h - mean) / deviation, g / scale))
        if not value < 1e6:  # NaN, too
            raise FloatingPointError("the oracle diverged; try a lower --learning-rate")
        self.updates += STEPS
        self.published = int(clock.max()), self.moments, self.model.get_weights()
        return value

    def guess(self, h):
        """ĝ (batch, width) at h (batch, input_dim), and the newest clock that it was learned from.

        The Keras model's own arithmetic, on a copy of its weights, in NumPy: 0.03 ms, where a compiled TensorFlow call
        takes 0.4 ms, and 2.4 ms behind a training step (2 cores, 100 × 24).
        """
        learned, (mean, deviation, scale), weights = self.published
        h = (h - mean) / deviation
        *hidden, (w, b) = zip(weights[::2], weights[1::2])
        for hidden_w, hidden_b in hidden:
            h = np.tanh(h @ hidden_w + hidden_b)
        return scale * (h @ w + b), learned


def main(args, stop):
    if args.layers[0] != args.layers[-1]:
        raise ValueError(f"--layers {args.layers}: the first and the last must be equal, the width of h and of dL/dh")
    per_call = STEPS * args.batch_size  # examples
    if per_call > args.keep * args.replay:
        raise ValueError(f"--keep times --replay must be at least {STEPS} times --batch-size: it trains so many at a time")
    width, labels = args.layers[0], args.condition_on_labels
    examples = exchange.NewestExamples(args.keep, args.replay)
    oracle, value, answered = None, None, 0

    def model_input(h, y):
        if not labels:
            return h
        if y.shape[1] != labels:
            raise Refused(f"this oracle was started with --condition-on-labels {labels}, but y has a width of {y.shape[1]}", 400)
        return np.column_stack([h, y])

    def status():
        return {"layers": args.layers, "condition_on_labels": labels, "ready": oracle is not None,
                "needs": math.ceil(per_call / args.replay), "updates": oracle.updates if oracle else 0, "loss": value,
                "answered": answered, "learned": oracle and oracle.published and oracle.published[0], "examples": examples.counters()}

    app = serving.make_app("oracle", status, args)

    @app.post("/estimate_gradients")
    def estimate_gradients():
        nonlocal answered
        h, y = serving.message(Question, h=width)
        h = model_input(h, y)
        if oracle is None:
            raise Refused("TensorFlow is still starting", 503)
        answered += 1
        gradients, learned = oracle.guess(h) if oracle.published else (np.zeros((len(h), width), np.float32), None)
        return serving.as_json(encode(gradients=gradients, learned=learned))

    @app.post("/provide_gradients")
    def provide_gradients():
        _, h, y, clock, g = serving.message(Gradients, h=width, gradients=width)
        examples.add(model_input(h, y), g, clock)
        return {"accepted": len(h)}

    serving.serve(app, args)
    rng = np.random.default_rng([args.seed, 3])
    oracle = Oracle([width + labels, *args.layers[1:]], args.learning_rate, args.batch_size,
                    seed=int(rng.integers(2**31)))
    print(f"oracle {args.layers} answers on {args.host}:{args.port}", flush=True)
    while not stop:
        if drawn := examples.draw(per_call, rng, seconds=0.2):
            value = oracle.train(*drawn)


if __name__ == "__main__":
    parser = serving.argument_parser(__doc__, 5001, layers=[24, 12, 24], learning_rate=0.005, batch_size=100, keep=2000,
                                     replay=8, seed=0)
    parser.add_argument("--condition-on-labels", type=serving.number(int, 1), nargs="?", const=1, default=0, metavar="K",
                        help="guess from y too, whose width is K (cDNI; %(const)s if K is not given)")
    serving.run(main, parser)
