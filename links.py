"""The two ends of a link, over HTTP: where the algorithm meets the protocol.

A link joins two neighbouring parts of the network and an oracle. Activations go up, true gradients
go to the oracle, guesses come down. train_input.py has a LowerEnd, train_output.py an UpperEnd, and
train_middle.py one of each. exchange.py has the algorithm of each end; this file connects it to
synthgrad.py's messages.

Threads: the training loop alone writes to weights, velocities and checkpoints. Servers' threads add
to Arrivals, Replay, Delayed.returned and `answers`, have an Outbox throw again, and read copies of
the weights. A Poster's thread empties its Outbox. An array that was thrown or published is not
written to any more.

    queue                   holds at most                      beyond that
    Outbox, going up        4 · staleness minibatches,
                            at most THROWN examples            the oldest is dropped, and counted
    Outbox, to the oracle   the part's --keep examples,
                            at most THROWN                     the oldest is dropped, and counted
    Outbox.kept             as its queue                       the oldest is not thrown again
    Arrivals.waiting        BACKLOG examples, or 2 minibatches the oldest is left to replay, counted
    Arrivals.questions      2 · THREADS                        503, so that it is asked again
    Replay                  --keep examples                    the oldest is forgotten
    Delayed.returned        2 · staleness minibatches          the oldest is dropped
    requests                CONNECTIONS, THREADS, MAX_BODY     not accepted; waits; 413

    wait                    ends with
    for another process     an answer, a refusal (4xx), a stop request, or --patience, see
                            serving.until_answered. One try ends after 10 s without a byte
    for a newer guess       the same. Meanwhile minibatches are thrown again every THROW_AGAIN s
    for minibatches         news, or 0.2 s; then the loop checks whether to stop
    for the training loop   its answer to a question, or 8 s: 503, so that it is asked again
    for weights, by a       one try; then 503, so that it is asked again
    middle part
    of a Poster             something thrown, or the end; then PAUSE, or TRY_AGAIN after a failure
    at the end              a Poster gets 5 s for what still waits
"""
import concurrent.futures
import threading
import time
from functools import partial

import flask
import numpy as np

from exchange import Arrivals, BoundedStaleness, Replay
from plumbing import runs, say, serving
from plumbing.posting import Outbox, Poster
from plumbing.errors import Diverged, NoAnswer, Refused, UserError
from plumbing.wire import encode, rows_per_message
from synthgrad import Examples, OracleClient, PartClient, Question, encode_weights

THROWN = 20_000  # examples that an Outbox holds at most


class LowerEnd:
    """The lower end of a link: what a part needs of the part and the oracle above it.

    delayed_answer(i, h, y, clock) takes the oracle's place with --gradients delayed.
    """

    def __init__(self, args, stop, delayed_answer=None):
        self.args, self.width = args, args.layers[-1]
        self.oracle = OracleClient(args.oracle_server, args.token)
        self.above, thrower = (PartClient(args.output_server, args.token) for _ in range(2))
        self.name = f"the part above at {self.above.url}"
        self.oracle_name = f"the oracle at {self.oracle.url}"
        self.from_above, self.from_oracle = (
            partial(serving.until_answered, who=who, stop=stop, patience=args.patience)
            for who in (self.name, self.oracle_name))
        self.outbox = Outbox(min(4 * args.staleness * args.batch_size, THROWN), per_message=1)
        self.poster = Poster(self.outbox, thrower.training_examples, self.name)
        self.bounded = BoundedStaleness(
            delayed_answer or self.ask_oracle, args.staleness,
            self.from_above if delayed_answer else self.from_oracle, self.outbox.throw_again)
        self.network = self.ids = ()  # widths and processes above the cut, once connected
        self.has_oracle = args.gradients not in ("true", "delayed")

    def ask_oracle(self, i, h, y, clock):
        return self.oracle.estimate_gradients(h, y)

    def ask_above(self, i, h, y, clock):
        return self.from_above(lambda: self.above.true_gradients(h, y))

    def throw(self, i, h, y, clock):
        if self.args.gradients != "true":  # there the question brings them
            self.outbox.throw(i, h, y, np.full(len(i), clock))

    def connect(self, new, k=None):
        """Wait for the part and the oracle above, check that they fit, and unless this is a resumed
        run that they are `new`, too. k is the width of y; a middle part learns it here."""
        def complete():
            status = self.above.status()
            serving.check_partner(status, self.width, k, self.name)
            if status.network is None:
                raise NoAnswer("it is waiting for the part above it")
            return status
        above = self.from_above(complete)
        self.network, self.ids = above.network, above.ids
        k = k or self.network[-1]
        serving.check_batch(self.args.batch_size, self.width, k)
        self.outbox.per_message = rows_per_message(self.width + k)
        partners = {self.name: above}
        if self.has_oracle:
            oracle = partners[self.oracle_name] = self.from_oracle(self.oracle.status)
            serving.check_partner(oracle, self.width, k, self.oracle_name)
            ahead = min(self.args.staleness * self.args.batch_size, above.backlog)
            if oracle.needs > ahead:
                raise UserError(
                    f"the oracle needs {oracle.needs} new gradients before it trains again, but "
                    f"only {ahead} come before this part waits for it (--staleness times "
                    "--batch-size, or the backlog of the part above); a larger --replay of "
                    "oracle.py makes it need fewer")
        if new:
            serving.check_unused(partners)

    def status(self):
        return {"gradients": self.args.gradients, "bound": self.args.staleness,
                "examples_sent": self.outbox.counters(), **self.bounded.status()}


class UpperEnd:
    """The upper end of a link: what a part does for the part below it.

    It takes activations, trains on them in a loop, and throws the true gradients at the link's
    oracle. Servers' threads run what routes() defines, locked_update() and status(). All else
    belongs to the training loop.
    """

    def __init__(self, args, part, rng, oracle_server, replay=0):
        self.args, self.part, self.network = args, part, None
        self.arrivals = Arrivals(Replay(args.keep, replay), args.batch_size, rng)
        self.oracle = oracle = OracleClient(oracle_server, args.token)
        self.outbox = Outbox(min(args.keep, THROWN), per_message=1)
        self.poster = Poster(self.outbox, oracle.provide_gradients, f"the oracle at {oracle.url}")
        self.checkpoint, self.loss = runs.Checkpoint(args.progress_dir), None
        self.resumed = False  # from a checkpoint
        self.answers, self.asking = {}, threading.Lock()
        self.saved, self.saved_updates, self.reporter = time.monotonic(), 0, serving.Reporter()

    def open(self, network):
        """Take activations from now on. network: the widths of this part and of all above it."""
        serving.check_batch(self.args.batch_size, network[0], network[-1])
        self.outbox.per_message = rows_per_message(2 * network[0] + network[-1])
        self.network = network

    def resume(self):
        """Continue from the checkpoint if --resume is given, else put an earlier run's aside."""
        if self.args.resume:
            numbers = self.checkpoint.resume(self.part.layers)
            self.resumed = bool(numbers)
            self.part.updates = self.saved_updates = numbers.get("updates", 0)
            self.loss = numbers.get("loss")
        else:
            self.checkpoint.put_aside()

    def routes(self, app, weights_above):
        """weights_above() -> [(w, b), ...] of all parts above this one, and each one's updates."""
        def widths():
            if self.network is None:
                raise Refused("still waiting for the part above", 503)
            return {"h": self.network[0], "y": self.network[-1]}

        @app.post("/training_examples")
        def training_examples():
            columns = serving.message(Examples, **widths())
            self.arrivals.add(*columns, tell=self.outbox.throw, again=self.outbox.throw_again)
            return {"accepted": len(columns[0])}

        @app.post("/true_gradients")
        def true_gradients():
            gradients = self.locked_update(*serving.message(Question, **widths()))
            return serving.as_json(encode(flask.g.values, gradients=gradients))

        @app.get("/weights")
        def get_weights():
            widths()
            (mine, updates), (theirs, their_updates) = self.part.weights(), weights_above()
            return serving.as_json(encode_weights(mine + theirs, [updates, *their_updates]))

    def locked_update(self, h, y, seconds=8):
        """g at h, after one update there. A question that is asked again gets the same answer."""
        question = h.tobytes(), y.tobytes()
        with self.asking:
            if question not in self.answers:
                if len(self.arrivals.questions) >= 2 * serving.THREADS:
                    raise Refused("busy: too many questions wait for the training loop", 503)
                self.answers[question] = concurrent.futures.Future()
                self.arrivals.add_question(h, y, self.answers[question].set_result)
            answer = self.answers[question]
            while len(self.answers) > 2 * serving.THREADS:  # more than can be asked at a time
                del self.answers[next(iter(self.answers))]
        try:
            return answer.result(seconds)
        except concurrent.futures.TimeoutError:
            raise Refused(f"busy: the training loop took over {seconds} s", 503) from None

    def minibatches(self, stop):
        """What to train on until `stop`; in between, checkpoints and a line now and then."""
        while not stop:
            if minibatch := self.arrivals.next(seconds=0.2):
                yield minibatch
            if time.monotonic() - self.saved > self.args.checkpoint_seconds:
                self.save()
            self.reporter.now_and_then(self.part.updates, self.report)

    def follow(self, losses, what):
        """Run a train() generator to its end, with a checkpoint at the end whatever ends it."""
        try:
            with np.errstate(all="ignore"):
                for value in map(float, losses):
                    if not np.isfinite(value):
                        raise Diverged(f"{what} diverged; try a lower --learning-rate")
                    old = value if self.loss is None else self.loss
                    self.loss = old + 0.01 * (value - old)  # over the last hundred or so
        except FloatingPointError:
            self.saved_updates = self.part.updates  # keep the last checkpoint, from before
            raise
        finally:
            self.save()
            self.poster.close(timeout=5)

    def save(self, always=False):
        """A checkpoint, if there was an update. One that cannot be written is reported."""
        self.saved = time.monotonic()
        if always or self.part.updates != self.saved_updates:
            loss = {} if self.loss is None else {"loss": self.loss}
            try:
                self.checkpoint.save(self.part.layers, updates=self.part.updates, **loss)
                self.saved_updates = self.part.updates
            except OSError as error:
                say(f"no checkpoint: {error}; training goes on")

    def report(self):
        return (f"{self.arrivals.replay.counters()['received']:,} examples received, "
                f"{self.part.updates:,} updates, {self.outbox.counters()['sent']:,} gradients sent")

    def status(self):
        return {"layers": self.args.layers, "updates": self.part.updates, "loss": self.loss,
                "backlog": self.arrivals.backlog, "examples": self.arrivals.replay.counters(),
                "waiting": len(self.arrivals.waiting), "skipped": self.arrivals.skipped,
                "network": self.network, "gradients_sent": self.outbox.counters()}
