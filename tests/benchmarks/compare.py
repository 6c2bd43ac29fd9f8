"""`make compare`: every way to train, on the default problem: what is a guess worth? Half an hour.

True gradients at once and delayed, zero gradients, and guesses by three oracles, with labels and
without; also guesses that are shuffled among a minibatch's examples. The same number of examples
each. Rates are those that `--search` found, on another target and seeds that are not reported: the
defaults of each way. Writes benchmarks/compare.md and compare.png.

    make compare ARGS="--target ripples --epochs 8"           # not the default target
    make compare ARGS="--away 50 --seconds 40 --ways true zero"  # the output trainer is 50 ms away
"""
from functools import partial
from itertools import product

import numpy as np

from plot import draw_curves, png
from tests.benchmarks.measure import (
    FUNCTIONS,
    KEPT,
    SEARCH_SEED,
    Runs,
    cell,
    final,
    make_parser,
    other_target,
    run_sgd,
    run_three,
    swing,
    table,
    until,
)

SMALL, LINEAR = ["--layers", 24, 12, 24], ["--layers", 24, 24]
LABELS = ["--condition-on-labels"]
WAYS = {  # name: --gradients, options of the oracle; the default one is the capable one
    "true": ("true", []),
    "true, delayed": ("delayed", []),
    "local loss": ("local", []),
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
                                          "--learning-rate", 0.8, "--decay", 1e12],
          "sgd.py, one example at a time": []}
GRID = ((1.6, 0.9), (2.7, 0.9), (4.0, 0.9), (12.0, 0.0), (20.0, 0.0), (30.0, 0.0), (50.0, 0.0))
MINUTE = 60


def run(folder, gradients, oracle, epochs, seed, away=0, rates=(), **options):
    """epochs: None where the run ends after so many seconds. away: milliseconds between the output
    trainer and the two others, there and back. rates: of layer 1 and its momentum, if not the
    defaults."""
    more = ["--num-epochs", epochs] if epochs else []
    if rates:
        more += ["--learning-rate", rates[0], "--momentum", rates[1]]
    run_three(folder, seed=seed, oracle=oracle, delay=away / 1000, late=away / 1000,
              input=["--gradients", gradients, *more], **options)


def search(epochs, seeds):
    """What the same rates give for true gradients and for guesses, on another target."""
    data, reached = other_target(KEPT / "other"), {}
    runs = Runs("compare-search", 3 * len(GRID) * seeds)
    for seed, gradients, rates in product(range(seeds), ("true", "local", "synthetic"), GRID):
        reached.setdefault((gradients, *rates), []).append(runs.score(
            f"{gradients} {rates} {epochs}", SEARCH_SEED + seed, run, gradients, [], epochs,
            rates=rates, data=data))
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
    parser.add_argument("--target", choices=FUNCTIONS, default="default", help="(%(default)s)")
    parser.add_argument("--seconds", type=int, help="of training, in place of --epochs")
    parser.add_argument("--away", type=int, default=0, metavar="MS",
                        help="milliseconds to the output trainer and back (%(default)s)")
    parser.add_argument("--search", action="store_true", help="print what the rates give, instead")
    args = parser.parse_args()
    if args.search:
        return search(args.epochs, args.seeds)
    data, epochs = FUNCTIONS[args.target](KEPT / args.target), args.epochs
    if args.seconds:
        epochs = None
    what = f"{epochs} epochs" if epochs else f"{args.seconds} s"
    what += f", {args.away} ms away" * bool(args.away)
    runs, results = Runs("compare", len(args.ways) * args.seeds), {}
    for seed, name in product(range(args.seeds), args.ways):
        get = partial(runs.get, f"{args.target} {name} {what}", seed)
        if name in SINGLE:
            metrics = get(run_sgd, "--num-epochs", args.epochs, *SINGLE[name], data=data)
        else:
            gradients, oracle = WAYS[name]
            metrics = get(run, gradients, oracle, epochs, away=args.away, data=data,
                          seconds=args.seconds)
        results.setdefault(name, []).append(metrics)
    rows = []
    for name, each in results.items():
        cosines, seconds = list(map(mean_cosine, each)), [run["seconds"][-1] for run in each]
        minute = [final(until(run, MINUTE)) for run in each]
        rows.append((
            name, cell(list(map(final, each))), cell(seconds, ".0f"),
            cell(minute) if min(seconds) > MINUTE - 5 else "–",
            cell(cosines, ".2f") if np.isfinite(cosines).all() else "–",
            *("–" * 3 if name in SINGLE else (
                cell(list(map(swing, each)), ".1f"),
                f"{np.median([run['updates'][-1] for run in each]):,.0f}",
                cell([run["cpu_ms"] for run in each], ".1f")))))
    table("compare", (
        f"{args.target} target: gradients", f"MSE after {what}", "seconds", f"MSE after {MINUTE} s",
        "mean gradient cosine", "highest over lowest row of the last third", "updates of layer 1",
        "CPU of all processes for an update, ms"), rows)
    middle = {name: each[int(np.argsort(list(map(final, each)))[len(each) // 2])]
              for name, each in results.items()}
    (KEPT / "compare.png").write_bytes(png(draw_curves, middle, size=(9, 8), dpi=110))
    print(f"wrote {KEPT / 'compare.png'}: of each way, the seed with the median MSE")


if __name__ == "__main__":
    main()
