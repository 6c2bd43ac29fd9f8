"""`make bench-staleness`: the final MSE against the bound on staleness and against the learning rate: where does the
control loop begin to swing? Twenty minutes for three seeds. Writes benchmarks/bench-staleness.md and .png.

Guesses are hardly ever as stale as they may be, so here the oracle is about as far away as the bound: the output trainer
waits 1/300 s for each update of the bound (500, where there is none) before it sends the next gradients. `--replay`
instead tries what replay gives, on another target and other seeds.
"""
import argparse
import itertools

import numpy as np
from matplotlib.ticker import LogLocator

from plot import STYLES, png
from tests.benchmarks.measure import KEPT, Runs, cell, final, other_target, run_three, swing, table

BOUNDS, RATES, NONE = (10, 20, 50, 100, 200, 10**6), (1.0, 3.0), 10**6
REPLAYS = (1, 2, 4, 8, 16)


def draw(figure, reached):
    """Median and range of the final MSE, and of the swing, against the bound, by rate."""
    names = [f"{'none' if bound == NONE else bound}\n({np.median([run[0] for rate in RATES for run in reached[bound, rate]]):.0f})"
             for bound in BOUNDS]
    for axes, n, label in zip(figure.subplots(1, 2), (1, 2), ("held-out MSE", "highest ÷ lowest row of the last third")):
        for shift, (color, style), rate in zip((-0.06, 0.06), STYLES, RATES):
            values = np.array([[run[n] for run in reached[bound, rate]] for bound in BOUNDS])
            median = np.median(values, axis=1)
            axes.errorbar(np.arange(len(BOUNDS)) + shift, median, [median - values.min(axis=1), values.max(axis=1) - median],
                          color=color, linestyle=style, marker="o", capsize=3, label=f"learning rate {rate:g}")
        axes.set(xlabel="--staleness, updates (and the median of what there was)", ylabel=label, yscale="log",
                 xticks=range(len(BOUNDS)), xticklabels=names)
        axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:.3g}", minor_formatter="")
        axes.grid(True, which="both", alpha=0.25)
        axes.legend()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="%(default)s")
    parser.add_argument("--epochs", type=int, default=4, help="of a run (%(default)s)")
    parser.add_argument("--replay", action="store_true", help="choose the defaults, on another target")
    args = parser.parse_args()
    if args.replay:
        data, seeds = other_target(KEPT / "other"), range(11, 11 + args.seeds)
        runs, reached = Runs("bench-replay", len(REPLAYS) * args.seeds), {}
        for seed, replay in itertools.product(seeds, REPLAYS):
            reached.setdefault(replay, []).append(runs.get(f"replay {replay}", seed, lambda folder: run_three(
                folder, seed=seed, data=data, oracle=["--replay", replay], output=["--replay", replay],
                input=["--num-epochs", args.epochs])))
        return table("bench-replay", ("--replay of both", "MSE on another target", "highest over lowest row of the last third",
                                      "seconds"), [
            (replay, cell(list(map(final, each))), cell(list(map(swing, each)), ".2f"),
             cell([metrics["seconds"][-1] for metrics in each], ".0f")) for replay, each in reached.items()])
    runs, reached = Runs("bench-staleness", len(BOUNDS) * len(RATES) * args.seeds), {}
    for seed, bound, rate in itertools.product(range(args.seeds), BOUNDS, RATES):
        metrics = runs.get(f"bound {bound} rate {rate}", seed, lambda folder: run_three(
            folder, seed=seed, late=min(bound, 500) / 300, input=[
                "--num-epochs", args.epochs, "--staleness", bound, "--learning-rate", rate]))
        reached.setdefault((bound, rate), []).append((
            np.median(metrics["staleness"][1:]), final(metrics), swing(metrics), metrics["seconds"][-1]))
    table("bench-staleness", ("--staleness", "learning rate", "median staleness", f"MSE after {args.epochs} epochs",
                              "highest over lowest row of the last third", "seconds"), [
        ("none" if bound == NONE else bound, rate, *(cell(column, form) for column, form in zip(
            zip(*each), (".0f", ".4f", ".2f", ".0f"))))
        for (bound, rate), each in reached.items()])
    (KEPT / "bench-staleness.png").write_bytes(png(draw, reached, size=(10, 4.2), dpi=110))


if __name__ == "__main__":
    main()
