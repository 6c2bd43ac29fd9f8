"""`make bench-delay`: every way to get a gradient, against its delay, in one process. Hours.

The networks: one layer of 24 below the cut, as in `make run`, and the same with eight inputs of
noise; one of 3 to 48 below 64-64-1; and three layers of 64, with noise. Three functions: the
default one, `waves` and `ripples`. In each network each way gets the same number of tries for its
rates, momentum and warm-up, on a function that is not reported, and as many for what is its own
(the head of a local loss, the oracle), on another one; at full length, at 6, 20 and 50 updates.
The rates at 0 are those at 6, and those at 100 are those at 50.
examples/in_process.py holds everything else still: the same options give the same numbers, on a
busy machine, too.

--widths compares the networks of one layer below 64-64-1 instead. --hindsight tries to prove a
verdict for guesses wrong: their opponents get the best of all rates on the very function and delay
that is reported. --persistence shows why exchange.centered() takes the mean out: the cosine of the
true gradient at the cut with itself some updates later, for its mean over held-out examples and for
the rest. Writes bench-delay.md and .png into benchmarks/, or bench-widths.md and .png, or
bench-hindsight.md, or bench-persistence.md.
"""
import concurrent.futures
import itertools
import json
import multiprocessing
import os

import numpy as np
from tqdm import tqdm

import exchange
from examples import in_process
from plot import STYLES, png
from plumbing import data
from plumbing.errors import UserError
from sgd import (
    backprop,
    descend,
    feed_forward,
    make_layers,
    minibatches,
    schedule,
    task_of,
)
from tests.benchmarks.measure import (
    DATA,
    FUNCTIONS,
    KEPT,
    SEARCH_SEED,
    another_target,
    cell,
    make_parser,
    noisy_data,
    other_target,
    table,
)
from train_input import mean_cosine, with_rates

EPOCHS = 3  # 5,700 updates
DELAYS = 0, 6, 20, 50, 100
SEARCHED_DELAYS = 6, 20, 50
WIDTHS = 3, 6, 12, 24, 48
PERSISTENCE = 1, 3, 6, 20, 50
SEARCHED = {"other": other_target, "another": another_target}  # for rates; for a way's own
# learning rate, momentum, warm-up
SHALLOW_RATES = (((1, 0.9, 0), (2.7, 0.9, 0), (2.7, 0.9, 1000), (20, 0.9, 1000), (30, 0, 1000),
                  (60, 0, 1000)), ((0.3, 0.9, 0), (5, 0.9, 0)))
DEEP_RATES = (((0.2, 0.9, 0), (0.6, 0.9, 0), (1.5, 0.9, 1000), (3, 0.9, 1000), (20, 0, 1000),
               (60, 0, 1000)), ((0.07, 0.9, 0), (6, 0.9, 1000)))
NARROW = {width: f"{width} below 64-64-1" for width in WIDTHS}
NETWORKS = {  # name: options, rates to try, where nothing is a way's own two more
    "one layer of 24": (["--layers", 2, 24, 12, 1], *SHALLOW_RATES),
    "one layer of 24, noise": (["--layers", 10, 24, 12, 1], *SHALLOW_RATES),
    **{name: (["--layers", 2, width, 64, 64, 1], *SHALLOW_RATES)
       for width, name in NARROW.items()},
    "three layers of 64": (["--layers", 10, 64, 64, 64, 64, 64, 1, "--cuts", 3], *DEEP_RATES)}
ORACLES = ("--oracle-rate", 0.002), ("--oracle-layers", 128, 128)
HEADS = ("--head",), ("--head", 64, 64)  # besides the default one, of 12
WAYS = {  # name: --gradients and labels, whether the delay matters, its own options to try
    "true, no delay": (["--gradients", "true"], False, None),
    "true, late": (["--gradients", "delayed"], True, None),
    "guesses with labels": (["--condition-on-labels"], True, ORACLES),
    "guesses": ([], True, ORACLES),
    "local loss": (["--gradients", "local"], False, HEADS),
    "zero": (["--gradients", "zero"], False, ())}


def data_of(function, network):
    """Paths of its x.npy and y.npy, which main() has made; with noise if the network has more than
    two inputs."""
    folder = KEPT / function
    x, y = DATA if function == "default" else (folder / "x.npy", folder / "y.npy")
    return (folder / "noisy" / "x.npy" if NETWORKS[network][0][1] > 2 else x), y


def learn(network, words, function, delay, rates, seed, own=()):
    """The held-out MSE after each epoch of one run. Kept on disk. delay: None where it does not
    matter."""
    delay = delay or 0
    name = " ".join(map(str, [network, *words, function, delay, *rates, seed, *own]))
    kept = KEPT / "bench-delay" / f"{name}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    paths = data_of(function, network)
    rate, momentum, warm_up = rates
    words = [*paths, *NETWORKS[network][0], *words, "--delay", delay, "--seed", seed, "--replay", 4,
             "--num-epochs", EPOCHS, "--learning-rate", rate, "--momentum", momentum,
             "--warm-up", warm_up, *own]
    args = with_rates(in_process.make_parser().parse_args(list(map(str, words))))
    with np.errstate(all="ignore"):
        try:
            scores = [score for _, score, *_ in in_process.run(args, data.load(*paths))]
        except UserError:  # diverged
            scores = [np.inf]
    kept.parent.mkdir(parents=True, exist_ok=True)
    temporary = kept.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(scores))
    temporary.replace(kept)
    return scores


def reached(scores):
    """What a run came to: the last held-out MSE, infinite if it diverged."""
    return float(np.nan_to_num(scores[-1], nan=np.inf))


def run_all(pool, cases):
    """[(arguments of learn)] -> what each run came to, with a progress bar."""
    cases = list(cases)
    futures = {case: pool.submit(learn, *case) for case in dict.fromkeys(cases)}
    for _ in tqdm(concurrent.futures.as_completed(futures.values()), total=len(futures),
                  unit="run"):
        pass
    return {case: reached(future.result()) for case, future in futures.items()}


def of_all_seeds(pool, cases):
    """{(*cell, seed): arguments of learn} -> {cell: what its runs came to}."""
    found, results = run_all(pool, cases.values()), {}
    for (*cell_of, _), case in cases.items():
        results.setdefault(tuple(cell_of), []).append(found[case])
    return results


def tries_of(network, way, best):
    """(rates, own options) to try: all rates first; then the best of them, and with it what is the
    way's own, or further rates where nothing is."""
    _, rates, more = NETWORKS[network]
    own = WAYS[way][2]
    if way == "zero":
        return [((1, 0, 0), ())]
    if best is None:
        return [(each, ()) for each in rates]
    return [best, *((best[0], each) for each in own or ()),
            *((each, ()) for each in more if own is None)]


def searched_for(way, delay):
    """The delay at which the rates for this one are searched; None if it does not matter."""
    if not WAYS[way][1]:
        return None
    return max((each for each in SEARCHED_DELAYS if each <= delay), default=SEARCHED_DELAYS[0])


def search(pool, network, ways, delays):
    """{(way, searched delay): the rates and own options that came to the lowest MSE}."""
    best = {(way, searched_for(way, delay)): None for way in ways for delay in delays}
    for function in SEARCHED:
        cases = {((way, delay), tried): (network, tuple(WAYS[way][0]), function, delay, tried[0],
                                         SEARCH_SEED, tried[1])
                 for (way, delay), before in best.items()
                 for tried in tries_of(network, way, before)}
        found = run_all(pool, cases.values())
        # of each cell the lowest comes last
        best = dict(sorted(cases, key=lambda one: -found[cases[one]]))  # noqa: B023
    return best


def tells(delay):
    """How a delay is named in a table."""
    return "–" if delay is None else delay


def changes(function, network):
    """The cosine of the true gradient at the cut, at held-out examples, with itself some updates
    later: for its mean over them, and for the rest. Plain SGD, from update 400 to 2,400."""
    loaded = data.load(*data_of(function, network))
    args = in_process.make_parser().parse_args(["", "", *map(str, NETWORKS[network][0])])
    layers = make_layers(args.layers, np.random.default_rng(SEARCH_SEED))
    below, above = layers[:args.cuts[0]], layers[args.cuts[0]:]
    x, y, seen = loaded.x_test[:5000], loaded.y_test[:5000], []
    loss_gradient = task_of(y.shape[1]).loss_gradient
    order = minibatches(len(loaded.x), args.batch_size, 2, SEARCH_SEED)
    for clock, i in enumerate(itertools.islice(order, 2400)):
        g = backprop(above, loss_gradient(feed_forward(layers, x), y))
        if clock >= 400:
            seen.append((g.mean(axis=0), exchange.centered(g)[:200].ravel()))
        backprop(layers, loss_gradient(feed_forward(layers, loaded.x[i]), loaded.y[i]))
        descend(below, schedule(1.0, args.decay, 300)(clock), 0.0)
        descend(above, args.output_rate, args.output_momentum)
    means, rests = map(np.array, zip(*seen, strict=True))
    for what, all_g in (("mean", means), ("the rest", rests)):
        yield function, network, what, *(f"{mean_cosine(all_g[:-k], all_g[k:]):.2f}"
                                         for k in PERSISTENCE)


def draw(figure, results, rows, columns, x_label):
    """The final MSE, median and range over seeds. results: (row, column, way, x) -> MSEs."""
    from matplotlib.ticker import LogLocator, NullFormatter
    named, grid = {}, figure.subplots(len(rows), len(columns), squeeze=False, sharex=True)
    ways = list(dict.fromkeys(way for *_, way, _ in results))
    for (row, column), axes in zip(itertools.product(rows, columns), grid.flat, strict=True):
        xs = sorted({x for r, c, _, x in results if (r, c) == (row, column) and x is not None})
        for (color, style), way in zip(STYLES, ways, strict=False):
            found = {x: values for (r, c, w, x), values in results.items()
                     if (r, c, w) == (row, column, way)}
            if list(found) == [None]:  # no delay: a level line
                found = dict.fromkeys(xs, found[None])
            values = np.array([found[x] for x in sorted(found)])
            if len(values):
                median = np.median(values, axis=1)
                axes.errorbar(sorted(found), median, [median - values.min(1),
                              values.max(1) - median], color=color, linestyle=style, marker="o",
                              markersize=4, capsize=3, label=way)
        axes.set_xscale("symlog", linthresh=min(filter(None, xs)))  # a delay may be 0
        axes.set(yscale="log", xticks=xs, xticklabels=xs)
        if row == rows[0]:
            axes.set_title(column, fontsize=10)
        if row == rows[-1]:
            axes.set_xlabel(x_label)
        if column == columns[0]:
            axes.set_ylabel(f"{row}\nheld-out MSE")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:.3g}",
                       minor_formatter="")
        axes.grid(True, alpha=0.25)
        named.update(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3)


def report(name, results, best, x_name):
    """A table with a row for each way, and one of what was chosen."""
    rows = {}
    for (row, column, way, x), values in results.items():
        rows.setdefault((row, way, x), {})[column] = cell(values)
    columns = list(dict.fromkeys(column for _, column, *_ in results))
    table(name, ("network", "gradients", x_name, *columns, "rate, momentum, warm-up; own"), [
        (row, way, tells(x), *(cells.get(column, "–") for column in columns),
         " ".join(map(str, (*best[row, way, x][0], *best[row, way, x][1]))))
        for (row, way, x), cells in rows.items()])


def delays(pool, args):
    results, chosen = {}, {}
    for network in args.networks:
        best = search(pool, network, args.ways, args.delays)
        cases = {}
        for way, function, seed in itertools.product(args.ways, args.functions, range(args.seeds)):
            for delay in args.delays if WAYS[way][1] else (None,):
                rates, own = chosen[network, way, delay] = best[way, searched_for(way, delay)]
                cases[network, function, way, delay, seed] = (
                    network, tuple(WAYS[way][0]), function, delay, rates, seed, own)
        results |= of_all_seeds(pool, cases)
    report("bench-delay", results, chosen, "updates late")
    (KEPT / "bench-delay.png").write_bytes(png(
        draw, results, args.networks, args.functions, "delay of true gradients, updates",
        size=(10, 3 * len(args.networks) + 0.8), dpi=110))


def widths(pool, args):
    """One layer of some width below 64-64-1, at 6 and 50 updates; local losses with each head."""
    cases, rows = {}, {}
    for width, network in NARROW.items():
        best = search(pool, network, args.ways, (6, 50))
        for way, function, seed, late in itertools.product(
                args.ways, args.functions, range(args.seeds), (6, 50)):
            delay = late if WAYS[way][1] else None
            rates, own = best[way, delay]
            for head in ((), *HEADS) if way == "local loss" else (own,):
                name = f"local loss, head {head_of(head)}" if way == "local loss" else way
                cases[f"{late} updates late", function, name, width, seed] = (
                    network, tuple(WAYS[way][0]), function, delay, rates, seed, head)
    results = of_all_seeds(pool, cases)
    for (late, function, name, width, _), (_, _, _, delay, *_) in cases.items():
        rows.setdefault((function, name, tells(delay)), {})[width] = cell(
            results[late, function, name, width])
    table("bench-widths", ("function", "gradients", "updates late", *(
        f"width {width}" for width in WIDTHS)), [
            (*row, *cells.values())
            for row, cells in sorted(rows.items(), key=lambda item: item[0][0])])
    (KEPT / "bench-widths.png").write_bytes(png(
        draw, results, ["6 updates late", "50 updates late"], args.functions,
        "width of the layer below the cut", size=(10, 6.8), dpi=110))


def head_of(own):
    return "of 12" if not own else "–".join(map(str, own[1:])) or "linear"


def hindsight(pool, args):
    """The ways without an oracle at the best of their rates for each function and delay."""
    cases, best = {}, {}
    for network, way, function, seed in itertools.product(
            args.networks, args.ways, args.functions, range(args.seeds)):
        words, is_late, own = WAYS[way]
        if own == ORACLES:
            continue
        _, rates, more = NETWORKS[network]
        for delay, tried in itertools.product(
                args.delays if is_late else (None,),
                (*rates, *more) if way != "zero" else ((1, 0, 0),)):
            cases[network, way, delay, function, tried, seed] = (
                network, tuple(words), function, delay, tried, seed, ())
    for (network, way, delay, function, tried), values in of_all_seeds(pool, cases).items():
        row = best.setdefault((network, way, tells(delay)), {})
        said = f"{cell(values)}: {' '.join(map(str, tried))}"
        row[function] = min(row.get(function, (np.inf, "–")), (np.median(values), said))
    table("bench-hindsight", ("network", "gradients", "updates late", *args.functions), [
        (*row, *(said for _, said in cells.values())) for row, cells in best.items()])


def persistence(_, args):
    table("bench-persistence", ("function", "network", "true gradient", *(
        f"{k} updates later" for k in PERSISTENCE)), [
        row for network in args.networks for function in args.functions
        for row in changes(function, network)])


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    add("--functions", nargs="+", default=list(FUNCTIONS), choices=FUNCTIONS)
    add("--delays", type=int, nargs="+", default=DELAYS)
    add("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    modes = parser.add_mutually_exclusive_group()
    for mode, what in ((widths, "one layer of 3 to 48 below 64-64-1"),
                       (hindsight, "give the opponents of guesses their best rates in each case"),
                       (persistence, "how fast the true gradient changes")):
        modes.add_argument(f"--{mode.__name__}", dest="mode", action="store_const", const=mode,
                           default=delays, help=what)
    add("--jobs", type=int, default=os.cpu_count(), help="runs at a time (%(default)s)")
    args = parser.parse_args()
    for function, make in {**FUNCTIONS, **SEARCHED}.items():
        noisy_data(KEPT / function / "noisy", paths=make(KEPT / function))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, context) as pool:
        args.mode(pool, args)


if __name__ == "__main__":
    main()
