"""The oracle: a Keras model that learns to guess the gradients dL/dh from the activations h.

    python oracle.py                            # 24 -> 64 -> 64 -> 24, listens on 127.0.0.1:5001
    python oracle.py --layers 24 24             # a linear oracle
    python oracle.py --condition-on-labels      # sees y as well: the paper's cDNI (section 3.1)

train_output.py throws examples (i, h, y, clock, g) at it, with the true gradients g. It keeps the
newest of them, because gradients age as the network learns, and trains over them in a loop,
minimising the mean of (ĝ − g)² (paper, eq. 5). train_input.py asks it for ĝ(h), or ĝ(h, y), and
waits for the answer. Nothing is kept on disk. After a restart the part below waits for TensorFlow,
makes at most --staleness updates along zeros, and waits until the oracle has learned again.
"""
import math
import sys

from plumbing import options, say, trace  # first, see there
import numpy as np

from replay import Replay, later
from plumbing import process
from plumbing.errors import Diverged, Refused, UserError
from sgd import Sigmoid

DEFAULTS = dict(
    layers=[24, 64, 64, 24], learning_rate=0.005, batch_size=100,
    keep=2000,  # examples that are stored, the newest ones
    replay=4,   # times that each of them is trained on, on average
    seed=0)
STEPS = 10      # minibatches in one call of the compiled training function
ACTIVATIONS = {  # of the model's layers, in NumPy, by Keras' names
    "linear": lambda z: z, "tanh": np.tanh, "sigmoid": Sigmoid.activate,
    "relu": lambda z: np.maximum(z, 0), "softplus": lambda z: np.logaddexp(0, z),
    "elu": lambda z: np.where(z > 0, z, np.expm1(np.minimum(z, 0))),
    "silu": lambda z: z * Sigmoid.activate(z)}


def make_model(dims):
    """[24, 64, 64, 24] -> a Keras model h -> ĝ, whose last layer starts at zero (section 3)."""
    import keras
    keras.config.set_floatx("float32")  # whatever ~/.keras/keras.json says
    hidden = [keras.layers.Dense(width, activation="tanh") for width in dims[1:-1]]
    return keras.Sequential([keras.Input((dims[0],)), *hidden,
                             keras.layers.Dense(dims[-1], kernel_initializer="zeros")])


def forward(activations, weights, h):
    """What the model computes, in NumPy: 0.05 ms; a TensorFlow call takes 0.4, or 2.4 if busy."""
    for activate, (w, *b) in zip(activations, weights, strict=True):
        h = activate(h @ w + b[0] if b else h @ w)
    return h


def activations_of(model):
    """The functions that forward() needs. UserError if it cannot follow this model."""
    import keras
    names = [layer.activation.__name__ if isinstance(layer, keras.layers.Dense)
             else type(layer).__name__ for layer in model.layers]
    known = [ACTIVATIONS.get(name) for name in names]
    z = np.linspace(-3, 3, 21, dtype=np.float32)
    if None in known or not all(np.allclose(mine(z), layer.activation(z), atol=1e-5)
                                for mine, layer in zip(known, model.layers, strict=True)):
        raise UserError(f"the oracle's model has the layers {', '.join(names)}; forward() follows "
                        f"Dense layers with {', '.join(ACTIVATIONS)}: name the new one there")
    return known


def loss(model, inputs, targets):
    """The mean of (ĝ − g)² (paper, eq. 5), in units of the mean of g²: of standardised h (batch,
    input_dim), the model's inputs, and scaled g (batch, width), its targets."""
    import tensorflow as tf
    return tf.reduce_mean(tf.square(model(inputs, training=True) - targets))


def compiled_training(model, learning_rate, batch_size, xla=True):
    """STEPS steps of Adam as one call: inputs and targets (STEPS · batch, dim) -> the mean loss and
    the weights after it.

    One call runs without Python's lock, so that the threads that answer are not starved. Keras' own
    train_on_batch takes longer for one step than this for all of them. The first call compiles.
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


class Model:
    """The Keras model between two changes of scale: it sees h standardised, and learns g divided by
    its present root mean square, because true gradients shrink as the network learns."""

    def __init__(self, dims, learning_rate, batch_size, seed):
        import keras
        import tensorflow as tf
        keras.utils.set_random_seed(seed)
        with tf.device("CPU"):  # so small a model is fastest there, and XLA compiles for it
            self.model = make_model(dims)
            self.activations = activations_of(self.model)
            self.step = compiled_training(self.model, learning_rate, batch_size)
        self.moments = None  # mean and deviation of h, and the scale of g

    def train(self, h, g):
        """STEPS minibatches. Returns the loss as a fraction: 0 is a perfect guess, 1 no better than
        zeros; and the model as it is now, h -> ĝ, which does not change any more."""
        import tensorflow as tf
        moments = h.mean(axis=0), h.std(axis=0) + 1e-3, np.sqrt(np.mean(g**2)) + 1e-12
        if self.moments:  # over the last ten calls or so, because those of one call are noisy
            moments = [old + np.float32(0.1) * (new - old)
                       for old, new in zip(self.moments, moments, strict=True)]
        mean, deviation, scale = self.moments = moments
        with tf.device("CPU"):
            value, weights = self.step((h - mean) / deviation, g / scale)
        if not (value := float(value)) < 1e6:  # NaN, too
            raise Diverged("the oracle diverged; try a lower --learning-rate")
        arrays = iter([each.numpy() for each in weights])
        weights = [[next(arrays) for _ in layer.weights] for layer in self.model.layers]

        def guess(h):
            return scale * forward(self.activations, weights, (h - mean) / deviation)
        return value, guess


class Oracle:
    """What has been learned from (activation, gradient) examples, and the examples.

    The training loop calls start() and train(), and owns the model. Servers' threads call add(),
    and guess(), which reads `published`; that is replaced whole. labels: y's width, or 0: not seen.
    """

    def __init__(self, dims, labels, keep, replay, learning_rate, batch_size, seed, stream=()):
        self.labels, self.width, self.per_call = labels, dims[-1], STEPS * batch_size
        if dims[0] != dims[-1]:
            raise UserError(f"--layers {dims}: the first and the last must be equal, the width of "
                            "h and of dL/dh")
        if self.per_call > keep * replay:
            raise UserError(f"the oracle's --keep times its --replay must be at least {STEPS} times"
                            " --batch-size, the examples that it trains on at a time")
        self.needs = math.ceil(self.per_call / replay)  # new examples until it trains again
        self.examples, self.rng = Replay(keep, replay), np.random.default_rng([seed, 3, *stream])
        self.options = [dims[0] + labels, *dims[1:]], learning_rate, batch_size
        self.model, self.updates, self.loss, self.newest = None, 0, None, None
        self.published = None, lambda h: np.zeros((len(h), self.width), np.float32)

    def start(self):
        """Build and compile the model, which takes seconds."""
        self.model = Model(*self.options, seed=int(self.rng.integers(2**31)))
        return self

    def inputs(self, h, y):
        """What the model sees: h, or h and y side by side."""
        if not self.labels:
            return h
        if y.shape[1] != self.labels:
            raise Refused(f"this oracle was started with --condition-on-labels {self.labels}, but y"
                          f" has a width of {y.shape[1]}", 400)
        return np.column_stack([h, y])

    def add(self, its_start, its_clock, waiting, i, h, y, clock, start, g):
        """True gradients g at h, (batch, width). They count again while none as new was learned."""
        inputs, this = self.inputs(h, y), (its_start, its_clock)
        trace.flow_in("gradients", its_clock)
        if self.examples.is_new(*this) or later(self.newest, this) != self.newest:
            self.examples.add(inputs, g, clock, start)

    def train(self, seconds=0):
        """STEPS minibatches, if so many are allowed within so many seconds; whether it was so. What
        came last is among them. `newest` is the newest of the part below's last start."""
        drawn = self.examples.draw(self.per_call, self.rng, seconds, newest_first=True)
        if not drawn:
            return False
        inputs, g, clock, start = drawn
        with trace.span("train", clock=int(clock[0])):
            self.loss, guess = self.model.train(inputs, g)
        self.updates += STEPS
        present = self.examples.newest_start()
        if (start == present).any():
            self.newest = later(self.newest, (present, int(clock[start == present].max())))
        self.published = self.newest, guess
        return True

    def guess(self, h, y):
        """ĝ (batch, width) at h (batch, width) and y, and the newest minibatch that it was learned
        from, (start, clock): zeros and None before anything was learned."""
        newest, guess = self.published
        return guess(self.inputs(h, y)), newest


def main(args, stop):
    from over_http import serve_gradients
    from plumbing import serving
    from plumbing.wire import encode
    from synthgrad import Question
    labels = args.condition_on_labels
    oracle = Oracle(args.layers, labels, args.keep, args.replay, args.learning_rate,
                    args.batch_size, args.seed)
    listener = serving.listen(args)

    def status():
        return {"layers": args.layers, "condition_on_labels": labels,
                "ready": oracle.model is not None, "updates": oracle.updates, "loss": oracle.loss,
                "learned": oracle.newest and oracle.newest[1], "needs": oracle.needs,
                "examples": oracle.examples.counters()}

    app = serving.make_app("oracle", status, args)
    serve_gradients(app, oracle.width, lambda: None, oracle.add)

    @app.post("/estimate_gradients")
    def estimate_gradients():
        h, y = serving.message(Question, h=oracle.width)
        if oracle.model is None:
            raise Refused("TensorFlow is still starting", 503)
        with trace.span("answer"):
            trace.flow_in("question", h)
            gradients, newest = oracle.guess(h, y)
            trace.flow_out("guess", h)
        return serving.as_json(encode(serving.wants_values(), gradients=gradients,
                                       newest=newest))

    serving.serve(app, listener, args)
    sys.modules["matplotlib"] = None  # so that Keras does not import it, which takes a second
    oracle.start()
    sees = f"h and y, {labels} wide" if labels else "h"
    where = options.address(args.host, args.port)
    say(f"oracle {args.layers}, which sees {sees}, answers on {where}")
    reporter = process.Reporter(lambda: (
        f"{oracle.examples.counters()['received']:,} gradients received, {oracle.updates:,} "
        f"updates, loss {oracle.loss:.3f} of zero's"))
    while not stop:
        oracle.train(seconds=0.2)
        reporter.now_and_then(oracle.updates)


if __name__ == "__main__":
    parser = options.make_parser(__doc__, 5001, **DEFAULTS)
    parser.add_argument("--condition-on-labels", type=options.number(int, 1), nargs="?", const=1,
                        default=0, metavar="K",
                        help="guess from y too, which is K wide (cDNI; K is %(const)s by default)")
    process.run(main, parser)
