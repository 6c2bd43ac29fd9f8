"""Plain SGD with hand-written backprop: the baseline, and the file to read first.

    python generate.py                     # makes x.npy and y.npy
    python sgd.py x.npy y.npy              # 100 epochs, 25 minutes; writes sgd_progress/

The symbols are the same here, in the README and in the protocol:

    x, h    a layer's input, and its activations h = activation(z), where z = x w + b
    y, ŷ    the target, and the network's output: the last layer's h
    L       the loss of one example: ½ (ŷ − y)² for numbers, the cross-entropy −Σ y ln ŷ for classes
    g       the gradient dL/dh, one row per example: what backprop hands from layer to layer

Everything works on a minibatch: x, y, h and g have the shape (batch, dim). The code is written to
be read, not to be fast. One example at a time (--batch-size 1) is SGD as textbooks describe it. The
trainers of the decoupled run use the same layers, and their loops call the same functions.
"""
import time
from itertools import pairwise

from plumbing import data, options, runs  # first, see there
import numpy as np
from tqdm import tqdm

from plumbing.errors import Diverged

# ---- activations: to add a hidden one, write a class like Sigmoid and name it in HIDDEN ----


class Sigmoid:
    """σ(z) = 1 / (1 + e^−z), in the form that cannot overflow."""
    gain = 4    # σ'(0) = 1/4, so weights must be 4 times as large to pass a signal on undiminished
    mean = 0.5  # of h at the start, when z is near zero

    @staticmethod
    def activate(z):
        return 0.5 * np.tanh(0.5 * z) + 0.5

    @staticmethod
    def backprop(h, g):
        """dL/dh -> dL/dz = dL/dh σ', where σ' = σ (1 − σ) = h (1 − h)."""
        return g * (h * (1 - h))


class Linear:
    """h = z: the last layer's activation where y is a number."""
    gain = 1

    @staticmethod
    def activate(z):
        return z

    @staticmethod
    def backprop(h, g):
        return g


class Softmax:
    """h = e^z / Σ e^z: the last layer's activation where y is a class; h is never exactly zero."""
    gain = 1

    @staticmethod
    def activate(z):
        e = np.exp(z - z.max(axis=1, keepdims=True))
        return np.maximum(e / e.sum(axis=1, keepdims=True), np.finfo(np.float32).tiny)

    @staticmethod
    def backprop(h, g):
        """dL/dh -> dL/dz = h (dL/dh − Σ h dL/dh). With the cross-entropy's g this is ŷ − y."""
        return h * (g - (h * g).sum(axis=1, keepdims=True))


HIDDEN = Sigmoid  # the activation of every hidden layer


def output_activation(k):
    """The last layer's activation where y is (batch, k)."""
    return Linear if k == 1 else Softmax


# ---- losses: another one is a further case in these functions and in plumbing/data.py; a score
# with a name of its own, which begins with test_, also in plot.CURVES ----


def loss(y_hat, y):
    """L of each example, (batch,): ½ (ŷ − y)² where y is (batch, 1), else the cross-entropy of
    one-hot y (batch, k)."""
    if y.shape[1] == 1:
        return 0.5 * (y_hat - y)[:, 0] ** 2
    return -(y * np.log(y_hat)).sum(axis=1)


def loss_gradient(y_hat, y):
    """g = dL/dŷ, (batch, k), with which backprop begins: ŷ − y, or −y / ŷ for classes."""
    return y_hat - y if y.shape[1] == 1 else -y / y_hat


def test_score(layers, x, y):
    """What is reported, on held-out x and y: the MSE, mean (ŷ − y)² without the ½, or the share of
    examples whose class is wrong."""
    y_hat = feed_forward(layers, x)
    if y.shape[1] == 1:
        return float(np.mean((y_hat - y) ** 2))
    return float(np.mean(y_hat.argmax(axis=1) != y.argmax(axis=1)))


# ---- layers ----


class Layer:
    """A fully connected layer: w (input_dim, output_dim) and b (output_dim,), both float32."""

    def __init__(self, w, b, activation):
        self.w, self.b, self.activation = w, b, activation
        self.w_velocity, self.b_velocity = np.zeros_like(w), np.zeros_like(b)

    def feed_forward(self, x):
        """x (batch, input_dim) -> h (batch, output_dim); remembers both for backprop."""
        self.x = x
        self.h = self.activation.activate(x.dot(self.w) + self.b)
        return self.h

    def backprop(self, g):
        """g = dL/dh (batch, output_dim) -> dL/dx (batch, input_dim), per example.

        Remembers the gradients of this layer's own w and b: the mean over the batch, which is taken
        here and only here.
        """
        dL_dz = self.activation.backprop(self.h, g)
        mean = dL_dz / len(g) if len(g) > 1 else dL_dz  # saves plain SGD 6% of its time
        self.dL_dw = self.x.T.dot(mean)
        self.dL_db = np.add.reduce(mean)
        return dL_dz.dot(self.w.T)

    def descend(self, learning_rate, momentum):
        """Step downhill. With momentum, along the decaying sum of past gradients (heavy ball)."""
        w_step, b_step = self.dL_dw, self.dL_db
        if momentum:
            w_step = self.w_velocity = momentum * self.w_velocity + w_step
            b_step = self.b_velocity = momentum * self.b_velocity + b_step
        self.w -= learning_rate * w_step
        self.b -= learning_rate * b_step


def feed_forward(layers, h):
    """x (batch, input_dim) of the first layer -> h (batch, output_dim) of the last."""
    for layer in layers:
        h = layer.feed_forward(h)
    return h


def backprop(layers, g):
    """g = dL/dh of the last layer -> dL/dx of the first, per example, through every layer."""
    for layer in reversed(layers):
        g = layer.backprop(g)
    return g


def descend(layers, learning_rate, momentum):
    """One update: every layer steps against the gradients that it remembers."""
    for layer in layers:
        layer.descend(learning_rate, momentum)


def make_layers(dims, rng, last=None, input_mean=0.0):
    """[2, 24, 12, 1] -> three layers. The last one's activation is `last`, or what fits y's width.

    Weights start at N(0, gain² · 2 / (input_dim + output_dim)) (Glorot & Bengio 2010, eq. 12, 16).
    Biases start so that an input at its mean gives z = 0, the middle of a sigmoid. Without that,
    deep stacks pass on no signal. `input_mean` is the mean of what the first layer is given.
    """
    layers = []
    for n, (input_dim, output_dim) in enumerate(pairwise(dims), 2):
        activation = HIDDEN if n < len(dims) else last or output_activation(output_dim)
        scale = activation.gain * np.sqrt(2 / (input_dim + output_dim))
        w = (scale * rng.standard_normal((input_dim, output_dim))).astype(np.float32)
        layers.append(Layer(w, -np.float32(input_mean) * w.sum(axis=0), activation))
        input_mean = HIDDEN.mean
    return layers


def layers_from_weights(weights):
    """[(w, b), ...] of a whole network -> its layers."""
    *hidden, (w, b) = weights
    return [*(Layer(*each, HIDDEN) for each in hidden), Layer(w, b, output_activation(len(b)))]


# ---- training ----


def minibatches(num_examples, batch_size, num_epochs, seed, skip=0):
    """The indices of each minibatch, every epoch in a new order, without the first `skip`.

    Random numbers come from streams [seed, n]: 1 for the lowest part (here for all layers), 2 for
    the highest, 3 for the oracle, 4 with the epoch for this, 5 for layer 1's shuffled gradients, 6
    with its widths for a middle part, so that two of the same widths start alike.
    """
    first, start = divmod(skip, num_examples)
    for epoch in range(first, num_epochs):
        # epochs count from 1, since [seed, 4, 0] is the same stream as [seed, 4]
        order = np.random.default_rng([seed, 4, epoch + 1]).permutation(num_examples)
        for k in range(start, num_examples, batch_size):
            yield order[k:k + batch_size]
        start = 0


def schedule(learning_rate, decay, warm_up=0):
    """The learning rate of the decoupled trainers, after so many updates: it rises during `warm_up`
    updates, while the other processes know little, and falls as 1 / (1 + updates / decay)."""
    return lambda updates: (learning_rate * min(1, (updates + 1) / (warm_up + 1))
                            / (1 + updates / decay))


def train(layers, x, y, order, learning_rate, momentum):
    """Plain SGD. `order` yields minibatches of indices. Yields after each update."""
    for clock, i in enumerate(order):
        y_hat = feed_forward(layers, x[i])
        g = loss_gradient(y_hat, y[i])
        backprop(layers, g)
        descend(layers, learning_rate(clock), momentum)
        yield len(i)


def main():
    parser = options.make_parser(
        __doc__, layers=[2, 24, 12, 1], num_epochs=100, learning_rate=0.002, batch_size=1,
        momentum=0.0, seed=0, progress_dir="sgd_progress")
    data.add_options(parser)
    parser.add_argument("--decay", type=options.number(float, 0, 1), default=0.997,
                        help="factor on the learning rate after each epoch (%(default)s)")
    args = options.parse(parser)
    with options.one_line_errors(parser):
        loaded = data.load(args.x, args.y, args.held_out)
        data.check_columns(loaded, args.layers)
        data.check_targets(loaded, args.layers[-1], "--layers")
        columns = ["seconds", "examples", "epoch", loaded.score]
        progress = runs.Progress(args.progress_dir, columns, vars(args) | {
            "constant_guess": loaded.constant_guess})
        print(data.describe(loaded))
        run(args, loaded, progress)


def run(args, loaded, progress):
    """Train with a progress bar, and write a row and a snapshot after each epoch."""
    x, y, x_test, y_test = loaded
    layers = make_layers(args.layers, np.random.default_rng([args.seed, 1]))
    per_epoch, examples, epoch = -(-len(x) // args.batch_size), 0, 0
    order = minibatches(len(x), args.batch_size, args.num_epochs, args.seed)
    start = time.perf_counter()

    def learning_rate(clock):
        return args.learning_rate * args.decay ** (clock // per_epoch)

    with (progress.ending(), np.errstate(all="ignore"),
          tqdm(total=args.num_epochs, unit="epoch") as bar):
        for count in train(layers, x, y, order, learning_rate, args.momentum):
            examples += count
            if examples == (epoch + 1) * len(x):
                epoch += 1
                reached = test_score(layers, x_test, y_test)
                if not np.isfinite(sum(layer.w.sum() for layer in layers)):
                    raise Diverged(
                        f"diverged in epoch {epoch}; try a lower --learning-rate")
                weights = [(layer.w, layer.b) for layer in layers]
                progress.write(weights, epoch=epoch, examples=examples, **{loaded.score: reached},
                               seconds=time.perf_counter() - start)
                bar.update()
                bar.set_postfix_str(f"held-out {loaded.score[5:].upper()} {reached:.4f}")
    print(f"{args.num_epochs} epochs in {time.perf_counter() - start:.0f} s: {progress.metrics}")
    for line in progress.verdict():
        print(line)


if __name__ == "__main__":
    main()
