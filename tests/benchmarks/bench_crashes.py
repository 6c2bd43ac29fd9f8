"""`make bench-crashes`: ten times kill -9 on one of the three in the middle of a run, against an undisturbed run.

A supervisor starts the same command with --resume, whatever has died, and does nothing else. Two minutes a seed.
"""
import argparse

from tqdm import tqdm

from tests.benchmarks.measure import DATA, TARGETS, Runs, final, ratio, run_three, table
from tests.processes import Three, wait_until

VICTIMS = ["oracle", "output", "input", "oracle", "output", "input", "oracle", "output", "input", "oracle"]
EPOCHS = 11


def disturbed(folder, seed):
    """The same run with a kill after each eleventh of it."""
    with Three(folder, ["--seed", seed], ["--seed", seed, "--resume"],
               [*DATA, "--snapshot-seconds", 2, "--num-epochs", EPOCHS, "--seed", seed, "--resume"]) as three:
        three.start()

        def epoch():
            return float((three.status("input") or {}).get("examples") or 0) / 190_000
        for n, victim in enumerate(tqdm(VICTIMS, desc="kills", unit="kill", leave=False), 1):
            wait_until(lambda: epoch() > EPOCHS * n / (len(VICTIMS) + 1), f"epoch {n} of the disturbed run", 300)
            three.kill(victim)
            three.start(victim)
        assert three.wait_for_input(300) == 0, three.log("input")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="%(default)s")
    seeds = parser.parse_args().seeds
    runs = Runs("bench-crashes", 2 * seeds)
    calm = [runs.get("calm", seed, lambda folder: run_three(folder, seed=seed, input=["--num-epochs", EPOCHS]))
            for seed in range(seeds)]
    shaken = [runs.get("shaken", seed, lambda folder: disturbed(folder, seed)) for seed in range(seeds)]
    value, pairs = ratio(list(map(final, shaken)), list(map(final, calm)))
    table("bench-crashes", TARGETS, [
        ("held-out MSE after 10 kills, over an undisturbed run's", value, "1.1", f"{EPOCHS} epochs each: {pairs}"),
        ("its seconds of training, over the undisturbed run's",
         *ratio([each["seconds"][-1] for each in shaken], [each["seconds"][-1] for each in calm], ".0f")[:1], "–",
         "what comes after the last checkpoint is trained again")])


if __name__ == "__main__":
    main()
