"""The same processes on a Ray cluster, each started and watched by an actor that Ray places.

    pip install -r examples/requirements.txt
    python examples/on_ray.py x.npy y.npy --num-epochs 16          # what plumbing.launch takes
    python examples/on_ray.py x.npy y.npy --parts 2-24 24-12 12-1

RAY_ADDRESS names a cluster; without it, Ray starts one on this machine. The project's folder and
the current one, to which the run is written, must be on a disk that all nodes share, under the same
path. The processes know nothing of Ray. The ports are those of plumbing.launch on every node.

When an actor or its node dies, its process dies, and Ray starts the actor again elsewhere. Once a
second the driver asks each actor for its node's address, and tells it what to run. An actor that
runs this already does nothing. One that was moved starts its process, a trainer with --resume if
this driver has seen that trainer answer. One whose neighbour was moved restarts its process,
because the command holds the neighbour's address. An input trainer that is lost before its first
row cannot continue: it says what to restart.
"""
import os
import subprocess
import sys
import time
from pathlib import Path

import ray

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plumbing import options  # noqa: E402
from plumbing.errors import UserError  # noqa: E402
from plumbing.launch import STOP_SECONDS, command_lines, ending, parse, start  # noqa: E402
from plumbing.live import Process  # noqa: E402

ATTEMPTS = 5        # starts of a command that may fail, while an old process frees port and files
FAILED = 1          # exit code after which another start would fail, too: diverged, or a bug
PLACE_SECONDS = 60  # between two lines about actors that Ray has not placed yet


@ray.remote(max_restarts=-1, max_task_retries=-1, scheduling_strategy="SPREAD")
class Runner:
    """Runs one process. Each method may be called twice: Ray does so after a restart."""

    def __init__(self, root, folder, token):
        self.root, self.folder, self.token = root, folder, token
        self.process, self.command, self.failures, self.answered = None, None, 0, False

    def address(self):
        return ray.util.get_node_ip_address()

    def run(self, command, resume):
        """Start the command unless it runs; first stop another one. `resume` are words for a start.

        Returns None while it runs, else the exit code: 0, FAILED, or that of ATTEMPTS failures. And
        whether this process, and no other one at its port, has answered.
        """
        if command != self.command:
            self.stop()
            self.command, self.failures = command, 0
        if self.process:
            code = self.process.poll()
            if code is None:
                self.answered = self.answered or self.answers()
                return None, self.answered
            self.failures += 1
            if code in (0, FAILED) or self.failures >= ATTEMPTS:
                return code, self.answered
        script, *words = [*command, *resume, "--host", self.address()]
        self.process = start([f"{self.root}/{script}", *words], cwd=self.folder)
        self.answered = False
        return None, False

    def answers(self):
        _, _, port, *_ = self.command
        status = Process(options.address(self.address(), port), self.token).ask()
        return bool(status) and status.get("pid") == self.process.pid

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
    """{name: answer} of all actors. Waits for those that Ray is starting again, and says so."""
    calls = {name: getattr(actor, method).remote(*(each[name] for each in arguments))
             for name, actor in actors.items()}
    while late := unanswered(calls, PLACE_SECONDS):
        print(f"waiting for Ray to place {', '.join(late)}; `ray status` says what it lacks")
    return dict(zip(calls, ray.get(list(calls.values())), strict=True))


def unanswered(calls, seconds):
    """The names in {name: call} whose calls have not ended after so many seconds."""
    _, late = ray.wait(list(calls.values()), num_returns=len(calls), timeout=seconds)
    return [name for name, call in calls.items() if call in late]


def stop(actors):
    """End all processes, but wait no longer for an actor than it needs for that."""
    for names in [["input"], [name for name in actors if name != "input"]]:  # see plumbing.launch
        late = unanswered({name: actors[name].stop.remote() for name in names}, 2 * STOP_SECONDS)
        if late:
            print(f"not stopped, because Ray cannot reach them: {', '.join(late)}. They end with "
                  "this driver")


def main(argv):
    """The exit code: the input trainer's, or 2 if another process has ended."""
    args = parse(argv)
    token = options.read_token(args.token_file) if args.token_file else None
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ray.init(runtime_env={"env_vars": {"PYTHONPATH": path}})  # where actors find plumbing
    commands = command_lines(args, hosts={})
    actors = {name: Runner.remote(str(ROOT), str(Path.cwd()), token) for name in commands}
    resume = {name: [] for name in commands}  # at the first start, unless it is in argv
    try:
        while True:
            commands = command_lines(args, hosts=ask(actors, "address"))
            said = ask(actors, "run", commands, resume)
            ended = {name: code for name, (code, _) in said.items() if code is not None}
            if ended:
                print("The run is over:", *(f"{name} {ending(ended[name])}." for name in ended))
                return ended.get("input", 2)
            for name, (_, answered) in said.items():
                if answered and not name.startswith("oracle"):
                    resume[name] = ["--resume"]
            time.sleep(1)
    finally:
        stop(actors)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"on_ray: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
