"""Plain stochastic gradient descent with hand-written backprop: the baseline, and the file to read first.

    python generate.py                     # makes x.npy and y.npy
    python sgd.py x.npy y.npy              # 100 epochs, about ten minutes; writes sgd_progress/

The symbols are the same here, in the README and on the wire:

    x, h    a layer's input, and its activations h = activation(z), where z = x w + b
    y, ŷ    the target, and the network's output: the last layer's h
    L       the loss of one example: ½ (ŷ − y)² for numbers, the cross-entropy −Σ y ln ŷ for classes
    g       the gradient dL/dh, one row per example: what backprop hands from layer to layer

Everything works on a minibatch: x, y, h and g have the shape (batch, dim). It is written to be read, not to be fast:
one example at a time (--batch-size 1) is stochastic gradient descent as the textbooks have it. The layers are the ones
that train_input.py and train_output.py use, each on its own side of the cut; their loops stand in the same words.
"""
import argparse
import time
from itertools import pairwise

import numpy as np


class Sigmoid:
    """σ(z) = 1 / (1 + e^−z), in the form that cannot overflow."""
    gain = 4  # σ'(0) = 1/4, so weights must be 4 times as large to pass a signal on undiminished

    @staticmethod
    def activate(z):
        return 0.5 * np.tanh(0.5 * z) + 0.5

    @staticmethod
    def backprop(h, g):
        """dL/dh -> dL/dz = dL/dh σ', and σ' = σ (1 − σ) in terms of h, which is at hand."""
        return g * (h * (1 - h))


class Linear:
    """The last layer's activation where y is a number."""
    gain = 1

    @staticmethod
    def activate(z):
        return z

    @staticmethod
    def backprop(h, g):
        """Of the last layer loss_gradient() gives dL/dz."""
        return g


class Softmax(Linear):
    """The last layer's activation where y is a class: probabilities, e^z over their sum."""

    @staticmethod
    def activate(z):
        e = np.exp(z - z.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)


def loss(y_hat, y):
    """L of each example, (batch,): ½ (ŷ − y)² where y is (batch, 1), else the cross-entropy of one-hot y (batch, k)."""
    if y.shape[1] == 1:
        return 0.5 * (y_hat - y)[:, 0] ** 2
    return -(y * np.log(np.maximum(y_hat, 1e-30))).sum(axis=1)


def loss_gradient(y_hat, y):
    """dL/dz of the last layer, with which backprop begins: ŷ − y, for both losses.

    For numbers because ŷ = z. For classes because softmax and cross-entropy go together: dL/dŷ alone is −y/ŷ.
    """
    return y_hat - y


def test_score(layers, x, y):
    """What is reported, on held-out x and y: the MSE, mean (ŷ − y)² without the ½; or the share of wrong classes."""
    y_hat = feed_forward(layers, x)
    if y.shape[1] == 1:
        return float(np.mean((y_hat - y) ** 2))
    return float(np.mean(y_hat.argmax(axis=1) != y.argmax(axis=1)))


class Layer:
    """A fully connected layer: w is (input_dim, output_dim) and b is (output_dim,), both float32."""

    def __init__(self, w, b, activation):
        self.w, self.b, self.activation = w, b, activation
        self.w_velocity, self.b_velocity = np.zeros_like(w), np.zeros_like(b)

    def feed_forward(self, x):
        """x (batch, input_dim) -> h (batch, output_dim); remembers both for backprop."""
        self.x = x
        self.h = self.activation.activate(x.dot(self.w) + self.b)
        return self.h

    def backprop(self, g):
        """g = dL/dh (batch, output_dim), of a network's last layer dL/dz -> dL/dx (batch, input_dim), per example.

        Remembers the gradients of this layer's own w and b: their mean over the batch, which is taken here and only here.
        """
        dL_dz = self.activation.backprop(self.h, g)
        share = dL_dz / len(g) if len(g) > 1 else dL_dz  # of the mean; plain SGD is spared 6% of its time
        self.dL_dw = self.x.T.dot(share)
        self.dL_db = np.add.reduce(share)
        return dL_dz.dot(self.w.T)

    def descend(self, learning_rate, momentum):
        """Step downhill. With momentum, along the decaying sum of past gradients (Polyak's heavy ball)."""
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
    """dL/dh of the last layer (what loss_gradient() gives, if it is the network's last) -> dL/dx of the first, per example;
    every layer remembers its own gradients."""
    for layer in reversed(layers):
        g = layer.backprop(g)
    return g


def descend(layers, learning_rate, momentum=0.0):
    """One update: every layer steps along the gradients that it remembers."""
    for layer in layers:
        layer.descend(learning_rate, momentum)


def output_activation(k):
    """The last layer's activation where y is (batch, k)."""
    return Linear if k == 1 else Softmax


def make_layers(dims, rng, last=None, input_mean=0.0):
    """[2, 24, 12, 1] -> three layers: sigmoid, but for the last one (None: what fits the width of y).

    Weights start at N(0, gain² · 2 / (input_dim + output_dim)) (Glorot & Bengio 2010, eq. 12 and 16). Biases start where
    inputs of their mean leave z at zero, the middle of a sigmoid: deep stacks pass no signal on without that, for a
    sigmoid's outputs have mean ½. `input_mean` is the mean of what the first layer is given.
    """
    layers = []
    for n, (input_dim, output_dim) in enumerate(pairwise(dims), 2):
        activation = Sigmoid if n < len(dims) else last or output_activation(output_dim)
        scale = activation.gain * np.sqrt(2 / (input_dim + output_dim))
        w = (scale * rng.standard_normal((input_dim, output_dim))).astype(np.float32)
        layers.append(Layer(w, -input_mean * w.sum(axis=0), activation))
        input_mean = 0.5
    return layers


def layers_from_weights(weights):
    """[(w, b), ...] of a whole network -> its layers."""
    *hidden, (w, b) = weights
    return [*(Layer(*each, Sigmoid) for each in hidden), Layer(w, b, output_activation(len(b)))]


def minibatches(num_examples, batch_size, num_epochs, seed, skip=0):
    """The indices of each minibatch, (batch,), every epoch in a new order; the first `skip` examples are passed over.

    Streams of random numbers are [seed, n]: 1 for layer 1 (and for all layers of sgd.py), 2 for the output half, 3 for the
    oracle, 4 and the epoch for this, 5 for --gradients shuffled. (Epochs count from 1: [seed, 4, 0] is the same as [seed, 4].)
    """
    first, start = divmod(skip, num_examples)
    for epoch in range(first, num_epochs):
        order = np.random.default_rng([seed, 4, epoch + 1]).permutation(num_examples)
        for k in range(start, num_examples, batch_size):
            yield order[k:k + batch_size]
        start = 0


def train(layers, x, y, order, learning_rate, momentum):
    """Stochastic gradient descent, the whole of it. `order` yields minibatches of indices; yields after each update."""
    for clock, i in enumerate(order):
        y_hat = feed_forward(layers, x[i])
        g = loss_gradient(y_hat, y[i])
        backprop(layers, g)
        descend(layers, learning_rate(clock), momentum)
        yield len(i)


def main():
    from plumbing import runs
    from tqdm import tqdm
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="%(prog)s [options] x.npy y.npy")
    runs.add_data_options(parser)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 24, 12, 1], help="widths (2 24 12 1)")
    parser.add_argument("--num-epochs", type=int, default=100, help="%(default)s")
    parser.add_argument("--learning-rate", type=float, default=0.002, help="%(default)s")
    parser.add_argument("--decay", type=float, default=0.997, help="factor on the rate after an epoch (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=1, help="%(default)s")
    parser.add_argument("--momentum", type=float, default=0.0, help="%(default)s")
    parser.add_argument("--seed", type=int, default=0, help="%(default)s")
    parser.add_argument("--progress-dir", default="sgd_progress", help="%(default)s")
    args = parser.parse_args()
    try:
        if min(args.batch_size, args.num_epochs) < 1 or args.seed < 0 or not args.learning_rate > 0:
            raise ValueError("--batch-size and --num-epochs must be at least 1, --seed at least 0, --learning-rate positive")
        x, y, x_test, y_test = runs.load_data(args.x, args.y, args.held_out)
        if len(args.layers) < 2 or min(args.layers) < 1:
            raise ValueError("--layers takes two or more widths, which must be positive")
        runs.check_widths(x, y, args.layers[0], args.layers[-1], "--layers")
        score = runs.score_name(y)
        progress = runs.Progress(args.progress_dir, ["seconds", "examples", "epoch", score], vars(args))
    except (ValueError, OSError) as error:
        parser.error(str(error))

    layers = make_layers(args.layers, np.random.default_rng([args.seed, 1]))
    per_epoch, examples, epoch = -(-len(x) // args.batch_size), 0, 0
    order = minibatches(len(x), args.batch_size, args.num_epochs, args.seed)
    start = time.perf_counter()
    try:
        with np.errstate(all="ignore"), tqdm(total=args.num_epochs, unit="epoch") as bar:
            for count in train(layers, x, y, order, lambda clock: args.learning_rate * args.decay ** (clock // per_epoch),
                               args.momentum):
                examples += count
                if examples == (epoch + 1) * len(x):
                    epoch += 1
                    reached = test_score(layers, x_test, y_test)
                    if not np.isfinite(sum(layer.w.sum() for layer in layers)):
                        progress.end("stopped: it diverged")
                        parser.exit(1, f"\nsgd.py: diverged in epoch {epoch}; try a lower --learning-rate\n")
                    progress.write([(layer.w, layer.b) for layer in layers], seconds=time.perf_counter() - start,
                                   examples=examples, epoch=epoch, **{score: reached})
                    bar.update()
                    bar.set_postfix_str(f"held-out {score[5:].upper()} {reached:.4f}")
    except KeyboardInterrupt:
        progress.end("stopped")
        parser.exit(130, f"\nstopped after {epoch} whole epochs, which are in {args.progress_dir}\n")
    progress.end("finished")
    print(f"{args.num_epochs} epochs in {time.perf_counter() - start:.0f} s: {args.progress_dir}/metrics.csv")


if __name__ == "__main__":
    main()
