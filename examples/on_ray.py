"""The same processes on a Ray cluster, each started and watched by an actor that Ray places.

    pip install -r examples/requirements.txt
    python examples/on_ray.py x.npy y.npy --num-epochs 16          # what plumbing.launch takes
    python examples/on_ray.py x.npy y.npy --parts 2-24 24-12 12-1

RAY_ADDRESS names a cluster; without it, Ray starts one on this machine. The project's folder and
the current one, to which the run is written, must be on a disk that all nodes share, under the same
path. The processes know nothing of Ray. The ports are those of plumbing.launch on every node.

When an actor or its node dies, its process dies, and Ray starts the actor again elsewhere. Once a
second the driver asks each actor for its node's address, and tells it what to run. An actor that
runs this already does nothing. One that was moved starts its process, a trainer with --resume. One
whose neighbour was moved restarts its process, because the command holds the neighbour's address.
An input trainer that is lost before its first row cannot continue: it says what to restart.
"""
import subprocess
import sys
import time
from pathlib import Path

import ray

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plumbing.launch import command_lines, parse  # noqa: E402

ATTEMPTS = 5        # starts in a row that may fail, while an old process frees its port and files
STOP_SECONDS = 30   # for a last snapshot or checkpoint
UNTIL_ORPHANED = """
import os, runpy, sys, threading

def end_with_parent():
    os.read(0, 1)  # returns when the actor, who holds the other end of this pipe, is gone
    os._exit(1)

threading.Thread(target=end_with_parent, daemon=True).start()
sys.path[0], *sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@ray.remote(max_restarts=-1, max_task_retries=-1, scheduling_strategy="SPREAD")
class Runner:
    """Runs one process. Each method may be called twice: Ray does so after a restart."""

    def __init__(self, root, folder):
        self.root, self.folder = root, folder
        self.process, self.command, self.failures, self.started = None, None, 0, 0.0

    def address(self):
        return ray.util.get_node_ip_address()

    def run(self, command, resume):
        """Start the command unless it runs; first stop another one. `resume` are words for a start.

        None while it runs, else the exit code: 0, or what it failed with ATTEMPTS times in a row.
        """
        if command != self.command:
            self.stop()
            self.command, self.failures = command, 0
        if self.process:
            code = self.process.poll()
            if code in (None, 0):
                return code
            lasted = time.monotonic() - self.started
            self.failures = 1 if lasted > 60 else self.failures + 1
            if self.failures >= ATTEMPTS:
                return code
        script, *words = [*command, *resume, "--host", self.address()]
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-c", UNTIL_ORPHANED, self.root, f"{self.root}/{script}", *words],
            cwd=self.folder, stdin=subprocess.PIPE)
        return None

    def stop(self):
        """End the process, the normal way if it can."""
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process = None


def ask(actors, method, *arguments):
    """{name: answer} of all actors. Waits for those that Ray is starting again."""
    calls = {name: getattr(actor, method).remote(*(each[name] for each in arguments))
             for name, actor in actors.items()}
    return dict(zip(calls, ray.get(list(calls.values())), strict=True))


def main(argv):
    """The exit code: the input trainer's, or 2 if another process has ended."""
    args = parse(argv)
    ray.init()
    commands = command_lines(args, hosts={})
    actors = {name: Runner.remote(str(ROOT), str(Path.cwd())) for name in commands}
    resume = {name: [] for name in commands}  # at the first start, unless it is in argv
    try:
        while True:
            commands = command_lines(args, hosts=ask(actors, "address"))
            codes = ask(actors, "run", commands, resume)
            ended = {name: code for name, code in codes.items() if code is not None}
            if ended:
                print("ended:", *(f"{name} with exit code {ended[name]}" for name in ended))
                return ended.get("input", 2)
            resume = {name: ["--resume"] * (not name.startswith("oracle")) for name in commands}
            time.sleep(1)
    finally:
        ray.get(actors["input"].stop.remote(), timeout=60)  # its last snapshot needs the others
        ask(actors, "stop")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
