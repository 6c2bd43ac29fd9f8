"""What asynchrony adds below a cut: bounded staleness, and where a part's gradient comes from.

    BoundedStaleness  waits while what is known above the cut is too old
    SOURCES           a class for each value of --gradients

What asynchrony adds above a cut is in replay.py and links.UpperEnd. links.LowerEnd uses this.
"""
import collections
import threading
import time

import numpy as np

from plumbing import trace
from plumbing.errors import NoAnswer
from sgd import HIDDEN, backprop, descend, feed_forward, make_layers, schedule, task_of

THROW_AGAIN = 0.5  # seconds between two times that a waiting part throws its minibatches again


class BoundedStaleness:
    """What is known above is at most `bound` updates old, or the part waits (Ho et al. 2013).

    ask() -> an answer, and (start, clock): the newest minibatch that is known above, or None.
    Staleness is the part's clock minus that one. While nothing of this start is known, it counts
    from the update before the first question. wait(attempt) calls attempt() until it no longer
    raises NoAnswer. Meanwhile throw_again(after) throws what is newer than the clock `after`, for
    it may be lost.
    """

    def __init__(self, bound, wait, throw_again, start):
        self.bound, self.wait, self.throw_again, self.start = bound, wait, throw_again, start
        self.known = None                             # the newest clock of this start known above
        self.thrown_at = 0.0                          # seconds, of time.monotonic()
        self.waits, self.waited = 0, 0.0              # a count; seconds
        self.recent = collections.deque(maxlen=1000)  # staleness, and seconds to answer

    def __call__(self, clock, ask):
        self.known = clock - 1 if self.known is None else self.known

        def attempt():
            asked = time.perf_counter()
            with trace.span("ask", clock=clock):
                answer, newest = ask()
            if newest and newest[0] == self.start:
                self.known = max(self.known, newest[1])
            if clock - self.known > self.bound:
                self.raise_too_old(clock, self.known)
            return answer, time.perf_counter() - asked
        answer, seconds = self.timed(attempt)
        self.recent.append((clock - self.known, seconds))
        return answer

    def timed(self, attempt):
        """What attempt() returns, (an answer, seconds that it took), once it succeeds. The rest of
        the time was a wait, and is counted."""
        began = time.perf_counter()
        answer, seconds = self.wait(attempt)
        waited = time.perf_counter() - began - seconds
        if waited > 0.001:
            self.waits, self.waited = self.waits + 1, self.waited + waited
        return answer, seconds

    def raise_too_old(self, clock, after):
        """Raises NoAnswer: what is newer than the clock `after` is not known above, or not back."""
        self.throw_lost(after)
        raise NoAnswer(f"this part is at update {clock}, what is known above is of update "
                       f"{after}, and --staleness is {self.bound}; is all above running?")

    def throw_lost(self, after):
        """Throw what is newer than the clock `after` again, unless that was done just now."""
        if time.monotonic() - self.thrown_at > THROW_AGAIN:
            self.thrown_at = time.monotonic()
            self.throw_again(after)

    def status(self):
        recent = list(self.recent) or [(np.nan, np.nan)]
        median, high = np.percentile(recent, [50, 95], axis=0).tolist()
        return {"staleness": median[0], "staleness_p95": high[0],
                "latency_ms": 1e3 * median[1], "latency_ms_p95": 1e3 * high[1],
                "waits": self.waits, "waited": self.waited}


def centered(g):
    """g (batch, width) minus its mean over the minibatch, unless that is a single example. Above
    the cut z = h w + b, so this mean is w (dL/db), and b descends along dL/db itself. So it is soon
    out of date, and would push all activations to one side, until sigmoids saturate."""
    return g - g.mean(axis=0) if len(g) > 1 else g


class Source:
    """Where a part's gradient comes from. gradients(h, y, clock, tell) yields (g, tell) for each
    update that can be made now: g (batch, width) and the tell() of the minibatch that it is of.

    h (batch, width) and y (batch, k) are of the minibatch that was just thrown. They are None if
    there is none; then only what has come back is yielded."""
    asks_oracle = takes_back = False  # whether gradients go to an oracle, or back to this part
    every = False   # whether the part above trains on each minibatch, and skips none
    locked = False  # whether the minibatch is not thrown, since the question brings it
    rates = dict(learning_rate=2.7, momentum=0.9, warm_up=0)  # where a person gives none

    def __init__(self, link, part, k, args, rng):
        """link: a LowerEnd; k: the width of y; args: of the program; rng: for what is drawn."""
        self.link, self.part = link, part

    def throws(self, clock):
        """The minibatch of this clock is about to be thrown."""


class Synthetic(Source):
    """The oracle's guess ĝ for the present activations (section 2), centered. The part waits for
    the guess, but not for the true gradient."""
    asks_oracle = True
    rates = dict(learning_rate=30.0, momentum=0.0, warm_up=1000)

    def gradients(self, h, y, clock, tell):
        guess = self.link.bounded(clock, lambda: self.link.above.guess(h, y))
        yield centered(self.used(guess)), tell

    def used(self, guess):
        """What becomes of the oracle's answer, (batch, width), before it is centered."""
        return guess


class Shuffled(Synthetic):
    """A control: each example gets the guess of another one in its minibatch."""

    def used(self, guess):
        return np.roll(guess, 1, axis=0)


class Delayed(Source):
    """True gradients of earlier minibatches, as a pipeline uses them (Huo et al. 2018), centered.

    An update is made when a gradient has come back, and only then. All that have come back are
    applied before the next forward pass, the oldest first. Before the next throw at most `bound`
    minibatches are on their way, and no more than leave one waiting for the part above: this window
    grows by one a round trip, as TCP's do. Beyond it the part waits. What comes back twice is
    applied once.

    Backprop goes through the remembered x and h and the present weights. Published pipelines
    remember the weights, too, or compute the activations again. In the first 500 updates of a deep
    part this is the same direction (cosine 0.998 at least)."""
    takes_back = every = True

    def __init__(self, link, part, k, args, rng):
        super().__init__(link, part, k, args, rng)
        self.bound, self.changed = link.bounded.bound, threading.Condition()
        self.window = link.above.window or self.bound  # how many may be on their way
        self.on_their_way = {}  # clock -> when it was thrown, its tell, (x, h) of each layer
        self.returned = {}      # clock -> g; servers add what is on its way, the loop takes it

    def add(self, start, clock, waiting, g):
        """In a server's thread: g of one minibatch. waiting: how many the part above still has."""
        with self.changed:
            if start == self.link.start and clock in self.on_their_way:
                self.returned[clock] = g
                if waiting < 2:
                    self.window = min(self.bound, self.window + 1 / self.window)
                else:  # as many as leave one waiting
                    self.window = min(self.bound, max(1, len(self.on_their_way) - waiting + 1))
                self.changed.notify()

    def throws(self, clock):
        inside = [(layer.x, layer.h) for layer in self.part.layers]
        self.on_their_way[clock] = [time.perf_counter(), None, inside]

    def gradients(self, h, y, clock, tell):
        if h is not None:
            self.on_their_way[clock][1] = tell
        yield from self.take(clock)
        if h is None and self.on_their_way:  # the part below may wait for what is lost above
            oldest, (thrown_at, *_) = next(iter(self.on_their_way.items()))
            if time.perf_counter() - thrown_at > THROW_AGAIN:
                self.link.bounded.throw_lost(oldest - 1)
        while h is not None and (len(self.on_their_way) > self.window  # too many, or one is lost
                                 or min(self.on_their_way, default=clock) <= clock - self.bound):
            self.link.bounded.timed(lambda: self.something_came(clock))
            yield from self.take(clock)

    def take(self, clock):
        with self.changed:
            came, self.returned = sorted(self.returned.items()), {}
        for then, g in came:
            if then not in self.on_their_way:  # it came again while it was applied
                continue
            thrown_at, tell, inside = self.on_their_way.pop(then)
            trace.flow_in("gradients", then)
            self.link.bounded.recent.append((clock - then, time.perf_counter() - thrown_at))
            for layer, (x, h) in zip(self.part.layers, inside, strict=True):
                layer.x, layer.h = x, h
            yield centered(g), tell

    def something_came(self, clock):
        with trace.span("wait", clock=clock), self.changed:
            if not self.changed.wait_for(lambda: self.returned, self.link.above.news_seconds):
                self.link.bounded.raise_too_old(clock, min(self.on_their_way) - 1)
        return None, 0.0


class Locked(Source):
    """The true gradient of the present minibatch: the part waits (update-locked, section 1). In a
    chain this is backprop. It is asked for; thrown and thrown back it would take twice as long."""
    locked = True

    def gradients(self, h, y, clock, tell):
        with trace.span("wait", clock=clock):
            above, thrown = self.link.above, self.link.thrown
            g = above.wait(lambda: above.true_gradients(*thrown))
            trace.flow_in("gradients", clock)
        yield g, tell


class Zero(Source):
    """A control: no gradient and no update. The part stays as drawn. It needs nothing from above,
    but waits while the part above is `bound` minibatches behind, with its replay."""
    every = True

    def gradients(self, h, y, clock, tell):
        link = self.link
        link.bounded(clock, lambda: (None, link.above.trained(clock - link.bounded.bound)))
        yield from self.own(h, y, clock, tell)

    def own(self, *minibatch):
        return ()


class Local(Zero):
    """The gradient of a local loss (Nøkland & Eidnes 2019; Belilovsky et al. 2019): a small head
    of the part's own predicts y from h, and is trained beside it. It needs no oracle, and waits as
    Zero does."""

    def __init__(self, link, part, k, args, rng):
        super().__init__(link, part, k, args, rng)
        width, self.task = len(part.layers[-1].b), task_of(k)
        self.layers = make_layers([width, *args.head, k], rng, input_mean=HIDDEN.mean)
        part.besides = self.layers
        self.rate = schedule(args.head_rate, args.decay)
        self.momentum = args.head_momentum

    def own(self, h, y, clock, tell):
        y_hat = feed_forward(self.layers, h)
        g = backprop(self.layers, self.task.loss_gradient(y_hat, y))
        descend(self.layers, self.rate(clock), self.momentum)
        yield g, tell


SOURCES = {"synthetic": Synthetic, "true": Locked, "delayed": Delayed, "local": Local,
           "zero": Zero, "shuffled": Shuffled}
