"""`make bench-staleness`: guesses against true gradients that come late, by processes. 45 minutes.

bench_delay.py asks this in one process; here three processes, or two for delayed gradients, answer
for two delays where the lower part is deep: 10-64-64-64 | 64-64-1 with eight inputs of noise. For
the default problem at other delays: ARGS="--problems default --staleness 10 20 50 100 200".

The delay is made: answers to the output trainer's gradients come late, and it sends the next ones
only then. So the newest gradient that a guess was learned from is half as old as --staleness allows
in the median, and --staleness is twice the staleness asked for. A delayed gradient is always as old
as --staleness allows. Layer 1 runs in bursts then, so the output trainer skips minibatches; the
table says how many, and a skipped one gives no gradient. Each way has the best of the same rates,
tried in half the updates on a seed that is not reported. Writes benchmarks/bench-staleness.md and
.png.
"""
from itertools import product

import numpy as np
from matplotlib.ticker import LogLocator

from plot import STYLES, png
from tests.benchmarks.bench_delay import DEEP_RATES, RATES
from tests.benchmarks.measure import (
    DATA,
    KEPT,
    SEARCH_SEED,
    Runs,
    cell,
    final,
    make_parser,
    noisy_data,
    run_three,
    swing,
    table,
)

PER_SECOND = 150  # updates; slower than layer 1 could be, so that --staleness is what limits it
PROBLEMS = {  # name: options of the input trainer, the output trainer and the oracle; rates
    "deep": (["--layers", 10, 64, 64, 64, "--warm-up", 300, "--decay", 20_000],
             ["--layers", 64, 64, 1, "--replay", 4], ["--layers", 64, 64, 64, "--replay", 4],
             DEEP_RATES),
    "default": ([], [], [], RATES)}
WAYS = {  # name: --gradients, options of the oracle
    "true gradients, delayed": ("delayed", []),
    "guesses with labels": ("synthetic", ["--condition-on-labels"]),
    "guesses": ("synthetic", [])}


def learn(folder, problem, way, staleness, rates, epochs, seed):
    below, above, oracle, _ = PROBLEMS[problem]
    kind, labels = WAYS[way]
    bound = staleness if kind == "delayed" else 2 * staleness
    run_three(folder, seed=seed, data=DATA if problem == "default" else noisy_data(KEPT / "noisy"),
              late=bound / PER_SECOND, oracle=[*oracle, *labels], output=above,
              input=[*below, "--gradients", kind, "--staleness", bound, "--num-epochs", epochs,
                     "--learning-rate", rates[0], "--momentum", rates[1]])


def draw(figure, results, problems):
    """The final MSE against the median staleness, median and range, by problem and way."""
    for axes, problem in zip(figure.subplots(1, len(problems), squeeze=False)[0], problems,
                             strict=True):
        for (color, style), way in zip(STYLES, WAYS, strict=False):
            points = np.array([
                (np.median([np.nanmedian(each["staleness"][1:]) for each in group]),
                 *np.percentile(list(map(final, group)), (0, 50, 100)))
                for (p, w, _), (_, group) in results.items() if (p, w) == (problem, way)])
            if len(points):
                stale, low, median, high = points.T
                axes.errorbar(stale, median, [median - low, high - median], color=color,
                              linestyle=style, marker="o", capsize=3, label=way)
        axes.set(xlabel="median staleness, updates", ylabel="held-out MSE", yscale="log",
                 title=problem)
        axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:.3g}",
                       minor_formatter="")
        axes.grid(True, which="both", alpha=0.25)
        axes.legend(fontsize=8)


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--epochs", type=int, default=4, help="of a run (%(default)s)")
    parser.add_argument("--problems", nargs="+", default=["deep"], choices=PROBLEMS)
    parser.add_argument("--staleness", type=int, nargs="+", default=[20, 50],
                        help="updates (%(default)s)")
    parser.add_argument("--ways", nargs="+", default=list(WAYS)[:2], choices=WAYS)
    args = parser.parse_args()
    cases, results = list(product(args.problems, args.ways, args.staleness)), {}
    runs = Runs("bench-staleness", len(cases) * args.seeds
                + sum(len(PROBLEMS[problem][-1]) for problem, *_ in cases))
    half = max(1, args.epochs // 2)
    for problem, way, staleness in cases:
        def score(rates, case=(problem, way, staleness)):
            return runs.score(f"{case} {rates} {half} epochs".replace("'", ""), SEARCH_SEED, learn,
                              *case, rates, half)
        best = min(PROBLEMS[problem][-1], key=score)
        results[problem, way, staleness] = best, [runs.get(
            f"{problem} {way} {staleness} {best} {args.epochs} epochs", seed, learn, problem, way,
            staleness, best, args.epochs) for seed in range(args.seeds)]
    table("bench-staleness", (
        "network", "gradients", "staleness asked for", "measured", "rate, momentum",
        f"MSE after {args.epochs} epochs", "highest over lowest row of the last third",
        "minibatches", "of them skipped above", "seconds"),
        [(*case, cell([np.nanmedian(each["staleness"][1:]) for each in group], ".0f"), best,
          cell(list(map(final, group))), cell(list(map(swing, group)), ".2f"),
          f"{np.median([each['updates'][-1] for each in group]):,.0f}",
          cell([each["status"]["output"]["skipped"] for each in group], ",.0f"),
          cell([each["seconds"][-1] for each in group], ".0f"))
         for case, (best, group) in results.items()])
    (KEPT / "bench-staleness.png").write_bytes(png(
        draw, results, args.problems, size=(6 * len(args.problems), 4.5), dpi=110))


if __name__ == "__main__":
    main()
