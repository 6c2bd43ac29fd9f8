"""`make bench`: the project's targets as one table, ours beside the baseline in one run. Half an hour for three seeds.

    python -m tests.benchmarks.bench --seeds 3 --spread 5
"""
import argparse
import base64
import json
import multiprocessing
import tempfile
import time

import numpy as np
import requests

from plumbing.runs import load_data
from sgd import make_layers, minibatches, train
from tests.benchmarks.measure import (DATA, TARGETS, Runs, cell, final, ratio, resident_megabytes, run_sgd, run_three,
                                      swing, table, time_to)
from tests.processes import Three, free_ports, wait_until

SECONDS = 60   # of training, in the decoupled runs


def bare_loop(examples=30_000):
    """Seconds per example of plain SGD without any layers: the same arithmetic, written out."""
    x, y, *_ = load_data(*DATA)
    rng = np.random.default_rng(0)
    w1, w2, w3 = (rng.standard_normal(shape).astype("f") for shape in ((2, 24), (24, 12), (12, 1)))
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
    x, y, *_ = load_data(*DATA)
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
    server = multiprocessing.get_context("spawn").Process(target=echo_server, args=(port,), daemon=True)
    server.start()
    body = json.dumps({"h": base64.b64encode(np.zeros((100, 24), "f")).decode()}).encode()
    session, taken = requests.Session(), []
    session.trust_env = False

    def echo():
        answer = session.post(f"http://127.0.0.1:{port}/echo", data=body, headers={"Content-Type": "application/json"})
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


TRUE = ["--gradients", "true", "--learning-rate", 0.4, "--momentum", 0.9, "--warm-up", 0]


def until(metrics, seconds):
    """The rows of the first so many seconds."""
    return {name: column[metrics["seconds"] <= seconds + 2] for name, column in metrics.items() if name != "ready"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="of the comparison with sgd.py (%(default)s)")
    parser.add_argument("--spread", type=int, default=5, help="seeds of 16 epochs, for the spread (%(default)s)")
    args = parser.parse_args()
    runs, memory, latency = Runs("bench", 4 * args.seeds + 2 * args.spread), [], []
    plain, batched, ours, zero, spread, true = ([] for _ in range(6))

    def watch(three):
        memory.append(resident_megabytes(three))
        state = three.status("input")
        if state and state["seconds"] > 5:
            latency.append([state["latency_ms"], state["latency_ms_p95"]])

    for seed in range(args.seeds):
        seeded = ["--seed", seed, "--num-epochs", 20]
        plain.append(runs.get("sgd.py", seed, lambda folder: run_sgd(folder, *seeded)))
        batched.append(runs.get("mini-batch", seed, lambda folder: run_sgd(
            folder, *seeded, "--batch-size", 100, "--momentum", 0.9, "--learning-rate", 0.2, "--decay", 1)))
        ours.append(runs.get("synthetic", seed, lambda folder: run_three(folder, SECONDS, seed, watch=watch)))
        zero.append(runs.get("zero", seed, lambda folder: run_three(folder, SECONDS, seed, input=["--gradients", "zero"])))
    for seed in range(args.spread):
        spread.append(runs.get("16 epochs", seed, lambda folder: run_three(folder, seed=seed, input=["--num-epochs", 16])))
        true.append(runs.get("16 epochs true", seed, lambda folder: run_three(
            folder, seed=seed, input=["--num-epochs", 16, *TRUE])))
    ready, echo = ready_seconds(), echo_milliseconds()
    layered, bare = np.min([(layered_loop(), bare_loop()) for _ in range(5)], axis=0)

    goals = [each["test_mse"][-1] for each in plain]
    mine, theirs, quick = ([time_to(each, goal) for each, goal in zip(group, goals)] for group in (ours, plain, batched))
    theirs = [each["seconds"][-1] for each in plain]
    p50, p95 = np.median(latency, axis=0) if latency else (np.nan, np.nan)
    reached, reached_true = ([final(each) for each in group] for group in (spread, true))
    rows = [
        ("time to sgd.py's 20-epoch MSE, two rows running, over its own time", ratio(mine, theirs)[0], "0.07",
         ratio(mine, theirs, ".0f")[1] + " s"),
        ("the same time over mini-batch SGD's in one process (batch 100, momentum 0.9, a row an epoch)",
         ratio(mine, quick)[0], "–", ratio(mine, quick, ".1f")[1] + " s"),
        (f"MSE after {SECONDS} s, over the zero-gradient control's", *ratio(
            list(map(final, ours)), list(map(final, zero)))[:1], "0.34", ratio(list(map(final, ours)), list(map(final, zero)))[1]),
        ("the worst of the seeds over the best, 16 epochs", f"{max(reached) / min(reached):.2f}", "2",
         f"{cell(reached)}; true gradients' {max(reached_true) / min(reached_true):.2f}: {cell(reached_true)}"),
        ("highest over lowest row (every 2 s) in the last third of a run, the worst of the seeds",
         f"{max(map(swing, spread)):.2f}", "2", f"{cell(list(map(swing, spread)), '.2f')}; true gradients' "
                                               f"{cell(list(map(swing, true)), '.2f')}"),
        ("estimate_gradients while training, over an idle echo's median by requests: median, 95th percentile",
         f"{p50 / echo:.2f}, {p95 / echo:.2f}", "2, 6", f"{p50:.2f}, {p95:.2f} ms; echo {echo:.2f} ms"),
        ("staleness: median, 95th percentile", f"{np.median(ours[0]['staleness'][1:]):.0f}, "
         f"{max(each['staleness_p95'][1:].max() for each in ours):.0f}", "–, 20", "updates"),
        ("examples/s", f"{np.median([each['examples'][-1] / each['seconds'][-1] for each in ours]):,.0f}", "–", "batch 100"),
        ("all three processes ready", f"{ready:.1f} s", "12 s", ""),
        ("resident memory of the three, at most", f"{max(memory or [np.nan]):.0f} MB", "900 MB", ""),
        ("an epoch of sgd.py over a bare NumPy loop", f"{layered / bare:.2f}", "1.15",
         f"{layered * 1e6:.1f} µs against {bare * 1e6:.1f} µs an example")]
    table("bench", TARGETS, rows)
    ways = {"sgd.py, one example at a time": plain, "mini-batch SGD, one process": batched, "true": true[:args.seeds],
            "zero": zero, "synthetic": ours}
    ways = {name: [until(each, SECONDS) for each in group] for name, group in ways.items()}
    table("bench-ways", ("gradients", f"MSE after {SECONDS} s, or 20 epochs", "millions of examples",
                         "seconds to sgd.py's 20-epoch MSE"), [
        (name, cell(list(map(final, group))), cell([each["examples"][-1] / 1e6 for each in group], ".1f"),
         cell(theirs if name.startswith("sgd.py") else [time_to(each, goal) for each, goal in zip(group, goals)], ".1f"))
        for name, group in ways.items()])


if __name__ == "__main__":
    main()
