"""`make bench-page`: what a browser on the live page costs: the MSE after 8 epochs with one, over
that without.

The viewer asks what the page's script asks, as often, and draws nothing; the page's own process
draws. Six minutes.
"""
import contextlib
import subprocess
import sys

from tests.benchmarks.measure import TARGETS, Runs, final, make_parser, ratio, run_three, table
from tests.processes import end, free_ports, start, wait_until

VIEWER = """
import json, sys, time, urllib.request
shown = None
while True:
    version = json.load(urllib.request.urlopen(sys.argv[1] + "live"))["version"]
    for kind in ("surface", "curves", "guess") if version != shown else ():
        urllib.request.urlopen(f"{sys.argv[1]}{kind}.png").read()
    shown = version
    time.sleep(2)
"""


@contextlib.contextmanager
def looked_at(folder):
    """The live page of the run in `folder`, and somebody who looks at it."""
    port = free_ports(1)[0]
    page = start("plot.py", "--live", folder / "progress", "--port", port, log=folder / "page.log")
    wait_until(lambda: str(port) in (folder / "page.log").read_text(), "the live page")
    viewer = subprocess.Popen([sys.executable, "-c", VIEWER, f"http://127.0.0.1:{port}/"],
                              start_new_session=True)
    try:
        yield
        assert viewer.poll() is None
    finally:
        end(viewer)
        end(page)


def alone(folder, seed):
    run_three(folder, seed=seed, input=["--num-epochs", 8])


def watched(folder, seed):
    with looked_at(folder):
        alone(folder, seed)


def main():
    seeds = make_parser(__doc__).parse_args().seeds
    runs = Runs("bench-page", 2 * seeds)
    pairs = [[runs.get(run.__name__, seed, run) for run in (watched, alone)]
             for seed in range(seeds)]
    scores = [list(map(final, group)) for group in zip(*pairs, strict=True)]
    seconds = [[each["seconds"][-1] for each in group] for group in zip(*pairs, strict=True)]
    value, all_pairs = ratio(*scores)
    table("bench-page", TARGETS, [
        ("MSE after 8 epochs with a browser on the live page, over that without", value, "1.1",
         all_pairs),
        ("seconds with, over those without", ratio(*seconds)[0], "–", "")])


if __name__ == "__main__":
    main()
