"""What the benchmarks share: runs of the baseline and of the three processes, other programs, ratios, tables.

Every process is started as a terminal starts it. Finished runs are kept in benchmarks/, so that a command can be
interrupted and started again, and two commands share what they both need.
"""
import contextlib
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

from plumbing.runs import read_metrics
from tests.processes import DEADLINE, ROOT, Three, end, start, wait_until

DATA = [ROOT / "x.npy", ROOT / "y.npy"]
KEPT = ROOT / "benchmarks"


def machine():
    """One line that says where this was measured: cores and versions only."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "tensorflow", "keras", "flask", "requests"))
    return f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}, {packages}"


def other_target(folder):
    """Paths of 200,000 examples of another function, for choosing defaults: those of the reported one stay unseen."""
    folder.mkdir(parents=True, exist_ok=True)
    x = np.random.default_rng(77).uniform(-1, 1, (200_000, 2)).astype(np.float32)
    z = 0.6 * np.sin(3 * x[:, 0] + 2 * np.sin(3 * x[:, 1])) + 0.4 * np.cos(5 * x[:, 0] * x[:, 1])
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", z - z.mean())
    return folder / "x.npy", folder / "y.npy"


def noisy_data(folder, columns=10):
    """Paths of the default problem with columns of noise beside the two that count, so that layer 1 must learn."""
    folder.mkdir(parents=True, exist_ok=True)
    x = np.load(DATA[0])
    noise = np.random.default_rng(0).uniform(-1, 1, (len(x), columns - x.shape[1])).astype(np.float32)
    np.save(folder / "x.npy", np.column_stack([x, noise]))
    return folder / "x.npy", DATA[1]


@contextlib.contextmanager
def busy(cores, same_session=False):
    """Other programs that take so many cores: in a session of their own, or in this one."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=not same_session)
              for _ in range(cores)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def run_sgd(folder, *options, data=DATA, timeout=3600):
    """One run of sgd.py in `folder`."""
    process = start("sgd.py", *data, "--progress-dir", folder / "progress", *options, log=folder / "sgd.log")
    try:
        assert process.wait(timeout) == 0, (folder / "sgd.log").read_text()
    finally:
        end(process)


def run_three(folder, seconds=None, seed=0, oracle=(), output=(), input=(), data=DATA, delay=0, late=0, session=True, watch=None,
              timeout=3600):
    """One decoupled run in `folder`, rows every 2 s; it ends by itself or after `seconds` of training.

    delay: seconds that the output trainer's answers to the input trainer are late; late: the oracle's to the output
    trainer, which sends the next gradients only then. session: each process has one of its
    own. watch(three) is called every half second while it trains. Writes ready.txt: seconds until training began.
    """
    seeds, endless = ["--seed", seed], ["--num-epochs", 10**6] if seconds else []
    three = Three(folder, [*oracle, *seeds], [*output, *seeds], [*data, "--snapshot-seconds", 2, *endless, *input, *seeds],
                  session=session)
    if delay:
        three.to_output.delay = delay
        three.commands["input"] += ["--output-server", f"127.0.0.1:{three.to_output.port}"]
    if late:
        three.to_oracle.delay = late
        three.commands["output"] += ["--oracle-server", f"127.0.0.1:{three.to_oracle.port}"]
    with three:
        three.start()
        began = time.monotonic()
        wait_until(lambda: (three.status("input") or {}).get("updates"), f"training to start ({folder})", 5 * DEADLINE)
        (folder / "ready.txt").write_text(f"{time.monotonic() - began:.1f}")

        def over():
            state = three.status("input") or {}
            if watch and state.get("updates"):
                watch(three)
            return three.processes["input"].poll() is not None or seconds and state.get("seconds", 0) >= seconds
        wait_until(over, f"the run in {folder} to end", timeout, pause=0.5)
        assert end(three.processes["input"]) == 0, three.log("input")


class Runs:
    """The runs of one command, kept in benchmarks/COMMAND/NAME_SEED; a bar shows how many of `total` are done."""

    def __init__(self, command, total):
        self.folder, self.bar = KEPT / command, tqdm(total=total, unit="run", desc=command)
        self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, name, seed, run):
        """The metrics of that run, in whose folder run(folder) is called unless it has finished before."""
        place = self.folder / f"{name}_{seed}".replace(" ", "_").replace(",", "").replace("|", "_")
        self.bar.set_postfix_str(f"{name}, seed {seed}")
        if not (place / "finished").exists():
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            run(place)
            (place / "finished").touch()
        self.bar.update()
        return read_metrics(place / "progress") | {"ready": float((place / "ready.txt").read_text())
                                                   if (place / "ready.txt").exists() else np.nan}


def final(metrics, rows=3):
    """What a run has reached: the median of its last rows. sgd.py's is its last: its rows are whole epochs."""
    score = metrics["test_mse" if "test_mse" in metrics else "test_error"]
    return float(np.median(score[-rows:])) if "staleness" in metrics else float(score[-1])


def swing(metrics):
    """The highest over the lowest row in the last third of a run."""
    last = metrics["test_mse"][-(len(metrics["test_mse"]) // 3):]
    return float(last.max() / last.min())


def time_to(metrics, mse):
    """Seconds until the held-out MSE was at most `mse` in two rows running; infinity if it never was."""
    reached = metrics["test_mse"] <= mse
    twice = np.flatnonzero(reached[:-1] & reached[1:])
    return float(metrics["seconds"][twice[0]]) if len(twice) else np.inf


def cell(values, form=".4f"):
    """Median and range."""
    return f"{np.median(values):{form}} ({min(values):{form}} – {max(values):{form}})"


def ratio(mine, theirs, form=".4f"):
    """The median of the pairs' ratios, and the pairs."""
    return (f"{np.median(np.divide(mine, theirs)):.2f}",
            ", ".join(f"{a:{form}}/{b:{form}}" for a, b in zip(mine, theirs)))


def resident_megabytes(three):
    return sum(psutil.Process(process.pid).memory_info().rss for process in three.processes.values()) / 1e6


def table(command, header, rows):
    """Prints a Markdown table under a line that says where it was measured, and keeps it in benchmarks/COMMAND.md."""
    text = "\n".join([machine(), "", "| " + " | ".join(header) + " |", "|" + " --- |" * len(header),
                      *("| " + " | ".join(map(str, row)) + " |" for row in rows)]) + "\n"
    KEPT.mkdir(exist_ok=True)
    (KEPT / f"{command}.md").write_text(text)
    print(f"\n{text}")


TARGETS = "what", "measured", "at most", ""
