"""`make try`: a short run of each kind, one after the other, and their curves in one picture.

    python -m plumbing.experiments x.npy y.npy --num-epochs 4    # what plumbing.launch takes
"""
import subprocess
import sys

from plumbing import launch, runs

EXPERIMENTS = {
    "guesses": [], "labels": ["--condition-on-labels"],
    **{kind: ["--gradients", kind] for kind in ("true", "delayed", "local", "zero", "shuffled")}}


def main(argv):
    """The exit code: that of the first run that did not finish, or plot.py's."""
    signals, folders = launch.catch_signals(), [f"try/{name}" for name in EXPERIMENTS]
    for n, (name, extra) in enumerate(EXPERIMENTS.items(), 1):
        print(f"{n} of {len(EXPERIMENTS)}, {name}: {' '.join(extra)}", flush=True)
        args = launch.parse(["--first-port", str(launch.free_first_port()), *argv, *extra,
                             "--progress-dir", f"try/{name}"])
        if code := launch.run(launch.command_lines(args), signals):
            return code
    drawn = subprocess.run([sys.executable, "plot.py", *folders, "--out", "try"])
    print("layer 1's gradients, held-out score (median of three rows), seconds of training")
    for name, folder in zip(EXPERIMENTS, folders, strict=True):
        rows = runs.read_rows(folder)
        print(f"{name:10} {runs.score_of(rows[0])} {runs.reached(rows):.4f} "
              f"{float(rows[-1]['seconds']):6.1f}")
    return drawn.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
