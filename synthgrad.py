"""The protocol: what the trainers and the oracle say to each other, as JSON over HTTP.

    process                    endpoint                     takes       gives
    oracle, 5001               POST /estimate_gradients     Question    Guess
                               POST /provide_gradients      Gradients   Accepted
    output or middle, 5002     POST /training_examples      Examples    Accepted
                               GET  /weights                            Weights
    input or middle, with      POST /provide_gradients      Gradients   Accepted
      --gradients true or
      delayed: in the
      oracle's place
    all                        GET  /status                             Status

    i           (batch,) int64           the examples' indices in the training set
    h           (batch, width) float32   activations at the cut
    y           (batch, k) float32       targets: a number, or one-hot over k classes
    gradients   (batch, width) float32   g = dL/dh, or the guess ĝ, one row per example
    clock       (batch,) int64           the number of the minibatch: how many came before it
    start       (batch,) int64           a number that each start of the part below draws anew, so
                                         that what is of before a crash is not taken for new
    newest      start and clock of the newest minibatch that ĝ was learned from, or that the part
                above was trained on; null if there is none

"below" and "above" are the parts of the network below and above a cut. Thrown means
fire-and-forget: the sender goes on at once, and what cannot be delivered is dropped. A message
holds whole minibatches: rows that follow each other and have the same clock and start.

A request that is wrong is answered 4xx with {"error": "what was wrong, where, and what was
expected"} and changes nothing. The messages are the types below. Unknown fields of a request are
refused. plumbing/wire.py turns arrays into JSON and back.
"""
import getpass
from functools import partial
from itertools import pairwise

import msgspec
import numpy as np

from exchange import SOURCES
from links import check_oracle, minibatches_of
from plumbing import process, serving
from plumbing.errors import NoAnswer, Refused, UserError
from plumbing.posting import THROWN, Outbox, Poster
from plumbing.wire import (Client, Integers, Malformed, Matrix, Vector, encode, json_to_ndarray,
                           ndarray_to_json)


class Question(msgspec.Struct, forbid_unknown_fields=True):
    """From below to the oracle. The part below waits for the answer. A question that is lost is
    asked again."""
    h: Matrix
    y: Matrix


class Guess(msgspec.Struct):
    """From the oracle to the part below, which has waited for it. If it is lost, the part below
    asks again. It also asks again if `newest` is too old."""
    gradients: Matrix
    newest: tuple[int, int] | None


class Examples(msgspec.Struct, forbid_unknown_fields=True):
    """Thrown from below to above; nobody waits. If they are lost, their minibatches go
    untrained above and unlearned by the oracle. Examples that the part below waits for are thrown
    again, and the part above recognises those that have come before."""
    i: Integers
    h: Matrix
    y: Matrix
    clock: Integers
    start: Integers
    every: bool = False  # none may be skipped, because the part below waits for each gradient


class Gradients(msgspec.Struct, forbid_unknown_fields=True):
    """Thrown from above to the oracle, or with --gradients true or delayed to the part below;
    nobody waits for the delivery. If they are lost, the oracle learns from later ones. The part
    above throws them again when it gets the same Examples again."""
    i: Integers
    h: Matrix
    y: Matrix
    clock: Integers
    start: Integers
    gradients: Matrix


class Accepted(msgspec.Struct):
    """The answer to what was thrown: how many examples came. Only the posting thread waits."""
    accepted: int


class LayerWeights(msgspec.Struct):
    w: Matrix
    b: Vector


class Weights(msgspec.Struct):
    """The answer of the part above, for which the part below waits: the layers of that part and of
    all above it, and how many updates each of these parts has made. If it is lost, the part below
    asks again."""
    layers: list[LayerWeights]
    updates: list[int]


class Status(msgspec.Struct):
    """What a process must know of another one before a run; each process says more of itself."""
    process: str                   # what it is
    layers: list[int]              # its own widths
    updates: int                   # a trainer's minibatches, an oracle's steps
    condition_on_labels: int = 0   # oracle: the width of y that it sees
    needs: int = 0                 # oracle: examples that must arrive before it trains again
    network: list[int] | None = None  # output, middle: widths of this part and all above it
    trained: tuple[int, int] | None = None  # output, middle: the newest minibatch, start and clock
    ids: list[str] = []            # of this process, and of those above it that it knows of
    user: str = ""                 # who started it


def encode_weights(weights, updates):
    """[(w, b), ...] of some layers, and how many updates each part of them has made, as bytes."""
    return msgspec.json.encode({"updates": updates, "layers": [
        {"w": ndarray_to_json(w), "b": ndarray_to_json(b)} for w, b in weights]})


# ---- clients: what one process asks of another ----


class ProcessClient(Client):
    """Any of the processes."""

    def status(self):
        """What the server says of itself: a Status."""
        return Status(*self.ask(Status, "GET", "/status"))

    def provide_gradients(self, i, h, y, clock, start, gradients):
        """True gradients g at h: for an oracle to learn from, or for the part that threw h."""
        self.ask(Accepted, "POST", "/provide_gradients", encode(
            i=i, h=h, y=y, clock=clock, start=start, gradients=gradients))


class OracleClient(ProcessClient):
    """The oracle, as the part below sees it."""
    port = 5001

    def estimate_gradients(self, h, y):
        """ĝ(h), or ĝ(h, y), the synthetic gradients (section 2.1), (batch, width); `newest`."""
        return self.ask(Guess, "POST", "/estimate_gradients", encode(h=h, y=y), rows=len(h),
                        gradients=h.shape[1])


class PartClient(ProcessClient):
    """The part above, as the part below it sees it."""
    port = 5002

    def training_examples(self, i, h, y, clock, start, every=False):
        """Activations to train on."""
        self.ask(Accepted, "POST", "/training_examples", encode(
            i=i, h=h, y=y, clock=clock, start=start, every=every))

    def weights(self, dims):
        """[(w, b), ...] of the part and all above it, which must be finite and have the widths
        `dims`, and how many updates each part has made."""
        layers, updates = self.ask(Weights, "GET", "/weights")
        try:
            weights = [(json_to_ndarray(each.w), json_to_ndarray(each.b)) for each in layers]
        except Malformed as error:
            raise NoAnswer(f"{self.url}/weights: {error}") from None
        shapes = [(w.shape, b.shape) for w, b in weights]
        finite = all(np.isfinite(array).all() for pair in weights for array in pair)
        if shapes != [(shape, shape[1:]) for shape in pairwise(dims)] or not finite:
            raise NoAnswer(f"{self.url}/weights: not finite, or not of layers of the widths {dims}")
        return weights, updates


# ---- endpoints: what a process answers, besides its status ----


def serve_gradients(app, width, k, add):
    """POST /provide_gradients. add(start, clock, (i, h, y, clock, start, g)) gets each minibatch.
    k() is the width of y, None where any will do."""
    @app.post("/provide_gradients")
    def provide_gradients():
        *columns, g = serving.message(Gradients, h=width, gradients=width, y=k())
        for start, clock, rows in minibatches_of(*columns[3:], *columns, g):
            add(start, clock, *rows)
        return {"accepted": len(g)}


def serve_part(app, arrivals, network, weights):
    """What a part answers the part below it. network(): the widths of this part and of all above
    it, or None while they are not known. weights(): the arguments of encode_weights()."""
    def widths():
        if network() is None:
            raise Refused("still waiting for the part above", 503)
        return {"h": network()[0], "y": network()[-1]}

    @app.post("/training_examples")
    def training_examples():
        columns = serving.message(Examples, **widths())
        arrivals.add(*columns)
        return {"accepted": len(columns[0])}

    @app.get("/weights")
    def get_weights():
        widths()
        return serving.as_json(encode_weights(*weights()))


def post_gradients(server, token):
    """A Poster of gradients at an oracle, or at the part below; None for "none"."""
    if server == "none":
        return None
    client = OracleClient(server, token)
    return Poster(Outbox(), client.provide_gradients, f"the process at {client.url}")


# ---- the part and the oracle above: what links.LowerEnd needs to be carried ----


class Above:
    """The part and the oracle above a cut, over HTTP. It is created before they answer.

    throw, throw_again, guess, trained, wait and news_seconds are what links.LowerEnd calls.
    """
    news_seconds = 0.2  # that one try waits for a gradient, so that a stop request is noticed

    def __init__(self, args, stop):
        self.args, self.stop, self.source = args, stop, SOURCES[args.gradients]
        self.part, thrower = (PartClient(args.output_server, args.token) for _ in range(2))
        self.oracle = OracleClient(args.oracle_server, args.token)
        self.name = f"the part above at {self.part.url}"
        self.oracle_name = f"the oracle at {self.oracle.url}"
        self.network, self.ids = None, []  # widths and processes above the cut, once they are known
        self.outbox = Outbox()
        self.poster = Poster(self.outbox, partial(
            thrower.training_examples, every=self.source.takes_back), self.name)
        self.throw, self.throw_again = self.outbox.throw, self.outbox.throw_again
        self.guess = self.oracle.estimate_gradients

    def until_answered(self, call, who):
        return process.until_answered(call, who, self.stop, self.args.patience)

    def wait(self, attempt):
        return self.until_answered(
            attempt, self.oracle_name if self.source.asks_oracle else self.name)

    def trained(self):
        return self.part.status().trained

    def weights(self):
        """The arguments of encode_weights() for all parts above."""
        return self.until_answered(lambda: self.part.weights(self.network), self.name)

    def connect(self, k=None, num_examples=2**53):
        """Wait for the part and the oracle above, and check that they fit. k is the width of y; a
        middle part learns it here. Returns k."""
        args, width = self.args, self.args.layers[-1]

        def complete():
            status = self.part.status()
            self.ids = status.ids
            check_partner(status, ("output trainer", "middle trainer"), width, k, self.name)
            if status.network is None:
                raise NoAnswer("it is waiting for the part above it")
            return status
        above = self.until_answered(complete, self.name)
        k, batch_size = k or above.network[-1], min(args.batch_size, num_examples)
        serving.check_batch(batch_size, width, k)
        self.partners = {self.name: above}
        if self.source.asks_oracle:
            oracle = self.until_answered(self.oracle.status, self.oracle_name)
            check_partner(oracle, ("oracle",), width, k, self.oracle_name)
            check_oracle(oracle.needs, args.staleness, batch_size, num_examples)
            self.partners[self.oracle_name] = oracle
        if self.source.takes_back and args.staleness * batch_size > THROWN:
            raise UserError(f"--staleness times --batch-size must be at most {THROWN} with "
                            f"--gradients {args.gradients}: so many examples can be on their way")
        self.network = above.network
        return k

    def check_use(self, resumed, part):
        """UserError if this is a new run and the others are not, or the other way round. part
        remembers in its checkpoint how far the part above was."""
        used = [f"{name} (at {each.updates} updates)" for name, each in self.partners.items()
                if each.updates]
        if used and not resumed:
            raise UserError(f"{' and '.join(used)} took part in an earlier run, or in one that goes"
                            " on: restart what is named, or continue that run with --resume")
        before, now = part.numbers.get("above", 0), self.partners[self.name].updates
        if before and not now:
            raise UserError(f"{self.name} is as drawn, but had made {before} updates when this "
                            "part's checkpoint was written: start it with --resume, too")
        part.numbers["above"] = now


def check_partner(status, kinds, width, k, name):
    """UserError unless the status is that of one of these kinds of processes, and fits a cut of
    `width` and y of `k`. UserError, too, if this process is above that one."""
    ours = getpass.getuser() if "127.0.0.1" in name else status.user
    if status.process not in kinds:
        raise UserError(f"{name} is not one: the process there is an {status.process}. "
                        "--output-server names the part above, --oracle-server its oracle")
    if status.user != ours:
        raise UserError(f"{name} was started by {status.user}, not by you: choose other ports, with"
                        " --port, --oracle-server and --output-server, or --first-port of make run")
    if serving.ID in status.ids:
        raise UserError(f"{name} has this process above it: the parts form a cycle. "
                        "--output-server is the address of the next part towards the output")
    if status.layers[0] != width:
        raise UserError(f"the --layers of {name} begin with {status.layers[0]}, ours end "
                        f"with {width}")
    if status.condition_on_labels not in (0, k or status.condition_on_labels):
        raise UserError(f"{name} was started with --condition-on-labels "
                        f"{status.condition_on_labels}; y has a width of {k}")
