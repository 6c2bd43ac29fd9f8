"""`make digits`: handwritten digits, in the form of the paper's table 1. Half an hour with 5,000 of them.

    make digits ARGS="--file mnist_5k.npz"     # without --file, MNIST as Keras downloads it

The input half has one to four hidden layers of 256, the output half is the softmax layer alone, so that the paper's "no
backprop" is our zero gradients, and "backprop" our true ones. Test error in percent after the same number of updates.
Also draws what the oracle's guesses say: digits, and the direction in which guess and truth push them.
"""
import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

from plot import png
from plumbing.runs import load_data, read_snapshot, snapshots
from sgd import feed_forward, layers_from_weights
from tests.benchmarks.measure import KEPT, ROOT, Runs, cell, final, run_three, table

BATCH, LABELS = 100, ["--condition-on-labels", 10]
WAYS = {  # name: --gradients, options of the oracle
    "no backprop (zero)": ("zero", []),
    "backprop (true)": ("true", []),
    "guesses": ("synthetic", []),
    "guesses, labels": ("synthetic", LABELS),
    "shuffled, labels": ("shuffled", LABELS)}


def draw_digits(figure, x, y, before, after):
    """Twelve held-out digits that the network was least sure of, and the probabilities it gives them, before and after."""
    hard = np.argsort(np.max(after * y, axis=1))[:12]
    grid = figure.subplots(4, 6, height_ratios=[2, 1] * 2)
    for n, k in enumerate(hard):
        image, bars = grid[2 * (n // 6), n % 6], grid[2 * (n // 6) + 1, n % 6]
        image.imshow(x[k].reshape(28, 28), cmap="gray_r")
        image.set_title(f"a {y[k].argmax()}, taken for a {after[k].argmax()}", fontsize=8)
        image.axis("off")
        bars.bar(np.arange(10) - 0.2, before[k], 0.4, color="#E69F00", label="no backprop")
        bars.bar(np.arange(10) + 0.2, after[k], 0.4, color="#0072B2", label="guesses, labels")
        bars.set(ylim=(0, 1), xticks=range(10), yticks=(0, 1))
        bars.tick_params(labelsize=6)
    figure.legend(*grid[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.suptitle("Held-out digits that it finds hardest, and the probability that it gives each class", fontsize=10)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="an .npz file in the form of Keras' mnist.npz")
    parser.add_argument("--seeds", type=int, default=3, help="%(default)s")
    parser.add_argument("--updates", type=int, default=6000, help="%(default)s")
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 3, 4], help="(%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=0.1, help="of both halves, in every way (%(default)s)")
    args = parser.parse_args()
    folder = KEPT / "digits-data"
    folder.mkdir(parents=True, exist_ok=True)
    made = subprocess.run([sys.executable, ROOT / "generate.py", "--digits", *([args.file] if args.file else []), "--dir",
                           folder], capture_output=True, text=True)
    if made.returncode:
        sys.exit(made.stderr)
    held_out = int(made.stdout.split("--held-out ")[1].split(":")[0])
    data = folder / "x.npy", folder / "y.npy"
    x, *_ = load_data(*data, held_out)
    epochs = max(1, round(args.updates * BATCH / len(x)))
    runs, errors = Runs("digits", len(args.depths) * len(WAYS) * args.seeds), {}
    rates = ["--learning-rate", args.learning_rate, "--momentum", 0.9, "--decay", 1e9]
    for seed in range(args.seeds):
        for depth in args.depths:
            for name, (gradients, oracle) in WAYS.items():
                errors.setdefault((depth, name), []).append(100 * final(runs.get(
                    f"{depth} {gradients} {'labels' if oracle else ''}", seed, lambda place: run_three(
                        place, seed=seed, data=data, oracle=["--layers", 256, 256, *oracle],
                        output=["--layers", 256, 10, *rates],
                        input=["--layers", 784, *[256] * depth, *rates, "--warm-up", 0, "--held-out", held_out,
                               "--gradients", gradients, "--num-epochs", epochs]))))
    table("digits", ("hidden layers of 256", *WAYS, "labels ÷ backprop", "labels ÷ no backprop"), [
        (depth, *(cell(errors[depth, name], ".1f") for name in WAYS),
         *(f"{np.median(errors[depth, 'guesses, labels']) / np.median(errors[depth, name]):.2f}"
           for name in ("backprop (true)", "no backprop (zero)"))) for depth in args.depths])
    _, _, x_test, y_test = load_data(*data, held_out)
    before, after = (feed_forward(layers_from_weights(read_snapshot(
        snapshots(runs.folder / f"{max(args.depths)}_{name}_0" / "progress")[-1])[0]), x_test) for name in ("zero_", "synthetic_labels"))
    (KEPT / "digits.png").write_bytes(png(draw_digits, x_test, y_test, before, after, size=(9, 6), dpi=110))
    print(f"test error in percent, {len(x):,} digits to train on, {args.updates:,} updates; wrote {KEPT / 'digits.png'}")


if __name__ == "__main__":
    main()
