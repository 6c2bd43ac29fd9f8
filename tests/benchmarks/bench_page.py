"""`make bench-page`: the share of throughput that the live page costs while somebody looks. About four minutes.

Windows without and with a viewer take turns in one run. The viewer asks what the page's script asks, as often, but
draws nothing itself: a browser's own work is not the training's.
"""
import argparse
import json
import tempfile
import time
import urllib.request

import numpy as np

from tests.benchmarks.measure import DATA, print_table
from tests.processes import Three, wait_until


def examples_per_second(three, looking, seconds):
    """Of a window that begins when the run's counters have just moved."""
    address, seen = f"http://127.0.0.1:{three.port('input')}", None
    began, before = time.monotonic(), three.status("input")["examples"]
    while time.monotonic() - began < seconds:
        if looking:
            version = json.load(urllib.request.urlopen(f"{address}/live"))["version"]
            for kind in ("surface", "curves") if version != seen else ():
                urllib.request.urlopen(f"{address}/{kind}.png?version={version}").read()
            seen = version
        time.sleep(2)
    return (three.status("input")["examples"] - before) / (time.monotonic() - began)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=12, help="of windows (%(default)s)")
    pairs = parser.parse_args().pairs
    with tempfile.TemporaryDirectory() as name, Three(name, input=[*DATA, "--num-epochs", 10**6]) as three:
        three.start()
        wait_until(lambda: (three.status("input") or {}).get("seconds", 0) > 8, "training to start")
        rates = np.array([[examples_per_second(three, looking, 8) for looking in (False, True)] for _ in range(pairs)])
    costs = 1 - rates[:, 1] / rates[:, 0]
    low, middle, high = np.percentile(costs, [25, 50, 75])
    print_table(("throughput that the live page costs while one looks", f"{middle:.1%}", "5%",
                 f"median of {pairs} pairs of windows; quartiles {low:.1%} and {high:.1%}; "
                 f"{np.median(rates[:, 0]):,.0f} examples/s without"))


if __name__ == "__main__":
    main()
