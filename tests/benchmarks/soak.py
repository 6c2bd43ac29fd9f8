"""`make soak`: the default run for an hour; are resident memory and latency flat? `ARGS="--seconds 600"` for a shorter one."""
import argparse
import tempfile

import numpy as np
from tqdm import tqdm

from tests.benchmarks.measure import DATA, TARGETS, resident_megabytes, table
from tests.processes import Three, wait_until


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=3600, help="%(default)s")
    seconds = parser.parse_args().seconds
    rows = []
    with tempfile.TemporaryDirectory() as name, Three(name, input=[*DATA, "--num-epochs", 10**6]) as three:
        three.start()
        with tqdm(total=seconds, unit="s") as bar:
            while not rows or rows[-1][0] < seconds:
                state = wait_until(lambda: (s := three.status("input")) and s["seconds"] > 10 * (len(rows) + 1) and s,
                                   "ten more seconds of training", 120)
                rows.append((state["seconds"], resident_megabytes(three), state["latency_ms"],
                             state["latency_ms_p95"], state["test_mse"]))
                bar.update(round(rows[-1][0]) - bar.n)
        counters = {name: three.status(name) for name in three.processes}
    rows = np.array(rows)
    quarter = len(rows) // 4
    first, last = np.median(rows[:quarter], axis=0), np.median(rows[-quarter:], axis=0)
    table("soak", TARGETS, [
        *((what, f"{last[n]:.{digits}f}", "–",
           f"{first[n]:.{digits}f} in the first quarter; {rows[:, n].min():.{digits}f} to {rows[:, n].max():.{digits}f}")
          for n, what, digits in ((1, f"resident memory of the three, MB, last quarter of {seconds} s", 0),
                                  (2, "estimate_gradients, median, ms", 2), (3, "estimate_gradients, 95th percentile, ms", 2),
                                  (4, "held-out MSE", 4))),
        ("examples sent, and dropped by the senders", ", ".join(
            f"{sent['sent']:,} and {sent['dropped']:,}" for sent in (
                counters["input"]["examples_sent"], counters["output"]["gradients"])), "–",
         "by the input trainer, by the output trainer")])


if __name__ == "__main__":
    main()
