"""`make bench-depth`: deep networks. `ARGS=--updates` measures what one update costs, instead.

Five hidden layers of 64, cut after layer 1, 3 or 5, on a problem where layer 1 must learn: the
default target, with eight columns of noise beside the two that count. True, zero, shuffled and
synthetic gradients, labels shown or not, a linear oracle and a deep one, after the same number of
updates; and, cut after 3 or 5, those in DISTANT with the output trainer 50 ms away, after the same
seconds. `--search` tries the same rates for every way, on a seed that is not reported.
"""
import itertools

import numpy as np
from tqdm import tqdm

from plot import STYLES, draw_curves, png
from tests.benchmarks.measure import (
    DATA,
    KEPT,
    SEARCH_SEED,
    Runs,
    cell,
    final,
    make_parser,
    noisy_data,
    run_three,
    table,
)
from tests.processes import Three, end, wait_until

WIDTH, COLUMNS, HIDDEN = 64, 10, 6
SECONDS = 30   # of training, where there is a delay
LINEAR, DEEP = ["--layers", WIDTH, WIDTH], ["--layers", WIDTH, WIDTH, WIDTH]
LABELS = ["--condition-on-labels"]
WAYS = {  # name: --gradients, options of the oracle
    "true": ("true", DEEP),
    "zero": ("zero", DEEP),
    "shuffled, labels": ("shuffled", [*DEEP, *LABELS]),
    "synthetic": ("synthetic", DEEP),
    "synthetic, labels, linear": ("synthetic", [*LINEAR, *LABELS]),
    "synthetic, labels": ("synthetic", [*DEEP, *LABELS])}
DISTANT = ("true", "zero", "synthetic, labels")
# rate and momentum of the input half
GRID = ((0.1, 0.9), (0.2, 0.9), (0.5, 0.0), (1.0, 0.0), (2.0, 0.0), (4.0, 0.0))
# Of what comes within a quarter of the best, which is what seeds differ by, the lowest rate. Zero
# gradients have none.
CHOSEN = {3: {"true": (0.2, 0.9), "zero": (4.0, 0.0), "shuffled, labels": (0.5, 0.0),
              "synthetic": (0.1, 0.9), "synthetic, labels, linear": (4.0, 0.0),
              "synthetic, labels": (4.0, 0.0)}}
CHOSEN[1] = CHOSEN[3]
# only these and true gradients were searched there
CHOSEN[5] = CHOSEN[3] | {"synthetic, labels": (0.2, 0.9)}


def learn(folder, data, cut, way, rates, seed, updates=None, seconds=None, delay=0):
    """One run: `cut` layers in the input half, the other hidden ones and the last in the output
    half.

    A linear layer of 64 alone, below which everything may saturate, is stable up to a rate of
    2 (1 + momentum) / 64 = 0.06.
    """
    gradients, oracle = WAYS[way]
    rate, momentum = rates
    run_three(folder, seconds, seed, data=data, delay=delay, oracle=oracle,
              output=["--layers", *[WIDTH] * (HIDDEN - cut), 1,
                      "--learning-rate", 0.02 if cut == HIDDEN - 1 else 0.1],
              input=["--layers", COLUMNS, *[WIDTH] * cut, "--gradients", gradients,
                     "--learning-rate", rate, "--momentum", momentum,
                     "--warm-up", 0 if gradients == "true" else 300, "--decay", 20_000,
                     *(["--num-epochs", round(updates / 1900)] if updates else [])])


def update_milliseconds(three, gradients, seconds=5):
    """Milliseconds an update of the input half, over some seconds of training; starts and ends the
    input trainer."""
    three.start("input", extra=["--gradients", gradients, "--resume"])

    def state():
        return three.status("input") or {}
    try:
        wait_until(lambda: state().get("updates", 0) > 10, f"training along {gradients} gradients",
                   120)
        return 1e3 / three.updates_per_second("input", seconds)
    finally:
        end(three.processes["input"])


def measure_updates(depths=(1, 2, 4, 8, 16), delays=(0, 10, 50), width=512):
    """What one update of the input half costs, decoupled and update-locked, as the output half
    deepens."""
    careful = ["--learning-rate", 0.01, "--batch-size", 256]
    cases = list(itertools.product(delays, ("synthetic", "true")))
    results = {case: [] for case in cases}
    for depth in tqdm(depths, unit="depth"):
        folder = KEPT / "bench-updates" / str(depth)
        folder.mkdir(parents=True, exist_ok=True)
        three = Three(folder, oracle=["--layers", width, width, *careful, "--keep", 5120],
                      output=["--layers", *[width] * (depth + 1), 1, *careful],
                      input=[*DATA, "--layers", 2, width, *careful, "--snapshot-seconds", 10**6])
        three.commands["input"] += ["--output-server", f"127.0.0.1:{three.to_output.port}"]
        with three:
            three.start("oracle", "output")
            wait_until(lambda three=three: (three.status("oracle") or {}).get("ready")
                       and three.status("output"), "two processes")
            for delay, gradients in cases:
                three.to_output.delay = delay / 1e3
                results[delay, gradients].append(update_milliseconds(three, gradients))
    names = {"synthetic": "decoupled", "true": "update-locked"}
    table("bench-updates", (
        "one update of the input half, ms", *depths, f"{depths[-1]} ÷ {depths[0]}"), [
        (f"{names[gradients]}, the output trainer {delay} ms away",
         *(f"{each:.1f}" for each in each_depth), f"{each_depth[-1] / each_depth[0]:.2f}")
        for (delay, gradients), each_depth in results.items()])

    def draw(figure):
        axes = figure.subplots()
        for (delay, gradients), milliseconds in results.items():
            axes.plot(depths, milliseconds, "-o" if gradients == "synthetic" else "--s",
                      color=STYLES[delays.index(delay)][0],
                      label=f"{names[gradients]}, {delay} ms away")
        axes.set(xlabel="hidden layers of the output half", ylabel="ms an update of the input half",
                 xscale="log", xticks=depths, xticklabels=depths, ylim=(0, None))
        axes.grid(True, alpha=0.25)
        axes.legend(fontsize=8)
    (KEPT / "bench-updates.png").write_bytes(png(draw, size=(7, 4.5), dpi=110))


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--updates", action="store_true", help="measure what an update costs, instead")
    add("--search", action="store_true", help="print what the rates give, instead")
    add("--cuts", type=int, nargs="+", default=[1, 3, 5], help="(%(default)s)")
    add("--ways", nargs="+", default=list(WAYS), choices=WAYS, help="(all)")
    add("--delays", type=int, nargs="+", default=[0, 50], help="milliseconds (%(default)s)")
    args = parser.parse_args()
    if args.updates:
        return measure_updates()
    data = noisy_data(KEPT / "noisy")
    if args.search:
        return search(args, data)
    every = itertools.product(range(args.seeds), args.delays, args.cuts, args.ways)
    cases = [(seed, delay, cut, way) for seed, delay, cut, way in every
             if not delay or cut > 1 and way in DISTANT]
    runs, results = Runs("bench-depth", len(cases)), {}
    for seed, delay, cut, way in cases:
        length = {"seconds": SECONDS} if delay else {"updates": 13_000}
        results.setdefault((delay, cut, way), []).append(runs.get(
            f"delay {delay} cut {cut} {way}", seed, learn, data, cut, way, CHOSEN[cut][way],
            delay=delay / 1e3, **length))
    best = {key: np.median(list(map(final, each))) for key, each in results.items()}
    rows = []
    for (delay, cut, way), each in results.items():
        over = [f"{best[delay, cut, way] / best[delay, cut, other]:.2f}"
                if (delay, cut, other) in best else "–" for other in ("zero", "true")]
        updates, seconds = (np.median([metrics[name][-1] for metrics in each])
                            for name in ("updates", "seconds"))
        stale = "–" if way == "true" else (
            f"{np.median([np.nanmedian(metrics['staleness']) for metrics in each]):.0f}")
        rows.append((f"{delay} ms away", cut, way, cell(list(map(final, each))), *over,
                     f"{updates:,.0f}", f"{seconds:.0f}", stale))
    table("bench-depth", ("output trainer", "cut after layer", "gradients", "held-out MSE",
                          "÷ zero's", "÷ true's", "updates", "seconds", "staleness"), rows)
    shown = {f"{way}, cut after {cut}": each[0] for (delay, cut, way), each in results.items()
             if delay == args.delays[0] and cut == args.cuts[len(args.cuts) // 2]}
    (KEPT / "bench-depth.png").write_bytes(png(draw_curves, shown, size=(9, 8), dpi=110))


def search(args, data):
    runs = Runs("bench-depth-search", len(args.cuts) * len(args.ways) * len(GRID))
    table("bench-depth-search", ("cut after layer", "gradients", *map(str, GRID)), [
        (cut, way, *(format(runs.score(f"cut {cut} {way} {rates}", SEARCH_SEED, learn, data, cut,
                                       way, rates, updates=6000), ".4f") for rates in GRID))
        for cut in args.cuts for way in args.ways])


if __name__ == "__main__":
    main()
