"""Pictures from what runs wrote down: metrics.csv and snapshot_*.npz.

    python plot.py                              # every folder here that holds a run
    python plot.py progress sgd_progress        # these runs, overlaid and named by their folders

Writes learning_curves.png with all runs; and of the first run one picture of the learned surface per snapshot, beside
the target, into synthetic_plots/, and learning.gif, the surface being learned. train_input.py lets it draw for the
live page (--live), in a process of its own, so that drawing does not hold up the training.
"""
import argparse
import csv
import io
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
from tqdm import tqdm

from generate import target
from sgd import feed_forward, read_snapshot, snapshots

# Okabe and Ito's colours, which colour-blind readers can tell apart, and line styles for those who print in grey.
COLORS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"
STYLES = [(COLORS[n % 7], ("-", "--", ":")[n % 3]) for n in range(21)]
AXIS = np.linspace(-1, 1, 121, dtype=np.float32)
GRID = np.stack(np.meshgrid(AXIS, AXIS), axis=-1)  # (121, 121, 2)
LEVELS = np.linspace(-1, 1, 21)
LIVE_SIZES = {"surface": (8, 3.6), "curves": (8, 4.5), "surface-tall": (4, 8), "curves-tall": (4, 8)}  # inches


def read_metrics(folder):
    """metrics.csv as a dict of arrays, column -> (rows,); cells that are no numbers become NaN."""
    with open(Path(folder) / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if None not in row.values()]

    def number(cell):
        try:
            return float(cell)
        except (TypeError, ValueError):
            return np.nan
    return {column: np.array([number(row[column]) for row in rows]) for column in (rows[0] if rows else ())}


def is_tall(figure):
    """Figures that are higher than wide are for phones: everything on them in one column."""
    return figure.get_figheight() > figure.get_figwidth()


def draw_surface(figure, layers, row):
    """The learned surface beside the target, on the same colour scale; above it on a figure that is tall."""
    axes = figure.subplots(*((2, 1) if is_tall(figure) else (1, 2)), sharex=True, sharey=True)
    learned = feed_forward(layers, GRID.reshape(-1, 2)).reshape(GRID.shape[:2])
    name = f"learned: {row['examples'] / 1e6:.2f} million examples,\n{row['seconds']:.0f} s, MSE {row['test_mse']:.4f}"
    for ax, z, title in zip(axes, (learned, target(GRID)), (name, "target")):
        contours = ax.contourf(AXIS, AXIS, z, levels=LEVELS, cmap="cividis", extend="both")
        ax.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal", xticks=(-1, 0, 1), yticks=(-1, 0, 1))
        ax.set_title(title, fontsize=10)
        ax.label_outer()
    figure.colorbar(contours, ax=axes, label="z", ticks=LEVELS[::5], location="bottom" if is_tall(figure) else "right")


def draw_curves(figure, runs):
    """Held-out MSE against seconds and against examples, and the gradient cosine below. runs: name -> metrics."""
    from matplotlib.ticker import LogLocator
    if is_tall(figure):
        axes = figure.subplots(4, 1, height_ratios=[3, 2, 3, 2]).reshape(2, 2).T
    else:
        axes = figure.subplots(2, 2, sharex="col", sharey="row", height_ratios=[3, 2])
    for (name, metrics), (color, line) in zip(runs.items(), STYLES * len(runs)):
        for column, x, scale in ((0, "seconds", 1), (1, "examples", 1e6)):
            for ax, y in ((axes[0, column], "test_mse"), (axes[1, column], "gradient_cosine")):
                if np.isfinite(metrics.get(y, np.nan)).any():
                    ax.plot(metrics[x] / scale, metrics[y], line, color=color, label=name, linewidth=1.5)
    for error, cosine, label in zip(*axes, ("seconds of training", "millions of examples that layer 1 has seen")):
        error.set(ylabel="held-out MSE", yscale="log")
        error.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:.3g}", minor_formatter="")
        cosine.set(xlabel=label, ylabel="cosine of synthetic and\ntrue gradients", ylim=(-0.3, 1))
        for ax in (error, cosine):
            ax.grid(True, which="both", alpha=0.25)
            if not is_tall(figure):
                ax.label_outer()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=1 if is_tall(figure) else 4,
                  fontsize=8)


def png(draw, *args, size=(8, 3.6), dpi=100):
    """The bytes of a PNG file of what draw(figure, *args) draws."""
    from matplotlib.figure import Figure  # here, because train_input.py imports this file and never draws itself
    figure, buffer = Figure(size, layout="constrained"), io.BytesIO()
    draw(figure, *args)
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def say(figure, text):
    figure.text(0.5, 0.5, text, ha="center", va="center", wrap=True)


def surface_problem(layers):
    if len(layers[0].w) != 2:
        return f"The surface over {len(layers[0].w)} input columns cannot be drawn; only over 2."


def is_whole(path):
    try:
        read_snapshot(path)
    except ValueError as error:
        print(f"{error}: left out", file=sys.stderr)
        return False
    return True


def draw_run(folder, out):
    """The surface at each snapshot, as pictures and as an animation. Returns what was written."""
    from matplotlib.animation import PillowWriter
    from matplotlib.figure import Figure
    pictures, movie = out / "synthetic_plots", out / "learning.gif"
    paths = list(filter(is_whole, snapshots(folder)))
    problem = surface_problem(read_snapshot(paths[-1])[0]) if paths else f"{folder} holds no snapshot"
    if problem:
        return [problem]
    pictures.mkdir(exist_ok=True)
    for old in pictures.glob("surface_*.png"):
        old.unlink()
    figure, writer = Figure((6.4, 3.2), layout="constrained"), PillowWriter(fps=4)
    every = max(1, -(-len(paths) // 40))  # the animation has at most 40 frames
    with writer.saving(figure, movie, dpi=90):
        for n, path in enumerate(tqdm(paths, desc="surfaces", unit="picture")):
            figure.clear()
            draw_surface(figure, *read_snapshot(path))
            figure.savefig(pictures / f"surface_{path.stem[9:]}.png", dpi=120)
            if n % every == 0 or n == len(paths) - 1:
                writer.grab_frame()
    return [pictures, movie]


class LivePictures:
    """Pictures of a run for the live page, drawn by `plot.py --live` in a process that ends when this one does."""

    def __init__(self, folder):
        self.folder, self.process, self.lock, self.drawn = folder, None, threading.Lock(), {}

    def get(self, kind, version):
        """The PNG bytes of one of LIVE_SIZES, drawn once a version; None if the drawing process died."""
        with self.lock:
            if self.drawn.get(kind, (None,))[0] != version:
                if not self.process or self.process.poll() is not None:
                    self.process = subprocess.Popen([sys.executable, __file__, "--live", self.folder],
                                                    stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                                    process_group=0)  # Ctrl-C is for the trainer
                try:
                    self.process.stdin.write(kind.encode() + b"\n")
                    self.process.stdin.flush()
                    size, = struct.unpack("<I", self.process.stdout.read(4))
                    picture, = struct.unpack(f"{size}s", self.process.stdout.read(size))
                except (OSError, struct.error):  # it died, perhaps half-way
                    return None
                self.drawn[kind] = version, picture
            return self.drawn[kind][1]


def live(folder):
    """Draw what standard input asks for, a word a line, until it is closed."""
    if hasattr(os, "nice"):
        os.nice(10)
    for line in sys.stdin:
        try:
            size = LIVE_SIZES[line.strip()]
            if line.startswith("curves"):
                picture = png(draw_curves, {"this run": read_metrics(folder)}, size=size)
            else:
                layers, row = read_snapshot(snapshots(folder)[-1])
                problem = surface_problem(layers)
                picture = png(say, problem, size=size) if problem else png(draw_surface, layers, row, size=size)
        except (ValueError, OSError, IndexError) as error:
            picture = png(say, f"nothing to draw yet ({error})")
        sys.stdout.buffer.write(struct.pack("<I", len(picture)) + picture)
        sys.stdout.buffer.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="folders of runs (all that are here)")
    parser.add_argument("--out", type=Path, default=Path("."), help="where to write (the current folder)")
    parser.add_argument("--live", metavar="RUN", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.live:
        return live(args.live)
    found = [path.parent.name for path in Path(".").glob("*/metrics.csv") if path.parent.suffix != ".old"]
    folders = args.runs or sorted(found, key=lambda name: (name != "progress", name))
    try:
        if not folders:
            raise ValueError("no folder here holds a run; train_input.py and sgd.py write them")
        args.out.mkdir(parents=True, exist_ok=True)
        names = [Path(folder).name for folder in folders]
        runs = {name if names.count(name) == 1 else str(folder): read_metrics(folder)
                for name, folder in zip(names, folders)}
        curves = args.out / "learning_curves.png"
        curves.write_bytes(png(draw_curves, runs, size=(9, 5.5), dpi=110))
        print("wrote", *(str(path) for path in [curves, *draw_run(folders[0], args.out)]), sep="\n  ")
    except (OSError, ValueError) as error:
        parser.exit(2, f"plot.py: {error}\n")


if __name__ == "__main__":
    main()
