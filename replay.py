"""What asynchrony adds above a cut and to an oracle: a bounded set of examples, trained on again.
"""
import threading

import numpy as np

SEEN = 20_000  # minibatches that are remembered at least, so that each counts once


class Replay:
    """The newest `keep` examples. Each one that arrives allows `replay` draws of any of them, of
    which at most `replay` per stored example are saved up. So training stops soon after news stops.
    Servers' threads add, the training loop draws."""

    def __init__(self, keep, replay):
        self.keep, self.replay, self.changed = keep, replay, threading.Condition()
        self.columns, self.received, self.drawn, self.allowed, self.fresh = None, 0, 0, 0.0, 0
        self.seen = {}  # (start, clock) of minibatches, the newest last; at most 2 · SEEN
        self.starts = {}  # of the part below, the newest last

    def is_new(self, start, clock):
        """Whether this minibatch comes for the first time: what is thrown again counts once."""
        with self.changed:
            new = (start, clock) not in self.seen
            self.starts.setdefault(start)
            self.seen[start, clock] = None
            if len(self.seen) > 2 * SEEN:
                self.seen = dict.fromkeys(list(self.seen)[-SEEN:])
            return new

    def add(self, *columns):
        """columns: arrays of one row per example, the newest last, always of the same widths."""
        n = len(columns[0])
        with self.changed:
            if self.columns is None:
                self.columns = [np.empty((self.keep, *each.shape[1:]), each.dtype)
                                for each in columns]
            slots = np.arange(self.received, self.received + n)[-self.keep:] % self.keep
            for stored, column in zip(self.columns, columns, strict=True):
                stored[slots] = column[-self.keep:]
            self.received, self.fresh = self.received + n, self.fresh + n
            self.allowed = min(self.allowed + self.replay * n, self.replay * self.keep)
            self.changed.notify()

    def draw(self, count, rng, seconds=0, newest_first=False):
        """`count` rows of each column, drawn with replacement; None if so many are not allowed in
        time. `newest_first`: what arrived since the last draw comes first, the newest in row 0, so
        that no news is missed by chance."""
        with self.changed:
            if not self.changed.wait_for(lambda: self.allowed >= count, seconds):
                return None
            self.allowed -= count
            self.drawn += count
            stored = min(self.received, self.keep)
            ages = rng.integers(stored, size=count)
            if newest_first:
                fresh = np.arange(min(self.fresh, stored, count))
                ages[:len(fresh)], self.fresh = fresh, 0
            rows = (self.received - 1 - ages) % self.keep
            # mode="clip" makes take() twice as fast as columns[rows]
            return [each.take(rows, axis=0, mode="clip") for each in self.columns]

    def newest_start(self):
        """The mark of the part below's last start: what has another one is of before a restart."""
        with self.changed:
            return next(reversed(self.starts), None)

    def counters(self):
        with self.changed:
            return {"received": self.received, "stored": min(self.received, self.keep),
                    "drawn": self.drawn}


def later(known, newest):
    """The later one of two minibatches (start, clock), where `newest` is of the newest start."""
    return max(known, newest) if known and known[0] == newest[0] else newest
