"""`make bench-delay`: guesses against true gradients that come late, in one process. Hours.

When is a guess better than a true gradient that is `delay` updates old? On the default problem, cut
after layer 1, and on two whose lower part is deep, 10-64-64-64 | 64-64-1, where eight inputs are
noise: the default target, and the waves of measure.py. 8 epochs. Each way has its best rate at each
delay, of the same ones: the one whose worse run is the best, of two in half the updates, on seeds
that are not reported. "mean kept" is without exchange.centered(). examples/in_process.py holds
everything else still: the same options give the same numbers, on a busy machine, too.
bench_staleness.py is the same by processes.

A second table shows why the mean is removed: the cosine of the true gradient at the cut with
itself some updates later, for its mean over held-out examples and for the rest. Writes
bench-delay.md, .png and bench-delay-persistence.md into benchmarks/.
"""
import functools
import itertools
import json
from unittest import mock

import numpy as np
from tqdm import tqdm

import exchange
from examples import in_process
from plot import STYLES, png
from plumbing import data
from sgd import (
    backprop,
    descend,
    feed_forward,
    loss_gradient,
    make_layers,
    minibatches,
    schedule,
)
from tests.benchmarks.measure import (
    DATA,
    KEPT,
    SEARCH_SEED,
    cell,
    make_parser,
    noisy_data,
    table,
    waves_target,
)
from train_input import mean_cosine

DELAYS = 6, 20, 50, 100, 200
PERSISTENCE = 1, 3, 6, 20, 50
DEEP = ["--layers", 10, 64, 64, 64, 64, 64, 1, "--cuts", 3, "--replay", 4, "--warm-up", 300,
        "--decay", 20_000]
DEEP_RATES = (0.1, 0.9), (0.2, 0.9), (1.0, 0.0), (2.0, 0.0)
RATES = (0.8, 0.9), (2.7, 0.9), (12.0, 0.0), (30.0, 0.0)
EPOCHS = 8
PROBLEMS = {  # name: options, hidden layers of a capable and of a small oracle, rates and momenta
    "default": ([], ([64, 64], [12]), RATES),
    "deep": (DEEP, ([64], []), DEEP_RATES), "deep, waves": (DEEP, ([64], []), DEEP_RATES)}
WAYS = {  # name: --gradients, which oracle, whether it sees y, whether the mean is kept
    "true gradients, delayed": ("delayed", 0, False, False),
    "guesses with labels": ("synthetic", 0, True, False),
    "guesses with labels, small oracle": ("synthetic", 1, True, False),
    "guesses": ("synthetic", 0, False, False),
    "true gradients, delayed, mean kept": ("delayed", 0, False, True),
    "guesses with labels, mean kept": ("synthetic", 0, True, True)}


@functools.cache
def data_of(problem):
    """Paths of its x.npy and y.npy."""
    if problem == "default":
        return DATA
    if problem == "deep":
        return noisy_data(KEPT / "noisy")
    return noisy_data(KEPT / "waves" / "noisy", paths=waves_target(KEPT / "waves"))


def learn(problem, way, delay, rates, seed, epochs):
    """The held-out MSE of one run, the median over its last three epochs. Kept on disk."""
    kept = KEPT / "bench-delay" / f"{problem} {way} {delay} {rates} {seed} {epochs}.json".replace(
        ",", "")
    if kept.exists():
        return json.loads(kept.read_text())
    (options, oracles, _), paths = PROBLEMS[problem], data_of(problem)
    kind, oracle, labels, mean_kept = WAYS[way]
    words = [*paths, *options, "--gradients", kind, "--delay", delay, "--seed", seed,
             "--learning-rate", rates[0], "--momentum", rates[1], "--num-epochs", epochs,
             "--oracle-replay", 4, "--oracle-layers", *oracles[oracle],
             *["--condition-on-labels"] * labels]
    args = in_process.make_parser().parse_args(list(map(str, words)))
    centered = (lambda g: g) if mean_kept else exchange.centered
    with np.errstate(all="ignore"), mock.patch("exchange.centered", centered):
        try:
            scores = [score for _, score, *_ in in_process.run(args, data.load(*paths))]
        except FloatingPointError:
            scores = [np.inf]
    reached = float(np.nan_to_num(np.median(scores[-3:]), nan=np.inf))
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(reached))
    return reached


def persistence(problem, delays):
    """The cosine of the true gradient at the cut, at held-out examples, with itself some updates
    later: for its mean over them, and for the rest. Plain SGD, from update 400 to 2,400."""
    loaded, options = data.load(*data_of(problem)), PROBLEMS[problem][0]
    args = in_process.make_parser().parse_args(["", "", *map(str, options)])
    layers = make_layers(args.layers, np.random.default_rng(SEARCH_SEED))
    below, above = layers[:args.cuts[0]], layers[args.cuts[0]:]
    x, y, seen = loaded.x_test[:5000], loaded.y_test[:5000], []
    order = minibatches(len(loaded.x), args.batch_size, 2, SEARCH_SEED)
    for clock, i in enumerate(itertools.islice(order, 2400)):
        g = backprop(above, loss_gradient(feed_forward(layers, x), y))
        if clock >= 400:
            seen.append((g.mean(axis=0), exchange.centered(g)[:200].ravel()))
        backprop(layers, loss_gradient(feed_forward(layers, loaded.x[i]), loaded.y[i]))
        descend(below, schedule(1.0, args.decay, args.warm_up)(clock), 0.0)
        descend(above, args.output_rate, args.output_momentum)
    means, rests = map(np.array, zip(*seen, strict=True))
    for what, all_g in (("mean", means), ("the rest", rests)):
        yield problem, what, *(f"{mean_cosine(all_g[:-k], all_g[k:]):.2f}" for k in delays)


def draw(figure, results, problems):
    """The final MSE against the delay, median and range, for each problem and way."""
    from matplotlib.ticker import LogLocator, NullFormatter
    named = {}  # label: line
    for axes, problem in zip(figure.subplots(1, len(problems), squeeze=False)[0], problems,
                             strict=True):
        for (color, style), way in zip(STYLES, WAYS, strict=False):
            found = {delay: values for (p, w, delay), (_, values) in results.items()
                     if (p, w) == (problem, way)}
            if not found:
                continue
            values = np.array(list(found.values()))
            median = np.median(values, axis=1)
            axes.errorbar(list(found), median, [median - values.min(1), values.max(1) - median],
                          color=color, linestyle=style, marker="o", capsize=3, label=way)
        delays = sorted({delay for shown, _, delay in results if shown == problem})
        axes.set(xlabel="delay of true gradients, updates", ylabel="held-out MSE", xscale="log",
                 yscale="log", xticks=delays, xticklabels=delays, title={
                     "default": "one layer below the cut: 2-24 | 24-12-1",
                     "deep": "three layers below the cut: 10-64-64-64 | 64-64-1",
                     "deep, waves": "three layers below the cut, waves"}[problem])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:.3g}",
                       minor_formatter="")
        axes.grid(True, alpha=0.25)
        named.update(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=2)


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=PROBLEMS)
    parser.add_argument("--delays", type=int, nargs="+", default=DELAYS)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    args = parser.parse_args()
    cases, results = list(itertools.product(args.problems, args.ways, args.delays)), {}
    for problem, way, delay in (bar := tqdm(cases, unit="case")):
        bar.set_postfix_str(f"{problem}, {way}, {delay}")
        found = {rates: max(learn(problem, way, delay, rates, SEARCH_SEED + n, EPOCHS // 2)
                            for n in range(2)) for rates in PROBLEMS[problem][-1]}
        best = min(found, key=found.get)
        results[problem, way, delay] = best, [
            learn(problem, way, delay, best, seed, EPOCHS) for seed in range(args.seeds)]
    shown = {case: f"{cell(values)} at {best}" for case, (best, values) in results.items()}
    late = [f"{delay} updates late" for delay in args.delays]
    table("bench-delay", ("network", "gradients", *late), [
        (problem, way, *(shown[problem, way, delay] for delay in args.delays))
        for problem in args.problems for way in args.ways])
    table("bench-delay-persistence", ("network", "true gradient", *(
        f"{k} updates later" for k in PERSISTENCE)), [
        row for problem in args.problems for row in persistence(problem, PERSISTENCE)])
    (KEPT / "bench-delay.png").write_bytes(png(
        draw, results, args.problems, size=(5 * max(2, len(args.problems)), 4.8), dpi=110))


if __name__ == "__main__":
    main()
