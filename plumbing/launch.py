"""Starts the commands that people type in several terminals, each in a session of its own.

    python -m plumbing.launch x.npy y.npy --num-epochs 8
    python -m plumbing.launch x.npy y.npy --num-epochs 8 --parts 2-24 24-12 12-1

The first line is `make run`, the second one `make chain`, but for --draw.

The run ends when any process but the live page ends. Ctrl-C stops the input trainer first,
because its last snapshot needs the others. A second Ctrl-C stops all of them at the same time.
What has not ended after 30 s is killed. All other options go to train_input.py.
"""
import argparse
import contextlib
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from plumbing import options, report, say
from plumbing.process import on_stop
from plumbing.wire import holder

STOP_SECONDS = 30  # for the last snapshot, and for the others to stop, before they are killed
if hasattr(subprocess, "CREATE_NEW_PROCESS_GROUP"):  # Windows has neither sessions nor SIGINT
    APART, STOP = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}, signal.CTRL_BREAK_EVENT
else:  # SIGTERM, since a SIGINT that comes while Python starts may be lost
    APART, STOP = {"start_new_session": True}, signal.SIGTERM
CAUSES = {"SIGILL": "the processor lacks instructions that TensorFlow is compiled for, such as AVX",
          "SIGKILL": "somebody killed it, or the kernel did because memory ran out (see dmesg)",
          "SIGSEGV": "an error in compiled code, such as TensorFlow's",
          "SIGABRT": "an error in compiled code, such as TensorFlow's",
          "SIGBUS": "the disk or /dev/shm may be full"}

# options of all parts but the highest, besides --gradients
LOWER = ("--staleness", "--learning-rate", "--momentum", "--warm-up", "--decay", "--head",
         "--head-rate", "--head-momentum")


def widths(text):
    """For argparse: "24-12" -> [24, 12]."""
    found = text.split("-")
    if len(found) < 2 or not all(each.isdecimal() and int(each) for each in found):
        raise argparse.ArgumentTypeError(f"{text}: expected widths like 24-12")
    return [int(each) for each in found]


def parse(argv):
    """The launcher's options; `rest` is what goes to train_input.py alone."""
    parser = options.make_parser(__doc__, seed=0, progress_dir="progress", token_file=None,
                                 resume=False, oracle_layers=[64, 64])
    parser.prog, add = "plumbing.launch", parser.add_argument
    add("--gradients", default="synthetic", help="of all parts but the highest (%(default)s)")
    for name in ("--batch-size", *LOWER):
        add(name, nargs="*", help="of all parts" + " but the highest" * (name in LOWER))
    add("--parts", type=widths, nargs="+", default=[[2, 24], [24, 12, 1]], metavar="WIDTHS",
        help="the widths of each part, the lowest first (2-24 24-12-1)")
    add("--condition-on-labels", type=options.number(int, 0), nargs="?", const=-1, metavar="K",
        dest="labels", help="oracles see y, which is K wide; 0: they do not (a chain's do)")
    add("--first-port", type=options.number(int, 1, 65000), default=5001,
        help="the lowest oracle's; the others' follow (%(default)s)")
    add("--allow-host", **options.SHARED["allow_host"], default=[])
    add("--draw", action="store_true", help="draw this run's pictures at its end")
    add("--port", type=options.number(int, 1, 65535), help="the input trainer's (--first-port + 2)")
    args, args.rest = parser.parse_known_args(argv)
    given = {name: vars(args)[name[2:].replace("-", "_")] for name in ("--batch-size", *LOWER)}
    words = {name: [name, *values] for name, values in given.items() if values is not None}
    args.trainers = words.pop("--batch-size", [])
    args.lower = [word for each in words.values() for word in each]
    if len(args.parts) < 2:
        parser.error("--parts takes two or more parts, like 2-24 24-12-1")
    for below, above in itertools.pairwise(args.parts):
        if below[-1] != above[0]:
            right = "-".join(map(str, [below[-1], *above[1:]]))
            below, above = ("-".join(map(str, each)) for each in (below, above))
            parser.error(f"--parts {below} {above}: a part begins with the width that the part "
                         f"below it ends with: {below} {right}")
    if args.labels == -1 or (args.labels is None and len(args.parts) > 2):
        args.labels = args.parts[-1][-1]
    args.port = args.port or args.first_port + 2
    return args


def command_lines(args, hosts=None):
    """The commands, {name: words}. hosts: {name: address}, without the page; else all are here.

    Link k is the one below part k, so "oracle1" is the input trainer's.
    """
    links, first, folder = range(1, len(args.parts)), args.first_port, Path(args.progress_dir)
    parts = ["input", *(f"middle{k}" for k in links[:-1]), "output"]
    port = {"oracle1": first, "output": first + 1, "input": args.port, "page": first + 3}
    for k in links[:-1]:
        port[f"middle{k}"], port[f"oracle{k + 1}"] = first + 9 + 2 * k, first + 10 + 2 * k
    server = {name: options.address((hosts or {}).get(name, "127.0.0.1"), port[name])
              for name in port}
    oracles = [server[f"oracle{k}"] for k in links]
    asked = links if args.gradients in ("synthetic", "shuffled") else []
    if args.gradients == "delayed":
        taught = [server[part] for part in parts[:-1]]
    else:
        taught = oracles if asked else ["none"] * len(links)
    token = ["--token-file", args.token_file] if args.token_file else []
    token += [word for name in args.allow_host for word in ("--allow-host", name)]
    shared = ["--seed", args.seed, *token]
    trainer = [*shared, *args.trainers, *["--resume"] * args.resume]
    lower = ["--gradients", args.gradients, *args.lower, *trainer]
    labels = ["--condition-on-labels", args.labels] if args.labels else []

    def beside(name):
        return folder.parent / f"{name}_{folder.name}"

    commands = {}
    for k in asked:
        width = args.parts[k][0]
        commands[f"oracle{k}"] = ["oracle.py", "--layers", width, *args.oracle_layers, width,
                                  *labels, *shared]
    commands["output"] = ["train_output.py", "--layers", *args.parts[-1], "--oracle-server",
                          taught[-1], "--progress-dir", beside("output"), *trainer]
    for k in links[:-1]:
        commands[f"middle{k}"] = [
            "train_middle.py", "--layers", *args.parts[k], "--lower-oracle-server", taught[k - 1],
            "--oracle-server", oracles[k], "--output-server", server[parts[k + 1]],
            "--progress-dir", beside(f"middle{k}"), *lower]
    others = [server[name] for name in commands if name not in ("oracle1", "output")]
    if hosts is None:
        commands["page"] = [
            "plot.py", "--live", folder, "--oracle-server", oracles[0], "--output-server",
            server["output"], "--input-server", server["input"], *token,
            *(["--also", *others] if others else [])]
    commands["input"] = [
        "train_input.py", "--layers", *args.parts[0], "--oracle-server", oracles[0],
        "--output-server", server[parts[1]], "--progress-dir", folder, *lower, *args.rest]
    return {name: [script, "--port", str(port[name]), *map(str, words)]
            for name, (script, *words) in commands.items()}


def free_first_port(count=40):
    """The first of `count` ports on which nobody listens, below those of outgoing connections."""
    while True:
        first = random.randrange(10_000, 30_000, count)
        if not any(map(is_taken, range(first, first + count))):
            return first


def is_taken(port):
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return True
    return False


def start(words, **options):
    """Start a program of the project. It ends when this process does, even if this one is killed.

    Not on Windows, where a thread that reads stdin can keep a library from being loaded.
    """
    if os.name == "posix":
        environment = {**os.environ, "END_WITH_PARENT": "1"}  # see plumbing/__init__.py
        options = {"stdin": subprocess.PIPE, "env": environment, **options}
    return subprocess.Popen([sys.executable, *words], **options)


def ending(code):
    """How a process has ended, in words. A negative exit code is the number of a signal."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was ended by {name}" + (f" ({CAUSES[name]})" if name in CAUSES else "")


def run(commands, signals):
    """Start the commands, {name: words}, and wait until one ends or `signals` is no longer empty.

    The exit code: the input trainer's, 2 if another one has ended, 130 after a signal.
    """
    for name, (script, _, port, *_) in commands.items():
        if name != "page" and is_taken(int(port)):
            say(f"plumbing.launch: port {port}, for {script}, is taken. "
                f"{holder(f'127.0.0.1:{port}')} Stop it, or start a run beside it: make run "
                'ARGS="--first-port 6001 --progress-dir second"')
            return 2
    started, ended = {}, []
    try:
        for name, words in commands.items():
            if not signals:
                started[name] = start(words, **APART)
        needed = [name for name in started if name != "page"]
        while not signals and not ended:
            time.sleep(0.1)
            ended = [name for name in needed if started[name].poll() is not None]
        if not ended:
            if "input" in started:
                started["input"].send_signal(STOP)
                wait([started["input"]], lambda: len(signals) > 1)
            return 130
        code = started[ended[-1]].returncode
        if ended[-1] != "input" or code < 0:
            say(f"plumbing.launch: {commands[ended[-1]][0]} {ending(code)}, so the run is stopped")
        return code if ended[-1] == "input" else 2
    finally:
        for process in started.values():
            if process.poll() is None:
                with contextlib.suppress(OSError):  # it may have ended just now
                    process.send_signal(STOP)
        wait(started.values())
        for process in started.values():
            process.kill()
            process.wait()


def wait(processes, enough=lambda: False):
    """Until all have ended, enough() is true, or STOP_SECONDS have passed."""
    deadline = time.monotonic() + STOP_SECONDS
    while (time.monotonic() < deadline and not enough()
           and any(each.poll() is None for each in processes)):
        time.sleep(0.05)


def catch_signals():
    """A list to which the number of each signal that asks for an end is appended from now on.

    A list, because an exception could come between a process' start and its entry in `started`.
    """
    caught = []
    on_stop(lambda number, _: caught.append(number))
    return caught


if __name__ == "__main__":
    signals = catch_signals()
    args = parse(sys.argv[1:])
    if code := run(command_lines(args), signals):
        sys.exit(code)
    usual = all(vars(args)[name] == default for name, default in vars(parse([])).items()
                if name in ("parts", "labels", "oracle_layers", "lower", "trainers"))
    print(*report.summary(args.progress_dir, usual), sep="\n", flush=True)
    if args.draw:
        sys.exit(subprocess.call([sys.executable, "plot.py", args.progress_dir]))
