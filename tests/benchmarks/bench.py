"""`make bench`: the project's targets as one table, ours beside the baseline in one run. Takes about a quarter of an hour.

    python -m tests.benchmarks.bench --seeds 3
"""
import argparse
import base64
import http.client
import json
import multiprocessing
import tempfile
import time
from pathlib import Path

import numpy as np
import requests
from tqdm import tqdm

from sgd import load_data
from tests.benchmarks.measure import DATA, print_table, resident_megabytes, run_sgd, run_three, time_to
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
        g3 = h2.dot(w3) + b3 - y[k:k + 1, None]
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
    import sgd
    x, y, *_ = load_data(*DATA)
    layers = sgd.make_layers([2, 24, 12, 1], np.random.default_rng(0))
    began = time.perf_counter()
    next(sgd.train(layers, x[:examples], y[:examples], 1, 0.002, 1, 1, 0, np.random.default_rng(0)))
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


def echo_times(count=1500):
    """Milliseconds of a bare echo of 100 × 24 floats, idle, by http.client (ours) and by requests."""
    port = free_ports(1)[0]
    server = multiprocessing.get_context("spawn").Process(target=echo_server, args=(port,), daemon=True)
    server.start()
    body = json.dumps({"h": base64.b64encode(np.zeros((100, 24), "f")).decode()}).encode()
    headers, times = {"Content-Type": "application/json"}, {}
    connection = http.client.HTTPConnection("127.0.0.1", port)

    def by_http_client():
        connection.request("POST", "/echo", body, headers)
        return base64.b64decode(json.loads(connection.getresponse().read())["h"])

    session = requests.Session()
    session.trust_env = False

    def by_requests():
        return base64.b64decode(session.post(f"http://127.0.0.1:{port}/echo", data=body, headers=headers).json()["h"])

    def answers():
        try:
            return by_http_client()
        except OSError:
            connection.close()
    wait_until(answers, "the echo server")
    for name, call in (("http.client", by_http_client), ("requests", by_requests)):
        taken = []
        for _ in range(count):
            began = time.perf_counter()
            call()
            taken.append(time.perf_counter() - began)
        times[name] = float(np.median(taken)) * 1e3
    server.terminate()
    return times


def ready_seconds(folder):
    began = time.monotonic()
    with Three(folder, input=DATA) as three:
        three.start()
        wait_until(lambda: (three.status("oracle") or {}).get("ready") and three.status("output")
                   and three.status("input"), "the three processes")
        return time.monotonic() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    rows, ratios, batch_ratios, decoupled, controls, memory, latency = [], [], [], [], [], [], []

    def watch(three):
        memory.append(resident_megabytes(three))
        state = three.status("input")
        if state["seconds"] > 5:
            latency.append([state["latency_ms"]["p50"], state["latency_ms"]["p95"]])

    with tempfile.TemporaryDirectory() as name, tqdm(total=2 + 4 * args.seeds, desc="bench", unit="part") as bar:
        folder = Path(name)
        (folder / "ready").mkdir()
        ready = ready_seconds(folder / "ready")
        bar.update()
        pairs = [(layered_loop(), bare_loop()) for _ in range(5)]
        layered, bare = np.min(pairs, axis=0)
        bar.update()
        rates = []
        for seed in range(args.seeds):
            plain = run_sgd(folder / f"sgd{seed}", "--num-epochs", 20, "--seed", seed)
            bar.update()
            goal = plain["test_mse"][-1]
            ours = run_three(folder / f"synthetic{seed}", SECONDS, seed, input=["--snapshot-seconds", 2], watch=watch)
            bar.update()
            zero = run_three(folder / f"zero{seed}", SECONDS, seed, input=["--snapshot-seconds", 2, "--gradients", "zero"])
            bar.update()
            batched = run_sgd(folder / f"batched{seed}", "--num-epochs", 20, "--batch-size", 100, "--momentum", 0.9,
                              "--learning-rate", 0.2, "--decay", 1, "--seed", seed)
            bar.update()
            ratios.append((time_to(ours, goal) / time_to(plain, goal), time_to(ours, goal), time_to(plain, goal), goal))
            batch_ratios.append(time_to(ours, goal) / time_to(batched, goal))
            decoupled.append(np.median(ours["test_mse"][-3:]))
            controls.append(np.median(zero["test_mse"][-3:]))
            rates.append(ours["examples"][-1] / ours["seconds"][-1])
        echo = echo_times()
    ratio, ours, plain, goal = sorted(ratios)[len(ratios) // 2]
    p50, p95 = np.median(latency, axis=0)
    rows = [
        ("time to sgd.py's MSE after 20 epochs, over sgd.py's own", f"{ratio:.2f}", "0.1 (0.2)",
         f"{ours:.1f} s against {plain:.1f} s to {goal:.4f}; seeds: {', '.join(f'{r[0]:.2f}' for r in ratios)}"),
        ("the same over mini-batch SGD in one process", f"{np.median(batch_ratios):.1f}", "–",
         "batch 100, momentum 0.9: what the wire costs"),
        (f"MSE after {SECONDS} s, over the zero-gradient control's", f"{np.median(np.divide(decoupled, controls)):.2f}",
         "0.5", f"{', '.join(f'{a:.4f}/{b:.4f}' for a, b in zip(decoupled, controls))}"),
        ("estimate_gradients while training, median", f"{p50:.2f} ms", "2 ms", "100 × 24"),
        ("estimate_gradients while training, 95th percentile", f"{p95:.2f} ms", "4 ms", ""),
        ("its median over a bare idle echo by requests", f"{p50 / echo['requests']:.2f}", "1.5",
         ", ".join(f"{name} {value:.2f} ms" for name, value in echo.items())),
        ("examples/s at batch 100", f"{np.median(rates):,.0f}", "40,000", ""),
        ("all three processes ready", f"{ready:.1f} s", "12 s", ""),
        ("resident memory of the three, at most", f"{max(memory):.0f} MB", "900 MB", ""),
        ("an epoch of sgd.py over a bare NumPy loop", f"{layered / bare:.2f}", "1.15",
         f"{layered * 1e6:.1f} µs against {bare * 1e6:.1f} µs an example"),
    ]
    print_table(*rows)


if __name__ == "__main__":
    main()
