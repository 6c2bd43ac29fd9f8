"""`make compare`: the claims that apply, tested: seven ways to train, three seeds each. About half an hour.

    python -m tests.benchmarks.compare --epochs 10 --seeds 3

Every run sees the same data and the same number of examples. Finished runs are kept in compare/, so that it can be
interrupted and started again. Writes compare/table.md and compare/curves.png, and prints the table.
"""
import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

from plot import draw_curves, png
from tests.benchmarks.measure import kept, machine, run_sgd, run_three

RUNS = {  # name: (options of the oracle, options of the input trainer, what it tests); None for sgd.py
    "sgd.py": (None, None, "the baseline"),
    "true gradients": ([], ["--gradients", "true"], "the same split, update-locked"),
    "zero gradients": ([], ["--gradients", "zero"], "the control: is the oracle worth anything?"),
    "synthetic, oracle 24-12-24": ([], [], "the default"),
    "synthetic, linear oracle": (["--layers", 24, 24], [], "will a much smaller oracle do?"),
    "synthetic, oracle 24-128-128-24": (["--layers", 24, 128, 128, 24], [], "does capacity help?"),
    "synthetic, labels shown": (["--condition-on-labels"], [], "the paper's cDNI"),
}
# True gradients arrive undelayed and unguessed, so that both halves
# can take the rate and the momentum of ordinary minibatch SGD.
TRUE = ["--learning-rate", 0.2, "--momentum", 0.9, "--decay", 200_000, "--warm-up", 0]


def run(folder, name, seed, epochs):
    """One run of the table, in `folder`."""
    oracle, input, _ = RUNS[name]
    if oracle is None:
        run_sgd(folder, "--num-epochs", epochs, "--seed", seed)
    else:
        extra = TRUE if name == "true gradients" else []
        output = ["--learning-rate", 0.2] if extra else []
        run_three(folder, None, seed, oracle, output,
                  [*input, *extra, "--num-epochs", epochs, "--snapshot-seconds", 2])


def cell(values, form):
    """Median and range."""
    return f"{np.median(values):{form}} ({min(values):{form}} – {max(values):{form}})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10, help="%(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="%(default)s")
    parser.add_argument("--dir", type=Path, default=Path("compare"), help="%(default)s")
    args = parser.parse_args()
    args.dir.mkdir(exist_ok=True)
    results = {name: [] for name in RUNS}
    with tqdm(total=len(RUNS) * args.seeds, unit="run") as bar:
        for seed in range(args.seeds):
            for name in RUNS:
                bar.set_postfix_str(f"{name}, seed {seed}")
                results[name].append(kept(args.dir, f"{name}_{args.epochs}_{seed}",
                                          lambda folder: run(folder, name, seed, args.epochs)))
                bar.update()
    lines = [f"{args.epochs} epochs of 190,000 examples, {args.seeds} seeds: median (range). {machine()}.", "",
             "| run | what it tests | held-out MSE | seconds | mean gradient cosine |", "| --- | --- | --- | --- | --- |"]
    middle = {}
    for name, runs in results.items():
        mse = [float(np.median(metrics["test_mse"][-3:])) for metrics in runs]
        cosines = [float(np.mean(metrics["gradient_cosine"][1:])) for metrics in runs if "gradient_cosine" in metrics]
        lines.append(f"| {name} | {RUNS[name][2]} | {cell(mse, '.4f')} | "
                     f"{cell([metrics['seconds'][-1] for metrics in runs], '.0f')} | "
                     f"{cell(cosines, '.2f') if cosines and np.isfinite(cosines).all() else '–'} |")
        middle[name] = runs[int(np.argsort(mse)[len(mse) // 2])]
    table = "\n".join(lines) + "\n"
    (args.dir / "table.md").write_text(table)
    (args.dir / "curves.png").write_bytes(png(draw_curves, middle, size=(9, 6), dpi=110))
    print(f"\n{table}\nwrote {args.dir / 'table.md'} and {args.dir / 'curves.png'} (of each, the seed with the median MSE)")


if __name__ == "__main__":
    main()
