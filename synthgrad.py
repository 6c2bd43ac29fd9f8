"""The protocol: what the trainers and the oracle say to each other, as JSON over HTTP.

    process                    endpoint                     takes       gives
    oracle, 5001               POST /estimate_gradients     Question    Guess
                               POST /provide_gradients      Gradients   Accepted
    output or middle, 5002     POST /training_examples      Examples    Accepted
                               POST /true_gradients         Examples    Truth
                               GET  /weights                            Weights
    input or middle, with      POST /provide_gradients      Gradients   Accepted
      --gradients delayed, in
      the oracle's place
    all                        GET  /status                             Status

    i           (batch,) int64           the examples' indices in the training set
    h           (batch, width) float32   activations at the cut
    y           (batch, k) float32       targets: a number, or one-hot over k classes
    gradients   (batch, width) float32   g = dL/dh, or the guess ĝ, one row per example
    clock       (batch,) int64           the number of the minibatch: how many came before it
    start       (batch,) int64           a number that each start of the part below draws anew, so
                                         that what is of before a crash is not taken for new
    newest,     start and clock of the newest minibatch that ĝ was learned from, or that the part
    trained     above was trained on; null if there is none

"below" and "above" are the parts of the network below and above a cut. Thrown means
fire-and-forget: the sender goes on at once, and what cannot be delivered is dropped. A message
holds whole minibatches: rows that follow each other and have the same clock and start.

A request that is wrong is answered 4xx with {"error": "what was wrong, where, and what was
expected"} and changes nothing. The messages are the types below. Unknown fields of a request are
refused. plumbing/wire.py turns arrays into JSON and back.
"""
from itertools import pairwise

import msgspec
import numpy as np

from plumbing import trace
from plumbing.errors import NoAnswer
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


class Truth(msgspec.Struct):
    """The true gradients, from above to below, which has waited for them. The part above has made
    one update with them. If they are lost, the part below asks again and is given the same ones."""
    gradients: Matrix


class Examples(msgspec.Struct, forbid_unknown_fields=True):
    """Thrown from below to above; nobody waits. If they are lost, their minibatches go
    untrained above and unlearned by the oracle. Examples that the part below waits for are thrown
    again, and the part above recognises those that have come before."""
    i: Integers
    h: Matrix
    y: Matrix
    clock: Integers
    start: Integers
    every: bool = False  # none of those that came may be skipped


class Gradients(msgspec.Struct, forbid_unknown_fields=True):
    """Thrown from above to the oracle, or with --gradients delayed to the part below; nobody waits.
    If they are lost, the oracle learns from later ones. The part
    above throws them again when it gets the same Examples again."""
    i: Integers
    h: Matrix
    y: Matrix
    clock: Integers
    start: Integers
    gradients: Matrix
    waiting: int = 0  # minibatches that the part above has not trained on yet, of those it must


class Accepted(msgspec.Struct):
    """The answer to what was thrown: how many examples came, and to Examples the newest minibatch
    that the part above was trained on, start and clock. Only the posting thread waits."""
    accepted: int
    trained: tuple[int, int] | None = None


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
    starts: list[int] = []         # marks of this process, and of those above it that it knows of
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

    def provide_gradients(self, i, h, y, clock, start, gradients, waiting=0):
        """True gradients g at h: for an oracle to learn from, or for the part that threw h."""
        self.ask(Accepted, "POST", "/provide_gradients", encode(
            i=i, h=h, y=y, clock=clock, start=start, gradients=gradients, waiting=waiting))


class OracleClient(ProcessClient):
    """The oracle, as the part below sees it."""
    port = 5001

    def estimate_gradients(self, h, y):
        """ĝ(h), or ĝ(h, y), the synthetic gradients (section 2.1), (batch, width); `newest`."""
        trace.flow_out("question", h)
        answer = self.ask(Guess, "POST", "/estimate_gradients", encode(h=h, y=y), rows=len(h),
                          gradients=h.shape[1])
        trace.flow_in("guess", h)
        return answer


class PartClient(ProcessClient):
    """The part above, as the part below it sees it."""
    port = 5002

    def training_examples(self, i, h, y, clock, start, every=False):
        """Activations to train on. Returns `trained`."""
        _, trained = self.ask(Accepted, "POST", "/training_examples", encode(
            i=i, h=h, y=y, clock=clock, start=start, every=every))
        return trained

    def true_gradients(self, i, h, y, clock, start):
        """g = dL/dh, (batch, width), with which the part above is updated, too: backprop over
        HTTP."""
        return self.ask(Truth, "POST", "/true_gradients", encode(
            i=i, h=h, y=y, clock=clock, start=start), rows=len(h), gradients=h.shape[1])[0]

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
