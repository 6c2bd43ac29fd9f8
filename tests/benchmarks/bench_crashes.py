"""`make bench-crashes`: ten times kill -9 in the middle of a run, against an undisturbed run. Two
minutes a seed; `--chain`, of which each of five processes is killed twice, takes three.

A supervisor starts the same command with --resume, whatever has died, and does nothing else.
"""
from itertools import pairwise

from tqdm import tqdm

from tests.benchmarks.measure import (
    DATA,
    TARGETS,
    Chain,
    Runs,
    final,
    make_parser,
    ratio,
    run_chain,
    run_three,
    table,
)
from tests.processes import Three, wait_until

KILLS = 10
PARTS = list(pairwise([2, 24, 12, 1]))
THREE, FIVE = ("oracle", "output", "input"), ("oracle1", "oracle2", "output", "middle1", "input")


def disturbed(folder, chain, epochs, seed):
    """The same run with a kill after each eleventh of it."""
    seeds = ["--seed", seed]
    again = [*seeds, "--resume"]
    driving = [*DATA, "--snapshot-seconds", 2, "--num-epochs", epochs, *again]
    victims = FIVE if chain else THREE
    group = (Chain(folder, PARTS, labels=1, oracle=seeds, output=again, middle=again, input=driving)
             if chain else Three(folder, seeds, again, driving))

    def epoch():
        return float((group.status("input") or {}).get("examples") or 0) / 190_000
    with group:
        group.start()
        for n in tqdm(range(KILLS), desc="kills", unit="kill", leave=False):
            due, victim = epochs * (n + 1) / (KILLS + 1), victims[n % len(victims)]
            wait_until(lambda due=due: epoch() > due, f"epoch {due} of the disturbed run", 300)
            group.kill(victim)
            group.start(victim)
        assert group.wait_for_input(300) == 0, group.log("input")


def calm(folder, chain, epochs, seed):
    """The run without a kill."""
    if chain:
        run_chain(folder, PARTS, seed, epochs, labels=1)
    else:
        run_three(folder, seed=seed, input=["--num-epochs", epochs])


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--chain", action="store_true", help="five processes instead of three")
    parser.add_argument("--epochs", type=int, default=11, help="(%(default)s)")
    args = parser.parse_args()
    command = "bench-crashes-chain" if args.chain else "bench-crashes"
    runs = Runs(command, 2 * args.seeds)
    quiet, shaken = ([runs.get(f"{run.__name__} {args.epochs} epochs", seed, run, args.chain,
                               args.epochs) for seed in range(args.seeds)]
                     for run in (calm, disturbed))
    value, pairs = ratio(list(map(final, shaken)), list(map(final, quiet)))
    seconds = [[each["seconds"][-1] for each in group] for group in (shaken, quiet)]
    table(command, TARGETS, [
        (f"held-out MSE after {KILLS} kills, over an undisturbed run's", value,
         "1.15" if args.chain else "1.1", f"{args.epochs} epochs each: {pairs}"),
        ("its seconds of training, over the undisturbed run's", ratio(*seconds)[0], "–",
         "what comes after the last checkpoint is trained again")])


if __name__ == "__main__":
    main()
