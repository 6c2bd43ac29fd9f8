"""`make compare`: every way to train, on the default problem: what is a guess worth? Half an hour.

True gradients at once and delayed, zero gradients, and guesses by three oracles, with labels and
without; also guesses that are shuffled among a minibatch's examples. The same number of examples
each. Rates are those that `--search` finds, on another target and seeds that are not reported;
delayed gradients have those of true ones. Writes benchmarks/compare.md and compare.png.
"""
from itertools import product

import numpy as np

from plot import draw_curves, png
from tests.benchmarks.measure import (
    KEPT,
    SEARCH_SEED,
    Runs,
    cell,
    final,
    make_parser,
    other_target,
    run_sgd,
    run_three,
    table,
)

SMALL, LINEAR = ["--layers", 24, 12, 24], ["--layers", 24, 24]
LABELS = ["--condition-on-labels"]
WAYS = {  # name: --gradients, options of the oracle; the default one is the capable one
    "true": ("true", []),
    "true, delayed": ("delayed", []),
    "zero": ("zero", []),
    "guesses, capable oracle": ("synthetic", []),
    "guesses, small oracle": ("synthetic", SMALL),
    "guesses, linear oracle": ("synthetic", LINEAR),
    "guesses with labels, capable oracle": ("synthetic", LABELS),
    "guesses with labels, small oracle": ("synthetic", [*SMALL, *LABELS]),
    "guesses with labels, linear oracle": ("synthetic", [*LINEAR, *LABELS]),
    "shuffled guesses, capable oracle": ("shuffled", []),
    "shuffled guesses, linear oracle": ("shuffled", LINEAR)}
SINGLE = {"mini-batch SGD, one process": ["--batch-size", 100, "--momentum", 0.9,
                                          "--learning-rate", 0.2, "--decay", 1],
          "sgd.py, one example at a time": []}
GRID = ((0.1, 0.9), (0.2, 0.9), (0.4, 0.9), (1.5, 0.0), (3.0, 0.0), (6.0, 0.0))
TRUE, GUESSES = (0.4, 0.9), (6.0, 0.0)  # rate and momentum of layer 1, of the grid


def run(folder, gradients, oracle, rates, epochs, seed, **options):
    rate, momentum = rates
    run_three(folder, seed=seed, oracle=oracle, input=[
        "--gradients", gradients, "--learning-rate", rate, "--momentum", momentum, "--num-epochs",
        epochs, *(["--warm-up", 0] if rates == TRUE and gradients != "synthetic" else []),
        *(["--staleness", 4] if gradients == "delayed" else [])],
        **options)


def search(epochs, seeds):
    """What the same rates give for true gradients and for guesses, on another target."""
    data, reached = other_target(KEPT / "other"), {}
    runs = Runs("compare-search", 2 * len(GRID) * seeds)
    for seed, gradients, rates in product(range(seeds), ("true", "synthetic"), GRID):
        reached.setdefault((gradients, *rates), []).append(runs.score(
            f"{gradients} {rates} {epochs}", SEARCH_SEED + seed, run, gradients, [], rates, epochs,
            data=data))
    table("compare-search", ("gradients", "rate of layer 1", "momentum",
                             f"MSE on another target after {epochs} epochs"),
          [(*rates, cell(values)) for rates, values in reached.items()])


def mean_cosine(metrics):
    return np.mean(metrics["gradient_cosine"][1:]) if "gradient_cosine" in metrics else np.nan


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--epochs", type=int, default=5, help="(%(default)s)")
    every = [*SINGLE, *WAYS]
    parser.add_argument("--ways", nargs="+", choices=every, default=every, help="(all)")
    parser.add_argument("--search", action="store_true", help="print what the rates give, instead")
    args = parser.parse_args()
    if args.search:
        return search(args.epochs, args.seeds)
    runs, results = Runs("compare", len(args.ways) * args.seeds), {}
    for seed, name in product(range(args.seeds), args.ways):
        if name in SINGLE:
            results.setdefault(name, []).append(runs.get(
                f"{name} {args.epochs}", seed, run_sgd, "--num-epochs", args.epochs,
                *SINGLE[name]))
        else:
            gradients, oracle = WAYS[name]
            results.setdefault(name, []).append(runs.get(
                f"{name} {args.epochs}", seed, run, gradients, oracle,
                TRUE if gradients in ("true", "delayed") else GUESSES, args.epochs))
    rows = []
    for name, each in results.items():
        cosines = list(map(mean_cosine, each))
        rows.append((name, cell(list(map(final, each))),
                     cell([metrics["seconds"][-1] for metrics in each], ".0f"),
                     cell(cosines, ".2f") if np.isfinite(cosines).all() else "–"))
    table("compare", ("gradients", f"MSE after {args.epochs} epochs", "seconds",
                      "mean gradient cosine"), rows)
    middle = {name: each[int(np.argsort(list(map(final, each)))[len(each) // 2])]
              for name, each in results.items()}
    (KEPT / "compare.png").write_bytes(png(draw_curves, middle, size=(9, 8), dpi=110))
    print(f"wrote {KEPT / 'compare.png'}: of each way, the seed with the median MSE")


if __name__ == "__main__":
    main()
