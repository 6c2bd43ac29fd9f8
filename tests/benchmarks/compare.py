"""`make compare`: every way to train, on the default problem: what is a guess worth? A quarter of an hour for three seeds.

True, zero and shuffled gradients, and guesses by both oracles with and without labels; the output half keeps and replays
its set in all of them. The same number of examples each. The rates of true gradients are those that `--search` finds, on
another target and seeds that are not reported. Writes benchmarks/compare.md and compare.png.
"""
import argparse
import itertools

import numpy as np

from plot import draw_curves, png
from tests.benchmarks.measure import KEPT, Runs, cell, final, other_target, run_sgd, run_three, table

LINEAR, LABELS = ["--layers", 24, 24], ["--condition-on-labels"]
WAYS = {  # name: --gradients, options of the oracle; None for sgd.py
    "sgd.py": (None, []),
    "true": ("true", []),
    "zero": ("zero", []),
    "synthetic, oracle 24-12-24": ("synthetic", []),
    "shuffled, oracle 24-12-24": ("shuffled", []),
    "synthetic, labels": ("synthetic", LABELS),
    "synthetic, linear": ("synthetic", LINEAR),
    "shuffled, linear": ("shuffled", LINEAR),
    "synthetic, linear, labels": ("synthetic", [*LINEAR, *LABELS])}
GRID = ((0.1, 0.9), (0.2, 0.9), (0.4, 0.9), (1.5, 0.0), (3.0, 0.0), (6.0, 0.0))  # rate and momentum of layer 1
RATES = {"true": (0.4, 0.9), "synthetic": (3.0, 0.0)}  # chosen of them; zero and shuffled: as synthetic


def run(folder, gradients, oracle, rates, seed, epochs, **options):
    rate, momentum = rates
    run_three(folder, seed=seed, oracle=oracle, input=[
        "--gradients", gradients, "--learning-rate", rate, "--momentum", momentum, "--num-epochs", epochs,
        *(["--warm-up", 0] if gradients == "true" else [])], **options)


def search(epochs, seeds=(11, 12)):
    """The same effort for both: the grid and what was reached on it, on another target and other seeds."""
    data, reached = other_target(KEPT / "other"), {}
    runs = Runs("compare-search", len(RATES) * len(GRID) * len(seeds))
    for seed, gradients, rates in itertools.product(seeds, RATES, GRID):
        reached.setdefault((gradients, *rates), []).append(final(runs.get(f"{gradients} {rates} {epochs}", seed, lambda folder: run(
            folder, gradients, [], rates, seed, epochs, data=data))))
    table("compare-search", ("gradients", "rate of layer 1", "momentum", f"MSE on another target after {epochs} epochs"),
          [(*rates, cell(values)) for rates, values in reached.items()])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5, help="%(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="%(default)s")
    parser.add_argument("--search", action="store_true", help="print what the grid of rates gives, instead")
    args = parser.parse_args()
    if args.search:
        return search(args.epochs)
    runs, results = Runs("compare", len(WAYS) * args.seeds), {name: [] for name in WAYS}
    for seed in range(args.seeds):
        for name, (gradients, oracle) in WAYS.items():
            results[name].append(runs.get(f"{name} {args.epochs}", seed, lambda folder: (
                run(folder, gradients, oracle, RATES["true" if gradients == "true" else "synthetic"], seed, args.epochs)
                if gradients else run_sgd(folder, "--num-epochs", args.epochs, "--seed", seed))))
    table("compare", ("gradients", f"MSE after {args.epochs} epochs", "seconds", "mean gradient cosine"), [
        (name, cell(list(map(final, each))), cell([metrics["seconds"][-1] for metrics in each], ".0f"),
         cell([np.mean(metrics["gradient_cosine"][1:]) for metrics in each], ".2f")
         if "gradient_cosine" in each[0] and np.isfinite(each[0]["gradient_cosine"][1:]).all() else "–")
        for name, each in results.items()])
    middle = {name: each[int(np.argsort(list(map(final, each)))[len(each) // 2])] for name, each in results.items()}
    (KEPT / "compare.png").write_bytes(png(draw_curves, middle, size=(9, 8), dpi=110))
    print(f"wrote {KEPT / 'compare.png'}: of each, the seed with the median MSE")


if __name__ == "__main__":
    main()
