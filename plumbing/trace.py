"""Records what a process does, in Chrome's trace event format, which Perfetto opens.

    trace.start("input.json", "input trainer")  # --trace FILE; without it nothing is recorded
    with trace.span("forward", clock=1000):     # a bar
        trace.flow_out("examples", 1000)        # an arrow starts here, and ends in the process
    trace.write()                               # that calls flow_in("examples", 1000)

The last LAST spans and ends of arrows are kept. Only spans that have ended are written, so begin
and end always pair up. An end of an arrow belongs to the span around it. plumbing/timeline.py joins
the files of several processes.

Timestamps are of time.perf_counter. On Linux, macOS and Windows it reads one clock of the machine,
so its processes agree. Nobody sets it, as the wall clock may be set. Two machines do not agree.
"""
import collections
import contextlib
import itertools
import json
import os
import threading
import time
import zlib

from plumbing import runs, say

LAST = 20_000  # spans and ends of arrows together; the input trainer's last 2,000 updates or so
NOTHING = contextlib.nullcontext()
recorder = None


class Recorder:
    """Any thread may add to it. Entries: phase, name, (number, ns) of begin and end, thread, more.

    The numbers count up, because two readings of a coarse clock may be equal.
    """

    def __init__(self, path, process, last):
        self.path, self.process, self.numbers = path, process, itertools.count()
        self.entries = collections.deque(maxlen=last)  # append() and copy() are atomic
        self.ends = {}  # thread -> when its last span ended

    def now(self):
        return time.perf_counter_ns(), next(self.numbers)

    def add(self, phase, name, begin, end, more):
        thread = threading.current_thread()
        self.ends[thread.native_id] = end
        self.entries.append((phase, name, begin, end, thread.native_id, thread.name, more))


class Span:
    """A bar, from enter to exit, also if that is by an exception."""

    def __init__(self, name, args):
        self.name, self.args = name, args

    def __enter__(self):
        self.begin = recorder.now()

    def __exit__(self, *_):
        recorder.add("B", self.name, self.begin, recorder.now(), {"args": self.args})


def start(path, process, last=LAST):
    """Record from now on. `process` is what the timeline calls this process."""
    global recorder
    recorder = Recorder(path, process, last)


def span(name, **args):
    """A context for what takes time. args: whole numbers or text, such as clock=1000."""
    return Span(name, args) if recorder else NOTHING


def since_last(name, **args):
    """A bar from the end of this thread's last one until now."""
    if recorder:
        now = recorder.now()
        begin = recorder.ends.get(threading.get_native_id(), now)
        recorder.add("B", name, begin, now, {"args": args})


def flow_out(name, key):
    """A message leaves. key: what its receiver knows, too. A whole number, as the clock, or an
    array, such as h, in C order: its bytes are the key."""
    flow("s", name, key)


def flow_in(name, key):
    """A message with this name and key is here."""
    flow("f", name, key)


def flow(phase, name, key):
    if recorder:
        key = fingerprint(key) if hasattr(key, "tobytes") else key
        now = recorder.now()
        recorder.add(phase, name, now, now, {"id": f"{name} {key}"})


def fingerprint(array):
    """A number for an array's bytes; for a NumPy number, which the clock may be, itself."""
    return f"{zlib.crc32(array):08x}" if array.shape else int(array)


def write():
    """Write what is kept, as a whole file. It may be called again, and when nothing is recorded."""
    if not recorder:
        return
    try:
        with runs.replacing(recorder.path) as file:  # default: of NumPy's numbers
            file.write(json.dumps({"traceEvents": events()}, default=int).encode())
    except OSError as error:  # at the end of a run, which is not to fail for this
        say(f"no trace: {error}")


def events():
    """A list of events in Chrome's format, in the order of time."""
    ordered, threads, pid = [], {}, os.getpid()
    for phase, name, begin, end, tid, thread, more in recorder.entries.copy():
        threads[tid] = thread
        common = {"name": name, "pid": pid, "tid": tid}
        if phase == "B":
            ordered += (begin, {"ph": "B", **common, **more}), (end, {"ph": "E", **common})
        else:
            binding = {"bp": "e"} if phase == "f" else {}  # to the span around it
            ordered.append((begin, {"ph": phase, "cat": "message", **common, **more, **binding}))
    ordered.sort(key=lambda pair: pair[0])
    names = [("process_name", 0, recorder.process),
             *(("thread_name", tid, thread) for tid, thread in threads.items())]
    return [*({"ph": "M", "name": name, "pid": pid, "tid": tid, "args": {"name": value}}
              for name, tid, value in names),
            *({"ts": ns / 1000, **event} for (ns, _), event in ordered)]  # microseconds
