"""What the benchmarks share: running the baseline and the three processes, and reading what they wrote."""
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil

from plumbing.runs import read_metrics
from tests.processes import DEADLINE, ROOT, Three, end, start, wait_until

DATA = [ROOT / "x.npy", ROOT / "y.npy"]


def machine():
    """One line that says where this was measured: cores and versions only."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "tensorflow", "keras", "flask", "waitress"))
    return f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}, {packages}"


def run_sgd(folder, *options, timeout=3600):
    """One run of sgd.py; returns its metrics."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    process = start("sgd.py", *DATA, "--progress-dir", Path(folder) / "progress", *options, log=Path(folder) / "sgd.log")
    try:
        assert process.wait(timeout) == 0, (Path(folder) / "sgd.log").read_text()
    finally:
        end(process)
    return read_metrics(Path(folder) / "progress")


def kept(folder, name, run):
    """The metrics of the run of that name in `folder`; run(its own folder) makes it, unless it has finished before."""
    place = folder / name.replace(" ", "_").replace(",", "")
    if not (place / "finished").exists():
        shutil.rmtree(place, ignore_errors=True)
        run(place)
        (place / "finished").touch()
    return read_metrics(place / "progress")


def run_three(folder, seconds=None, seed=0, oracle=(), output=(), input=(), watch=None, timeout=3600, data=DATA,
              **where):
    """One decoupled run, which ends by itself or after `seconds` of training; returns its metrics.

    `watch(three)` is called every half second while it trains; `where` is Three's ports and proxy.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    seeds = ["--seed", seed]
    endless = ["--num-epochs", 10**6] if seconds else []
    with Three(folder, oracle=[*oracle, *seeds], output=[*output, *seeds],
               input=[*data, *endless, *input, *seeds], **where) as three:
        three.start()
        wait_until(lambda: (three.status("input") or {}).get("seconds"), f"training to start ({folder})", DEADLINE)

        def over():
            state = three.status("input") or {}
            if watch and state.get("examples"):
                watch(three)
            return three.processes["input"].poll() is not None or seconds and state.get("seconds", 0) >= seconds
        wait_until(over, f"the run in {folder} to end", timeout, pause=0.5)
        assert end(three.processes["input"]) == 0, three.log("input")
    return read_metrics(three.progress)


def time_to(metrics, mse):
    """Seconds until the held-out MSE was first at most `mse`; infinity if it never was."""
    reached = metrics["seconds"][metrics["test_mse"] <= mse]
    return float(reached[0]) if len(reached) else np.inf


def resident_megabytes(three):
    return sum(psutil.Process(process.pid).memory_info().rss for process in three.processes.values()) / 1e6


def print_table(*rows):
    """Rows (what, measured, at most, remark) as Markdown, under a line that says where this was measured."""
    print(f"\n{machine()}\n\n| what | measured | at most | |\n| --- | --- | --- | --- |")
    for row in rows:
        print("| " + " | ".join(row) + " |")
