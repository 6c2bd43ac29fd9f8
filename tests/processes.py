"""Starts the processes as terminals do, watches them, and leaves none behind."""
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from functools import partial
from pathlib import Path
from unittest import mock

import msgspec

from plumbing.runs import read_metrics
from plumbing.wire import Array, json_to_ndarray

ROOT = Path(__file__).resolve().parent.parent
DEADLINE = 60  # seconds that anything here is waited for
# without a proxy from the environment
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def free_ports(count):
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def start(script, *args, log=None, cwd=None, prefix=(), session=True, **options):
    """One of the project's programs, as a terminal starts it: in a session of its own, and nothing
    else is set.

    Linux shares the cores out between sessions first (autogroup), so this is part of what is
    measured.
    """
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(open(log, "ab")) if log else None
        own = {"start_new_session": True} if session else {"process_group": 0}
        return subprocess.Popen(
            [*prefix, sys.executable, "-u", str(ROOT / script), *map(str, args)], cwd=cwd,
            stdout=out, stderr=subprocess.STDOUT if out else None, **own, **options)


def end(process, sig=signal.SIGTERM, timeout=DEADLINE):
    """Stop one process, by force when it does not obey; returns its exit code."""
    if process.poll() is None:
        process.send_signal(sig)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


def status(port):
    """GET /status, or None while nobody answers."""
    try:
        with DIRECT.open(f"http://127.0.0.1:{port}/status", timeout=5) as answer:
            return json.load(answer)
    except (OSError, http.client.HTTPException):
        return None


def array_of(message):
    """The array in a JSON answer, {"shape": ..., ...}, of any shape."""
    return json_to_ndarray(msgspec.json.decode(msgspec.json.encode(message),
                                               type=Array[list[int], str]))


def wait_until(condition, what, timeout=DEADLINE, pause=0.05):
    """Poll condition() every `pause` seconds until it returns something true, and return that."""
    deadline = time.monotonic() + timeout
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout} s in vain: {what}")
        time.sleep(pause)
    return result


def still(read):
    """Wait until four readings, half a second apart, are equal; returns the reading."""
    seen = []

    def settled():
        seen.append(read())
        return len(seen) > 3 and all(each == seen[-1] for each in seen[-4:])
    wait_until(settled, "it to stand still", pause=0.5)
    return seen[-1]


@contextlib.contextmanager
def local_cluster():
    """A Ray cluster on this machine, and two nodes of it that run actors, which its head does not.

    All have the loopback address, which Ray else replaces by the machine's own. What is started
    meanwhile finds it.
    """
    with mock.patch.dict(os.environ, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0"):
        from ray.cluster_utils import Cluster  # here, because it reads that
        cluster = Cluster(initialize_head=True, head_node_args={
            "num_cpus": 0, "node_ip_address": "127.0.0.1", "include_dashboard": False})
        try:
            nodes = [cluster.add_node(num_cpus=3, node_ip_address="127.0.0.1") for _ in range(2)]
            os.environ["RAY_ADDRESS"] = cluster.address
            yield cluster, nodes
        finally:
            cluster.shutdown()


class Proxy:
    """A port that passes everything on to another one. It can hold back every answer for a while,
    or lose what comes."""

    def __init__(self, target):
        # delay is in seconds; it and cut may be changed at any time
        self.target, self.delay, self.cut = target, 0.0, False
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):  # until close()
            while True:
                near = self.socket.accept()[0]
                try:
                    if self.cut:
                        raise OSError
                    far = socket.create_connection(("127.0.0.1", self.target))
                except OSError:  # nobody there yet: as if this port did not answer either
                    near.close()
                    continue
                asked = threading.Event()
                for each in (near, far):
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for pair in ((near, far, asked.set), (far, near, partial(self._hold, asked))):
                    threading.Thread(target=self._pass, args=pair, daemon=True).start()

    def _hold(self, asked):
        if asked.is_set():
            asked.clear()
            time.sleep(self.delay)

    def _pass(self, source, sink, before):
        with contextlib.suppress(OSError):
            while (data := source.recv(1 << 20)) and not self.cut:
                before()
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self):
        self.socket.close()


class Three:
    """The oracle, the output trainer and the input trainer, on three ports, with their logs in
    `folder`. Without an oracle where these `gradients` need none."""

    def __init__(self, folder, oracle=(), output=(), input=(), session=True,
                 gradients="synthetic"):
        self.folder, self.ports, self.session = Path(folder), free_ports(3), session
        self.progress = self.folder / "progress"
        a, b, c = self.ports
        # where gradients and activations go, if a command says so
        self.to_oracle, self.to_output = Proxy(c if gradients == "delayed" else a), Proxy(b)
        self.taught = gradients in ("synthetic", "shuffled")
        back = (f"127.0.0.1:{a}" if self.taught else f"127.0.0.1:{c}" if gradients == "delayed"
                else "none")
        self.commands = {
            "oracle": ["oracle.py", "--port", a, *oracle],
            "output": ["train_output.py", "--port", b, "--oracle-server", back,
                       "--progress-dir", self.folder / "output_progress", *output],
            "input": ["train_input.py", "--port", c, "--oracle-server", f"127.0.0.1:{a}",
                      "--gradients", gradients, "--output-server", f"127.0.0.1:{b}",
                      "--progress-dir", self.progress, *input]}
        self.processes = {}

    def start(self, *names, extra=()):
        for name in names or list(self.commands)[not self.taught:]:
            self.processes[name] = start(*self.commands[name], *extra, session=self.session,
                                         log=self.folder / f"{name}.log")
        return self

    def wait_until_ready(self, *names):
        """Until these answer, and the oracle's TensorFlow has started."""
        def ready():
            statuses = [self.status(name) for name in names]
            for name in names:
                assert self.processes[name].poll() is None, self.log(name)
            return all(each and each.get("ready", True) for each in statuses)
        wait_until(ready, f"{' and '.join(names)} to be ready")

    def updates(self, name="input"):
        """How many updates a process has made; 0 while it does not answer."""
        return (self.status(name) or {}).get("updates", 0)

    def port(self, name):
        return self.ports[list(self.commands).index(name)]

    def status(self, name):
        return status(self.port(name))

    def kill(self, name):
        self.processes[name].kill()
        self.processes[name].wait()

    def metrics(self, column):
        """A column of the run's metrics.csv, one float per snapshot; empty before there are any."""
        written = (self.progress / "metrics.csv").exists() and read_metrics(self.progress)
        return written[column] if written else []

    def log(self, name):
        return (self.folder / f"{name}.log").read_text()

    def wait_for_input(self, timeout):
        """Until the input trainer ends by itself: its exit code. RuntimeError as soon as another
        one dies."""
        def ended():
            for name, process in self.processes.items():
                if name != "input" and process.poll() is not None:
                    raise RuntimeError(f"{name} ended with exit code {process.poll()}")
            return self.processes["input"].poll() is not None
        wait_until(ended, "the input trainer to end", timeout)
        return self.processes["input"].returncode

    def updates_per_second(self, name, seconds):
        """How fast `name` trains, seen from outside, over the next `seconds`."""
        began, before = time.monotonic(), self.status(name)["updates"]
        time.sleep(seconds)
        return (self.status(name)["updates"] - before) / (time.monotonic() - began)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        # in this order, so that a last snapshot can be composed
        for name in ("input", "output", "oracle"):
            if name in self.processes:
                end(self.processes[name])
        self.to_oracle.close()
        self.to_output.close()
