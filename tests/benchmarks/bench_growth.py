"""`make bench-growth`: memory and time per stored example, from 20,000 to 2 million, and at a width
of 1024.

Fills a real output trainer and a real oracle over HTTP, and watches them train over what they hold.
About two minutes.
"""
import argparse
import tempfile
from pathlib import Path

import numpy as np
import psutil
from tqdm import tqdm

from plumbing.wire import rows_per_message
from synthgrad import OracleClient, PartClient
from tests.benchmarks.measure import TARGETS, table
from tests.processes import Three, wait_until

CASES = [(24, 20_000, 2_000_000), (1024, 20_000, 200_000)]  # width, fewer examples, more examples
BATCH = 100  # examples an update, the default


def resident(three, name):
    return psutil.Process(three.processes[name].pid).memory_info().rss


def fill(three, name, width, start, count):
    """Posts examples with the indices start, start + 1, …; returns when all are stored."""
    rng = np.random.default_rng(start)
    rows = min(5000, rows_per_message(2 * width + 1))
    kind = PartClient if name == "output" else OracleClient
    client = kind(f"127.0.0.1:{three.port(name)}", timeout=60)
    for k in range(start, count, rows):
        i = np.arange(k, min(k + rows, count))
        clock = np.full(len(i), k)
        h, y = rng.random((len(i), width), "f"), rng.random((len(i), 1), "f")
        if name == "output":
            client.training_examples(i, h, y, clock, 0 * i)
        else:
            client.provide_gradients(i, h, y, clock, 0 * i, 0.01 * h)


def grow(folder, name, width, fewer, more):
    """One of the two alone, filled in two stages: bytes per example over raw bytes, and µs per
    example at each."""
    folder.mkdir()
    kept = ["--keep", more, "--replay", 1e6]
    with Three(folder, oracle=["--layers", width, width, "--learning-rate", 1e-4, *kept],
               output=["--layers", width, 12, 1, "--learning-rate", 1e-3, *kept]) as three:
        three.start("oracle", "output")
        wait_until(lambda: (three.status("oracle") or {}).get("ready") and three.status("output"),
                   "the processes", 120)
        sizes, times, done = [], [], 0
        for count in (fewer, more):
            fill(three, name, width, done, count)
            done = count
            wait_until(lambda: not three.status(name).get("waiting"),
                       "what has arrived to be trained on", 300)
            # of replay, which has no bound here
            times.append(1e6 / BATCH / three.updates_per_second(name, 4))
            sizes.append(resident(three, name))
        raw = {"output": 4 * width + 4, "oracle": 8 * width + 16}[name]  # h, y; h, g, clock, start
    return (sizes[1] - sizes[0]) / (more - fewer) / raw, times


def main():
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary, tqdm(total=2 * len(CASES), unit="part") as bar:
        for width, fewer, more in CASES:
            for name in ("output", "oracle"):
                memory, (before, after) = grow(Path(temporary) / f"{name}{width}", name, width,
                                               fewer, more)
                rows += [(f"{name}, width {width}: bytes per stored example over raw bytes",
                          f"{memory:.2f}", "2", f"from {fewer:,} to {more:,} examples"),
                         (f"{name}, width {width}: time per example, {more:,} over {fewer:,} "
                          f"stored", f"{after / before:.2f}", "1.1",
                          f"{before:.2f} → {after:.2f} µs")]
                bar.update()
    table("bench-growth", TARGETS, rows)


if __name__ == "__main__":
    main()
