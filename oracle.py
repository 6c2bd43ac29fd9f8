"""The oracle: a Keras model that learns to guess the gradients dL/dh from the activations h.

    python oracle.py                            # 24 -> 64 -> 64 -> 24, listens on 127.0.0.1:5001
    python oracle.py --layers 24 24             # a linear oracle
    python oracle.py --condition-on-labels      # sees y as well: the paper's cDNI (section 3.1)

train_output.py throws examples (i, h, y, clock, g) at it, with the true gradients g. It keeps the
newest of them, because gradients age as the network learns, and trains over them in a loop,
minimising the mean of (ĝ − g)² (paper, eq. 5). train_input.py asks it for ĝ(h), or ĝ(h, y), and
waits for the answer. The oracle keeps nothing on disk. After a restart, the part below waits until
TensorFlow has started. Then the oracle answers zeros until it has learned from new gradients. The
part below makes at most --staleness updates along zeros, and then waits.
"""
import math
import sys

from plumbing import options, say, serving  # first, see there
import flask
import numpy as np

from exchange import BACKLOG, Replay
from plumbing.errors import Diverged, Refused, UserError
from plumbing.wire import encode
from synthgrad import Gradients, Question

DEFAULTS = dict(
    layers=[24, 64, 64, 24], learning_rate=0.005, batch_size=100,
    keep=2000,  # examples that are stored, the newest ones
    replay=4,   # times that each of them is trained on, on average
    seed=0)
STEPS = 10      # minibatches in one call of the compiled training function


def make_model(dims):
    """[24, 64, 64, 24] -> a Keras model h -> ĝ, whose last layer starts at zero (section 3)."""
    import keras
    keras.config.set_floatx("float32")  # whatever ~/.keras/keras.json says
    hidden = [keras.layers.Dense(width, activation="tanh") for width in dims[1:-1]]
    return keras.Sequential([keras.Input((dims[0],)), *hidden,
                             keras.layers.Dense(dims[-1], kernel_initializer="zeros")])


def loss(model, inputs, targets):
    """The mean of (ĝ − g)² (paper, eq. 5), in units of the mean of g²: of standardised h (batch,
    input_dim), the model's inputs, and scaled g (batch, width), its targets."""
    import tensorflow as tf
    return tf.reduce_mean(tf.square(model(inputs, training=True) - targets))


def compiled_training(model, learning_rate, batch_size, xla=True):
    """STEPS steps of Adam as one call: inputs and targets (STEPS · batch, dim) -> the mean loss and
    the weights after it.

    One call, because it runs without Python's lock, so that the threads that answer questions are
    not starved, and because Keras' own train_on_batch takes longer for one step than this for all
    of them. XLA compiles it, where it can. The first call compiles.
    """
    import keras
    import tensorflow as tf
    optimizer = keras.optimizers.Adam(learning_rate)
    optimizer.build(model.trainable_variables)

    def step(k, total, inputs, targets):
        with tf.GradientTape() as tape:
            value = loss(model, inputs[k], targets[k])
        optimizer.apply(tape.gradient(value, model.trainable_variables))
        return k + 1, total + value, inputs, targets

    @tf.function(jit_compile=xla)
    def train(inputs, targets):
        inputs, targets = (tf.reshape(each, (STEPS, batch_size, each.shape[1]))
                           for each in (inputs, targets))
        _, total, *_ = tf.while_loop(lambda k, *_: k < STEPS, step, (0, 0.0, inputs, targets))
        return total / STEPS, [tf.identity(variable) for variable in model.trainable_variables]

    nothing = [tf.zeros((STEPS * batch_size, dim))
               for dim in (model.input_shape[1], model.output_shape[1])]
    try:
        train(*nothing)  # zero gradients teach nothing; Adam counts its steps from here
    except tf.errors.OpError as error:
        if not xla:
            raise
        say(f"XLA cannot compile here ({str(error).splitlines()[0][:80]}): training without it")
        return compiled_training(model, learning_rate, batch_size, xla=False)
    return train


class Oracle:
    """The model between two changes of scale: it sees h standardised, and learns g divided by the
    present root mean square of g. True gradients shrink as the network learns; so the model need
    not follow that.

    The training loop owns all of it. Servers' threads read `updates`, and `published`, which is
    replaced whole.
    """

    def __init__(self, dims, learning_rate, batch_size, seed):
        import keras
        import tensorflow as tf
        keras.utils.set_random_seed(seed)
        with tf.device("CPU"):  # so small a model is fastest there, and XLA compiles for it
            self.model = make_model(dims)
            self.step = compiled_training(self.model, learning_rate, batch_size)
        self.moments, self.updates = None, 0  # mean and deviation of h, and the scale of g
        self.published = None                 # the clock learned from, the moments, the weights

    def train(self, h, g, clock, ages):
        """STEPS minibatches. Returns the loss as a fraction: 0 is a perfect guess, 1 no better than
        zeros. `ages`: how many examples have arrived since each."""
        import tensorflow as tf
        moments = h.mean(axis=0), h.std(axis=0) + 1e-3, np.sqrt(np.mean(g**2)) + 1e-12
        if self.moments:  # over the last ten calls or so, because those of one call are noisy
            moments = [old + np.float32(0.1) * (new - old)
                       for old, new in zip(self.moments, moments, strict=True)]
        mean, deviation, scale = self.moments = moments
        with tf.device("CPU"):
            value, weights = self.step((h - mean) / deviation, g / scale)
        if not value < 1e6:  # NaN, too
            raise Diverged("the oracle diverged; try a lower --learning-rate")
        self.updates += STEPS
        # Only recent arrivals count, because a trainer that was resumed has an older clock. BACKLOG
        # of them, because the part above takes its last arrival first and older ones later.
        newest = ages <= max(ages.min(), BACKLOG)
        self.published = int(clock[newest].max()), self.moments, [each.numpy() for each in weights]
        return float(value)

    def guess(self, h):
        """ĝ (batch, width) at h (batch, input_dim), and the newest clock that it was learned from:
        zeros and None before anything was learned.

        The Keras model's own arithmetic on a copy of its weights, in NumPy: 0.05 ms, where a
        compiled TensorFlow call takes 0.4 ms, and 2.4 ms behind a training step (100 × 24).
        """
        if not self.published:
            return np.zeros((len(h), self.model.output_shape[1]), np.float32), None
        learned, (mean, deviation, scale), weights = self.published
        h = (h - mean) / deviation
        *hidden, (w, b) = zip(weights[::2], weights[1::2], strict=True)
        for hidden_w, hidden_b in hidden:
            h = np.tanh(h @ hidden_w + hidden_b)
        return scale * (h @ w + b), learned


def model_input(h, y, labels):
    """What the model sees: h, or h and y side by side if `labels`, the width of y, is not 0."""
    if not labels:
        return h
    if y.shape[1] != labels:
        raise Refused(f"this oracle was started with --condition-on-labels {labels}, but y has a "
                      f"width of {y.shape[1]}", 400)
    return np.column_stack([h, y])


def main(args, stop):
    if args.layers[0] != args.layers[-1]:
        raise UserError(f"--layers {args.layers}: the first and the last must be equal, the width "
                        "of h and of dL/dh")
    per_call = STEPS * args.batch_size  # examples
    if per_call > args.keep * args.replay:
        raise UserError(f"--keep times --replay must be at least {STEPS} times --batch-size, the "
                        "examples that it trains on at a time")
    listener = serving.listen(args)
    width, labels = args.layers[0], args.condition_on_labels
    examples = Replay(args.keep, args.replay)
    oracle, state = None, {"loss": None, "answered": 0}

    def status():
        published = oracle and oracle.published
        return {"layers": args.layers, "condition_on_labels": labels, "ready": oracle is not None,
                "updates": oracle.updates if oracle else 0, "learned": published and published[0],
                "needs": math.ceil(per_call / args.replay), "examples": examples.counters(),
                **state}

    app = serving.make_app("oracle", status, args)

    @app.post("/estimate_gradients")
    def estimate_gradients():
        h, y = serving.message(Question, h=width)
        inputs = model_input(h, y, labels)
        if oracle is None:
            raise Refused("TensorFlow is still starting", 503)
        state["answered"] += 1
        gradients, learned = oracle.guess(inputs)
        return serving.as_json(encode(flask.g.values, gradients=gradients, learned=learned))

    @app.post("/provide_gradients")
    def provide_gradients():
        i, h, y, clock, g = serving.message(Gradients, h=width, gradients=width)
        inputs, new = model_input(h, y, labels), examples.is_new(i, h, clock)
        if new.any():
            examples.add(inputs[new], g[new], clock[new])
        return {"accepted": len(h)}

    serving.serve(app, listener, args)
    sys.modules["matplotlib"] = None  # so that Keras does not import it, which takes a second
    rng = np.random.default_rng([args.seed, 3])
    oracle = Oracle([width + labels, *args.layers[1:]], args.learning_rate, args.batch_size,
                    seed=int(rng.integers(2**31)))
    sees = f"h and y, {labels} wide" if labels else "h"
    say(f"oracle {args.layers}, which sees {sees}, answers on {args.host}:{args.port}")
    reporter = serving.Reporter()
    while not stop:
        if drawn := examples.draw(per_call, rng, seconds=0.2):
            state["loss"] = oracle.train(*drawn)
        reporter.now_and_then(oracle.updates, lambda: (
            f"{examples.counters()['received']:,} gradients received, {oracle.updates:,} updates, "
            f"loss {state['loss']:.3f} of zero's, {state['answered']:,} questions answered"))


if __name__ == "__main__":
    parser = options.make_parser(__doc__, 5001, **DEFAULTS)
    parser.add_argument("--condition-on-labels", type=options.number(int, 1), nargs="?", const=1,
                        default=0, metavar="K",
                        help="guess from y too, which is K wide (cDNI; K is %(const)s by default)")
    serving.run(main, parser)
