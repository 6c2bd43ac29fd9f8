"""The two ends of a link: what the train functions call, whatever carries the messages.

A link joins two neighbouring parts of the network. Activations go up, true gradients come down, to
the link's oracle or to the part below. train_input.py has a LowerEnd, train_output.py an UpperEnd,
and train_middle.py one of each. Between processes, over_http.py carries the messages. In
one process, examples/in_process.py carries them by plain calls.

Threads: the training loop alone writes to weights, velocities and checkpoints. Servers' threads add
to UpperEnd.due and .waiting, Replay and Delayed.returned, have an Outbox throw again, and read
copies of the weights. A Poster's thread empties its Outbox. An array that was thrown or published
is not written to any more.

A guess's way, in the order of the calls; true and delayed gradients differ in exchange.py only:

    train_input.train                  h = feed_forward(layers, x); throw(i, h, y, clock)
    LowerEnd.gradients                 asks its source, which --gradients names:
    exchange.Synthetic.gradients       centers ĝ, which comes through
    exchange.BoundedStaleness          asks again while what the oracle knows is too old
    over_http.Above.guess, .wait       synthgrad.OracleClient.estimate_gradients; says for whom
    oracle.Oracle.guess                ĝ of the model that was published last
    train_input.train                  backprop(layers, ĝ); part.descend()

A minibatch that comes late: the part above trains on it when nothing newer waits, or only by replay
if it was skipped. Its gradient goes to the oracle, whose guesses do not wait for it. With delayed
gradients it is applied when it has come back, and the part below waits rather than let more than
--staleness be on their way.

    queue                     holds at most                      beyond that
    Outbox                    THROWN examples                    the oldest is dropped, and counted
    Outbox.kept               THROWN examples                    the oldest is not thrown again
    UpperEnd.waiting          BACKLOG examples,                  the oldest is left to replay,
                              or 2 minibatches                   and counted
    UpperEnd.due              2 · THROWN examples                503, so that they are thrown again
    Replay                    --keep examples                    the oldest is forgotten
    Replay.seen               2 · SEEN minibatches               the oldest would count again
    Delayed.on_their_way,     --staleness + 1 minibatches        the part waits
    .returned
    answers to /true_…        THREADS minibatches                the oldest is asked anew
    requests                  CONNECTIONS, THREADS, MAX_BODY     not accepted; waits; 413

    wait                      ends with
    for another process       an answer, a refusal (4xx), a stop request, or --patience, see
                              process.until_answered. One try ends after 10 s without a byte
    for news, because of      the same. Meanwhile minibatches are thrown again every THROW_AGAIN s.
    --staleness               A bound too small for news to come is refused at the start
    for minibatches           news, or 0.2 s; then the loop checks whether to stop
    for weights, by a middle  one try; then 503, so that it is asked again
    part
    for a true gradient       the answer; after 8 s 503, so that it is asked again
    of a Poster               something thrown, or the end; then PAUSE, or TRY_AGAIN after a failure
    at the end                a Poster gets 5 s for what still waits. For room on a full disk: room,
                              a stop request, or --patience
"""
import collections
from functools import partial
from typing import NamedTuple

import numpy as np

from exchange import SOURCES, BoundedStaleness
from replay import later
from plumbing import trace
from plumbing.errors import Refused, UserError
from plumbing.posting import THROWN

BEHIND = 2     # new minibatches by which replay may lag, where the part below waits anyway
BACKLOG = 800  # examples that may wait to be trained on, where skipping is allowed


class Minibatch(NamedTuple):
    """What a part above trains on. tell(g) passes its gradient on; None where nobody wants it."""
    i: np.ndarray
    h: np.ndarray
    y: np.ndarray
    clock: int | None = None  # the number that the part below gave it; None where it is replayed
    tell: object = None


def minibatches_of(clock, start, *columns):
    """Yields (start, clock, rows of each column) of each minibatch of a message. A minibatch's rows
    follow each other, and have one clock and one start."""
    cuts = np.flatnonzero(np.diff(clock) | np.diff(start)) + 1
    for a, b in zip([0, *cuts], [*cuts, len(clock)], strict=True):
        yield int(start[a]), int(clock[a]), [column[a:b] for column in columns]


def send_down(clock, send, *columns):
    """send(*columns), the last of which is the gradient of the minibatch number `clock`."""
    trace.flow_out("gradients", clock)
    send(*columns)


class UpperEnd:
    """What has come from below: the last arrival first, however old, else replay.

    back: where gradients are thrown, an Outbox or its like; None if nobody wants them. At most
    BACKLOG examples wait. Beyond that the oldest minibatch is skipped: it stays in the replay set
    only. Gradients at replayed activations are not passed on. Those come from layers that have
    changed since, and an oracle that learned from them would mislead the present ones. Where
    the part below waits for each of its minibatches, none is skipped, and the oldest is first.
    """

    def __init__(self, replay, batch_size, rng, back=None):
        self.replay, self.batch_size, self.rng, self.back = replay, batch_size, rng, back
        self.due, self.waiting, self.skipped = collections.deque(), collections.deque(), 0
        self.rows, self.trained = {"due": 0, "waiting": 0}, None  # trained: start and newest clock
        self.changed, self.nudged = replay.changed, False
        if replay.replay and batch_size > replay.keep * replay.replay:
            raise UserError("--keep times --replay must be at least --batch-size, or nothing is "
                            "ever trained on again; --replay 0 says so")

    def add(self, i, h, y, clock, start, every=False):
        """In a server's thread: whole minibatches. `every`: none may be skipped."""
        if every:
            self.refuse_more()  # before anything of it counts as having come
        known = []
        for its_start, its_clock, columns in minibatches_of(clock, start, i, h, y, clock, start):
            if not self.replay.is_new(its_start, its_clock):
                known.append(its_clock)
                continue
            tell = None if self.back is None else partial(
                send_down, its_clock, self.back.throw, *columns)
            self.queue("due" if every else "waiting", its_start,
                       Minibatch(*columns[:3], its_clock, tell))
        if known and self.back is not None:  # gradients may be lost. An empty back may be falsy
            self.back.throw_again(min(known) - 1)

    def ask(self, i, h, y, clock, start, tell):
        """In a server's thread: one minibatch, none of which is skipped. tell(g) gets its
        gradient."""
        self.refuse_more()
        its_clock = int(clock[0])
        self.queue("due", int(start[0]),
                   Minibatch(i, h, y, its_clock, partial(send_down, its_clock, tell)))

    def refuse_more(self):
        if self.rows["due"] > 2 * THROWN:
            raise Refused("busy: too many minibatches wait for the training loop", 503)

    def queue(self, name, start, minibatch):
        queue = getattr(self, name)
        with self.changed:
            queue.append((start, minibatch))
            self.rows[name] += len(minibatch.h)
            while name == "waiting" and len(queue) > 2 and self.rows[name] > BACKLOG:
                self.rows[name] -= len(queue.popleft()[1].h)
                self.skipped += 1
            self.replay.add(minibatch.h, minibatch.y)

    def nudge(self):
        """Have next() return at once: a gradient has come back from above."""
        with self.changed:
            self.nudged = True
            self.changed.notify_all()

    def next(self, seconds=0):
        """The next Minibatch, or None if there is none within so many seconds. Diverged if a
        gradient that was thrown has."""
        if error := getattr(self.back, "diverged", None):
            raise error
        with self.changed:
            self.changed.wait_for(lambda: self.nudged or self.due or self.waiting
                                  or self.replay.allowed >= self.batch_size, seconds)
            self.nudged = False
            # what must be answered comes first, unless replay has fallen too far behind
            due = self.due and self.replay.allowed <= (
                max(1, BEHIND * self.replay.replay) * self.batch_size)
            if due or self.waiting:
                name = "due" if due else "waiting"
                start, minibatch = self.due.popleft() if due else self.waiting.pop()
                self.rows[name] -= len(minibatch.h)
                if start == self.replay.newest_start():
                    self.trained = later(self.trained, (start, minibatch.clock))
                elif not due:  # of before a restart of the part below, which wants no gradient now
                    minibatch = minibatch._replace(tell=None)
                return minibatch
            drawn = self.replay.draw(self.batch_size, self.rng)
            return Minibatch(None, *drawn) if drawn else None

    def line(self):
        """What is said of it now and then."""
        return (f"{self.replay.counters()['received']:,} examples received, {self.skipped:,} "
                f"minibatches skipped, {self.sent()['sent']:,} gradients sent")

    def sent(self):
        nothing = {"thrown": 0, "sent": 0, "dropped": 0}
        return nothing if self.back is None else self.back.counters()

    def status(self):
        return {"gradients_sent": self.sent(), "examples": self.replay.counters(),
                "waiting": len(self.due) + len(self.waiting), "skipped": self.skipped,
                "trained": self.trained}


class LowerEnd:
    """What a part calls of the link above it: throw() and gradients().

    above carries the messages: throw(*columns), throw_again(after), guess(h, y), trained(enough),
    true_gradients(*columns), wait(attempt), window and news_seconds. start: a number that another
    start of this part does not have.
    """

    def __init__(self, part, above, start, k, args, rng):
        """k: the width of y. args: the program's options. rng: for what the source draws."""
        self.above, self.start = above, start
        self.bounded = BoundedStaleness(args.staleness, above.wait, above.throw_again, start)
        self.source = SOURCES[args.gradients](self, part, k, args, rng)
        self.thrown = None  # the last minibatch

    def throw(self, i, h, y, clock):
        """To the part above, fire-and-forget: h (batch, width) of the minibatch number `clock`."""
        trace.since_last("forward", clock=clock)
        with trace.span("throw", clock=clock):
            trace.flow_out("examples", clock)
            self.thrown = i, h, y, np.full(len(i), clock), np.full(len(i), self.start)
            self.source.throws(clock)  # first, for its gradient may be back at once
            if not self.source.locked:
                self.above.throw(*self.thrown)

    def gradients(self, h=None, y=None, clock=0, tell=None):
        """(g, tell) of each update that can be made now, see exchange.Source."""
        if h is None and not self.source.takes_back:
            return
        for g, its_tell in self.source.gradients(h, y, clock, tell):
            with trace.span("update", clock=clock):  # until the train function wants the next one
                yield g, its_tell

    def take_back(self, start, clock, waiting, *columns):
        """In a server's thread: columns of a minibatch that was thrown, the last its gradient, if
        it is wanted. waiting: how many the part above has still to train on."""
        if self.source.takes_back:
            self.source.add(start, clock, waiting, columns[-1])

    def status(self):
        return {"bound": self.bounded.bound, **self.bounded.status()}


def check_oracle(needs, staleness, batch_size, num_examples):
    """UserError if an oracle that `needs` so many new examples before it trains again could not get
    them from a part below, which waits for it: then both would wait for ever."""
    whole, rest = divmod(staleness, -(-num_examples // batch_size))
    last = num_examples % batch_size or batch_size  # an epoch's last minibatch may be smaller
    ahead = min(whole * num_examples + (rest and (rest - 1) * batch_size + last),
                max(BACKLOG // batch_size, 2) * batch_size)
    if needs > ahead:
        raise UserError(
            f"the oracle needs {needs} new gradients before it trains again, but only {ahead} come "
            "before this part waits for it (--staleness times --batch-size, or what may wait in "
            "the part above); a larger --replay of oracle.py makes it need fewer")
