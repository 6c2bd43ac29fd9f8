"""`make bench-busy`: the same run on an idle and on a busy machine. Half an hour for three seeds.

8 epochs; the three in sessions of their own, as three terminals are, or in one;
other programs take one core or both, from a session of their own or from the same one (which is how
it is wherever the kernel does not share the cores out between sessions first). Every ratio is
within one seed.
"""
import numpy as np

from tests.benchmarks.measure import (
    FUNCTIONS,
    KEPT,
    TARGETS,
    Runs,
    busy,
    final,
    make_parser,
    ratio,
    run_three,
    table,
)

CASES = {  # name: cores that others take, whether from the same session, three sessions or one
    "idle, three sessions": (0, False, True),
    "idle, one session": (0, False, False),
    "one core taken, three sessions": (1, False, True),
    "one core taken, one session": (1, False, False),
    "both cores taken, three sessions": (2, False, True),
    "both cores taken, one session": (2, False, False),
    "both cores taken by the same session": (2, True, False)}


def learn(folder, cores, same_session, session, data, seed):
    with busy(cores, same_session):
        run_three(folder, seed=seed, input=["--num-epochs", 8], session=session, data=data)


def describe(group):
    """The worst of a case's runs, and how long they waited."""
    stale = max(np.nanmax(each["staleness_p95"]) for each in group)
    rate = np.median([each["updates"][-1] / each["seconds"][-1] for each in group])
    waited, seconds = (max(each[name][-1] for each in group) for name in ("waited", "seconds"))
    return (f"{max(each['ready'] for each in group):.0f}; {stale:.0f}; {rate:.0f}", "30; 20; –",
            f"waited {waited:.1f} s of {seconds:.0f} at most")


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES,
                        help="the first is what the others are compared with (all)")
    parser.add_argument("--target", choices=FUNCTIONS, default="default", help="(%(default)s)")
    args = parser.parse_args()
    paths = FUNCTIONS[args.target](KEPT / args.target)
    runs = Runs("bench-busy", args.seeds * len(args.cases))
    metrics = {name: [] for name in args.cases}
    for seed in range(args.seeds):
        for name in args.cases:
            metrics[name].append(runs.get(f"{args.target} {name}", seed, learn, *CASES[name],
                                          paths))
    rows, (first, *others) = [], args.cases
    idle = list(map(final, metrics[first]))
    for name in others:
        value, pairs = ratio(list(map(final, metrics[name])), idle)
        rows.append((f"{args.target}, MSE after 8 epochs: {name}; over {first}", value,
                     "1.2 either way" if name.startswith("idle") else "1.25", pairs))
    rows += [(f"{name}: seconds until training begins; staleness, 95th percentile, at most; "
              "updates/s", *describe(group)) for name, group in metrics.items()]
    table("bench-busy", TARGETS, rows)


if __name__ == "__main__":
    main()
