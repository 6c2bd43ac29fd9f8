"""What a run ran on, for run.json, and what came out of it, which plumbing.launch prints."""
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from plumbing import files, runs

# of guesses on the default problem, in the README; one seed
README_EPOCHS, README_MSE = 4, 0.0070


def machine():
    """Versions, cores, and the commit of the project, for run.json; None where it is unknown."""
    def version(name):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    def git(*words):
        try:
            answer = subprocess.run(["git", *words], capture_output=True, text=True, timeout=5,
                                    cwd=Path(__file__).parent)
        except (OSError, subprocess.SubprocessError):
            return None
        return answer.stdout.strip() if answer.returncode == 0 else None
    changes = git("status", "--porcelain", "--untracked-files=no")
    return {"cores": os.cpu_count(), "system": platform.system(), "machine": platform.machine(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "tensorflow", "keras")},
            "commit": git("rev-parse", "HEAD"), "changed": None if changes is None else
            bool(changes)}


def summary(folder, usual):
    """[what came out, how it compares with the README's number, what to try next]. usual: whether
    the network and the oracle are those of the README."""
    run, rows = files.read_json(Path(folder) / "run.json"), runs.read_rows(folder)
    if not rows:
        return [f"{folder} holds no row yet"]
    name = runs.score_of(rows[0])
    epochs, kind = float(rows[-1]["epoch"]), run.get("gradients", "synthetic")
    lines = [f"{kind} gradients: held-out {name[5:]} {runs.reached(rows):.4f} after {epochs:g} "
             f"epochs and {float(rows[-1]['seconds']):.0f} s; a constant guess has "
             f"{run.get('constant_guess', float('nan')):.4f}"]
    if usual and kind == "synthetic" and name == "test_mse":
        lines.append(f"the README has {README_MSE:.4f} after {README_EPOCHS} epochs of the default "
                     f"problem; at that point this run had {at(rows, README_EPOCHS)}")
    others = [each for each in ("true", "delayed", "local", "zero") if each != kind]
    first, *rest = others
    return [*lines, f'next: the same with ARGS="--gradients {first} --progress-dir {first}", or '
                    f"with {', '.join(rest)}; then make plots"]


def at(rows, epochs):
    """What the run had come to after so many epochs, as text."""
    return next((f"{runs.reached(rows[:n]):.4f}" for n, row in enumerate(rows, 1)
                 if float(row["epoch"]) >= epochs), "not come so far")

