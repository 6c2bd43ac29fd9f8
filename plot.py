"""Pictures from what runs wrote down: metrics.csv and snapshot_*.npz.

    python plot.py                              # every folder here that holds a run
    python plot.py progress sgd_progress        # these runs, overlaid and named by their folders
    python plot.py --live                       # a page that follows progress/ while it grows

Writes learning_curves.png with all runs. Of the first run, or the newest one here, it draws each
snapshot into synthetic_plots/: the learned surface beside the target, and the oracle's guess ĝ
below the true gradient g. learning.gif and guesses.gif are the same as animations. The live page is
a process of its own (plumbing/live.py), at http://127.0.0.1:5004/. No other process needs it.
"""
import contextlib
import itertools
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from plumbing import options, runs, say  # first, see there
import numpy as np

from generate import target
from plumbing.bar import progress_bar
from plumbing.pictures import animate, log_ticks, png
from plumbing.errors import UserError, file_errors
from sgd import CLASS, NUMBER, feed_forward, layers_from_weights

AXIS = np.linspace(-1, 1, 121, dtype=np.float32)
GRID = np.stack(np.meshgrid(AXIS, AXIS), axis=-1)  # (121, 121, 2)
LEVELS = np.linspace(-1, 1, 21)
CURVES = {  # column: label, scale, limits, and what a constant guess is called
    **{task.score: (task.label, "log", (None, None), f"always guessing {task.constant}")
       for task in (NUMBER, CLASS)},
    "gradient_cosine": ("cosine of ĝ and g", "linear", (-0.3, 1), None),
    "staleness": ("staleness,\nupdates", "linear", (0, None), None)}


# Colour-blind readers can tell these colours apart (Okabe and Ito), readers in grey the lines.
COLORS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"
STYLES = [(COLORS[n % 7], ("-", "--", ":")[n % 3]) for n in range(21)]


class NotDrawable(UserError):
    """There is no picture of this kind of such a run. Says why."""


def is_tall(figure):
    """Figures that are higher than wide are for phones."""
    return figure.get_figheight() > figure.get_figwidth()


def square(ax, title, fontsize=10):
    ax.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal", xticks=(-1, 0, 1), yticks=(-1, 0, 1))
    ax.set_title(title, fontsize=fontsize)
    ax.label_outer()


def progress_of(row):
    return f"{row['examples'] / 1e6:.2f} million examples, {row['seconds']:.0f} s"


def draw_surface(figure, weights, row, _=None):
    """The learned surface and the target, on the same colour scale."""
    if (width := len(weights[0][0])) != 2 or len(weights[-1][1]) != 1:
        raise NotDrawable(f"A surface over {width} input columns cannot be drawn, only one number "
                          "over 2; see the curves.")
    tall = is_tall(figure)
    axes = figure.subplots(*((2, 1) if tall else (1, 2)), sharex=True, sharey=True)
    learned = feed_forward(layers_from_weights(weights), GRID.reshape(-1, 2))
    score = runs.score_of(row)
    name = f"learned output, {CURVES[score][0]} {row[score]:.4f}\n{progress_of(row)}"
    for ax, values, title in zip(axes, (learned.reshape(GRID.shape[:2]), target(GRID)),
                                 (name, "target of generate.py"), strict=True):
        contours = ax.contourf(AXIS, AXIS, values, levels=LEVELS, cmap="cividis", extend="both")
        square(ax, title)
    figure.colorbar(contours, ax=axes, label="learned output, target", ticks=LEVELS[::5],
                    location="bottom" if tall else "right")


def cosine(a, b):
    return np.sum(a * b) / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-20)


def draw_guess(figure, _, row, probe):
    """Of a few hidden units at the cut: the true gradient g = dL/dh over the square of inputs, and
    below it the oracle's guess ĝ, on the same colour scale. A unit's cosine is that of two vectors,
    g and ĝ, with an entry for each held-out example."""
    from matplotlib.tri import Triangulation
    g, guess = probe.get("g", np.zeros(0)), probe.get("guess", np.zeros(0))
    if not (np.isfinite(g).all() and np.isfinite(guess).all() and g.any() and guess.any()
            and len(g) > 2):
        raise NotDrawable("No guesses to draw: the snapshot holds none, only zeros, or those of "
                          "fewer than three examples.")
    tall, units = is_tall(figure), g.shape[1]
    axes = figure.subplots(*((units, 2) if tall else (2, units)), sharex=True, sharey=True,
                           squeeze=False)
    limit = float(f"{np.percentile(np.abs(g), 99) or np.abs(g).max():.1g}")
    triangles = Triangulation(*probe["x"].T)
    for unit, pair in enumerate(axes if tall else axes.T):
        for ax, name, values in zip(pair, "gĝ", (g, guess), strict=True):
            filled = ax.tricontourf(triangles, values[:, unit], levels=limit * LEVELS,
                                    cmap="PuOr", extend="both")
            of_pair = f", cosine {cosine(g[:, unit], guess[:, unit]):.2f}" * (name == "ĝ")
            square(ax, f"{name} of unit {unit + 1}{of_pair}", fontsize=9)
    figure.colorbar(filled, ax=axes, location="bottom", label="gradient $dL/dh$ of an example",
                    ticks=limit * LEVELS[::5], aspect=50, shrink=0.7, format="{x:.2g}")
    figure.suptitle(f"{progress_of(row)}: true gradient g, guess ĝ,\n"
                    f"cosine over these units {cosine(g, guess):.2f}", fontsize=10)


def draw_curves(figure, metrics):
    """Against seconds and against examples: the held-out score, and below it what the runs have of
    the rest of CURVES. metrics: name of a run -> what read_run() returns."""
    def drawable(run, column):
        return np.isfinite(run.get(column, np.nan)).any() and {"seconds", "examples"} <= set(run)
    rows = [column for column in CURVES
            if any(drawable(run, column) for run in metrics.values())] or [NUMBER.score]
    heights = [3 if column.startswith("test") else 2 for column in rows]
    across = ("seconds", 1, "seconds of training"), ("examples", 1e6, "millions of examples")
    tall = is_tall(figure)
    if tall:
        axes = figure.subplots(2 * len(rows), 1, height_ratios=2 * heights).reshape(2, -1).T
    else:
        axes = figure.subplots(len(rows), 2, sharex="col", sharey="row", height_ratios=heights,
                               squeeze=False)
    for column, line_of_axes in zip(rows, axes, strict=True):
        label, scale, limits, constant = CURVES[column]
        shown = [(name, run, *style) for (name, run), style
                 in zip(metrics.items(), itertools.cycle(STYLES)) if drawable(run, column)]
        for ax, (x, unit, x_label) in zip(line_of_axes, across, strict=True):
            for name, run, color, style in shown:
                ax.plot(run[x] / unit, run[column], linestyle=style, color=color, label=name)
            for score in {run.get("constant_guess") for _, run, *_ in shown if constant} - {None}:
                ax.axhline(score, color="0.45", linewidth=0.8, label=constant)
            ax.update_datalim([(0, 0)] * (limits[0] == 0))  # leaves room above the lines, too
            ax.set(ylabel=label, yscale=scale, ylim=limits,
                   xlabel=x_label if column == rows[-1] else "")
            if scale == "log":
                log_ticks(ax)
            ax.grid(True, which="both", alpha=0.25)
            if not tall:
                ax.label_outer()
    lines = {line.get_label(): line for ax in axes[:, 0] for line in ax.lines}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=1 if tall else 3)


def read_run(folder):
    """A run's metrics, and the score of a constant guess or None."""
    constant = runs.read_json(Path(folder) / "run.json").get("constant_guess")
    known = isinstance(constant, (int, float)) and 0 < constant < np.inf
    return {**runs.read_metrics(folder), "constant_guess": constant if known else None}


KINDS = {  # of pictures: function, inches, inches on the live page and where it is tall, animation
    "surface": (draw_surface, (6.4, 3.2), (8, 3.6), (4, 8), "learning.gif"),
    "guess": (draw_guess, (9, 5.4), (8, 4.8), (4, 8.6), "guesses.gif")}
PLACES = {}  # of the axes in pictures that this process has drawn, see png()
DAMAGED = ValueError, LookupError, TypeError, RuntimeError  # what a damaged file raises


def draw_snapshot(path, pictures):
    """Draws the pictures of one snapshot: {kind: file}, and {kind: why there is none}."""
    drawn, problems = {}, {}
    try:
        snapshot = runs.read_snapshot(path)
        for kind, (draw, size, *_) in KINDS.items():
            picture = pictures / f"{kind}_{path.stem[9:]}.png"
            try:
                picture.write_bytes(png(draw, *snapshot, size=size,
                                        places=PLACES.setdefault(picture.parent / kind, [])))
                drawn[kind] = picture
            except NotDrawable as error:
                problems[kind] = error
    except DAMAGED as error:
        say(f"left out {path.name}: {error}")
    return drawn, problems


def draw_run(folder, out):
    """Draws each snapshot, as pictures and as animations. Returns what was written."""
    pictures, drawn, problems = out / "synthetic_plots", {kind: [] for kind in KINDS}, {}
    pictures.mkdir(exist_ok=True)
    for old in (old for kind in KINDS for old in pictures.glob(f"{kind}_*.png")):
        old.unlink()
    paths = runs.snapshots(folder)
    # a few are drawn before other processes have started; very many would fill the memory
    jobs = min(os.cpu_count() or 1, 8, len(paths) // 8)
    with (ProcessPoolExecutor(jobs, get_context("spawn")) if jobs > 1
          else contextlib.nullcontext()) as pool:
        done = (pool.map if pool else map)(draw_snapshot, paths, itertools.repeat(pictures))
        for found, missed in progress_bar(done, total=len(paths), desc="pictures", unit="snapshot"):
            for kind, picture in found.items():
                drawn[kind].append(picture)
            problems.update(missed)
    for kind, (*_, movie) in KINDS.items():
        (out / movie).unlink(missing_ok=True)  # of an earlier run
        if drawn[kind]:
            animate(drawn[kind], out / movie)
        else:
            print(problems.get(kind, f"{folder} holds no snapshot to draw a {kind} of"))
    return [pictures, *(out / movie for kind, (*_, movie) in KINDS.items() if drawn[kind])]


def draw_live(folder, kind, tall):
    """The "curves" or one of KINDS as a PNG file's bytes. None where there are no guesses."""
    *_, wide_size, tall_size, _ = KINDS.get(kind, (None, (8, 6), (4, 10), None))
    size = tall_size if tall else wide_size
    try:
        if kind == "curves":
            return png(draw_curves, {"this run": read_run(folder)}, size=size)
        return png(KINDS[kind][0], *runs.read_snapshot(runs.snapshots(folder)[-1]), size=size)
    except (*DAMAGED, OSError) as error:
        text = str(error) if isinstance(error, NotDrawable) else f"nothing to draw yet ({error})"
        return None if kind == "guess" else png(
            lambda figure: figure.text(0.5, 0.5, text, ha="center", va="center", wrap=True),
            size=size)


def runs_here():
    """The folders here that hold a run, the newest first, without those moved aside."""
    found = {path.parent.name: path.stat().st_mtime_ns for path in Path(".").glob("*/metrics.csv")}
    aside = {name for name in found
             if Path(name).suffix[1:].isdigit() and Path(name).stem in found}
    return sorted(found.keys() - aside, key=found.get, reverse=True)


def main():
    parser = options.make_parser(__doc__, 5004)
    add = parser.add_argument
    add("runs", nargs="*", help="folders (all runs here but progress.1 etc.; --live: progress)")
    add("--out", type=Path, default=Path("."), help="folder to write to (the current one)")
    add("--live", action="store_true", help="serve a page that follows a run; addresses are for it")
    for who, port in (("oracle", 5001), ("output", 5002), ("input", 5003)):
        add(f"--{who}-server", default=f"127.0.0.1:{port}", help="whom to ask (%(default)s)")
    add("--also", nargs="+", default=[], metavar="ADDR",
        help="further processes to ask: the middle trainers and oracles of a chain")
    args = parser.parse_args()
    if args.live:
        from plumbing import live, process
        process.run(lambda args, stop: live.main(draw_live, args, stop), parser)  # never returns
    folders = list(dict.fromkeys(args.runs)) or runs_here()
    with options.one_line_errors(parser), file_errors():
        if not folders:
            raise UserError("no folder here holds a run; train_input.py and sgd.py write them")
        args.out.mkdir(parents=True, exist_ok=True)
        names = [Path(folder).name for folder in folders]
        named = {name if names.count(name) == 1 else folder: folder
                 for name, folder in zip(names, folders, strict=True)}
        curves = args.out / "learning_curves.png"
        metrics = {name: read_run(folder) for name, folder in named.items()}
        curves.write_bytes(png(draw_curves, metrics, size=(9, 6.5), dpi=110))
        print("wrote", curves, *draw_run(folders[0], args.out), sep="\n  ")


if __name__ == "__main__":
    main()
