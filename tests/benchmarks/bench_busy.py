"""`make bench-busy`: the same run on an idle and on a busy machine. Half an hour for three seeds.

8 epochs of the default run; the three in sessions of their own, as three terminals are, or in one; other programs take
one core or both, from a session of their own or from the same one (which is how it is wherever the kernel does not share
the cores out between sessions first). Every ratio is within one seed.
"""
import argparse

import numpy as np

from tests.benchmarks.measure import TARGETS, Runs, busy, final, ratio, run_three, table

CASES = {  # name: cores that other programs take, from the same session, the three in sessions of their own
    "idle, three sessions": (0, False, True),
    "idle, one session": (0, False, False),
    "one core taken, three sessions": (1, False, True),
    "one core taken, one session": (1, False, False),
    "both cores taken, three sessions": (2, False, True),
    "both cores taken, one session": (2, False, False),
    "both cores taken by the same session": (2, True, False)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="%(default)s")
    seeds = parser.parse_args().seeds
    runs = Runs("bench-busy", seeds * len(CASES))
    metrics = {name: [] for name in CASES}
    for seed in range(seeds):
        for name, (cores, same_session, session) in CASES.items():
            def run(folder):
                with busy(cores, same_session):
                    run_three(folder, seed=seed, input=["--num-epochs", 8], session=session)
            metrics[name].append(runs.get(name, seed, run))
    idle = [final(each) for each in metrics["idle, three sessions"]]
    rows = [(f"MSE after 8 epochs: {name}; over idle, three sessions", *ratio(list(map(final, each)), idle)[:1],
             "1.2 either way" if name.startswith("idle") else "1.25", ratio(list(map(final, each)), idle)[1])
            for name, each in metrics.items() if name != "idle, three sessions"]
    rows += [(f"{name}: seconds until training begins; staleness, 95th percentile, at most; updates/s",
              f"{max(each['ready'] for each in runs_):.0f}; {max(np.nanmax(each['staleness_p95']) for each in runs_):.0f}; "
              f"{np.median([each['updates'][-1] / each['seconds'][-1] for each in runs_]):.0f}", "30; 20; –",
              f"waited {max(each['waited'][-1] for each in runs_):.1f} s of {max(each['seconds'][-1] for each in runs_):.0f} at most")
             for name, runs_ in metrics.items()]
    table("bench-busy", TARGETS, rows)


if __name__ == "__main__":
    main()
