"""`make bench-depth`: what one update of the input half costs, decoupled and update-locked, as the output half deepens.

Batch 256, width 512, a linear oracle; once with the output trainer at hand, and with 10 and 50 ms of delay before it
answers. Then the other side: held-out MSE against seconds, on networks of up to six hidden layers and a problem where
layer 1 matters: the default target, with eight columns of noise beside the two that count. Writes a table and pictures
into bench_depth/, where finished training runs are kept. About a quarter of an hour.
"""
import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from plot import STYLES, draw_curves, png
from tests.benchmarks.measure import DATA, kept, machine, run_three
from tests.processes import DelayingProxy, Three, end, free_ports, wait_until

DEPTHS, DELAYS, WIDTH = (1, 2, 4, 8, 16), (0, 10, 50), 512  # hidden layers of the output half; milliseconds
SECONDS = 5        # of each measurement
LEARNING, COLUMNS = 40, 10  # seconds of training for the curves, on inputs of so many columns
RUNS = {  # name: gradients, layers of the input half, hidden layers of the output half, milliseconds of delay
    "true gradients": ("true", 1, 5, 0),
    "synthetic gradients": ("synthetic", 1, 5, 0),
    "zero gradients": ("zero", 1, 5, 0),
    "true, 50 ms late": ("true", 1, 5, 50),
    "synthetic, 50 ms late": ("synthetic", 1, 5, 50),
    "zero, 50 ms late": ("zero", 1, 5, 50),
    "true, one hidden layer in all": ("true", 1, 0, 0),
    "true, cut after layer 3": ("true", 3, 3, 0),
    "synthetic, cut after layer 3": ("synthetic", 3, 3, 0),
    "zero, cut after layer 3": ("zero", 3, 3, 0),
}
CAREFUL = ["--learning-rate", 0.01, "--batch-size", 256]


def behind_a_proxy():
    """Where three processes shall run so that the input trainer reaches the output trainer through a proxy."""
    ports = free_ports(3)
    return {"ports": ports, "proxy": DelayingProxy(ports[1])}


def update_milliseconds(three, gradients):
    """Milliseconds an update of the input half, over SECONDS of training; starts and ends the input trainer."""
    three.start("input", extra=["--gradients", gradients])

    def state():
        return three.status("input") or {}
    try:
        wait_until(lambda: state().get("updates", 0) > 10, f"training along {gradients} gradients", 120)
        return 1e3 / three.updates_per_second("input", SECONDS)
    finally:
        end(three.processes["input"])


def measure_updates(folder, bar):
    """{(gradients, delay): [milliseconds at each depth]}"""
    results = {(gradients, delay): [] for delay in DELAYS for gradients in ("synthetic", "true")}
    for depth in DEPTHS:
        (folder / str(depth)).mkdir()
        where = behind_a_proxy()
        with Three(folder / str(depth), oracle=["--layers", WIDTH, WIDTH, *CAREFUL],
                   output=["--layers", *[WIDTH] * (depth + 1), 1, *CAREFUL],
                   input=[*DATA, "--layers", 2, WIDTH, *CAREFUL, "--snapshot-seconds", 10**6], **where) as three:
            three.start("oracle", "output")
            wait_until(lambda: (three.status("oracle") or {}).get("ready") and three.status("output"), "two processes")
            for (gradients, delay), milliseconds in results.items():
                where["proxy"].delay = delay / 1e3
                milliseconds.append(update_milliseconds(three, gradients))
                bar.update()
        where["proxy"].close()
    return results


def noisy_data(folder):
    """Paths of x.npy with eight more columns, of noise, and of y.npy."""
    x = np.load(DATA[0])
    noise = np.random.default_rng(0).uniform(-1, 1, (len(x), COLUMNS - x.shape[1])).astype(np.float32)
    np.save(folder / "x.npy", np.column_stack([x, noise]))
    return folder / "x.npy", DATA[1]


def learn(folder, data, gradients, depth, rest, delay):
    """One of RUNS: hidden layers of 64, and the oracle 64-64-64."""
    # Unguessed gradients can take the rate and the momentum of ordinary minibatch SGD.
    rates = ([0.1, "--momentum", 0.9, "--warm-up", 0, "--decay", 200_000] if gradients == "true"
             else [1.0 if depth == 1 else 0.1])
    where = behind_a_proxy()
    where["proxy"].delay = delay / 1e3
    run_three(folder, LEARNING, data=data, oracle=["--layers", 64, 64, 64],
              output=["--layers", *[64] * (rest + 1), 1, "--learning-rate", 0.1],
              input=["--layers", COLUMNS, *[64] * depth, "--gradients", gradients, "--snapshot-seconds", 2,
                     "--learning-rate", *rates], **where)
    where["proxy"].close()


def draw_updates(figure, results):
    """Milliseconds an update against the output half's depth."""
    axes = figure.subplots()
    for (gradients, delay), milliseconds in results.items():
        color, _ = STYLES[DELAYS.index(delay)]
        axes.plot(DEPTHS, milliseconds, "-o" if gradients == "synthetic" else "--s", color=color,
                  label=f"{'decoupled' if gradients == 'synthetic' else 'update-locked'}, {delay} ms of delay")
    axes.set(xscale="log", yscale="log", xlabel="hidden layers of the output half (width 512)",
             ylabel="one update of the input half, ms (batch 256)", xticks=DEPTHS, xticklabels=DEPTHS,
             yticks=(20, 50, 100, 200), yticklabels=(20, 50, 100, 200), ylim=(15, 250))
    axes.minorticks_off()
    axes.grid(True, alpha=0.25)
    axes.legend(fontsize=8)


def main():
    folder = Path("bench_depth")
    folder.mkdir(exist_ok=True)
    runs, data = {}, noisy_data(folder)
    with tqdm(total=len(DEPTHS) * len(DELAYS) * 2 + len(RUNS), unit="part") as bar:
        for name, options in RUNS.items():
            runs[name] = kept(folder, name, lambda place: learn(place, data, *options))
            bar.update()
        with tempfile.TemporaryDirectory() as temporary:
            results = measure_updates(Path(temporary), bar)
    (folder / "updates.png").write_bytes(png(draw_updates, results, size=(7, 4.5), dpi=110))
    (folder / "learning.png").write_bytes(png(draw_curves, dict(list(runs.items())[:6]), size=(9, 5.5), dpi=110))
    lines = [f"Milliseconds an update of the input half; batch 256, width {WIDTH}. {machine()}.", "",
             "| hidden layers of the output half | " + " | ".join(map(str, DEPTHS)) + " | 16 over 1 |",
             "| --- |" + " --- |" * (len(DEPTHS) + 1)]
    for (gradients, delay), ms in results.items():
        name = "decoupled" if gradients == "synthetic" else "update-locked"
        lines.append(f"| {name}, {delay} ms of delay | " + " | ".join(f"{m:.1f}" for m in ms) + f" | {ms[-1] / ms[0]:.2f} |")
    lines += ["", f"Hidden layers of 64, {LEARNING} s of training; MSE: the median of the last three rows.", "",
              "| run | network, cut at \\| | held-out MSE | updates of the input half |", "| --- | --- | --- | --- |"]
    for name, metrics in runs.items():
        _, depth, rest, _ = RUNS[name]
        network = "-".join(map(str, [COLUMNS, *[64] * depth])) + " \\| " + "-".join(map(str, [*[64] * rest, 1]))
        lines.append(f"| {name} | {network} | {np.median(metrics['test_mse'][-3:]):.4f} | "
                     f"{metrics['examples'][-1] / 100:,.0f} |")
    table = "\n".join(lines) + "\n"
    (folder / "table.md").write_text(table)
    print(f"\n{table}\nwrote {folder}/table.md, {folder}/updates.png and {folder}/learning.png")


if __name__ == "__main__":
    main()
