"""`make soak`: the default run for an hour; are resident memory and latency flat? `ARGS="--seconds
600"` for a shorter one."""
import argparse
import tempfile

import numpy as np
from tqdm import tqdm

from tests.benchmarks.measure import DATA, TARGETS, resident_megabytes, table
from tests.processes import Three, wait_until


def sample(three, due):
    """Waits for `due` seconds of training; what it is like then."""
    def ready():
        state = three.status("input")
        return state and state["seconds"] > due and state
    state = wait_until(ready, "ten more seconds of training", 120)
    return (state["seconds"], resident_megabytes(three), state["latency_ms"],
            state["latency_ms_p95"], state["test_mse"])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=3600, help="(%(default)s)")
    seconds, rows = parser.parse_args().seconds, []
    with (tempfile.TemporaryDirectory() as name, tqdm(total=seconds, unit="s") as bar,
          Three(name, input=[*DATA, "--num-epochs", 10**6]) as three):
        three.start()
        while not rows or rows[-1][0] < seconds:
            rows.append(sample(three, 10 * (len(rows) + 1)))
            bar.update(round(rows[-1][0]) - bar.n)
        sent = [three.status("input")["examples_sent"], three.status("output")["gradients_sent"]]
        skipped = three.status("output")["skipped"]
    columns, quarter, lines = np.array(rows).T, len(rows) // 4, []
    shown = ((f"resident memory of the three, MB, last quarter of {seconds} s", ".0f"),
             ("estimate_gradients, median, ms", ".2f"),
             ("estimate_gradients, 95th percentile, ms", ".2f"), ("held-out MSE", ".4f"))
    for column, (what, form) in zip(columns[1:], shown, strict=True):
        first, last = np.median(column[:quarter]), np.median(column[-quarter:])
        lines.append((what, f"{last:{form}}", "–", f"{first:{form}} in the first quarter; "
                      f"{column.min():{form}} to {column.max():{form}}"))
    table("soak", TARGETS, [
        *lines,
        ("examples sent, and dropped by the senders", ", ".join(
            f"{each['sent']:,} and {each['dropped']:,}" for each in sent), "–",
         "by the input trainer, by the output trainer"),
        ("minibatches that the output trainer skipped", f"{skipped:,}", "–",
         "because newer ones had arrived")])


if __name__ == "__main__":
    main()
