"""What every process does that is not serving: it waits for others, reports, and stops."""
import contextlib
import getpass
import os
import random
import signal
import sys
import time
import traceback

from plumbing import options, say, trace
from plumbing.errors import NoAnswer

START = random.getrandbits(52)  # of this process: tells it from others, and from one before a crash
REPORT_SECONDS = 30      # between two lines about what has been trained


def user():
    """Who started this process; in a container that has no name for its user, a number."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return str(os.getuid())


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM came, and what can be kept has been kept."""


def on_stop(handler):
    """Has handler(number, frame) called for each signal that asks for an end. After nohup, the end
    of the terminal (SIGHUP) is none."""
    for name in {"SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"} & set(dir(signal)):
        number = getattr(signal, name)
        if name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


class Stop:
    """Turns true on SIGTERM or SIGHUP (exit code 0) and on Ctrl-C (130). After that, Ctrl-C ends
    the process at once.

    A plain flag, because a signal may come while the main thread holds a threading.Event's lock.
    """

    def __init__(self):
        self.requested, self.exit_code = False, 0
        on_stop(self._request)

    def _request(self, number, _):
        polite = signal.Signals(number).name in ("SIGTERM", "SIGHUP")
        if self.requested and not polite:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self.exit_code = True, 0 if polite else 130

    def __bool__(self):
        return self.requested


def until_answered(call, who, stop, patience):
    """call() again and again while it raises NoAnswer, ever less often. Says for whom it waits.

    Ends with the answer, with NoAnswer after `patience` seconds, or with Stopped: after a stop
    request one failed call ends the wait.
    """
    began, pause, said = time.monotonic(), 0.001, False
    while True:
        try:
            answer = call()
            if said:
                say(f"going on after {time.monotonic() - began:.0f} s: {who} has caught up")
            return answer
        except NoAnswer as error:
            waited = time.monotonic() - began
            if stop:
                raise Stopped(error) from None
            if waited > patience:
                raise
            if waited > 1 and not said:
                said = True
                say(f"waiting for {who} ({error})")
            with trace.span("wait"):
                time.sleep(pause)
            pause = min(2 * pause, 0.2)


class Reporter:
    """Prints line() every REPORT_SECONDS, if there were updates since the last one."""

    def __init__(self, line):
        self.line, self.reported, self.updates = line, time.monotonic(), 0

    def now_and_then(self, updates):
        if time.monotonic() - self.reported > REPORT_SECONDS:
            self.reported = time.monotonic()
            if updates != self.updates:
                self.updates = updates
                say(self.line())


def run(main, parser):
    """Parse, run main(args, stop), exit with 0, with 130 after Ctrl-C, or as one_line_errors().
    After an error of the code: with its traceback and 1.

    Nobody waits for the threads that still answer requests. If one of them is in C++ code (a
    picture, TensorFlow), it would abort the process while Python shuts down. So the process ends
    without that.
    """
    args, stop = options.parse(parser), Stop()
    try:
        with options.one_line_errors(parser), contextlib.suppress(Stopped):
            main(args, stop)
        code = stop.exit_code
    except SystemExit as error:
        code = error.code
    except Exception as error:
        with contextlib.suppress(OSError):  # the terminal may have gone
            traceback.print_exception(error)
        code = 1
    trace.write()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
