"""`make bench-chain`: every layer in a process of its own. Two hours; without digits 40 minutes.

    make bench-chain ARGS="--problems default noise"
    make bench-chain ARGS="--file mnist_5k.npz"        # without --file, Keras downloads MNIST

The default problem 2-24 | 24-12 | 12-1, ten inputs of which eight are noise (10-64 | 64 | 64 | 64 |
1), and digits with two, three and four hidden layers of 256: the setting of the paper's table 1.
True gradients go through the whole chain. Guesses, with labels or without, come from linear oracles
or from deep ones: one hidden layer of 128 for digits, 64-64 elsewhere.

Writes bench-chain.md, the held-out MSE or test error, and bench-chain-parts.md: what each part did,
and for seed 0 the cosine of each link's guess with two gradients. One is that of backprop through
the whole network. The other is what the link's oracle learns from, which comes from the next link's
guess. examples/in_process.py measures them, after as many updates. `--search` tries the same rates
for every way in half the updates, on a seed that is not reported.
"""
import json
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from examples import in_process
from exchange import centered
from plumbing import data
from sgd import backprop, feed_forward, task_of
from tests.benchmarks.measure import (
    DATA,
    KEPT,
    SEARCH_SEED,
    Runs,
    cell,
    digits_data,
    final,
    make_parser,
    noisy_data,
    run_chain,
    table,
)
from train_input import mean_cosine, with_rates


class Problem(NamedTuple):
    dims: list      # of the whole network
    updates: int    # of the lowest part, with minibatches of 100
    hidden: list    # layers of a deep oracle
    decay: float    # updates, of all parts but the highest
    output: float   # learning rate of the highest part
    grid: tuple     # rate, momentum and warm-up of all parts but the highest
    best: dict      # of the grid, for a way or kind of gradients, linear oracles, and all else


def digits(depth):
    best = 3.0, 0.0, 300
    return Problem([784, *[256] * depth, 10], 2000, [128], 1e9, 0.02,
                   ((0.3, 0.0, 300), (1.0, 0.0, 300), best),
                   {"linear": (0.1, 0.0, 300), "guesses": (0.3, 0.0, 300), "other": best})


PROBLEMS = {
    "default": Problem([2, 24, 12, 1], 15_200, [64, 64], 5000, 0.1,
                       ((2.7, 0.9, 0), (8, 0.9, 1000), (20, 0.9, 1000), (30, 0, 1000),
                        (240, 0, 1000)),
                       {"true": (20, 0.9, 1000), "delayed": (30, 0, 1000),
                        "local": (8, 0.9, 1000), "linear": (3, 0, 1000),
                        "guesses, labels": (240, 0, 1000), "other": (30, 0, 1000)}),
    "noise": Problem([10, 64, 64, 64, 1], 13_300, [64, 64], 20_000, 0.02,
                     ((1.5, 0.9, 1000), (3, 0.9, 1000), (6, 0, 1000), (20, 0, 1000),
                      (60, 0, 1000)),
                     {"true": (3, 0.9, 1000), "delayed": (20, 0, 1000), "local": (60, 0, 1000),
                      "linear": (1, 0, 300), "guesses, labels": (60, 0, 1000),
                      "other": (6, 0, 1000)}),
    **{f"digits, {depth} hidden": digits(depth) for depth in (2, 3, 4)}}
WAYS = {  # name: --gradients, whether the oracles are deep, whether they see y
    "true": ("true", True, False),
    "delayed": ("delayed", True, False),
    "local": ("local", True, False),
    "zero": ("zero", True, False),
    "guesses, linear": ("synthetic", False, False),
    "guesses": ("synthetic", True, False),
    "guesses, labels, linear": ("synthetic", False, True),
    "guesses, labels": ("synthetic", True, True),
    "guesses, cut once": ("synthetic", True, False)}  # 2-24 | 24-12-1: the three processes


def best_rates(problem, way):
    kind = "linear" if "linear" in way else WAYS[way][0]
    return problem.best.get(way) or problem.best.get(kind, problem.best["other"])


def learn(folder, problem, way, rates, loaded, paths, epochs, seed):
    """One run of the chain, in processes."""
    (kind, deep, labels), dims = WAYS[way], problem.dims
    below = ["--learning-rate", rates[0], "--momentum", rates[1], "--warm-up", rates[2],
             "--decay", problem.decay]
    run_chain(folder, [dims[:2], dims[1:]] if "once" in way else list(pairwise(dims)), seed, epochs,
              paths, gradients=kind, labels=loaded.y.shape[1] if labels else 0,
              oracle_layers=problem.hidden if deep else [], middle=below,
              input=[*below, "--held-out", len(loaded.x_test)],
              output=["--learning-rate", problem.output, *(
                  ["--decay", problem.decay] if problem.decay > 1e6 else [])])


def cosines(kept, problem, way, rates, loaded, paths, epochs):
    """[with the gradient of backprop, with what the oracle learns from] for each link, lowest
    first, after a run in one process. Kept on disk."""
    if kept.exists():
        return json.loads(kept.read_text())
    _, deep, labels = WAYS[way]
    cuts = range(1, len(problem.dims) - 1)
    words = [*paths, "--layers", *problem.dims, "--cuts", *cuts, "--num-epochs", epochs,
             "--learning-rate", rates[0], "--momentum", rates[1], "--warm-up", rates[2],
             "--decay", problem.decay, "--output-rate", problem.output,
             "--oracle-layers", *(problem.hidden if deep else []),
             *["--condition-on-labels"] * labels]
    args = with_rates(in_process.make_parser().parse_args(list(map(str, words))))
    with np.errstate(all="ignore"):
        *_, (_, _, layers, cut) = in_process.run(args, loaded)
    x, y = loaded.x_test[:500], loaded.y_test[:500]
    y_hat, found = feed_forward(layers, x), []
    full = learned = backprop(layers[-1:], task_of(y.shape[1]).loss_gradient(y_hat, y))
    links = []
    while cut:
        links.insert(0, cut)
        cut = cut.higher
    for layer, above, link in zip(layers[-2::-1], layers[:0:-1], links, strict=True):
        guess, _ = link.guess(above.x, y)
        found.insert(0, [mean_cosine(full, guess), mean_cosine(learned, guess)])
        full, learned = layer.backprop(full), layer.backprop(centered(guess))
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(found))
    return found


def describe_parts(metrics):
    """Updates a second of each part, minibatches that each skipped, the memory that each part above
    the lowest and each oracle adds, the lowest link's staleness, and seconds."""
    above = [status for status in reversed(metrics["status"].values())
             if "skipped" in (status or {})]
    oracles = [status for name, status in metrics["status"].items() if name.startswith("oracle")]
    rates = [metrics["updates"][-1], *(status["updates"] for status in above)]
    stale = metrics["staleness"][1:]
    return (", ".join(f"{updates / metrics['seconds'][-1]:.0f}" for updates in rates),
            ", ".join(str(status["skipped"]) for status in above),
            *(", ".join(str(status.get("megabytes", "–")) for status in each) or "–"
              for each in (above, oracles)),
            f"{np.nanmedian(stale):.0f}" if np.isfinite(stale).any() else "–",
            f"{metrics['seconds'][-1]:.0f}")


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--file", type=Path, help="an .npz file in the form of Keras' mnist.npz")
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=PROBLEMS)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--updates", type=int, help="of the lowest part, in place of each "
                                                    "problem's own")
    parser.add_argument("--no-cosines", action="store_true", help="leave out what is measured in "
                                                                  "one process")
    parser.add_argument("--search", action="store_true", help="print what the rates give, instead")
    args = parser.parse_args()
    cases, inputs = [], {}
    for name, way in product(args.problems, args.ways):
        if name == "default" or "once" not in way:
            cases.append((name, way))
    for name in args.problems:
        paths, held_out = (digits_data(KEPT / "digits-data", args.file) if "digits" in name else
                           (DATA if name == "default" else noisy_data(KEPT / "noisy"), None))
        loaded = data.load(*paths, held_out)
        updates = (args.updates or PROBLEMS[name].updates) // (2 if args.search else 1)
        inputs[name] = loaded, paths, max(1, round(updates * 100 / len(loaded.x)))
    if args.search:
        return search(cases, inputs)
    runs, results = Runs("bench-chain", len(cases) * args.seeds), {}
    for seed, (name, way) in product(range(args.seeds), cases):
        problem = PROBLEMS[name]
        results.setdefault((name, way), []).append(runs.get(
            f"{name} {way} {args.updates or ''}", seed, learn, problem, way,
            best_rates(problem, way), *inputs[name]))

    def score(name, way):
        if (name, way) not in results:
            return "–"
        scale, form = (100, ".1f") if "digits" in name else (1, ".4f")
        return cell([scale * final(each) for each in results[name, way]], form)
    table("bench-chain", ("held-out MSE; digits: test error, %", *args.ways), [
        (name, *(score(name, way) for way in args.ways)) for name in args.problems])
    rows = []
    for name, way in cases:
        row = [name, way, *describe_parts(results[name, way][0]), "–", "–"]
        if WAYS[way][0] == "synthetic" and "once" not in way and not args.no_cosines:
            found = cosines(runs.folder / "cosines" / f"{name} {way} {args.updates or ''}.json",
                            PROBLEMS[name], way, best_rates(PROBLEMS[name], way), *inputs[name])
            row[-2:] = (", ".join(f"{value:.2f}" for value in column)
                        for column in zip(*found, strict=True))
        rows.append(row)
    table("bench-chain-parts", (
        "network", "gradients", "updates/s of each part, the lowest first", "minibatches skipped",
        "MB that each part above the lowest adds", "MB that each oracle adds",
        "staleness of the lowest link", "seconds", "cosine of each link's guess with backprop's",
        "with what its oracle learns from"), rows)


def search(cases, inputs):
    runs = Runs("bench-chain-search", sum(len(PROBLEMS[name].grid) for name, _ in cases))
    table("bench-chain-search", ("network", "gradients", "rate, momentum, warm-up: reached"), [
        (name, way, "; ".join(f"{rates}: " + format(runs.score(
            f"{name} {way} {rates} {inputs[name][-1]}", SEARCH_SEED, learn, PROBLEMS[name], way,
            rates, *inputs[name]), ".4f") for rates in PROBLEMS[name].grid))
        for name, way in cases])


if __name__ == "__main__":
    main()
