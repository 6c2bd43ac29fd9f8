"""`make bench-load`: 20 clients flood a running training with examples and gradients.

What must hold: memory stays bounded, no thread or connection leaks, the counters add up, the oracle
keeps answering.
"""
import argparse
import contextlib
import http.client
import itertools
import tempfile
import threading
import time

import numpy as np
import psutil

from plumbing.wire import encode
from synthgrad import OracleClient
from tests.benchmarks.measure import DATA, TARGETS, resident_megabytes, table
from tests.processes import Three, wait_until

CLIENTS, ROWS, WIDTH = 20, 1000, 24


def flood(port, path, columns, numbers, until, accepted):
    """One client: sends new examples all the time; appends how many were accepted."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    while time.monotonic() < until:
        i = ROWS * next(numbers) + np.arange(ROWS)
        clock = np.full(ROWS, i[0])  # a minibatch
        body = encode(i=i, clock=clock, start=0 * i, **columns)
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        assert response.status == 200, response.status
        accepted.append(ROWS)
    connection.close()


def messages():
    """What one to the output trainer and one to the oracle hold besides i, clock and start: as
    large as in a training."""
    rng = np.random.default_rng(0)
    examples = {"h": rng.random((ROWS, WIDTH), "f"), "y": rng.normal(size=(ROWS, 1)).astype("f")}
    return examples, examples | {"gradients": 0.01 * rng.normal(size=(ROWS, WIDTH)).astype("f")}


def resources(three):
    processes = [psutil.Process(process.pid) for process in three.processes.values()]
    return sum(p.num_threads() for p in processes), sum(p.num_fds() for p in processes)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="(%(default)s)")
    seconds = parser.parse_args().seconds
    examples, gradients = messages()
    accepted, numbers = {"/training_examples": [], "/provide_gradients": []}, itertools.count()
    with (tempfile.TemporaryDirectory() as name,
          Three(name, input=[*DATA, "--num-epochs", 10**6]) as three):
        three.start()
        wait_until(lambda: (three.status("input") or {}).get("seconds", 0) > 5, "training to start")
        before, megabytes, latency = resources(three), [resident_megabytes(three)], []
        until = time.monotonic() + seconds
        kinds = [("output", "/training_examples", examples),
                 ("oracle", "/provide_gradients", gradients)]
        threads = [threading.Thread(target=flood, args=(three.port(who), path, columns, numbers,
                                                        until, accepted[path]))
                   for who, path, columns in kinds * (CLIENTS // 2)]
        for thread in threads:
            thread.start()
        client = OracleClient(f"127.0.0.1:{three.port('oracle')}")
        h, y = np.full((100, WIDTH), 0.5, "f"), np.zeros((100, 1), "f")
        while time.monotonic() < until:
            began = time.perf_counter()
            client.estimate_gradients(h, y)
            latency.append(1e3 * (time.perf_counter() - began))
            if len(latency) % 20 == 0:
                megabytes.append(resident_megabytes(three))
            time.sleep(0.02)
        for thread in threads:
            thread.join(60)
        client.session.close()
        with contextlib.suppress(TimeoutError):  # a leak, then: the table shows it
            wait_until(lambda: all(np.less_equal(resources(three), before)),
                       "connections to be closed", 10)
        # what the training itself sent, but for what is under way
        trained = three.status("input")["examples_sent"]["sent"] - 20_000
        told = three.status("output")["gradients_sent"]["sent"] - 20_000
        after, output, oracle = resources(three), three.status("output"), three.status("oracle")
        alive = all(process.poll() is None for process in three.processes.values())
    counted = all(mine["examples"]["received"] >= sum(accepted[path]) + sent
                  for mine, path, sent in ((output, "/training_examples", trained),
                                           (oracle, "/provide_gradients", told)))
    rows = sum(map(sum, accepted.values()))
    p50, p95 = np.percentile(latency, [50, 95])
    table("bench-load", TARGETS, [
        (f"examples taken from {CLIENTS} flooding clients in {seconds:.0f} s", f"{rows:,}", "–",
         f"{rows / seconds:,.0f}/s"),
        ("resident memory of the three, at most", f"{max(megabytes):.0f} MB", "1200 MB",
         f"{megabytes[0]:.0f} MB before"),
        ("estimate_gradients meanwhile: median, 95th percentile", f"{p50:.1f} ms, {p95:.1f} ms",
         "–", f"{len(latency)} questions"),
        ("threads, open files: before → after",
         f"{before[0]} → {after[0]}, {before[1]} → {after[1]}", "no growth", ""),
        ("what was accepted was counted as received; all three alive", f"{counted}; {alive}",
         "True; True", "")])


if __name__ == "__main__":
    main()
