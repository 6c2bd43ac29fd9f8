"""`make timeline`: who works, who waits, and what is on its way, in milliseconds of two runs.

    python -m plumbing.timeline x.npy y.npy             # what plumbing.launch takes

The part above is 20 ms away, there and back. One run takes true gradients, one takes guesses. Each
writes one trace, of all its processes, into timeline/: open it with https://ui.perfetto.dev.
timeline.png shows ten updates of layer 1 of both.
"""
import collections
import contextlib
import json
import statistics
import sys
from pathlib import Path

from plumbing import launch, new_figure, proxy, say
from plumbing.errors import UserError, file_errors

AWAY = 0.010  # seconds to the part above, and as many back
UPDATES = 10  # of layer 1, in the picture
LANES = "output trainer", "oracle", "input trainer"  # the highest first
LAYER_1 = "input trainer"
# span: label, color. Colour-blind readers can tell these apart (Okabe and Ito)
BARS = {
    "forward": ("forward", "#56B4E9"), "throw": ("forward", "#56B4E9"),
    "backprop": ("backprop and update", "#0072B2"), "update": ("backprop and update", "#0072B2"),
    "wait": ("waits", "#D55E00"), "ask": ("asks the oracle", "#CCCCCC"),
    "minibatch": ("trains on a new minibatch", "#009E73"),
    "replay": ("trains on a replayed one", "#F0E442"),
    "train": ("oracle trains", "#CC79A7"), "answer": ("oracle answers", "#E69F00")}
# message: label, color
ARROWS = {"examples": ("activations", "#000000"), "gradients": ("true gradients", "#D55E00"),
          "guess": ("guesses", "#E69F00")}
Bar = collections.namedtuple("Bar", "lane name begin end args")  # times in ms
Arrow = collections.namedtuple("Arrow", "name lane begin to_lane end")


def join(files):
    """The traces of a run's processes as one, a dict. Of arrows only those with both ends remain.

    A message may be thrown twice, and each arrival needs an id of its own: it gets the last
    departure before it.
    """
    events, arrows, departures = [], [], collections.defaultdict(list)
    for file in files:
        with file_errors():
            events += json.loads(Path(file).read_text(encoding="utf-8"))["traceEvents"]
    events.sort(key=lambda event: event.get("ts", 0))  # names first
    for event in events:
        if event["ph"] == "s":
            departures[event["id"]].append(event)
    for event in events:
        if event["ph"] == "f" and (sent := departures[event["id"]]):
            earlier = [each for each in sent if each["ts"] <= event["ts"]]
            arrows += [{**each, "id": len(arrows) // 2}
                       for each in ((earlier or sent)[-1 if earlier else 0], event)]
    events = [event for event in events if event["ph"] not in "sf"] + arrows
    return {"traceEvents": sorted(events, key=lambda event: event.get("ts", 0))}


def bars_and_arrows(events):
    """Lists of Bar and Arrow from the events of join()."""
    lanes = {event["pid"]: event["args"]["name"] for event in events
             if event["name"] == "process_name"}
    open_bars, leaving, bars, arrows = collections.defaultdict(list), {}, [], []
    for event in events:
        if event["ph"] == "M":
            continue
        lane, ms = lanes[event["pid"]], event["ts"] / 1000
        stack = open_bars[event["pid"], event["tid"]]
        if event["ph"] == "B":
            stack.append((event["name"], ms, event.get("args", {})))
        elif event["ph"] == "E":
            name, begin, args = stack.pop()
            bars.append(Bar(lane, name, begin, ms, args))
        elif event["ph"] == "s":
            leaving[event["id"]] = lane, ms
        else:
            arrows.append(Arrow(event["name"], *leaving[event["id"]], lane, ms))
    return bars, arrows


def window(bars):
    """(begin, end) of UPDATES updates of layer 1: those of median duration, in the middle third of
    the time that all processes recorded."""
    lanes = {bar.lane for bar in bars}
    first = max(min(bar.begin for bar in bars if bar.lane == lane) for lane in lanes)
    last = min(max(bar.end for bar in bars if bar.lane == lane) for lane in lanes)
    ends = sorted(bar.end for bar in bars if (bar.lane, bar.name) == (LAYER_1, "update"))
    windows = list(zip(ends, ends[UPDATES:], strict=False))
    middle = [each for each in windows if first + (last - first) / 3 <= each[0]
              and each[1] <= last - (last - first) / 3] or windows
    if not middle:
        raise UserError(f"the trace has fewer than {UPDATES + 1} updates of layer 1")
    median = statistics.median_low(end - begin for begin, end in middle)
    return next(each for each in middle if each[1] - each[0] == median)


def draw(figure, locked_events, decoupled_events):
    """Two panels, each UPDATES updates of layer 1 long: true gradients above, guesses below.

    The arguments: a figure of matplotlib, and the events of join() for each run.
    """
    panels = [bars_and_arrows(events) for events in (locked_events, decoupled_events)]
    shown = [window(bars) for bars, _ in panels]
    lanes = [[lane for lane in LANES if lane in {bar.lane for bar in bars}] for bars, _ in panels]
    axes = figure.subplots(2, 1, height_ratios=[len(each) + 0.3 for each in lanes])
    titles = ("True gradients: layer 1 waits for each of them",
              "Guesses: layer 1 does not wait for the true gradient")
    for ax, (bars, arrows), (begin, end), title, names in zip(axes, panels, shown, titles, lanes,
                                                             strict=True):
        ax.set_title(f"{title}. {UPDATES} updates take {end - begin:.0f} ms", loc="left",
                     fontsize=10, weight="bold")
        draw_bars(ax, bars, begin, end, names)
        draw_arrows(ax, arrows, begin, end, names)
        ax.axhspan(0.42, 0.58, color="#EEEEEE", zorder=0)
        labels = [names[0], f"network, {1000 * AWAY:.0f} ms", *names[1:]]
        ax.set(xlim=(0, end - begin), ylim=(len(names) - 0.7, -0.3),
               yticks=[0, 0.5, *range(1, len(names))],
               yticklabels=[label.replace(" ", "\n", 1) for label in labels])
        ax.tick_params(axis="y", length=0)
        ax.tick_params(labelsize=8)
        ax.spines[["left", "top", "right"]].set_visible(False)
    axes[-1].set_xlabel("milliseconds; the two panels have different scales", fontsize=8)
    draw_legend(figure)


def draw_legend(figure):
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    patches = {label: Patch(label=label, **look(name)) for name, (label, _) in BARS.items()}
    lines = [Line2D([], [], color=color, marker=">", markersize=4, label=label)
             for label, color in ARROWS.values()]
    figure.legend(handles=[*patches.values(), *lines], loc="outside lower center", ncols=4,
                  fontsize=8, frameon=False)


def look(name):
    """How matplotlib draws a span of this name: waiting is hatched."""
    color = BARS[name][1]
    if name == "wait":
        return {"facecolor": "white", "edgecolor": color, "hatch": "////", "linewidth": 1}
    return {"facecolor": color, "edgecolor": color, "linewidth": 0.4}


def draw_bars(ax, bars, begin, end, lanes):
    for name in ["wait", *(name for name in BARS if name != "wait")]:  # what is inside is above
        for y, lane in enumerate(lanes):
            pieces = [(bar.begin - begin, bar.end - bar.begin) for bar in bars
                      if (bar.lane, bar.name) == (lane, name)
                      and bar.end > begin and bar.begin < end]
            ax.broken_barh(pieces, (y - 0.2, 0.4), **look(name))


def draw_arrows(ax, arrows, begin, end, lanes):
    """From the edge of one lane to that of another."""
    from matplotlib.patches import FancyArrowPatch
    for arrow in arrows:
        if arrow.name in ARROWS and arrow.begin < end and arrow.end > begin:
            start, stop = lanes.index(arrow.lane), lanes.index(arrow.to_lane)
            edge = 0.2 if stop > start else -0.2
            ax.add_patch(FancyArrowPatch(
                (arrow.begin - begin, start + edge), (arrow.end - begin, stop - edge),
                arrowstyle="-|>", color=ARROWS[arrow.name][1], linewidth=0.9, mutation_scale=7,
                shrinkA=0, shrinkB=0, zorder=0.9))  # behind the bars of a lane between


def run(name, extra, argv, signals):
    """Run the processes with a slow network around the part above. Returns the exit code, and the
    events of all, which are in timeline/NAME.json, too."""
    folder = Path("timeline")
    args = launch.parse(["--first-port", str(launch.free_first_port()), "--num-epochs", "1", *argv,
                         *extra, "--progress-dir", str(folder / name)])
    if len(args.parts) > 2:
        sys.exit("plumbing.timeline: it draws one cut, so --parts takes two parts")
    commands = launch.command_lines(args)
    commands.pop("page")
    files = {each: folder / f"{name}_{each}.json" for each in commands}
    for each, words in commands.items():
        files[each].unlink(missing_ok=True)
        words += ["--trace", str(files[each])]
    with far(commands["input"], "--output-server"), far(commands["output"], "--oracle-server"):
        if code := launch.run(commands, signals):
            return code, []
    trace = join(files.values())
    (folder / f"{name}.json").write_text(json.dumps(trace), encoding="utf-8")
    return 0, trace["traceEvents"]


def far(words, option):
    """Put a slow network before the server that a command has as its `option`; it can be closed."""
    target = words[words.index(option) + 1]
    if target == "none":
        return contextlib.nullcontext()
    slow = proxy.Proxy(int(target.rpartition(":")[2]), AWAY)
    words += [option, f"127.0.0.1:{slow.port}"]  # the last one counts
    return contextlib.closing(slow)


def main(argv):
    """The exit code: that of the run that did not finish, or 0."""
    signals, traces = launch.catch_signals(), []
    Path("timeline").mkdir(exist_ok=True)
    for name, extra in (("true", ["--gradients", "true"]), ("guesses", [])):
        print(f"timeline, {name}: the part above is {2000 * AWAY:.0f} ms away", flush=True)
        code, events = run(name, extra, argv, signals)
        if code:
            return code
        traces.append(events)
    figure = new_figure((9, 5.6))
    draw(figure, *traces)
    figure.savefig("timeline.png", dpi=200)
    say("timeline.png; Perfetto opens timeline/true.json and timeline/guesses.json")
    return 0


if __name__ == "__main__":
    try:
        with file_errors():
            sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"plumbing.timeline: {error}")
