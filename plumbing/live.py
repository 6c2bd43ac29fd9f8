"""The live page's server: page.html, the status of all processes, and pictures of a run.

Started by plot.py --live. Nothing here knows how a picture is drawn: main() is given a function.
"""
import concurrent.futures
import os
import socket
import threading
import time
from pathlib import Path

import flask
import msgspec

from plumbing import options, runs, say, serving
from plumbing.errors import Refused
from plumbing.wire import Client

TIMEOUT = 2                    # seconds to wait for a process
ORACLE = "synthetic", "shuffled"  # the values of --gradients with which an oracle is asked


class Process:
    """A process that the page asks. `kind` is what its status must say under "process"; what a
    further process is becomes known once it answers."""

    def __init__(self, address, token, kind=None):
        self.address, self.token, self.kind, self.further = address, token, kind, kind is None
        Client(address)  # UserError if it is no address

    @property
    def name(self):
        return f"{self.kind or 'process'} at {self.address}" if self.further else self.kind

    def ask(self):
        """Its status, a dict, or None if it does not answer or answers something else."""
        try:
            answer = Client(self.address, self.token, TIMEOUT).call("GET", "/status")
            status = msgspec.json.decode(answer, type=dict)
        except (ValueError, msgspec.DecodeError, RecursionError):
            return None
        kind = status.get("process")
        if not isinstance(kind, str) or not (self.further or kind == self.kind):
            return None
        self.kind = kind
        return status


def missing(statuses):
    """The names of the processes that do not answer, without oracles that nobody asks."""
    middle = [status for name, status in statuses.items() if name.startswith("middle") and status]
    names = []
    for name, status in statuses.items():
        below = middle if " at " in name else [statuses["input trainer"] or {}]
        unused = below and all(part.get("gradients") not in ORACLE for part in below)
        if status is None and not (name.startswith("oracle") and unused):
            names.append(name)
    return names


def sentence(statuses, run):
    """What the page says at its top, and whether all is well. statuses: name -> status or None;
    run: what run.json holds."""
    trainer, absent = statuses["input trainer"], missing(statuses)
    if trainer is None:
        if run.get("ended"):
            return f"training is {run['ended']}", run["ended"] in ("finished", "stopped")
        return ("Nothing is trained: the input trainer does not answer. Start it, or see its "
                "terminal.", False)
    state, total, examples = (trainer.get(name) for name in ("state", "total", "examples"))
    if str(state).startswith("training is"):  # finished, or stopped: nobody is waited for
        return state, True
    if any(not name.startswith("process at") for name in absent):
        return f"Nothing is trained. Unreachable, and waited for: {', '.join(absent)}", False
    if all(isinstance(number, (int, float)) for number in (total, examples)) and total > 0:
        state = f"{state}: {examples / total:.0%} of {total:,} examples"
    return (f"{state}; unreachable: {', '.join(absent)}", False) if absent else (str(state), True)


def other_folder(statuses, folder):
    """A line about pictures that are not of the run that the input trainer is at, or None."""
    theirs = (statuses["input trainer"] or {}).get("progress_dir")
    if not isinstance(theirs, str) or os.path.realpath(theirs) == os.path.realpath(folder):
        return None
    return (f"The pictures are of {os.path.abspath(folder)}, but the input trainer writes to "
            f"{theirs}: start plot.py --live with that folder.")


class Pictures:
    """Draws each picture once a snapshot, one at a time. draw(folder, kind, tall) -> a PNG file's
    bytes, or None."""

    def __init__(self, draw, folder):
        self.draw, self.folder = draw, folder
        self.lock, self.drawn = threading.Lock(), {}  # (kind, tall) -> (version, bytes)

    def version(self):
        try:
            newest = runs.snapshots(self.folder)[-1]
            return f"{newest.name}-{newest.stat().st_mtime_ns}"
        except (IndexError, FileNotFoundError):  # none, or a new run has just moved the folder
            return None

    def get(self, *which):
        if not self.lock.acquire(timeout=10):
            raise Refused("still drawing another picture", 503)
        try:
            version = self.version()
            if version is None or self.drawn.get(which, (None,))[0] != version:
                self.drawn[which] = version, self.draw(self.folder, *which)
            return self.drawn[which][1]
        finally:
            self.lock.release()


def statuses_of(processes):
    """name -> status or None, of all processes, asked at the same time."""
    with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
        statuses = list(pool.map(Process.ask, processes))
    return {process.name: status for process, status in zip(processes, statuses, strict=True)}


def url(host, port):
    """Where a browser finds the page: by the machine's name where it listens on all addresses."""
    name = socket.gethostname() if host in ("0.0.0.0", "::") else host
    return f"http://{options.address(name, port)}/"


def main(draw, args, stop):
    """Serve the page until it is stopped."""
    folder = Path(args.runs[0] if args.runs else "progress")
    pictures, processes = Pictures(draw, folder), [
        Process(args.input_server, args.token, "input trainer"),
        Process(args.output_server, args.token, "output trainer"),
        Process(args.oracle_server, args.token, "oracle"),
        *(Process(address, args.token) for address in args.also)]
    listener = serving.listen(args)
    app = serving.make_app("live page", lambda: {"folder": str(folder)}, args)

    @app.get("/")
    def page():
        return flask.send_file(Path(__file__).with_name("page.html").resolve())

    @app.get("/live")
    def live():
        statuses = statuses_of(processes)
        state, well = sentence(statuses, runs.read_json(folder / "run.json"))
        return {"version": pictures.version(), "state": state, "well": well,
                "warning": other_folder(statuses, folder), "missing": missing(statuses),
                "processes": statuses}

    @app.get("/<any(surface, guess, curves):kind>.png")
    @app.get("/<any(surface, guess, curves):kind>-<any(tall):tall>.png")
    def picture(kind, tall=None):
        found = pictures.get(kind, tall is not None)
        headers = {"Content-Type": "image/png", "Cache-Control": "no-store"}
        return (found, headers) if found else ("", 204, headers)

    serving.serve(app, listener, args)
    say(f"the live page of {folder}: {url(args.host, args.port)}")
    while not stop:
        time.sleep(0.2)
