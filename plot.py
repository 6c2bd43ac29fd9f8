"""Pictures from what runs wrote down: metrics.csv and snapshot_*.npz.

    python plot.py                              # every folder here that holds a run, but progress.1 and the like
    python plot.py progress sgd_progress        # these runs, overlaid and named by their folders
    python plot.py --live                       # a page that follows progress/: http://127.0.0.1:5004/

Writes learning_curves.png with all runs; and of the first run one picture of the learned surface
per snapshot, beside the target, into synthetic_plots/, and learning.gif, the surface being learned.
The live page is a process of its own: it asks the three for their /status and reads the run's
folder, and nobody waits for it or needs it.
"""
import argparse
import io
import itertools
import json
import sys
import threading
import time
from pathlib import Path

import plumbing  # first, see there
import numpy as np
from tqdm import tqdm

from generate import target
from plumbing.runs import read_metrics, read_snapshot, snapshots
from sgd import feed_forward, layers_from_weights

# Okabe and Ito's colours, which colour-blind readers can tell apart, and line styles for those who print in grey.
COLORS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"
STYLES = [(COLORS[n % 7], ("-", "--", ":")[n % 3]) for n in range(21)]
AXIS = np.linspace(-1, 1, 121, dtype=np.float32)
GRID = np.stack(np.meshgrid(AXIS, AXIS), axis=-1)  # (121, 121, 2)
LEVELS = np.linspace(-1, 1, 21)
LIVE_SIZES = {"surface": (8, 3.6), "curves": (8, 6), "surface-tall": (4, 8), "curves-tall": (4, 10)}  # inches
CURVES = {  # column: label, scale, limits
    "test_mse": ("held-out MSE", "log", (None, None)),
    "test_error": ("held-out error", "log", (None, None)),
    "gradient_cosine": ("cosine of ĝ and g", "linear", (-0.3, 1)),
    "staleness": ("staleness,\nupdates", "linear", (0, None))}


def is_tall(figure):
    """Figures that are higher than wide are for phones: everything on them in one column."""
    return figure.get_figheight() > figure.get_figwidth()


def draw_surface(figure, weights, row):
    """The learned surface beside the target, on the same colour scale; above it on a figure that is
    tall."""
    axes = figure.subplots(*((2, 1) if is_tall(figure) else (1, 2)), sharex=True, sharey=True)
    learned = feed_forward(layers_from_weights(weights), GRID.reshape(-1, 2)).reshape(GRID.shape[:2])
    name = f"learned: {row['examples'] / 1e6:.2f} million examples,\n{row['seconds']:.0f} s, MSE {row['test_mse']:.4f}"
    for ax, z, title in zip(axes, (learned, target(GRID)), (name, "target")):
        contours = ax.contourf(AXIS, AXIS, z, levels=LEVELS, cmap="cividis", extend="both")
        ax.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal", xticks=(-1, 0, 1), yticks=(-1, 0, 1))
        ax.set_title(title, fontsize=10)
        ax.label_outer()
    figure.colorbar(contours, ax=axes, label="z", ticks=LEVELS[::5], location="bottom" if is_tall(figure) else "right")


def draw_curves(figure, runs):
    """Against seconds and against examples: the held-out score, and below it what the runs have of
    the rest of CURVES.

    runs: name -> metrics.
    """
    from matplotlib.ticker import LogLocator
    rows = [column for column in CURVES
            if any(np.isfinite(metrics.get(column, np.nan)).any() for metrics in runs.values())] or ["test_mse"]
    heights = [3 if column.startswith("test") else 2 for column in rows]
    across = [("seconds", 1, "seconds of training"), ("examples", 1e6, "millions of examples trained on")]
    if is_tall(figure):
        axes = figure.subplots(2 * len(rows), 1, height_ratios=2 * heights).reshape(2, -1).T
    else:
        axes = figure.subplots(len(rows), 2, sharex="col", sharey="row", height_ratios=heights, squeeze=False)
    for row, (column, line_of_axes) in enumerate(zip(rows, axes)):
        label, scale, limits = CURVES[column]
        for ax, (x, unit, x_label) in zip(line_of_axes, across):
            for (name, metrics), (color, style) in zip(runs.items(), itertools.cycle(STYLES)):
                if np.isfinite(metrics.get(column, np.nan)).any():
                    ax.plot(metrics[x] / unit, metrics[column], style, color=color, label=name, linewidth=1.5)
            if limits[0] == 0:
                ax.update_datalim([(0, 0)])  # so that there is room above the line, too
                ax.autoscale_view()
            ax.set(ylabel=label, yscale=scale, ylim=limits, xlabel=x_label if row == len(rows) - 1 else "")
            if scale == "log":
                ax.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:.3g}", minor_formatter="")
            ax.grid(True, which="both", alpha=0.25)
            if not is_tall(figure):
                ax.label_outer()
    lines = {line.get_label(): line for ax in axes[:, 0] for line in ax.lines}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=1 if is_tall(figure) else 4, fontsize=8)


def png(draw, *args, size=(8, 3.6), dpi=100):
    """The bytes of a PNG file of what draw(figure, *args) draws."""
    from matplotlib.figure import Figure
    figure, buffer = Figure(size, layout="constrained"), io.BytesIO()
    draw(figure, *args)
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def say(figure, text):
    figure.text(0.5, 0.5, text, ha="center", va="center", wrap=True)


def surface_problem(weights):
    """Why the surface cannot be drawn, or None."""
    if len(weights[0][0]) == 2 and len(weights[-1][1]) == 1:
        return None
    return f"A surface over {len(weights[0][0])} input columns cannot be drawn, only one number over 2; see the curves."


def is_whole(path):
    try:
        read_snapshot(path)
    except ValueError as error:
        print(f"{error}: left out", file=sys.stderr)
        return False
    return True


def draw_run(folder, out):
    """The surface at each snapshot, as pictures and as an animation, if it can be drawn. Returns
    what was written."""
    from matplotlib.animation import PillowWriter
    from matplotlib.figure import Figure
    pictures, movie = out / "synthetic_plots", out / "learning.gif"
    paths = list(filter(is_whole, snapshots(folder)))
    problem = surface_problem(read_snapshot(paths[-1])[0]) if paths else f"{folder} holds no snapshot"
    if problem:
        print(problem)
        return []
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


def draw_live(folder, kind):
    """One of LIVE_SIZES, of what the folder holds now, as PNG bytes."""
    size = LIVE_SIZES[kind]
    try:
        if kind.startswith("curves"):
            return png(draw_curves, {"this run": read_metrics(folder)}, size=size)
        weights, row = read_snapshot(snapshots(folder)[-1])
        problem = surface_problem(weights)
        return png(say, problem, size=size) if problem else png(draw_surface, weights, row, size=size)
    except (ValueError, OSError, LookupError) as error:
        return png(say, f"nothing to draw yet ({error})", size=size)


def live(args, stop):
    """The live page, until it is stopped: page.html, the raw statuses of the three, and pictures
    drawn once a snapshot."""
    import flask

    from plumbing import serving
    from synthgrad import Client, NoAnswer, Refused
    folder, servers = Path(args.runs[0] if args.runs else "progress"), {
        "input trainer": args.input_server, "output trainer": args.output_server, "oracle": args.oracle_server}
    for server in servers.values():
        Client(server)  # ValueError, if it is no address
    drawing, drawn = threading.Lock(), {}  # kind -> (version, PNG); whoever draws holds the lock

    def version():
        newest = snapshots(folder)[-1:]
        return f"{newest[0].name}-{newest[0].stat().st_mtime_ns}" if newest else None

    def ask(server):
        try:
            return json.loads(Client(server, args.token, timeout=1).call("GET", "/status"))
        except (NoAnswer, Refused):
            return None

    app = serving.make_app("live page", lambda: {"folder": str(folder)}, args)

    @app.get("/")
    def page():
        return flask.send_file(Path(__file__).with_name("page.html").resolve())

    @app.get("/live")
    def statuses():
        try:
            run = json.loads((folder / "run.json").read_text())
        except (OSError, ValueError):
            run = None
        return {"version": version(), "run": run, "processes": {name: ask(server) for name, server in servers.items()}}

    @app.get("/<kind>.png")
    def picture(kind):
        if kind not in LIVE_SIZES:
            flask.abort(404)
        if not drawing.acquire(timeout=10):
            raise Refused("still drawing another picture", 503)
        try:
            if (now := version()) is None or drawn.get(kind, (None,))[0] != now:
                drawn[kind] = now, draw_live(folder, kind)
            return drawn[kind][1], {"Content-Type": "image/png", "Cache-Control": "no-store"}
        finally:
            drawing.release()

    serving.serve(app, args)
    print(f"the live page of {folder}: http://{args.host}:{args.port}/", flush=True)
    while not stop:
        time.sleep(0.2)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="*", help="folders of runs (all here but those moved aside, like progress.1; with --live: progress)")
    add("--out", type=Path, default=Path("."), help="where to write (the current folder)")
    add("--live", action="store_true", help="serve a page that follows a run")
    add("--host", default="127.0.0.1", help="address that the live page listens on (%(default)s)")
    add("--port", type=int, default=5004, help="its port (%(default)s)")
    add("--oracle-server", default="127.0.0.1:5001", help="where the live page asks (%(default)s)")
    add("--output-server", default="127.0.0.1:5002", help="(%(default)s)")
    add("--input-server", default="127.0.0.1:5003", help="(%(default)s)")
    add("--token-file", type=Path, help="file with the secret that the processes insist on, and then the page, too")
    args = parser.parse_args()
    if args.live:
        from plumbing import serving
        serving.run(live, parser)
    found = [path.parent.name for path in Path(".").glob("*/metrics.csv") if not path.parent.suffix]
    folders = args.runs or sorted(found, key=lambda name: (name != "progress", name))
    try:
        if not folders:
            raise ValueError("no folder here holds a run; train_input.py and sgd.py write them")
        args.out.mkdir(parents=True, exist_ok=True)
        names = [Path(folder).name for folder in folders]
        runs = {name if names.count(name) == 1 else str(folder): read_metrics(folder)
                for name, folder in zip(names, folders)}
        curves = args.out / "learning_curves.png"
        curves.write_bytes(png(draw_curves, runs, size=(9, 6.5), dpi=110))
        print("wrote", *(str(path) for path in [curves, *draw_run(folders[0], args.out)]), sep="\n  ")
    except (OSError, ValueError) as error:
        parser.exit(2, f"plot.py: {error}\n")


if __name__ == "__main__":
    main()
