"""Plain SGD with hand-written backprop: the baseline, and the file to read first.

    python generate.py                     # makes x.npy and y.npy
    python sgd.py x.npy y.npy              # 100 epochs, 25 minutes; writes sgd_progress/

The symbols are the same here, in the README and in the protocol:

    x, h    a layer's input, and its activations h = activation(z), where z = x w + b
    y, ŷ    the target, and the network's output: the last layer's h
    L       the loss of one example: ½ (ŷ − y)² for numbers, the cross-entropy −Σ y ln ŷ for classes
    g       the gradient dL/dh, one row per example: what backprop hands from layer to layer

Everything works on a minibatch: x, y, h and g have the shape (batch, dim). The code is written to
be read, not to be fast. One example at a time (--batch-size 1) is SGD as textbooks describe it.
"""
import time
from itertools import pairwise

from plumbing import data, options, report, runs  # first, see there
import numpy as np

from plumbing.bar import progress_bar
from plumbing.errors import Diverged

# ---- activations: to add a hidden one, write a class like Sigmoid and name it in HIDDEN ----


class Sigmoid:
    """σ(z) = 1 / (1 + e^−z), in the form that cannot overflow.

    gain: by how much weights must be larger than a linear layer's to pass a signal on undiminished,
    1 / σ'(0). A ReLU's is √2, since half of its inputs pass (He et al. 2015, eq. 10). mean: of h at
    the start, when z is near zero; about 0.4 for a ReLU."""
    gain = 4
    mean = 0.5

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
    """h = e^z / Σ e^z, never exactly zero: the last layer's activation where y is a class."""
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


# ---- tasks: to add a loss, write a class like these and name it in NUMBER or CLASS ----


class MeanSquare:
    """y is a number, (batch, 1): L = ½ (ŷ − y)², reported as the MSE, without the ½."""
    activation = Linear                           # of the last layer
    score, label = "test_mse", "held-out MSE"     # its column in metrics.csv: test_…; and words
    y_is, constant = "numbers", "the mean"

    @staticmethod
    def loss(y_hat, y):
        """L of each example, (batch,)."""
        return 0.5 * (y_hat - y)[:, 0] ** 2

    @staticmethod
    def loss_gradient(y_hat, y):
        """g = dL/dŷ, (batch, k), with which backprop begins."""
        return y_hat - y

    @staticmethod
    def test(y_hat, y):
        """What is reported, of held-out examples: a number, the lower the better."""
        return float(np.mean((y_hat - y) ** 2))


class CrossEntropy:
    """y is a class, one-hot, (batch, k): L = −Σ y ln ŷ, reported as the share of wrong classes."""
    activation = Softmax
    score, label = "test_error", "held-out error"
    y_is, constant = "class labels", "the commonest class"

    @staticmethod
    def loss(y_hat, y):
        return -(y * np.log(y_hat)).sum(axis=1)

    @staticmethod
    def loss_gradient(y_hat, y):
        return -y / y_hat

    @staticmethod
    def test(y_hat, y):
        return float(np.mean(y_hat.argmax(axis=1) != y.argmax(axis=1)))


NUMBER, CLASS = MeanSquare, CrossEntropy


def task_of(k):
    """The task where y is (batch, k)."""
    return NUMBER if k == 1 else CLASS


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
    Biases start so that an input at its mean gives z = 0, the middle of a sigmoid; else deep stacks
    pass on no signal. `input_mean`: of what the first layer is given.
    """
    layers = []
    for n, (input_dim, output_dim) in enumerate(pairwise(dims), 2):
        activation = HIDDEN if n < len(dims) else last or task_of(output_dim).activation
        scale = activation.gain * np.sqrt(2 / (input_dim + output_dim))
        w = (scale * rng.standard_normal((input_dim, output_dim))).astype(np.float32)
        layers.append(Layer(w, -np.float32(input_mean) * w.sum(axis=0), activation))
        input_mean = HIDDEN.mean
    return layers


def layers_from_weights(weights):
    """[(w, b), ...] of a whole network -> its layers."""
    *hidden, (w, b) = weights
    return [*(Layer(*each, HIDDEN) for each in hidden), Layer(w, b, task_of(len(b)).activation)]


def test_score(layers, x, y):
    """The score of a whole network on held-out x and y."""
    return task_of(y.shape[1]).test(feed_forward(layers, x), y)


def minibatches(num_examples, batch_size, num_epochs, seed, skip=0):
    """The indices of each minibatch, every epoch in a new order, without the first `skip`.

    Random numbers come from streams [seed, n, ...]: 1 for the lowest part (here and in
    in_process.py for all layers), 2 for the highest part and its replay, 3 for the oracle, 4 and
    the epoch for this, 5 for shuffled gradients and heads, 6 and its widths for a middle part (two
    of the same widths start alike). In in_process.py 2, 3 and 5 have the width of the cut, too.
    """
    first, start = divmod(skip, num_examples)
    for epoch in range(first, num_epochs):
        # epochs count from 1, since [seed, 4, 0] is the same stream as [seed, 4]
        order = np.random.default_rng([seed, 4, epoch + 1]).permutation(num_examples)
        for k in range(start, num_examples, batch_size):
            yield order[k:k + batch_size]
        start = 0


def schedule(learning_rate, decay, warm_up=0):
    """The learning rate after so many updates: it rises during `warm_up` updates, while an oracle
    knows little, and falls as 1 / (1 + updates / decay)."""
    return lambda updates: (learning_rate * min(1, (updates + 1) / (warm_up + 1))
                            / (1 + updates / decay))


def train(layers, x, y, order, learning_rate, momentum):
    """Plain SGD. `order` yields minibatches of indices. Yields after each update."""
    task = task_of(y.shape[1])
    for clock, i in enumerate(order):
        y_hat = feed_forward(layers, x[i])
        g = task.loss_gradient(y_hat, y[i])
        backprop(layers, g)
        descend(layers, learning_rate(clock), momentum)
        yield len(i)


def main():
    parser = options.make_parser(
        __doc__, layers=[2, 24, 12, 1], num_epochs=100, learning_rate=0.002, batch_size=1,
        momentum=0.0, decay=50_000_000, seed=0, progress_dir="sgd_progress")
    data.add_options(parser)
    args = options.parse(parser)
    with options.one_line_errors(parser):
        loaded = data.load(args.x, args.y, args.held_out)
        data.check_columns(loaded, args.layers)
        data.check_targets(loaded, args.layers[-1], "--layers", task_of)
        columns = ["seconds", "examples", "epoch", task_of(loaded.y.shape[1]).score]
        progress = runs.Progress(args.progress_dir, columns, vars(args) | {
            "constant_guess": data.constant_guess(loaded, task_of), "machine": report.machine()})
        print(data.describe(loaded, task_of))
        run(args, loaded, progress)


def run(args, loaded, progress):
    """Train with a progress bar, and write a row and a snapshot after each epoch."""
    x, y, x_test, y_test = loaded
    layers = make_layers(args.layers, np.random.default_rng([args.seed, 1]))
    score, examples, epoch = task_of(y.shape[1]).score, 0, 0
    order = minibatches(len(x), args.batch_size, args.num_epochs, args.seed)
    learning_rate, start = schedule(args.learning_rate, args.decay), time.perf_counter()
    with (progress.ending(), np.errstate(all="ignore"),
          progress_bar(total=args.num_epochs, unit="epoch") as bar):
        for count in train(layers, x, y, order, learning_rate, args.momentum):
            examples += count
            if examples == (epoch + 1) * len(x):
                epoch += 1
                reached = test_score(layers, x_test, y_test)
                if not np.isfinite(sum(layer.w.sum() for layer in layers)):
                    raise Diverged(f"diverged in epoch {epoch}; try a lower --learning-rate")
                progress.write([(layer.w, layer.b) for layer in layers], examples=examples,
                               epoch=epoch, seconds=time.perf_counter() - start, **{score: reached})
                bar.update()
                bar.set_postfix_str(f"held-out {score[5:].upper()} {reached:.4f}")
    print(f"{args.num_epochs} epochs in {time.perf_counter() - start:.0f} s: {progress.metrics}")
    for line in progress.verdict():
        print(line)


if __name__ == "__main__":
    main()
