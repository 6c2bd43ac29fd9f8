"""A part of the network, which one process trains: its layers, its clock, its checkpoint."""
import threading
import time

import numpy as np

from plumbing import runs, say, trace
from plumbing.errors import Diverged, FileError


# of a start without --resume, which has put the checkpoint aside
UNDO = ("stop that trainer, rename the newest checkpoint.N.npz in its --progress-dir to "
        "checkpoint.npz, and start it with --resume")


class Part:
    """Layers, how many minibatches they were trained on, and what a checkpoint holds of them.

    The training loop alone writes to it. Other threads call weights(), and read numbers. folder:
    where the checkpoint is; None: nowhere. same: values that a resumed run must share.
    """

    def __init__(self, layers, folder=None, **same):
        self.layers, self.same = layers, same
        self.besides = []                   # further layers in the checkpoint: a local loss' head
        self.clock, self.average = 0, None  # minibatches; of what the last hundred or so gave
        self.numbers = {}                   # further ones that the checkpoint holds
        self.lock, self.checkpoint = threading.Lock(), folder and runs.Checkpoint(folder)
        self.saved, self.saved_clock = time.monotonic(), 0  # when, and what

    def descend(self, learning_rate, momentum):
        """One update: every layer steps against the gradients that it remembers."""
        with self.lock:  # so that nobody reads half an update
            for layer in self.layers:
                layer.descend(learning_rate, momentum)

    def weights(self):
        """[(w, b), ...], copied, and how many minibatches made them."""
        with self.lock:
            return [(layer.w.copy(), layer.b.copy()) for layer in self.layers], self.clock

    def resume(self, wanted):
        """Continue from the checkpoint if that is `wanted`, else put an earlier run's aside.
        True if there was one to continue from."""
        if not wanted:
            self.checkpoint.put_aside()
            return False
        found = self.checkpoint.resume(self.layers + self.besides, **self.same)
        self.clock = self.saved_clock = found.pop("updates", 0)
        self.average = found.pop("average", None)
        self.numbers.update(found)
        return self.clock > 0 or bool(found)

    def save(self):
        """FileError if the disk is full, Diverged if the weights are not finite: then the last
        checkpoint is kept."""
        average = {} if self.average is None else {"average": self.average}
        self.checkpoint.save(self.layers + self.besides, updates=self.clock, **self.same,
                             **self.numbers, **average)
        self.saved_clock = self.clock

    def try_to_save(self):
        """If there was an update. A checkpoint that cannot be written is reported."""
        self.saved = time.monotonic()
        if self.clock != self.saved_clock:
            try:
                self.save()
            except FileError as error:
                say(f"no checkpoint: {error}; training goes on")

    def minibatches(self, arrivals, stop, seconds, reporter):
        """What arrivals.next() gives until `stop`, None where it gives nothing. In between, a
        checkpoint every so many seconds, and a line now and then."""
        while not stop:
            minibatch = arrivals.next(0.2)
            if time.monotonic() - self.saved > seconds:
                self.try_to_save()
            if minibatch is None:
                yield None
                continue
            clock = minibatch.clock
            with trace.span("replay" if clock is None else "minibatch", clock=clock):
                if clock is not None:
                    trace.flow_in("examples", clock)
                yield minibatch  # until the train function wants the next one
            reporter.now_and_then(self.clock)

    def train(self, values, what):
        """Run a train() generator to its end, with a checkpoint at the end whatever ends it."""
        try:
            with np.errstate(all="ignore"):
                for value in map(float, values):
                    if not np.isfinite(value):
                        raise Diverged(f"{what} diverged; try a lower --learning-rate")
                    old = value if self.average is None else self.average
                    self.average = old + 0.01 * (value - old)  # over the last hundred or so
        except Diverged:
            self.saved_clock = self.clock  # keep the last checkpoint, from before
            raise
        finally:
            self.try_to_save()
