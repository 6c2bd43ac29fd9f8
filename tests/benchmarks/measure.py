"""What the benchmarks share: runs of sgd.py, of the three processes and of a chain of them, ratios,
tables.

Every process is started as a terminal starts it. Finished runs are kept in benchmarks/, so that a
command can be interrupted and started again.
"""
import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import version

import numpy as np
import psutil
from tqdm import tqdm

from plumbing.launch import command_lines, free_first_port, parse
from plumbing.runs import read_json, read_metrics
from tests.processes import DEADLINE, ROOT, Three, end, start, wait_until

DATA = [ROOT / "x.npy", ROOT / "y.npy"]
KEPT = ROOT / "benchmarks"
LONGEST = 3600  # seconds of a run
SEARCH_SEED = 11  # rates are chosen on it; it is not reported
TARGETS = "what", "measured", "at most", ""


def make_parser(doc, seeds=3):
    """A benchmark's options; all have --seeds."""
    parser = argparse.ArgumentParser(description=doc,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=seeds, help="(%(default)s)")
    return parser


def machine():
    """One line that says where this was measured: cores and versions only."""
    names = "numpy", "tensorflow", "keras", "flask", "requests"
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    return (f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}, "
            f"{packages}")


# ---- data ----


def save_target(folder, seed, target):
    """Paths of 200,000 examples of z = target(x1, x2), its mean removed."""
    folder.mkdir(parents=True, exist_ok=True)
    x = np.random.default_rng(seed).uniform(-1, 1, (200_000, 2)).astype(np.float32)
    z = target(*x.T)
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", z - z.mean())
    return folder / "x.npy", folder / "y.npy"


def other_target(folder):
    """Another function than the reported one, for choosing defaults."""
    return save_target(folder, 77, lambda a, b: (
        0.6 * np.sin(3 * a + 2 * np.sin(3 * b)) + 0.4 * np.cos(5 * a * b)))


def another_target(folder):
    """A third function, with more detail: here it matters that layer 1 learns."""
    return save_target(folder, 78, lambda a, b: (
        0.5 * np.sin(7 * a + 3 * np.cos(4 * b)) + 0.4 * np.cos(6 * (a + b) + 4 * a * b)))


def waves_target(folder):
    """A target that is reported, and no default was chosen on: waves that cross."""
    return save_target(folder, 79, lambda a, b: (
        0.5 * np.sin(7 * a + 2 * b) * np.cos(5 * b) + 0.3 * np.sin(6 * b * a + 2)))


def ripples_target(folder):
    """Another one: ripples around a point beside the centre."""
    return save_target(folder, 80, lambda a, b: (
        0.6 * np.cos(9 * np.hypot(a - 0.3, b + 0.2)) + 0.3 * a * b))


FUNCTIONS = {"default": lambda folder: DATA, "waves": waves_target, "ripples": ripples_target}


def noisy_data(folder, columns=10, paths=DATA):
    """Paths of a problem, else the default one, with columns of noise beside the two that count, so
    that layer 1 must learn."""
    folder.mkdir(parents=True, exist_ok=True)
    x = np.load(paths[0])
    noise = np.random.default_rng(0).uniform(-1, 1, (len(x), columns - x.shape[1]))
    np.save(folder / "x.npy", np.column_stack([x, noise.astype(np.float32)]))
    return folder / "x.npy", paths[1]


def digits_data(folder, file=None):
    """Paths of MNIST, from a file in the form of Keras' mnist.npz if one is given, and how many
    examples at the end are for testing."""
    folder.mkdir(parents=True, exist_ok=True)
    made = subprocess.run([sys.executable, ROOT / "generate.py", "--digits",
                           *([file] if file else []), "--dir", folder],
                          capture_output=True, text=True)
    if made.returncode:
        sys.exit(made.stderr)
    held_out = int(made.stdout.split("--held-out ")[1].split(":")[0])
    return (folder / "x.npy", folder / "y.npy"), held_out


# ---- runs ----


@contextlib.contextmanager
def busy(cores, same_session=False):
    """Other programs that take so many cores: in a session of their own, or in this one."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"],
                               start_new_session=not same_session) for _ in range(cores)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def run_sgd(folder, *options, seed=0, data=DATA):
    """One run of sgd.py in `folder`."""
    process = start("sgd.py", *data, "--progress-dir", folder / "progress", "--seed", seed,
                    *options, log=folder / "sgd.log")
    try:
        assert process.wait(LONGEST) == 0, (folder / "sgd.log").read_text()
    finally:
        end(process)


def run_three(folder, seconds=None, seed=0, oracle=(), output=(), input=(), data=DATA, away=0,
              session=True, watch=None):
    """One decoupled run in `folder`, rows every 2 s; it ends by itself or after `seconds` of
    training.

    away: seconds by which the output trainer is away from the two others: an answer of it is late,
    and one to it, so that it sends its next gradients only then. session: each process has one of
    its own. watch: see follow(). No oracle runs where --gradients asks none.
    """
    kind = input[input.index("--gradients") + 1] if "--gradients" in input else "synthetic"
    seeds, endless = ["--seed", seed], ["--num-epochs", 10**6] if seconds else []
    three = Three(folder, [*oracle, *seeds], [*output, *seeds],
                  [*data, "--snapshot-seconds", 2, *endless, *input, *seeds], session=session,
                  gradients=kind)
    if away:
        three.to_oracle.delay = three.to_output.delay = away
        three.commands["input"] += ["--output-server", f"127.0.0.1:{three.to_output.port}"]
        if "none" not in three.commands["output"]:
            three.commands["output"] += ["--oracle-server", f"127.0.0.1:{three.to_oracle.port}"]
    with three:
        three.start()
        follow(three, seconds, watch)


def follow(group, seconds=None, watch=None):
    """Until the run ends, by itself or after `seconds` of training. AssertionError if a process
    ends before.

    watch(group) is called every half second while it trains. Writes timing.json, and status.json:
    what every process that still runs says of itself at the end.
    """
    used = []  # (updates of layer 1, CPU seconds of all processes) while it trains

    def state():
        return group.status("input") or {}

    def check_others():
        for name, process in group.processes.items():
            assert name == "input" or process.poll() is None, group.log(name)

    def begun():
        check_others()
        return state().get("updates") or group.processes["input"].poll() is not None

    def over():
        check_others()
        now = state()
        if now.get("updates") and group.processes["input"].poll() is None:
            used.append((now["updates"], sum(
                sum(psutil.Process(process.pid).cpu_times()[:2])
                for process in group.processes.values() if process.poll() is None)))
            if watch:
                watch(group)
        return (group.processes["input"].poll() is not None
                or seconds and now.get("seconds", 0) >= seconds)
    began = time.monotonic()
    wait_until(begun, f"training to start ({group.folder})", 5 * DEADLINE)
    ready = time.monotonic() - began
    wait_until(over, f"the run in {group.folder} to end", LONGEST, pause=0.5)
    updates, seconds = np.subtract(used[-1], used[0]) if used else (0, 0)
    (group.folder / "timing.json").write_text(json.dumps({  # seconds until it began; milliseconds
        "ready": round(ready, 1), "cpu_ms": 1e3 * seconds / updates if updates else None}))
    (group.folder / "status.json").write_text(json.dumps(
        {name: {**(group.status(name) or {}), "megabytes": added_megabytes(process)}
         for name, process in group.processes.items() if process.poll() is None}))
    assert end(group.processes["input"]) == 0, group.log("input")


class Chain(Three):
    """A chain of parts, each a process, with an oracle for each link, and their logs in `folder`.

    parts: the widths of each, the input trainer's first: [[2, 24], [24, 12], [12, 1]]. The commands
    and their names are plumbing.launch's, and further options of each kind of process.
    """
    taught = True  # the commands have an oracle only where one is asked

    def __init__(self, folder, parts, gradients="synthetic", labels=0, oracle_layers=(64, 64),
                 oracle=(), output=(), middle=(), input=()):
        self.folder, self.session = folder, True
        self.progress, self.processes = folder / "progress", {}
        words = ["--parts", *("-".join(map(str, widths)) for widths in parts), "--oracle-layers",
                 *oracle_layers, "--condition-on-labels", labels, "--gradients", gradients,
                 "--first-port", free_first_port(), "--progress-dir", self.progress]
        self.commands = command_lines(parse(list(map(str, words))), hosts={})
        further = {"oracle": oracle, "output": output, "input": input, "middle": middle}
        for name, command in self.commands.items():
            command += further[name.rstrip("0123456789")]
        self.ports = {name: int(command[2]) for name, command in self.commands.items()}

    def port(self, name):
        return self.ports[name]

    def __exit__(self, *_):
        for name in reversed(self.processes):  # from below, so that a last snapshot is complete
            end(self.processes[name])


def run_chain(folder, parts, seed=0, epochs=8, data=DATA, oracle=(), output=(), middle=(),
              input=(), **options):
    """One run of a chain of processes in `folder`, rows every 2 s. options: see Chain."""
    seeds = ["--seed", seed]
    chain = Chain(folder, parts, oracle=[*oracle, *seeds], output=[*output, *seeds],
                  middle=[*middle, *seeds], **options,
                  input=[*data, "--snapshot-seconds", 2, "--num-epochs", epochs, *input, *seeds])
    with chain:
        chain.start()
        follow(chain)


class Runs:
    """The runs of one command, kept in benchmarks/COMMAND/NAME_SEED; a bar shows how many of
    `total` are done."""

    def __init__(self, command, total):
        self.folder, self.bar = KEPT / command, tqdm(total=total, unit="run", desc=command)
        self.folder.mkdir(parents=True, exist_ok=True)

    def place(self, name, seed):
        return self.folder / f"{name}_{seed}".translate(str.maketrans(" |/", "___", ",()[]"))

    def get(self, name, seed, run, *args, **options):
        """The metrics of that run. Unless it has finished before, run(folder, *args, seed=seed,
        **options) is called."""
        place = self.place(name, seed)
        self.bar.set_postfix_str(f"{name}, seed {seed}")
        if not (place / "finished").exists():
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            run(place, *args, seed=seed, **options)
            (place / "finished").touch()
        self.bar.update()
        return read_metrics(place / "progress") | {
            "ready": np.nan, "cpu_ms": np.nan, **read_json(place / "timing.json"),
            "status": read_json(place / "status.json")}

    def score(self, *args, **options):
        """What get() gives has reached; infinity if it diverged."""
        try:
            return final(self.get(*args, **options))
        except AssertionError:
            self.bar.update()
            return np.inf


# ---- numbers and tables ----


def final(metrics, rows=3):
    """What a run has reached: the median of its last rows. sgd.py's rows are whole epochs, and its
    last one counts."""
    score = metrics["test_mse" if "test_mse" in metrics else "test_error"]
    return float(np.median(score[-rows:])) if "staleness" in metrics else float(score[-1])


def swing(metrics):
    """The highest over the lowest row in the last third of a run."""
    last = metrics["test_mse"][-(len(metrics["test_mse"]) // 3):]
    return float(last.max() / last.min())


def until(metrics, seconds):
    """The rows of the first so many seconds."""
    return {name: column[metrics["seconds"] <= seconds + 2] for name, column in metrics.items()
            if isinstance(column, np.ndarray)}


def time_to(metrics, mse, column="seconds"):
    """Seconds, or updates, until the held-out MSE was at most `mse` in two rows running; infinity
    if it never was."""
    reached = metrics["test_mse"] <= mse
    twice = np.flatnonzero(reached[:-1] & reached[1:])
    return float(metrics[column][twice[0]]) if len(twice) else np.inf


def still_falls(metrics):
    """The lowest row of the last third of a run over that of the third before; NaN if there are
    not three rows."""
    third = len(metrics["test_mse"]) // 3
    if not third:
        return np.nan
    return float(metrics["test_mse"][-third:].min() / metrics["test_mse"][third:-third].min())


def cell(values, form=".4f"):
    """Median and range; one value as it is."""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{np.median(values):{form}} ({min(values):{form}} – {max(values):{form}})"


def ratio(mine, theirs, form=".4f"):
    """The median of the pairs' ratios, and the pairs."""
    return (f"{np.median(np.divide(mine, theirs)):.2f}",
            ", ".join(f"{a:{form}}/{b:{form}}" for a, b in zip(mine, theirs, strict=True)))


def added_megabytes(process):
    """Megabytes that only this process uses, without shared libraries."""
    return round(psutil.Process(process.pid).memory_full_info().uss / 1e6)


def resident_megabytes(three):
    return sum(psutil.Process(process.pid).memory_info().rss
               for process in three.processes.values()) / 1e6


def table(command, header, rows):
    """Prints a Markdown table under a line that says where it was measured, and keeps it in
    benchmarks/COMMAND.md."""
    lines = [header, ["---"] * len(header), *rows]
    text = "\n".join([machine(), "", *(f"| {' | '.join(map(str, line))} |" for line in lines), ""])
    KEPT.mkdir(exist_ok=True)
    (KEPT / f"{command}.md").write_text(text)
    print(f"\n{text}")
