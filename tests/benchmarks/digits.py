"""`make digits`: handwritten digits, in the form of the paper's table 1. Twenty minutes with 5,000
of them.

    make digits ARGS="--file mnist_5k.npz"     # without --file, MNIST as Keras downloads it

The input half has one to four hidden layers of 256, the output half is the softmax layer alone, so
that the paper's "no backprop" is our zero gradients, and "backprop" our true ones; the oracle is
linear, as the paper's are for fully connected networks. Test error in percent after the same number
of updates. `--search` tries the same rates for every way, on a seed that is not reported, with the
deepest network. Also draws guesses beside true gradients. bench_chain.py cuts at every layer.
"""
from pathlib import Path

import numpy as np

from plot import png
from plumbing import data
from plumbing.runs import read_snapshot, snapshots
from sgd import feed_forward, layers_from_weights
from synthgrad import OracleClient
from tests.benchmarks.measure import (
    KEPT,
    SEARCH_SEED,
    Runs,
    cell,
    digits_data,
    final,
    make_parser,
    run_three,
    table,
)

BATCH, WIDTH, CLASSES = 100, 256, 10
LABELS = ["--condition-on-labels", CLASSES]
WAYS = {  # name: --gradients, options of the oracle
    "no backprop": ("zero", []),
    "backprop": ("true", []),
    "backprop, late": ("delayed", []),
    "local loss": ("local", []),
    "guesses": ("synthetic", []),
    "guesses, labels": ("synthetic", LABELS)}
# rate of the input half, which has no momentum; of the output half, whose momentum is 0.9
GRID = ((0.1, 0.02), (0.3, 0.02), (1.0, 0.02), (0.1, 0.1))
RATES = {"no backprop": (0.3, 0.02), "backprop": (1.0, 0.02),
         "backprop, late": (1.0, 0.02), "local loss": (1.0, 0.02), "guesses": (0.1, 0.02),
         "guesses, labels": (0.3, 0.02)}  # of them


def learn(folder, loaded, paths, depth, way, rates, updates, seed):
    """One run; with labels, what the oracle guesses late in it is kept in guesses.npz."""
    gradients, oracle = WAYS[way]
    steady = ["--decay", 1e9]
    n, columns = loaded.x.shape
    run_three(folder, seed=seed, data=paths, oracle=["--layers", WIDTH, WIDTH, *oracle],
              output=["--layers", WIDTH, CLASSES, "--learning-rate", rates[1], *steady],
              input=["--layers", columns, *[WIDTH] * depth, "--learning-rate", rates[0], *steady,
                     "--warm-up", 300, "--momentum", 0, "--held-out", len(loaded.x_test),
                     "--gradients", gradients,
                     "--num-epochs", max(1, round(updates * BATCH / n))],
              watch=ask_once(folder, loaded, 0.9 * updates) if oracle else None)


def ask_once(folder, loaded, after):
    """For follow(): asks for ĝ at the held-out digits, once, after so many updates, and keeps it
    with the true g, both of the network in the newest snapshot."""
    def watch(three):
        kept = folder / "guesses.npz"
        if kept.exists() or (three.status("input") or {}).get("updates", 0) < after:
            return
        *below, above = layers_from_weights(read_snapshot(snapshots(three.progress)[-1])[0])
        h = feed_forward(below, loaded.x_test)
        y_hat = feed_forward([above], h)
        oracle = OracleClient(f"127.0.0.1:{three.port('oracle')}")
        guess, _ = oracle.estimate_gradients(h, loaded.y_test)
        np.savez(kept, y_hat=y_hat, g=(y_hat - loaded.y_test) @ above.w.T, guess=guess, w=above.w)
    return watch


def draw_guesses(figure, x, y, y_hat, g, guess, w):
    """Held-out digits, hard ones above and easy ones below: where a step along −g, and one along
    −ĝ, would push them.

    A step of h along −g changes the last layer's z by −g w: one number for each class.
    """
    order = np.argsort(np.sum(y_hat * y, axis=1))
    shown = [*order[:5], *order[len(order) // 2:][:5]]
    grid = figure.subplots(4, 5, height_ratios=[1, 1.2] * 2, sharey="row")
    for n, k in enumerate(shown):
        image, bars = grid[2 * (n // 5), n % 5], grid[2 * (n // 5) + 1, n % 5]
        image.imshow(x[k].reshape(28, 28), cmap="gray_r")
        image.set_title(f"a {y[k].argmax()}, taken for a {y_hat[k].argmax()} "
                        f"({y_hat[k].max():.0%})", fontsize=8)
        image.axis("off")
        for shift, color, label, each in (
                (-0.2, "#0072B2", "along the true −g", g[k]),
                (0.2, "#E69F00", "along the guess −ĝ", guess[k])):
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
    figure.legend(*grid[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2,
                  fontsize=8)
    figure.suptitle("Where the true gradient and the guess (which sees the label) push the last "
                    "layer's input z", fontsize=10)


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--file", type=Path, help="an .npz file in the form of Keras' mnist.npz")
    parser.add_argument("--updates", type=int, default=2000, help="(%(default)s)")
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 3, 4],
                        help="(%(default)s)")
    parser.add_argument("--search", action="store_true", help="print what the rates give, instead")
    args = parser.parse_args()
    paths, held_out = digits_data(KEPT / "digits-data", args.file)
    loaded = data.load(*paths, held_out)
    if args.search:
        return search(loaded, paths, max(args.depths), args.updates)
    runs, errors = Runs("digits", len(args.depths) * len(WAYS) * args.seeds), {}
    for seed in range(args.seeds):
        for depth in args.depths:
            for way in WAYS:
                errors.setdefault((depth, way), []).append(100 * final(runs.get(
                    f"{depth} {way}", seed, learn, loaded, paths, depth, way, RATES[way],
                    args.updates)))
    median = {case: np.median(values) for case, values in errors.items()}
    table("digits", ("hidden layers of 256", *WAYS, "labels ÷ backprop", "labels ÷ no backprop"), [
        (depth, *(cell(errors[depth, way], ".1f") for way in WAYS),
         *(f"{median[depth, 'guesses, labels'] / median[depth, way]:.2f}"
           for way in ("backprop", "no backprop"))) for depth in args.depths])
    with np.load(runs.place(f"{args.depths[0]} guesses, labels", 0) / "guesses.npz") as kept:
        shown = [kept[name] for name in ("y_hat", "g", "guess", "w")]
    picture = KEPT / "digits.png"
    picture.write_bytes(png(draw_guesses, loaded.x_test, loaded.y_test, *shown, size=(9, 7),
                            dpi=110))
    print(f"test error in percent, {len(loaded.x):,} digits to train on, {args.updates:,} updates; "
          f"wrote {picture}")


def search(loaded, paths, depth, updates):
    runs = Runs("digits-search", len(WAYS) * len(GRID))
    rates = f"rates of the input half and of the output half, {depth} hidden layers"
    table("digits-search", (rates, *map(str, GRID)), [
        (way, *(format(100 * runs.score(f"{depth} {way} {rates}", SEARCH_SEED, learn, loaded, paths,
                                        depth, way, rates, updates), ".1f") for rates in GRID))
        for way in WAYS])


if __name__ == "__main__":
    main()
