"""Fire-and-forget: what is thrown at another process, and the thread that posts it."""
import collections
import threading

import numpy as np

from plumbing import say
from plumbing.errors import Diverged

THROWN = 25_000  # examples that an Outbox holds at most; 21 minibatches of 1,000 fit
MAX_BYTES = 2**22  # of arrays in a message, and one minibatch more
PAUSE = 0.008    # seconds between posts: what is thrown meanwhile shares one request
TRY_AGAIN = 0.5  # seconds until a post that failed is followed by the next one


class Newest(collections.deque):
    """Minibatches, (clock, columns): the newest that have at most `max_rows` examples together, and
    always the last one."""

    def __init__(self, max_rows):
        self.max_rows, self.rows = max_rows, 0

    def append(self, clock, columns):
        """Returns how many examples were dropped for it."""
        super().append((clock, columns))
        self.rows += len(columns[0])
        dropped = 0
        while self.rows > self.max_rows and len(self) > 1:
            dropped += len(self.popleft()[0])
        return dropped

    def popleft(self):
        """The columns of the oldest minibatch."""
        _, columns = super().popleft()
        self.rows -= len(columns[0])
        return columns


class Outbox:
    """What was thrown at another process, fire-and-forget: nobody waits for it to be posted.

    The queue holds at most `max_rows` examples; beyond that the oldest are dropped. What cannot be
    delivered is dropped too. thrown = sent + dropped + what waits or is on its way. A thread of its
    own takes messages of at most MAX_BYTES from here, see Poster. Once something that was thrown
    has diverged, throwing raises Diverged, so that the training loop ends.
    """

    def __init__(self, max_rows=THROWN):
        self.queue, self.kept = Newest(max_rows), Newest(max_rows)  # kept: to throw again
        self.changed, self.closing = threading.Condition(), False
        self.thrown = self.sent = self.dropped = 0
        self.start, self.diverged = None, None  # of what is kept; the error

    def throw(self, i, h, y, clock, start, *g):
        """A minibatch, with its gradient if that is known. Nobody may write to it any more."""
        with self.changed:
            if self.start != start[0]:  # nobody waits for what is of before a restart
                self.kept, self.start = Newest(self.kept.max_rows), start[0]
            self._append(int(clock[0]), (i, h, y, clock, start, *g))
            self.kept.append(int(clock[0]), (i, h, y, clock, start, *g))

    def throw_again(self, after):
        """Throw once more what is newer than the clock `after`, and does not wait here."""
        with self.changed:
            waiting = {id(columns[0]) for _, columns in self.queue}
            for clock, columns in self.kept:
                if clock > after and id(columns[0]) not in waiting:
                    self._append(clock, columns)

    def _append(self, clock, columns):
        if self.diverged:
            raise self.diverged
        self.thrown += len(columns[0])
        self.dropped += self.queue.append(clock, columns)
        self.changed.notify()

    def next_message(self):
        """Waits for minibatches and takes the oldest that fit into a message, at least one.

        Returns its columns; None when the outbox is closed and empty.
        """
        with self.changed:
            self.changed.wait_for(lambda: self.queue or self.closing)
            taken, size = [], 0
            while self.queue and (not taken or size < MAX_BYTES):
                taken.append(self.queue.popleft())
                size += sum(column.nbytes for column in taken[-1])
        return [np.concatenate(column) for column in zip(*taken, strict=True)] or None

    def counters(self):
        with self.changed:
            return {"thrown": self.thrown, "sent": self.sent, "dropped": self.dropped}


class Poster:
    """Posts an outbox's messages until it is closed. `to` names the receiver in what is printed."""

    def __init__(self, outbox, post, to):
        self.outbox, self.post, self.to = outbox, post, to
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        outbox, reachable = self.outbox, True
        while columns := outbox.next_message():
            try:
                self.post(*columns)
                delivered = True
            except Diverged as error:
                outbox.diverged = error
                return
            except Exception as error:  # whatever it is, it is reported, and the thread goes on
                delivered = False
                if reachable:
                    say(f"{self.to} does not take what is sent to it ({error}); messages are "
                        "dropped until it does")
            if delivered and not reachable:
                say(f"{self.to} takes messages again")
            reachable, rows = delivered, len(columns[0])
            with outbox.changed:
                outbox.sent += rows * delivered
                outbox.dropped += rows * (not delivered)
                outbox.changed.wait_for(lambda: outbox.closing, PAUSE if delivered else TRY_AGAIN)
                if outbox.closing and not delivered:
                    return

    def close(self, timeout):
        """Post what still waits, for at most `timeout` seconds."""
        with self.outbox.changed:
            self.outbox.closing = True
            self.outbox.changed.notify_all()
        self.thread.join(timeout)
