"""Plain stochastic gradient descent with hand-written backprop: the baseline, and the file to read first.

    python generate.py                     # makes x.npy and y.npy
    python sgd.py x.npy y.npy              # 100 epochs, about ten minutes; writes sgd_progress/

The symbols are the same here, in the README and on the wire:

    x, h    a layer's input, and its activations h = activation(z), where z = x w + b
    L       the loss of one example, ½ (ŷ − y)²; ŷ is the last layer's h
    g       the gradient dL/dh, one row per example: what backprop hands from layer to layer

Everything works on a minibatch: x, h and g have the shape (batch, dim). It is written to be read, not to be fast:
one example at a time (--batch-size 1) is stochastic gradient descent as the textbooks have it. The layers are the
ones that train_input.py and train_output.py use, each on its own side of the cut.
"""
import argparse
import csv
import os
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
from tqdm import tqdm


class Sigmoid:
    """σ(z) = 1 / (1 + e^−z), in the form that cannot overflow."""

    gain = 4  # σ'(0) = 1/4, so weights must be 4 times as large to pass a signal on undiminished

    @staticmethod
    def activate(z):
        return 0.5 * np.tanh(0.5 * z) + 0.5

    @staticmethod
    def derivative(h):
        """dh/dz, written in terms of h, which is at hand: σ' = σ (1 − σ)."""
        return h * (1 - h)


class Linear:
    gain = 1

    @staticmethod
    def activate(z):
        return z

    @staticmethod
    def derivative(h):
        return 1


class Layer:
    """A fully connected layer: w is (input_dim, output_dim) and b is (output_dim,), both float32.

    Weights start at N(0, gain² · 2 / (input_dim + output_dim)) (Glorot & Bengio 2010, eq. 12 and 16). Between layers of
    equal width that is gain² / input_dim, scaling by fan-in, which for the small default network was no better. Biases
    start where inputs of mean `input_mean` leave z at zero, the middle of a sigmoid; without that, deep stacks pass
    no signal on, for a sigmoid's outputs have mean ½.
    """

    def __init__(self, input_dim, output_dim, activation, rng=None, input_mean=0.0):
        rng = rng or np.random.default_rng()
        scale = activation.gain * np.sqrt(2 / (input_dim + output_dim))
        self.w = (scale * rng.standard_normal((input_dim, output_dim))).astype(np.float32)
        self.b = -input_mean * self.w.sum(axis=0)
        self.activation = activation
        self.w_velocity, self.b_velocity = np.zeros_like(self.w), np.zeros_like(self.b)

    def feed_forward(self, x):
        """x (batch, input_dim) -> h (batch, output_dim); remembers both for backprop."""
        self.x = x
        self.h = self.activation.activate(x.dot(self.w) + self.b)
        return self.h

    def backprop(self, dL_dh):
        """dL/dh (batch, output_dim) -> dL/dx (batch, input_dim), per example, by the chain rule.

        Remembers the gradients of this layer's own w and b. Here, and only here, the mean over the batch is taken.
        """
        dL_dz = dL_dh * self.activation.derivative(self.h)
        mean_dL_dz = dL_dz / len(dL_dz) if len(dL_dz) > 1 else dL_dz  # plain SGD is spared 6% of its time
        self.dL_dw = self.x.T.dot(mean_dL_dz)
        self.dL_db = np.add.reduce(mean_dL_dz)
        return dL_dz.dot(self.w.T)

    def descend(self, learning_rate, momentum=0.0):
        """Step downhill. With momentum, along the decaying sum of past gradients (Polyak's heavy ball)."""
        if momentum:
            self.dL_dw = self.w_velocity = momentum * self.w_velocity + self.dL_dw
            self.dL_db = self.b_velocity = momentum * self.b_velocity + self.dL_db
        self.w -= learning_rate * self.dL_dw
        self.b -= learning_rate * self.dL_db


def make_layers(dims, rng, last=Linear, input_mean=0.0):
    """[2, 24, 12, 1] -> three layers, sigmoid but for the last one; `input_mean` is that of the first one's inputs."""
    activations = [Sigmoid] * (len(dims) - 2) + [last]
    means = [input_mean] + [0.5] * (len(dims) - 2)
    return [Layer(*shape, activation, rng, mean)
            for *shape, activation, mean in zip(dims, dims[1:], activations, means)]


def layers_from_weights(weights):
    """[(w, b), ...] -> layers that hold these arrays: sigmoid but for the last one, which is linear."""
    layers = make_layers([len(w) for w, _ in weights] + [len(weights[-1][1])], np.random.default_rng(0))
    for layer, (w, b) in zip(layers, weights):
        layer.w, layer.b = w, b
    return layers


def feed_forward(layers, h):
    """x (batch, input_dim) of the first layer -> h (batch, output_dim) of the last."""
    for layer in layers:
        h = layer.feed_forward(h)
    return h


def backprop(layers, g):
    """dL/dh of the last layer -> dL/dx of the first, per example; every layer remembers its own gradients."""
    for layer in reversed(layers):
        g = layer.backprop(g)
    return g


def mean_squared_error(layers, x, y):
    """MSE, the mean of (ŷ − y)² without the ½, over x (n, dim) and y (n,)."""
    return float(np.mean((feed_forward(layers, x)[:, 0] - y) ** 2))


def train(layers, x, y, num_epochs, learning_rate, decay, batch_size, momentum, rng):
    """Stochastic gradient descent, the whole of it. Yields after every epoch; the caller looks at the layers."""
    for epoch in range(num_epochs):
        order = rng.permutation(len(x))
        x, y = x[order], y[order]
        for k in range(0, len(x), batch_size):
            y_hat = feed_forward(layers, x[k:k + batch_size])
            g = y_hat - y[k:k + batch_size, None]  # dL/dŷ of L = ½ (ŷ − y)²
            backprop(layers, g)
            for layer in layers:
                layer.descend(learning_rate, momentum)
        learning_rate *= decay
        yield epoch + 1


# ---- data, and what a run writes down: nothing about learning from here on ----

def load_data(x_path, y_path):
    """Read x (n, dim) and y (n,) as float32, and hold the last 5% out: returns x, y, x_test, y_test.

    Raises ValueError or OSError, saying what was wrong and what was expected.
    """
    arrays = []
    for path in (x_path, y_path):
        try:
            arrays.append(np.asarray(np.load(path, allow_pickle=False), np.float32))
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} not found: `python generate.py` makes x.npy and y.npy") from None
        except (ValueError, TypeError, EOFError, zipfile.BadZipFile):
            raise ValueError(f"{path}: expected a NumPy .npy file that holds an array of numbers") from None
        if not np.isfinite(arrays[-1]).all():
            raise ValueError(f"{path}: holds NaN or infinity; expected finite numbers")
    x, y = arrays
    if x.ndim != 2 or y.shape != x.shape[:1] or len(x) < 20:
        raise ValueError(f"{x_path} has shape {x.shape} and {y_path} {y.shape}; "
                         "expected (n, columns) and (n,) with the same n, at least 20")
    split = len(x) - len(x) // 20
    return x[:split], y[:split], x[split:], y[split:]


class Progress:
    """Writes metrics.csv, a row per snapshot, and snapshot_000042.npz, the whole network, into one folder.

    An earlier run in the folder is moved to FOLDER.old, unless `resume` is given: then rows are appended to it.
    ValueError when the folder holds anything else.
    """

    def __init__(self, folder, columns, resume=False):
        self.folder, self.metrics = Path(folder), Path(folder) / "metrics.csv"
        if self.folder.is_dir() and any(self.folder.iterdir()) and not resume:
            old = self.folder.with_name(self.folder.name + ".old")
            for place in (self.folder, old):
                if place.exists() and not (place / "metrics.csv").exists():
                    raise ValueError(f"{place} holds something other than a run; --progress-dir chooses another folder")
            shutil.rmtree(old, ignore_errors=True)
            self.folder.rename(old)
            print(f"{folder} held an earlier run: moved to {old}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.columns = columns
        self.count = 1 + max((int(path.stem[9:]) for path in snapshots(folder)), default=-1)
        if not self.metrics.exists():
            self.metrics.write_text(",".join(columns) + "\n")

    def write(self, layers, **row):
        """One row and one snapshot; the snapshot appears whole or not at all."""
        path = self.folder / f"snapshot_{self.count:06d}.npz"
        arrays = {f"{name}{n}": getattr(layer, name) for n, layer in enumerate(layers, 1) for name in ("w", "b")}
        with open(path.with_suffix(".tmp"), "wb") as file:
            np.savez(file, **arrays, **row)
        os.replace(file.name, path)
        with open(self.metrics, "a", newline="") as file:
            csv.writer(file).writerow([f"{row[column]:.6g}" if isinstance(row[column], float) else row[column]
                                       for column in self.columns])
        self.count += 1


def snapshots(folder):
    """The folder's snapshots, oldest first."""
    return sorted(Path(folder).glob("snapshot_[0-9]*.npz"))


def read_snapshot(path):
    """Returns the layers of a snapshot and a dict of the numbers beside them; ValueError if it is not a whole one."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        weights = [(arrays.pop(f"w{n}"), arrays.pop(f"b{n}")) for n in range(1, 1 + len(arrays)) if f"w{n}" in arrays]
        dims = [len(b) for _, b in weights]
        for (w, b), shape in zip(weights, zip([len(weights[0][0]), *dims], dims)):
            if w.shape != shape or b.ndim != 1 or not np.isfinite(w).all() or not np.isfinite(b).all():
                raise ValueError(f"weights of the shapes {w.shape} and {b.shape}, or not finite")
        return layers_from_weights(weights), {name: array.item() for name, array in arrays.items()}
    except (ValueError, TypeError, LookupError, OSError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"{path} is not a whole snapshot ({error})") from None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="%(prog)s [options] x.npy y.npy")
    parser.add_argument("x", help="inputs, (n, columns)")
    parser.add_argument("y", help="targets, (n,)")
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
        x, y, x_test, y_test = load_data(args.x, args.y)
        if min(args.batch_size, args.num_epochs) < 1 or args.seed < 0:
            raise ValueError("--batch-size and --num-epochs must be at least 1, --seed at least 0")
        if args.layers[0] != x.shape[1] or args.layers[-1] != 1 or min(args.layers) < 1 or len(args.layers) < 2:
            raise ValueError(f"--layers {args.layers}: must begin with x's {x.shape[1]} columns and end with 1")
        progress = Progress(args.progress_dir, ["seconds", "examples", "epoch", "test_mse"])
    except (ValueError, OSError) as error:
        parser.error(str(error))

    rng = np.random.default_rng(args.seed)
    layers = make_layers(args.layers, rng)
    start = time.perf_counter()
    epochs = train(layers, x, y, args.num_epochs, args.learning_rate, args.decay, args.batch_size, args.momentum, rng)
    try:
        for epoch in (bar := tqdm(epochs, total=args.num_epochs, unit="epoch")):
            mse = mean_squared_error(layers, x_test, y_test)
            if not np.isfinite(mse):
                parser.exit(1, f"\nsgd.py: diverged in epoch {epoch}; try a lower --learning-rate\n")
            progress.write(layers, seconds=time.perf_counter() - start, examples=epoch * len(x), epoch=epoch,
                           test_mse=mse)
            bar.set_postfix_str(f"held-out MSE {mse:.4f}")
    except KeyboardInterrupt:
        parser.exit(130, f"\nstopped; every finished epoch is in {args.progress_dir}\n")
    print(f"{args.num_epochs} epochs in {time.perf_counter() - start:.0f} s: {args.progress_dir}/metrics.csv")


if __name__ == "__main__":
    main()
