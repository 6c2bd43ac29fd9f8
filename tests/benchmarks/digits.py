"""`make digits`: handwritten digits, in the form of the paper's table 1. Twenty minutes with 5,000 of them.

    make digits ARGS="--file mnist_5k.npz"     # without --file, MNIST as Keras downloads it

The input half has one to four hidden layers of 256, the output half is the softmax layer alone, so that the paper's "no
backprop" is our zero gradients, and "backprop" our true ones; the oracle is linear, as the paper's are for fully connected
networks. Test error in percent after the same number of updates. `--search` tries the same grid of rates for every way,
on a seed that is not reported, with the deepest network. Also draws what a guess says, beside the truth.
"""
import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

from plot import png
from plumbing.runs import load_data
from sgd import feed_forward, layers_from_weights
from synthgrad import LayerClient, OracleClient
from tests.benchmarks.measure import KEPT, ROOT, Runs, cell, final, run_three, table

BATCH, WIDTH, CLASSES = 100, 256, 10
LABELS = ["--condition-on-labels", CLASSES]
WAYS = {  # name: --gradients, options of the oracle
    "no backprop": ("zero", []),
    "backprop": ("true", []),
    "guesses": ("synthetic", []),
    "guesses, labels": ("synthetic", LABELS)}
GRID = ((0.1, 0.02), (0.3, 0.02), (1.0, 0.02), (0.1, 0.1))  # rate of the input half; of the output half, momentum 0.9
RATES = {"no backprop": (0.3, 0.02), "backprop": (1.0, 0.02), "guesses": (0.1, 0.02), "guesses, labels": (0.3, 0.02)}  # of them


def learn(folder, data, held_out, depth, way, rates, seed, epochs, watch=None):
    gradients, oracle = WAYS[way]
    rate, rate_out = rates
    run_three(folder, seed=seed, data=data, watch=watch, oracle=["--layers", WIDTH, WIDTH, *oracle],
              output=["--layers", WIDTH, CLASSES, "--learning-rate", rate_out, "--decay", 1e9],
              input=["--layers", data_width(data), *[WIDTH] * depth, "--learning-rate", rate, "--decay", 1e9, "--warm-up", 300,
                     "--held-out", held_out, "--gradients", gradients, "--num-epochs", epochs])


def data_width(data):
    return np.load(data[0], mmap_mode="r").shape[1]


def ask_once(folder, x, y, dims, after):
    """What run_three is to do meanwhile: ask for ĝ at x, once, after so many updates, and keep it with the true g."""
    def watch(three):
        kept = folder / "guesses.npz"
        if kept.exists() or (three.status("input") or {}).get("updates", 0) < after:
            return
        *below, above = layers_from_weights([each for name, part in (("input", dims[:-1]), ("output", dims[-2:]))
                                             for each in LayerClient(f"127.0.0.1:{three.port(name)}").weights(part)[0]])
        h = feed_forward(below, x)
        y_hat = feed_forward([above], h)
        guess = OracleClient(f"127.0.0.1:{three.port('oracle')}").estimate_gradients(h, y)[0]
        np.savez(kept, y_hat=y_hat, g=(y_hat - y) @ above.w.T, guess=guess, w=above.w)
    return watch


def draw_guesses(figure, x, y, y_hat, g, guess, w):
    """Held-out digits, hard ones above and easy ones below: where a step along −g, and one along −ĝ, would push them.

    A step of h along −g changes the last layer's z by −g w: one number for each class.
    """
    order = np.argsort(np.sum(y_hat * y, axis=1))
    shown = [*order[:5], *order[len(order) // 2:][:5]]
    grid = figure.subplots(4, 5, height_ratios=[1, 1.2] * 2, sharey="row")
    for n, k in enumerate(shown):
        image, bars = grid[2 * (n // 5), n % 5], grid[2 * (n // 5) + 1, n % 5]
        image.imshow(x[k].reshape(28, 28), cmap="gray_r")
        image.set_title(f"a {y[k].argmax()}, taken for a {y_hat[k].argmax()} ({y_hat[k].max():.0%})", fontsize=8)
        image.axis("off")
        for shift, color, label, each in ((-0.2, "#0072B2", "along the true −g", g[k]), (0.2, "#E69F00", "along the guess −ĝ", guess[k])):
            bars.bar(np.arange(CLASSES) + shift, -each @ w, 0.4, color=color, label=label)
        cosine = g[k] @ guess[k] / np.linalg.norm(g[k]) / np.linalg.norm(guess[k])
        bars.set_title(f"cosine of ĝ and g {cosine:.2f}", fontsize=7)
        bars.axhline(0, color="black", linewidth=0.6)
        bars.set_xticks(range(CLASSES))
        bars.tick_params(labelsize=6)
    for row in (1, 3):
        grid[row, 0].set_ylabel("change of z", fontsize=7)
        for axes in grid[row]:
            axes.set_xlabel("class", fontsize=7)
    figure.legend(*grid[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.suptitle("Where the true gradient and the guess (which sees the label) push the last layer's input z", fontsize=10)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="an .npz file in the form of Keras' mnist.npz")
    parser.add_argument("--seeds", type=int, default=3, help="%(default)s")
    parser.add_argument("--updates", type=int, default=2000, help="%(default)s")
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 3, 4], help="(%(default)s)")
    parser.add_argument("--search", action="store_true", help="print what the grid of rates gives, instead")
    args = parser.parse_args()
    folder = KEPT / "digits-data"
    folder.mkdir(parents=True, exist_ok=True)
    made = subprocess.run([sys.executable, ROOT / "generate.py", "--digits", *([args.file] if args.file else []), "--dir",
                           folder], capture_output=True, text=True)
    if made.returncode:
        sys.exit(made.stderr)
    held_out = int(made.stdout.split("--held-out ")[1].split(":")[0])
    data = folder / "x.npy", folder / "y.npy"
    x, _, x_test, y_test = load_data(*data, held_out)
    epochs = max(1, round(args.updates * BATCH / len(x)))
    if args.search:
        depth, runs = max(args.depths), Runs("digits-search", len(WAYS) * len(GRID))
        reached = {(way, rates): 100 * final(runs.get(f"{depth} {way} {rates}", 11, lambda place: learn(
            place, data, held_out, depth, way, rates, 11, epochs))) for way in WAYS for rates in GRID}
        return table("digits-search", (f"rates of the input half and of the output half, {depth} hidden layers", *map(str, GRID)),
                     [(way, *(f"{reached[way, rates]:.1f}" for rates in GRID)) for way in WAYS])
    runs, errors = Runs("digits", len(args.depths) * len(WAYS) * args.seeds), {}
    for seed in range(args.seeds):
        for depth in args.depths:
            dims = [x.shape[1], *[WIDTH] * depth, CLASSES]
            for way in WAYS:
                errors.setdefault((depth, way), []).append(100 * final(runs.get(f"{depth} {way}", seed, lambda place: learn(
                    place, data, held_out, depth, way, RATES[way], seed, epochs,
                    watch=ask_once(place, x_test, y_test, dims, 0.9 * args.updates) if WAYS[way][1] else None))))
    table("digits", ("hidden layers of 256", *WAYS, "labels ÷ backprop", "labels ÷ no backprop"), [
        (depth, *(cell(errors[depth, way], ".1f") for way in WAYS),
         *(f"{np.median(errors[depth, 'guesses, labels']) / np.median(errors[depth, way]):.2f}"
           for way in ("backprop", "no backprop"))) for depth in args.depths])
    with np.load(runs.folder / f"{args.depths[0]}_guesses_labels_0" / "guesses.npz") as kept:
        (KEPT / "digits.png").write_bytes(png(draw_guesses, x_test, y_test, *(kept[name] for name in ("y_hat", "g", "guess", "w")),
                                              size=(9, 7), dpi=110))
    print(f"test error in percent, {len(x):,} digits to train on, {args.updates:,} updates; wrote {KEPT / 'digits.png'}")


if __name__ == "__main__":
    main()
