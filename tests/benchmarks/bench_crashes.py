"""`make bench-crashes`: ten times kill -9 on one of the three in the middle of a run, against an undisturbed run.

A killed process is started again with the same command (the input trainer with --resume), and nothing else is done.
About two minutes a seed.
"""
import argparse
import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from plot import read_metrics
from tests.benchmarks.measure import DATA, print_table, run_three
from tests.processes import Three, wait_until

VICTIMS = ["oracle", "output", "input", "oracle", "output", "input", "oracle", "output", "input", "oracle"]


def disturbed(folder, seed, options, epochs):
    """The same run with a kill after each eleventh of it; returns its metrics."""
    folder.mkdir()
    seeds = ["--seed", seed]
    with Three(folder, oracle=seeds, output=seeds, input=[*options, *seeds]) as three:
        three.start()

        def epoch():
            return float((three.status("input") or {}).get("epoch") or 0)
        for n, victim in enumerate(tqdm(VICTIMS, desc="kills", unit="kill"), 1):
            wait_until(lambda: epoch() > epochs * n / (len(VICTIMS) + 1), f"epoch {n} of the disturbed run", 300)
            three.processes[victim].kill()
            three.processes[victim].wait()
            three.start(victim, extra=["--resume"] if victim == "input" else [])
        assert three.wait_for_input(300) == 0, three.log("input")
    return read_metrics(three.progress)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="%(default)s")
    epochs, pairs = 11, []
    options = [*DATA, "--num-epochs", epochs, "--snapshot-seconds", 1]
    with tempfile.TemporaryDirectory() as name:
        for seed in range(parser.parse_args().seeds):
            calm = run_three(Path(name) / f"calm{seed}", seed=seed, input=options[2:])
            shaken = disturbed(Path(name) / f"shaken{seed}", seed, options, epochs)
            pairs.append([float(np.median(metrics["test_mse"][-3:])) for metrics in (shaken, calm)])
    ratios = [mine / theirs for mine, theirs in pairs]
    print_table(("held-out MSE after 10 kills, over an undisturbed run's", f"{np.median(ratios):.2f}", "1.15",
                 f"{epochs} epochs each: " + ", ".join(f"{mine:.4f}/{theirs:.4f}" for mine, theirs in pairs)))


if __name__ == "__main__":
    main()
