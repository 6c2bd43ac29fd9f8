"""`make compare`: every way to train, on the default problem: what is a guess worth? Half an hour.

True gradients at once and delayed, zero gradients, and guesses by three oracles, with labels and
without; also guesses that are shuffled among a minibatch's examples. The same number of examples
each. The rates are each way's defaults, or with `--searched` those that bench-delay found. `--deep`
has three layers of 64 below the cut, eight inputs of noise, and searched rates. Writes
benchmarks/compare.md and compare.png.

"Until" columns: when the MSE was at most as high in two rows running as the worst run ended, zero
and shuffled gradients left out. "Still falls": the lowest row of the last third over that of the
third before; at 1 a run has come to its floor.

    make compare ARGS="--target ripples --epochs 8"           # not the default target
    make compare ARGS="--away 50 --seconds 40 --ways true zero"  # the output trainer is 50 ms away
    make compare ARGS="--deep --ways true 'local loss'"
"""
from functools import partial
from itertools import product

import numpy as np

from plot import draw_curves, png
from tests.benchmarks.measure import (
    FUNCTIONS,
    KEPT,
    Runs,
    cell,
    final,
    make_parser,
    noisy_data,
    run_sgd,
    run_three,
    still_falls,
    swing,
    table,
    time_to,
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
MINUTE = 60
DEEP = {"oracle": ["--layers", 64, 64, 64, 64], "output": ["--layers", 64, 64, 1],
        "input": ["--layers", 10, 64, 64, 64]}
# layer 1's rate, momentum and warm-up, the oracle's rate: what bench-delay found at 6 updates
SEARCHED = {"true": (20, 0.9, 1000), "true, delayed": (5, 0.9, 0), "local loss": (20, 0.9, 1000),
            "guesses with labels, capable oracle": (20, 0.9, 1000, 0.002)}
# found before 60 without momentum was tried, which is better for local losses and guesses, and
# before late gradients were searched at 20 updates, where 0.07 is better for them
DEEP_SEARCHED = {"true": (6, 0.9, 1000), "true, delayed": (0.6, 0.9, 0), "zero": (1, 0, 0),
                 "local loss": (3, 0.9, 1000),
                 **{name: (3, 0.9, 1000, 0.002) for name in WAYS if "guesses" in name}}
NO_GOAL = "zero", "shuffled"  # ways that need not reach what the others reach


def run(folder, gradients, oracle, epochs, seed, away=0, rates=(), deep=False, **options):
    """epochs: None where the run ends after so many seconds. away: milliseconds between the output
    trainer and the two others, there and back. rates: of layer 1, its momentum and warm-up, and the
    oracle's rate, if not the defaults."""
    more = ["--num-epochs", epochs] if epochs else []
    layers = DEEP if deep else dict.fromkeys(DEEP, [])
    for name, value in zip(("learning-rate", "momentum", "warm-up"), rates, strict=False):
        more += [f"--{name}", value]
    oracle = [*layers["oracle"], *oracle, *[f"--learning-rate={rate}" for rate in rates[3:]]]
    run_three(folder, seed=seed, away=away / 1000, oracle=oracle, output=layers["output"],
              input=["--gradients", gradients, *layers["input"], *more], **options)


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
    parser.add_argument("--deep", action="store_true",
                        help="three layers below the cut, at searched rates")
    parser.add_argument("--searched", action="store_true",
                        help="rates that bench-delay found at 6 updates, in place of the defaults")
    args = parser.parse_args()
    rates = DEEP_SEARCHED if args.deep else SEARCHED if args.searched else {}
    data, epochs = FUNCTIONS[args.target](KEPT / args.target), args.epochs
    if args.deep:
        data = noisy_data(KEPT / args.target / "noisy", paths=data)
        if args.ways == every:
            args.ways = [name for name, (_, oracle) in WAYS.items() if "--layers" not in oracle]
    if args.seconds:
        epochs = None
    what = f"{epochs} epochs" if epochs else f"{args.seconds} s"
    what += f", {args.away} ms away" * bool(args.away) + ", deep" * args.deep
    what += ", searched" * (args.searched and not args.deep)  # deep ones always are
    runs, results = Runs("compare", len(args.ways) * args.seeds), {}
    for seed, name in product(range(args.seeds), args.ways):
        get = partial(runs.get, f"{args.target} {name} {what}", seed)
        if name in SINGLE:
            metrics = get(run_sgd, "--num-epochs", args.epochs, *SINGLE[name], data=data)
        else:
            gradients, oracle = WAYS[name]
            metrics = get(run, gradients, oracle, epochs, away=args.away, data=data,
                          seconds=args.seconds, deep=args.deep, rates=rates.get(name, ()))
        results.setdefault(name, []).append(metrics)
    rows = []
    goal = max((final(run) for name, each in results.items() for run in each
                if not name.startswith(NO_GOAL)), default=0)
    for name, each in results.items():
        cosines, seconds = list(map(mean_cosine, each)), [run["seconds"][-1] for run in each]
        minute = [final(until(run, MINUTE)) for run in each]
        rows.append((
            name, cell(list(map(final, each))), cell(seconds, ".0f"),
            cell(minute) if min(seconds) > MINUTE - 5 else "–",
            cell(cosines, ".2f") if np.isfinite(cosines).all() else "–",
            cell([time_to(run, goal) for run in each], ".0f"),
            *("–" * 5 if name in SINGLE else (
                cell([time_to(run, goal, "updates") for run in each], ",.0f"),
                cell(list(map(still_falls, each)), ".2f"),
                cell(list(map(swing, each)), ".1f"),
                f"{np.median([run['updates'][-1] for run in each]):,.0f}",
                cell([run["cpu_ms"] for run in each], ".1f")))))
    table("compare", (
        f"{args.target} target: gradients", f"MSE after {what}", "seconds", f"MSE after {MINUTE} s",
        "mean gradient cosine", f"seconds until {goal:.4f}", f"updates until {goal:.4f}",
        "still falls", "highest over lowest row of the last third", "updates of layer 1",
        "CPU of all processes for an update, ms"), rows)
    middle = {name: each[int(np.argsort(list(map(final, each)))[len(each) // 2])]
              for name, each in results.items()}
    (KEPT / "compare.png").write_bytes(png(draw_curves, middle, size=(9, 8), dpi=110))
    print(f"wrote {KEPT / 'compare.png'}: of each way, the seed with the median MSE")


if __name__ == "__main__":
    main()
