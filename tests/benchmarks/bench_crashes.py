"""`make bench-crashes`: ten times kill -9 in the middle of a run, against an undisturbed run. Two
minutes a seed; `--chain`, of which each of five processes is killed twice, takes three.

A supervisor starts the same command with --resume, whatever has died, and does nothing else.
`--cluster` removes one of the two working nodes of a Ray cluster instead, halfway; needs Ray.
"""
from itertools import pairwise

from tqdm import tqdm

from plumbing.launch import free_first_port
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
from tests.processes import Three, end, local_cluster, start, status, wait_until

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


def on_cluster(folder, lose_node, epochs, seed):
    """The three processes on a Ray cluster, of which a node is lost halfway or not."""
    first = free_first_port()
    with local_cluster() as (cluster, nodes):
        driver = start("examples/on_ray.py", *DATA, "--num-epochs", epochs, "--seed", seed,
                       "--snapshot-seconds", 2, "--first-port", first, cwd=folder,
                       log=folder / "log")
        try:
            wait_until(lambda: (status(first + 2) or {}).get("examples", 0) > epochs * 95_000,
                       "half of the run", 600)
            if lose_node:
                cluster.remove_node(nodes[1], allow_graceful=False)
            assert driver.wait(600) == 0, (folder / "log").read_text()
        finally:
            end(driver)


def main():
    parser = make_parser(__doc__)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--chain", action="store_true", help="five processes instead of three")
    group.add_argument("--cluster", action="store_true", help="lose a node of a Ray cluster")
    parser.add_argument("--epochs", type=int, default=11, help="(%(default)s)")
    args = parser.parse_args()
    ways = {"calm": (calm, args.chain), "disturbed": (disturbed, args.chain)}
    command, limit, what = "bench-crashes", "1.1", f"{KILLS} kills"
    if args.chain:
        command, limit = "bench-crashes-chain", "1.15"
    if args.cluster:
        ways = {"calm": (on_cluster, False), "disturbed": (on_cluster, True)}
        command, limit, what = "bench-crashes-cluster", "1.25", "the loss of a node"
    runs = Runs(command, 2 * args.seeds)
    quiet, shaken = ([runs.get(f"{way} {args.epochs} epochs", seed, *ways[way], args.epochs)
                      for seed in range(args.seeds)] for way in ways)
    value, pairs = ratio(list(map(final, shaken)), list(map(final, quiet)))
    seconds = [[each["seconds"][-1] for each in group] for group in (shaken, quiet)]
    table(command, TARGETS, [
        (f"held-out MSE after {what}, over an undisturbed run's", value,
         limit, f"{args.epochs} epochs each: {pairs}"),
        ("its seconds of training, over the undisturbed run's", ratio(*seconds)[0], "–",
         "what comes after the last checkpoint is trained again")])


if __name__ == "__main__":
    main()
