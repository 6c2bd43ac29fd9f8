"""Fire and forget, and the bounded, replayed set of newest examples that both loops train over."""
import collections
import sys
import threading

import numpy as np

from synthgrad import rows_per_message

PAUSE = 0.004   # seconds between posts: what is thrown meanwhile shares one, and a request costs as much as an update


class Sender:
    """Throws examples at a server without ever making the thrower wait; a thread of its own posts them.

    The queue is bounded to `max_rows` examples: beyond that the oldest are dropped. What could not be delivered is
    dropped too. Everything is counted: thrown = sent + dropped + what waits or is under way. What waits is posted
    together, as much of it as fits into a message, of examples of `width` floats each.
    """

    def __init__(self, post, who, max_rows, width):
        self.post, self.who, self.max_rows, self.per_message = post, who, max_rows, rows_per_message(width)
        self.queue, self.changed, self.closing, self.reachable = collections.deque(), threading.Condition(), False, True
        self.thrown = self.sent = self.dropped = 0
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def throw(self, *arrays):
        """arrays: one row per example; from now on they must not be written to."""
        with self.changed:
            self.queue.append(arrays)
            self.thrown += len(arrays[0])
            while self._waiting() > self.max_rows and len(self.queue) > 1:
                self.dropped += len(self.queue.popleft()[0])
            self.changed.notify()

    def _waiting(self):
        return sum(len(arrays[0]) for arrays in self.queue)

    def _next_message(self):
        """As many of the oldest throws as fit into one message, but at least one; none when closed."""
        with self.changed:
            self.changed.wait_for(lambda: self.queue or self.closing)
            batches, rows = [], 0
            while self.queue and (not batches or rows + len(self.queue[0][0]) <= self.per_message):
                batches.append(self.queue.popleft())
                rows += len(batches[-1][0])
            return batches

    def _run(self):
        while batches := self._next_message():
            try:
                self.post(*map(np.concatenate, zip(*batches)))
                delivered = True
            except Exception as error:  # whatever it is, it is said, and the thread lives on
                delivered = False
                if self.reachable:
                    print(f"{self.who} does not take what is thrown at it; dropping until it does: {error}",
                          file=sys.stderr, flush=True)
            rows = sum(len(arrays[0]) for arrays in batches)
            with self.changed:
                self.sent += rows * delivered
                self.dropped += rows * (not delivered)
                self.reachable = delivered
                self.changed.wait_for(lambda: self.closing, PAUSE if delivered else 0.5)
                if self.closing and not delivered:
                    return

    def close(self, timeout):
        """Send what still waits, for at most `timeout` seconds."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join(timeout)

    def counters(self):
        with self.changed:
            return {"thrown": self.thrown, "sent": self.sent, "dropped": self.dropped}


class NewestExamples:
    """The newest `keep` examples, to be trained over again and again: bounded replay.

    Each example that arrives allows `replay` draws, of whatever is stored; what is not drawn is allowed later, but
    never more than `replay` draws per stored example. So whoever trains over these stops soon after news stops, and
    does not fit too closely what stands still. Servers' threads add, the training loop draws; both hold the lock for
    as long as it takes to copy rows.
    """

    def __init__(self, keep, replay):
        self.keep, self.replay, self.changed = keep, replay, threading.Condition()
        self.columns, self.received, self.drawn, self.allowed = None, 0, 0, 0.0

    def add(self, *columns):
        """columns: arrays of one row per example, the newest last, always of the same widths and types."""
        n = len(columns[0])
        with self.changed:
            if self.columns is None:
                self.columns = [np.empty((self.keep, *column.shape[1:]), column.dtype) for column in columns]
            slots = np.arange(self.received, self.received + n)[-self.keep:] % self.keep
            for stored, column in zip(self.columns, columns):
                stored[slots] = column[-self.keep:]
            self.received += n
            self.allowed = min(self.allowed + self.replay * n, self.replay * self.keep)
            self.changed.notify()

    def draw(self, count, rng, seconds=0):
        """`count` rows of each column, drawn with replacement; None if so many are not allowed within so many seconds."""
        with self.changed:
            if not self.changed.wait_for(lambda: self.allowed >= count, seconds):
                return None
            self.allowed -= count
            self.drawn += count
            rows = rng.integers(min(self.received, self.keep), size=count)
            return [stored.take(rows, axis=0, mode="clip") for stored in self.columns]  # "clip": twice as fast as [rows]

    def counters(self):
        with self.changed:
            return {"received": self.received, "stored": min(self.received, self.keep), "drawn": self.drawn}
