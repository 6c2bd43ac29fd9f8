"""`make bench`: the project's targets as one table, ours beside the baseline in one run. Half an
hour for three seeds.

    python -m tests.benchmarks.bench --seeds 3 --spread 5
"""
import base64
import json
import multiprocessing
import tempfile
import time

import numpy as np
import requests

from plumbing import data
from sgd import make_layers, minibatches, train
from tests.benchmarks.compare import SINGLE
from tests.benchmarks.measure import (
    DATA,
    TARGETS,
    Runs,
    cell,
    final,
    make_parser,
    ratio,
    resident_megabytes,
    run_sgd,
    run_three,
    swing,
    table,
    time_to,
    until,
)
from tests.processes import Three, free_ports, wait_until

SECONDS = 60  # of training, in the decoupled runs


def bare_loop(examples=30_000):
    """Seconds per example of plain SGD without any layers: the same arithmetic, written out."""
    x, y, *_ = data.load(*DATA)
    rng = np.random.default_rng(0)
    w1, w2, w3 = (rng.standard_normal(dims).astype("f") for dims in ((2, 24), (24, 12), (12, 1)))
    b1, b2, b3 = (np.zeros(n, "f") for n in (24, 12, 1))
    rate, began = 0.002, time.perf_counter()
    for k in range(examples):
        x0 = x[k:k + 1]
        h1 = 0.5 * np.tanh(0.5 * (x0.dot(w1) + b1)) + 0.5
        h2 = 0.5 * np.tanh(0.5 * (h1.dot(w2) + b2)) + 0.5
        g3 = h2.dot(w3) + b3 - y[k:k + 1]
        g2 = g3.dot(w3.T) * (h2 * (1 - h2))
        g1 = g2.dot(w2.T) * (h1 * (1 - h1))
        w3 -= rate * h2.T.dot(g3)
        b3 -= rate * g3.sum(axis=0)
        w2 -= rate * h1.T.dot(g2)
        b2 -= rate * g2.sum(axis=0)
        w1 -= rate * x0.T.dot(g1)
        b1 -= rate * g1.sum(axis=0)
    return (time.perf_counter() - began) / examples


def layered_loop(examples=30_000):
    """Seconds per example of sgd.py's own loop."""
    x, y, *_ = data.load(*DATA)
    layers = make_layers([2, 24, 12, 1], np.random.default_rng(0))
    began = time.perf_counter()
    for _ in train(layers, x, y, minibatches(examples, 1, 1, seed=0), lambda clock: 0.002, 0.0):
        pass
    return (time.perf_counter() - began) / examples


def echo_server(port):
    import flask
    import waitress
    app = flask.Flask("echo")

    @app.post("/echo")
    def echo():
        message = json.loads(flask.request.get_data())
        arrays = {name: base64.b64decode(value) for name, value in message.items()}
        return {name: base64.b64encode(value).decode() for name, value in arrays.items()}
    waitress.serve(app, port=port, threads=4, _quiet=True)


def echo_milliseconds(count=1500):
    """The median of a bare idle echo of 100 × 24 floats by requests."""
    port = free_ports(1)[0]
    spawn = multiprocessing.get_context("spawn")
    server = spawn.Process(target=echo_server, args=(port,), daemon=True)
    server.start()
    body = json.dumps({"h": base64.b64encode(np.zeros((100, 24), "f")).decode()}).encode()
    headers = {"Content-Type": "application/json"}
    session, taken = requests.Session(), []
    session.trust_env = False

    def echo():
        answer = session.post(f"http://127.0.0.1:{port}/echo", data=body, headers=headers)
        return base64.b64decode(answer.json()["h"])

    def answers():
        try:
            return echo()
        except requests.RequestException:
            return None
    wait_until(answers, "the echo server")
    for _ in range(count):
        began = time.perf_counter()
        echo()
        taken.append(time.perf_counter() - began)
    server.terminate()
    return float(np.median(taken)) * 1e3


def ready_seconds():
    with tempfile.TemporaryDirectory() as folder, Three(folder, input=DATA) as three:
        began = time.monotonic()
        three.start()
        wait_until(lambda: (three.status("oracle") or {}).get("ready") and three.status("output")
                   and three.status("input"), "the three processes")
        return time.monotonic() - began


TRUE, BATCHED = ["--gradients", "true"], SINGLE["mini-batch SGD, one process"]


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--spread", type=int, default=5,
                        help="seeds of 16 epochs, for the spread (%(default)s)")
    args = parser.parse_args()
    runs, memory, latency = Runs("bench", 4 * args.seeds + 2 * args.spread), [], []
    plain, batched, ours, zero, spread, true = ([] for _ in range(6))

    def watch(three):
        memory.append(resident_megabytes(three))
        state = three.status("input")
        if state and state["seconds"] > 5:
            latency.append([state["latency_ms"], state["latency_ms_p95"]])

    for seed in range(args.seeds):
        plain.append(runs.get("sgd.py", seed, run_sgd, "--num-epochs", 20))
        batched.append(runs.get("mini-batch", seed, run_sgd, "--num-epochs", 20, *BATCHED))
        ours.append(runs.get("synthetic", seed, run_three, SECONDS, watch=watch))
        zero.append(runs.get("zero", seed, run_three, SECONDS, input=["--gradients", "zero"]))
    for seed in range(args.spread):
        spread.append(runs.get("16 epochs", seed, run_three, input=["--num-epochs", 16]))
        true.append(runs.get("16 epochs true", seed, run_three,
                             input=["--num-epochs", 16, *TRUE]))
    ready, echo = ready_seconds(), echo_milliseconds()
    layered, bare = np.min([(layered_loop(), bare_loop()) for _ in range(5)], axis=0)

    goals = [each["test_mse"][-1] for each in plain]
    theirs = [each["seconds"][-1] for each in plain]

    def times(group):
        return [time_to(each, goal) for each, goal in zip(group, goals, strict=True)]

    def scores(group):
        return list(map(final, group))
    p50, p95 = np.median(latency, axis=0) if latency else (np.nan, np.nan)
    worst, worst_true = (max(scores(group)) / min(scores(group)) for group in (spread, true))
    swings, swings_true = (list(map(swing, group)) for group in (spread, true))
    (own, own_pairs), (quick, quick_pairs), (gain, gain_pairs) = (
        ratio(times(ours), theirs, ".0f"), ratio(times(ours), times(batched), ".1f"),
        ratio(scores(ours), scores(zero)))
    stale = [np.median(ours[0]["staleness"][1:]),
             max(each["staleness_p95"][1:].max() for each in ours)]
    rate = np.median([each["examples"][-1] / each["seconds"][-1] for each in ours])
    table("bench", TARGETS, [
        ("time to sgd.py's 20-epoch MSE, two rows running, over its own time", own, "0.06",
         f"{own_pairs} s"),
        ("the same time over mini-batch SGD's in one process (batch 100, momentum 0.9, a row an "
         "epoch)", quick, "–", f"{quick_pairs} s"),
        (f"MSE after {SECONDS} s, over the zero-gradient control's", gain, "0.4", gain_pairs),
        ("the worst of the seeds over the best, 16 epochs", f"{worst:.2f}", "2",
         f"{cell(scores(spread))}; true gradients' {worst_true:.2f}: {cell(scores(true))}"),
        ("highest over lowest row (every 2 s) in the last third of a run, the worst of the seeds",
         f"{max(swings):.2f}", "2",
         f"{cell(swings, '.2f')}; true gradients' {cell(swings_true, '.2f')}"),
        ("estimate_gradients while training, over an idle echo's median by requests: median, 95th "
         "percentile", f"{p50 / echo:.2f}, {p95 / echo:.2f}", "2, 6",
         f"{p50:.2f}, {p95:.2f} ms; echo {echo:.2f} ms"),
        ("staleness: median, 95th percentile", "{:.0f}, {:.0f}".format(*stale), "–, 20", "updates"),
        ("examples/s", f"{rate:,.0f}", "–", "batch 100"),
        ("all three processes ready", f"{ready:.1f} s", "12 s", ""),
        ("resident memory of the three, at most", f"{max(memory or [np.nan]):.0f} MB", "900 MB",
         ""),
        ("an epoch of sgd.py over a bare NumPy loop", f"{layered / bare:.2f}", "1.15",
         f"{layered * 1e6:.1f} µs against {bare * 1e6:.1f} µs an example")])
    ways = {"sgd.py, one example at a time": plain, "mini-batch SGD, one process": batched,
            "true": true[:args.seeds], "zero": zero, "synthetic": ours}
    rows = []
    for name, group in ways.items():
        group = [until(each, SECONDS) for each in group]
        reached = theirs if name.startswith("sgd.py") else [
            time_to(each, goal) for each, goal in zip(group, goals, strict=False)]
        rows.append((name, cell(scores(group)),
                     cell([each["examples"][-1] / 1e6 for each in group], ".1f"),
                     cell(reached, ".1f")))
    table("bench-ways", ("gradients", f"MSE after {SECONDS} s, or 20 epochs",
                         "millions of examples", "seconds to sgd.py's 20-epoch MSE"), rows)


if __name__ == "__main__":
    main()
