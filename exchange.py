"""What asynchrony adds to SGD: arrivals, replay, and gradients with bounded staleness.

    Arrivals          above          what to train on next: the newest arrival first, else replay
    Replay            above, oracle  the newest examples, and how often each may be trained on
    BoundedStaleness  below          asks for a gradient, and waits while the answer is too old
    Delayed           below          true gradients of earlier minibatches, instead of guesses
    centered          below          guesses and late gradients without their mean
    gradient_source   below          chooses where a gradient comes from

"below" and "above" are the parts of the network below and above a cut. Nothing here depends on how
messages travel: examples/in_process.py uses plain function calls, the trainers use HTTP. The
columns of a minibatch are i, h, y and clock, see synthgrad.py.
"""
import collections
import threading
import time
from functools import partial
from typing import NamedTuple

import numpy as np

from plumbing.errors import NoAnswer
from sgd import descend

THROW_AGAIN = 0.5  # seconds between two times that a waiting part throws its minibatches again
BACKLOG = 800      # examples that may wait to be trained on


class Part:
    """A part of the network. The training loop alone writes to it; other threads call weights()."""

    def __init__(self, layers, updates=0):
        self.layers, self.updates, self.lock = layers, updates, threading.Lock()

    def descend(self, learning_rate, momentum):
        with self.lock:  # so that nobody reads half an update, or its weights with another's number
            descend(self.layers, learning_rate, momentum)
            self.updates += 1

    def weights(self):
        """[(w, b), ...], copied, and how many updates made them."""
        with self.lock:
            return [(layer.w.copy(), layer.b.copy()) for layer in self.layers], self.updates


class Replay:
    """The newest `keep` examples. Each one that arrives allows `replay` draws of any of them.

    At most `replay` draws per stored example are saved up. So training stops soon after news stops,
    and does not overfit. What is thrown again is recognised and counts once. Servers' threads add,
    the training loop draws.
    """

    def __init__(self, keep, replay):
        self.keep, self.replay, self.changed = keep, replay, threading.Condition()
        self.columns, self.received, self.drawn, self.allowed = None, 0, 0, 0.0
        self.seen, self.remember = {}, max(keep, 20_000)  # keys; the newest are last

    def is_new(self, i, h, clock):
        """(batch,) bool. A resumed run has the same i and clock again, but another h: it is new."""
        with self.changed:
            keys = list(map(hash, zip(i.tolist(), clock.tolist(), h[:, 0].tolist(), strict=True)))
            new = np.array([key not in self.seen for key in keys])
            self.seen.update(dict.fromkeys(keys))
            if len(self.seen) > 2 * self.remember:
                self.seen = dict.fromkeys(list(self.seen)[-self.remember:])
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
            self.received += n
            self.allowed = min(self.allowed + self.replay * n, self.replay * self.keep)
            self.changed.notify()

    def draw(self, count, rng, seconds=0):
        """`count` rows of each column, with replacement, and how many have arrived since each one.
        None if so many are not allowed within so many seconds."""
        with self.changed:
            if not self.changed.wait_for(lambda: self.allowed >= count, seconds):
                return None
            self.allowed -= count
            self.drawn += count
            ages = rng.integers(min(self.received, self.keep), size=count)
            rows = (self.received - 1 - ages) % self.keep
            # mode="clip" makes take() twice as fast as columns[rows]
            return [*(each.take(rows, axis=0, mode="clip") for each in self.columns), ages]

    def counters(self):
        with self.changed:
            return {"received": self.received, "stored": min(self.received, self.keep),
                    "drawn": self.drawn}


class Minibatch(NamedTuple):
    """What a part above trains on. tell(g) passes its gradient on; None where h is replayed."""
    i: np.ndarray
    h: np.ndarray
    y: np.ndarray
    tell: object = None


class Arrivals:
    """What a part above trains on, in a loop: the last arrival first, however old, else replay.

    At most `backlog` examples wait, or two minibatches. Beyond that the oldest minibatch is
    skipped: it stays in the replay set only. Gradients at replayed activations are not passed on.
    Those come from layers that have changed since, and an oracle that learned from them would
    mislead the present ones.
    """

    def __init__(self, replay, batch_size, rng, backlog=BACKLOG):
        self.replay, self.batch_size, self.rng = replay, batch_size, rng
        self.backlog = max(backlog, 2 * batch_size)
        self.waiting, self.questions, self.skipped = collections.deque(), collections.deque(), 0
        self.changed = replay.changed

    def add(self, i, h, y, clock, tell, again):
        """In a server's thread. tell(i, h, y, clock, g) passes gradients on. again(after) is called
        where examples have come before: their gradients may have been lost on the way."""
        new = self.replay.is_new(i, h, clock)
        if not new.all():
            again(int(clock[~new].min()) - 1)
            i, h, y, clock = (column[new] for column in (i, h, y, clock))
        for k in range(0, len(i), self.batch_size):
            columns = [column[k:k + self.batch_size] for column in (i, h, y, clock)]
            with self.changed:
                self.waiting.append(Minibatch(*columns[:3], partial(tell, *columns)))
                while len(self.waiting) > 2 and sum(len(w.h) for w in self.waiting) > self.backlog:
                    self.waiting.popleft()
                    self.skipped += 1
                self.replay.add(*columns[1:3])

    def add_question(self, h, y, tell):
        """In a server's thread, which waits for tell(g). Questions come first; none is skipped."""
        with self.changed:
            self.questions.append(Minibatch(np.arange(len(h)), h, y, tell))
            self.replay.add(h, y)

    def next(self, seconds=0):
        """The next minibatch, or None if there is none within so many seconds."""
        with self.changed:
            self.changed.wait_for(lambda: self.questions or self.waiting
                                  or self.replay.allowed >= self.batch_size, seconds)
            if self.questions or self.waiting:
                return self.questions.popleft() if self.questions else self.waiting.pop()
            drawn = self.replay.draw(self.batch_size, self.rng)
            return Minibatch(None, *drawn[:2]) if drawn else None


class BoundedStaleness:
    """Gradients that are at most `bound` updates old, or the part waits (Ho et al. 2013, eq. 1).

    answer(i, h, y, clock) -> g (batch, width), and `learned`, the clock of what g was learned from.
    Staleness is clock − learned. An oracle that has learned nothing yet answers zeros and None;
    then staleness counts from the first such answer. It does, too, if `learned` is later than this
    clock, as after resuming from an older checkpoint. wait(ask) calls ask() until it no longer
    raises NoAnswer. Meanwhile ask() has minibatches thrown again, which may have been lost.
    """

    def __init__(self, answer, bound, wait, throw_again):
        self.answer, self.bound, self.wait, self.throw_again = answer, bound, wait, throw_again
        self.learned, self.first_seen = object(), 0   # the last answer's, and when it first came
        self.thrown_at = 0.0                          # seconds, of time.monotonic()
        self.waits, self.waited = 0, 0.0              # a count; seconds
        self.recent = collections.deque(maxlen=1000)  # staleness, and seconds to answer

    def __call__(self, i, h, y, clock):
        """h (batch, width), y (batch, k) -> g (batch, width)."""
        began = time.perf_counter()
        g = self.wait(partial(self.ask, i, h, y, clock))
        waited = time.perf_counter() - began - self.recent[-1][1]
        if waited > 0.001:
            self.waits, self.waited = self.waits + 1, self.waited + waited
        return g

    def ask(self, i, h, y, clock):
        """Raises NoAnswer if the gradient is too old."""
        asked = time.perf_counter()
        g, learned = self.answer(i, h, y, clock)
        if learned != self.learned:
            self.learned, self.first_seen = learned, clock
        from_here = learned is not None and learned <= clock  # else it counts from its first answer
        staleness = clock - (learned if from_here else self.first_seen)
        if staleness > self.bound:
            if time.monotonic() - self.thrown_at > THROW_AGAIN:
                self.thrown_at = time.monotonic()
                self.throw_again(learned if from_here else None)
            news = "none has come yet" if learned is None else f"the newest is of update {learned}"
            raise NoAnswer(f"no true gradient is new enough: {news}, this part is at update "
                           f"{clock}, --staleness is {self.bound}; is all above running?")
        self.recent.append((staleness, time.perf_counter() - asked))
        return g

    def status(self):
        recent = list(self.recent) or [(np.nan, np.nan)]
        median, high = np.percentile(recent, [50, 95], axis=0).tolist()
        return {"staleness": median[0], "staleness_p95": high[0],
                "latency_ms": 1e3 * median[1], "latency_ms_p95": 1e3 * high[1],
                "waits": self.waits, "waited": self.waited}


def centered(g):
    """g (batch, width) minus its mean over the minibatch, unless that is a single example.

    Above the cut z = h w + b, so the mean of g is w (dL/db), and b itself descends along dL/db. A
    few updates later this mean is unrelated to its old value. A late or guessed mean pushes all
    activations to one side, until sigmoids saturate.
    """
    return g - g.mean(axis=0) if len(g) > 1 else g


class Delayed:
    """True gradients of earlier minibatches: the competitor of guesses (Huo et al. 2018).

    When a gradient comes back, the layers get back the x and h of the minibatch that it belongs to,
    so that backprop applies it there. If several have come back, the oldest is next. Until one has,
    the gradient is zero. What comes back more than `bound` updates late is dropped. Gradients are
    centered, as guesses are. With their mean, late ones teach a deep lower part much less.
    """

    def __init__(self, layers, bound):
        self.layers, self.bound = layers, bound
        self.memory = {}                     # clock -> i, (x, h) of each layer, which rows are due
        self.returned = collections.deque(maxlen=2 * bound)  # (clock, i, g), which servers add
        self.learned = None                  # the newest clock of a gradient that was applied

    def add(self, i, h, y, clock, g):
        """In a server's thread: true gradients g (batch, width), of one or more minibatches."""
        cuts = np.flatnonzero(np.diff(clock)) + 1
        self.returned.extend(zip(*(np.split(each, cuts) for each in (clock, i, g)), strict=True))

    def answer(self, i, h, y, clock):
        """For BoundedStaleness: g, and the newest clock that was applied."""
        remembered = [(layer.x, layer.h) for layer in self.layers]
        self.memory[clock] = i, remembered, np.ones(len(i), bool)
        self.memory.pop(clock - self.bound - 1, None)
        while self.returned:
            (then, *_), its_i, its_g = self.returned.popleft()
            i_then, remembered, due = self.memory.get(then, (its_i, [], np.zeros(len(its_i), bool)))
            _, rows, theirs = np.intersect1d(i_then, its_i, return_indices=True)
            if due[rows].any():  # what comes twice is applied once
                for layer, (x, activations) in zip(self.layers, remembered, strict=True):
                    layer.x, layer.h = x, activations
                g = np.zeros_like(layer.h)
                g[rows] = centered(its_g[theirs]) * due[rows, None]
                due[rows], self.learned = False, max(int(then), self.learned or 0)
                return g, self.learned
        return np.zeros_like(h), self.learned


def gradient_source(kind, guess, truth, rng):
    """gradient(i, h, y, clock) -> g (batch, width), of the kind that --gradients names. Guesses are
    centered."""
    return {"synthetic": lambda *minibatch: centered(guess(*minibatch)),
            "delayed": guess, "true": truth,
            "zero": lambda *minibatch: 0 * guess(*minibatch),
            "shuffled": lambda *minibatch: rng.permutation(centered(guess(*minibatch)))}[kind]
