"""`make bench-pace`: when does decoupling pay on one machine? An hour.

The MSE after equal seconds with no delay: a cheap lower part under an expensive upper one, both
equal, and an expensive lower part under a cheap upper one, on ten inputs of which eight are noise;
oracles see labels. Each way has the best of the same rates, tried for half the seconds on a seed
that is not reported; `--search` stops after that. Zero gradients have no rate.
"""
from itertools import product
from typing import NamedTuple

import numpy as np

from tests.benchmarks.measure import (
    KEPT,
    SEARCH_SEED,
    Runs,
    cell,
    final,
    make_parser,
    noisy_data,
    run_three,
    table,
)


class Network(NamedTuple):
    below: list
    above: list
    hidden: int   # width of the oracle's one hidden layer
    rate: float   # of the lower part, by which the factors in GRID are multiplied
    output: float  # rate of the upper part


NETWORKS = {  # the wider, the lower the rates at which a layer is stable
    "cheap under expensive": Network([10, 64, 64, 64], [64, 512, 512, 512, 512, 1], 64, 1, 0.0125),
    "balanced": Network([10, 256, 256, 256, 256], [256, 256, 256, 256, 1], 128, 0.25, 0.025),
    "expensive under cheap": Network([10, 512, 512, 512, 512], [512, 64, 1], 128, 0.125, 0.0125)}
WAYS = "true", "delayed", "local", "synthetic", "zero"
GRID = (0.1, 0.9), (0.2, 0.9), (1.0, 0.0), (2.0, 0.0)  # factor on the rate; momentum


def learn(folder, network, way, rates, data, seconds, seed):
    factor, momentum = rates
    width = network.below[-1]
    run_three(folder, seconds, seed, data=data, input=[
        "--layers", *network.below, "--gradients", way, "--learning-rate", factor * network.rate,
        "--momentum", momentum, "--warm-up", 300 if way == "synthetic" else 0,
        "--decay", 20_000],
        oracle=["--layers", width, network.hidden, width, "--condition-on-labels"],
        output=["--layers", *network.above, "--learning-rate", network.output])


def describe(metrics):
    """Updates a second below and above, seconds waited, staleness, minibatches skipped above."""
    seconds, above = metrics["seconds"][-1], metrics["status"]["output"]
    staleness = metrics["staleness"][1:]
    return (metrics["updates"][-1] / seconds, above["updates"] / seconds, metrics["waited"][-1],
            np.nanmedian(staleness) if np.isfinite(staleness).any() else 0, above["skipped"])


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--seconds", type=int, default=40, help="of training (%(default)s)")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--search", action="store_true", help="only try the rates")
    args = parser.parse_args()
    data = noisy_data(KEPT / "noisy")
    cases = list(product(args.networks, args.ways))
    tried = {case: GRID if case[1] != "zero" else GRID[:1] for case in cases}
    runs = Runs("bench-pace", sum(map(len, tried.values()))
                + len(cases) * args.seeds * (not args.search))
    found = {(*case, rates): runs.score(
        f"{' '.join(case)} {rates} {args.seconds // 2} s", SEARCH_SEED, learn, NETWORKS[case[0]],
        case[1], rates, data, args.seconds // 2) for case in cases for rates in tried[case]}
    table("bench-pace-search", ("network", "gradients", *(f"{rates}" for rates in GRID)), [
        (*case, *(f"{found[*case, rates]:.4f}" if rates in tried[case] else "–" for rates in GRID))
        for case in cases])
    if args.search:
        return
    results = {}
    for seed, case in product(range(args.seeds), cases):
        best = min(tried[case], key=lambda rates, case=case: found[*case, rates])
        results.setdefault(case, []).append(runs.get(
            f"{' '.join(case)} {best} {args.seconds} s", seed, learn, NETWORKS[case[0]], case[1],
            best, data, args.seconds))
    rows = []
    for (name, way), each in results.items():
        mine, theirs = ([final(run) for run in some] for some in (each, results.get(
            (name, "true"), [])))
        below, above, waited, staleness, skipped = np.median(list(map(describe, each)), axis=0)
        rows.append((name, way, cell(mine),
                     f"{np.median(mine) / np.median(theirs):.2f}" if theirs else "–",
                     f"{below:.0f}, {above:.0f}", f"{waited:.1f}", f"{staleness:.0f}",
                     f"{skipped:,.0f}"))
    table("bench-pace", (
        "network", "gradients", f"MSE after {args.seconds} s", "÷ true gradients'",
        "updates/s below, above", "seconds waited", "staleness", "minibatches skipped above"), rows)


if __name__ == "__main__":
    main()
