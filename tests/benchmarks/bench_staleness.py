"""`make bench-staleness`: the final MSE against the bound on staleness and against the learning rate: where does the
control loop begin to swing? Half an hour for three seeds. Writes benchmarks/bench-staleness.md and .png.

Guesses are hardly ever as stale as they may be, so here the oracle is about as far away as the bound: the output trainer
waits 1/300 s for each update of the bound (500, where there is none) before it sends the next gradients. `--replay` instead chooses --staleness and --replay, on another target and other seeds.
"""
import argparse
import itertools

import numpy as np

from plot import STYLES, png
from tests.benchmarks.measure import KEPT, Runs, cell, final, other_target, run_three, swing, table

BOUNDS, RATES, NONE = (10, 20, 50, 100, 200, 10**6), (0.75, 1.5, 3.0), 10**6
REPLAYS = (1, 2, 4, 8, 16)


def draw(figure, reached):
    """Median and range of the final MSE, by rate, against the staleness that there was."""
    axes = figure.subplots()
    for (color, style), rate in zip(STYLES, RATES):
        stale = [np.median([stale for stale, _ in reached[bound, rate]]) for bound in BOUNDS]
        values = np.array([[mse for _, mse in reached[bound, rate]] for bound in BOUNDS])
        axes.errorbar(stale, np.median(values, axis=1), [np.median(values, axis=1) - values.min(axis=1),
                                                         values.max(axis=1) - np.median(values, axis=1)],
                      color=color, linestyle=style, marker="o", capsize=3, label=f"learning rate {rate}")
    axes.set(xlabel="staleness of the guesses, updates (median of a run)", ylabel="held-out MSE after 8 epochs", xscale="log",
             yscale="log")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="%(default)s")
    parser.add_argument("--epochs", type=int, default=8, help="%(default)s")
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
        reached.setdefault((bound, rate), []).append((np.median(metrics["staleness"][1:]), final(metrics)))
    table("bench-staleness", ("bound", "rate", "median staleness", "MSE"), [
        ("none" if bound == NONE else bound, rate, cell([stale for stale, _ in each], ".0f"), cell([mse for _, mse in each]))
        for (bound, rate), each in reached.items()])
    (KEPT / "bench-staleness.png").write_bytes(png(draw, reached, size=(7, 4.5), dpi=110))


if __name__ == "__main__":
    main()
