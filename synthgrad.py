"""The protocol: what train_input.py, train_output.py and oracle.py say to each other, as JSON over HTTP.

    process        endpoint                     takes       gives
    oracle, 5001   POST /estimate_gradients     Question    Guess        ĝ at once, and what it was learned from
                   POST /provide_gradients      Gradients   Accepted     true gradients, thrown by the output trainer
    output, 5002   POST /training_examples      Examples    Accepted     activations, thrown by the input trainer
                   POST /true_gradients         Question    Truth        g, with which one update was made
                   GET  /weights                            Weights      the output half
    input, 5003    GET  /weights                            Weights      the input half
    all three      GET  /status                             Status       widths, updates, counters, losses

    i           (batch,) int64           the examples' indices in the training set
    h           (batch, width) float32   activations at the cut
    y           (batch, k) float32       targets: a number, or one-hot over k classes
    gradients   (batch, width) float32   g = dL/dh, or the guess ĝ, one row per example
    clock       (batch,) int64           how many updates layer 1 had made when it computed h
    learned     a number or null         the newest clock among the true gradients that the guess was learned from

A request that is wrong is answered 4xx with {"error": "what was wrong, where, and what was expected"} and changes
nothing. The messages are the types below; unknown fields of a request are refused.
"""
import base64
from itertools import pairwise
from typing import Annotated, Generic, Literal, TypeVar

import msgspec
import numpy as np
import requests
from msgspec import UNSET, UnsetType
from urllib3.util import parse_url

MAX_BODY = 2**25        # bytes of a request; what was thrown is put together into messages of half of that
MAX_VALUES = 2**20      # bytes of an array that is spelled out in "values", which is for people
MAX_MAGNITUDE = 1e6     # activations and gradients are small numbers; larger ones would only overflow later
MAX_INTEGER = 2**53     # of an index or a clock

# ---- arrays ----

Shape, DType = TypeVar("Shape"), TypeVar("DType")
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class Array(msgspec.Struct, Generic[Shape, DType], forbid_unknown_fields=True):
    """{"shape": [100, 24], "dtype": "float32", "base64": "..."}, little-endian, C order; or, for people with curl,
    {"shape": [2, 2], "values": [1, 2, 3, 4]}. `values` stays text here, so that no malformed one can cost memory."""
    shape: Shape
    dtype: DType | UnsetType = UNSET
    base64: bytes | UnsetType = UNSET
    values: msgspec.Raw | UnsetType = UNSET


Vector = Array[tuple[Count], Literal["float32"]]
Matrix = Array[tuple[Count, Count], Literal["float32"]]
Integers = Array[tuple[Count], Literal["int64"]]
AnyArray = Array[Annotated[list[Count], msgspec.Meta(max_length=8)], Literal["float32", "float64", "int32", "int64"]]


def ndarray_to_json(array):
    """An array of any shape -> a dict that json.dumps takes, as Array describes it."""
    array = np.asarray(array)
    little_endian = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return {"shape": list(array.shape), "dtype": array.dtype.name, "base64": base64.b64encode(little_endian).decode()}


def json_to_ndarray(message, dtype="float32"):
    """The inverse: a dict or an Array -> an array; `dtype` is that of `values` without one. Raises Malformed."""
    try:
        if isinstance(message, dict):
            message = msgspec.json.decode(msgspec.json.encode(message), type=AnyArray)
        dtype = np.dtype(message.dtype or dtype)
        if (message.base64 is UNSET) == (message.values is UNSET):
            raise ValueError('expected either "base64" or "values"')
        if message.values is UNSET:
            flat = np.frombuffer(bytearray(message.base64), dtype.newbyteorder("<")).astype(dtype, copy=False)
        elif len(message.values) > MAX_VALUES:
            raise ValueError(f'at most {MAX_VALUES} bytes of "values"; "base64" may be longer')
        else:
            flat = np.array(msgspec.json.decode(message.values, type=list[int if dtype.kind == "i" else float]), dtype)
        return flat.reshape(message.shape)
    except (msgspec.DecodeError, ValueError, OverflowError, TypeError, RecursionError) as error:
        raise Malformed(str(error)) from None


# ---- messages ----

class Question(msgspec.Struct, forbid_unknown_fields=True):
    h: Matrix
    y: Matrix


class Guess(msgspec.Struct):
    gradients: Matrix
    learned: int | None


class Truth(msgspec.Struct):
    gradients: Matrix


class Examples(msgspec.Struct, forbid_unknown_fields=True):
    i: Integers
    h: Matrix
    y: Matrix
    clock: Integers


class Gradients(Examples):
    gradients: Matrix


class Accepted(msgspec.Struct):
    accepted: int


class LayerWeights(msgspec.Struct):
    w: Matrix
    b: Vector


class Weights(msgspec.Struct):
    layers: list[LayerWeights]
    updates: int


class Status(msgspec.Struct):
    """What the others need to know; each process says more."""
    layers: list[int]
    updates: int
    condition_on_labels: int = 0   # the width of y that an oracle sees
    needs: int = 0                 # examples that must arrive before an oracle trains again


class Malformed(ValueError):
    """A message is not what it must be; says where, and what was expected. A server answers it with 400."""


class Refused(Exception):
    """Raised in a server, it answers so, with `status`; in a client, it was answered so, 4xx."""

    def __init__(self, message, status):
        super().__init__(message)
        self.status = status


class NoAnswer(ConnectionError):
    """The server cannot be reached, or broke off, or was too slow, or answered rubbish, or what is too old to be of use.

    Asking again may help.
    """


def encode(**fields):
    """A message as bytes. What decode() would not take for its magnitude is never sent: raises FloatingPointError."""
    for name, value in fields.items():
        if isinstance(value, np.ndarray):
            if value.dtype.kind == "f" and not (np.abs(value) <= MAX_MAGNITUDE).all():  # NaN is not, either
                raise FloatingPointError(f"{name} is not finite, or beyond {MAX_MAGNITUDE:g}: diverged; try a lower --learning-rate")
            fields[name] = ndarray_to_json(value)
    return msgspec.json.encode(fields)


def encode_weights(weights, updates):
    """[(w, b), ...] of some layers, and how many updates made them, as bytes: Weights."""
    return msgspec.json.encode({"updates": updates, "layers": [
        {"w": ndarray_to_json(w), "b": ndarray_to_json(b)} for w, b in weights]})


def decode(body, kind, rows=None, **widths):
    """The bytes of a message -> its fields in order, arrays as arrays. Raises Malformed, naming the field.

    `widths` are those that matrices must have, such as h=24. All arrays must have the same number of rows, `rows` if
    it is given and at least one, and hold finite numbers of sane magnitudes.
    """
    try:
        message = msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise Malformed(f"{error}; expected {kind.__name__}: an object of {', '.join(kind.__struct_fields__)}") from None
    fields = []
    for name in kind.__struct_fields__:
        value = getattr(message, name)
        if isinstance(value, Array):
            integers = name in ("i", "clock")
            try:
                value = json_to_ndarray(value, "int64" if integers else "float32")
            except Malformed as error:
                raise Malformed(f"{error} - at `$.{name}`") from None
            rows = len(value) if rows is None else rows
            wanted = (rows, widths.get(name, value.shape[1])) if value.ndim == 2 else (rows,)
            if value.shape != wanted or not rows:
                raise Malformed(f"Expected shape {wanted}, at least one row, got {value.shape} - at `$.{name}`")
            low, high = (0, MAX_INTEGER) if integers else (-MAX_MAGNITUDE, MAX_MAGNITUDE)
            if value.size and not (value.min() >= low and value.max() <= high):  # NaN fails both
                raise Malformed(f"Expected finite numbers from {low:g} to {high:g} - at `$.{name}`")
        fields.append(value)
    return fields


def rows_per_message(width):
    """How many examples of `width` floats fit: base64 takes 16/3 bytes for a float, i and clock as much as 4 floats."""
    return max(1, MAX_BODY // 2 // (6 * (width + 4)))


# ---- clients ----

class Client:
    """Speaks to one server over kept connections. Belongs to one thread. Waits `timeout` seconds for the next bytes.

    All its methods raise Refused, if the server answers 4xx, or NoAnswer.
    """
    port = None

    def __init__(self, server, token=None, timeout=10):
        try:
            address = parse_url(server if "//" in server else f"http://{server}")
            if address.scheme != "http" or not address.host or not (address.port or self.port):
                raise ValueError
        except ValueError:
            raise ValueError(f"{server}: expected a server's address like 127.0.0.1:{self.port or 5003}") from None
        self.url, self.timeout = f"http://{address.host}:{address.port or self.port}", timeout
        self.session = requests.Session()
        self.session.trust_env = False  # no proxy from the environment between these processes
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})

    def call(self, method, path, body=None):
        """The bytes that are answered.

        Prepared without the session's part in it, which is to merge headers and cookies: that would take 0.3 of 1.4 ms.
        """
        request = requests.Request(method, self.url + path, self.headers, data=body).prepare()
        try:
            answer = self.session.send(request, timeout=self.timeout, allow_redirects=False)
        except requests.RequestException as error:
            raise NoAnswer(f"{self.url}{path}: {type(error).__name__}: {str(error)[-150:]}") from None
        if 400 <= answer.status_code < 500:
            raise Refused(f"{self.url}{path}: {answer.text[:500].strip()}", answer.status_code)
        if answer.status_code != 200:
            raise NoAnswer(f"{self.url}{path}: status {answer.status_code}, {answer.text[:150].strip()}")
        return answer.content

    def ask(self, kind, method, path, body=None, **expected):
        """The fields of the answer, which must be a `kind`."""
        try:
            return decode(self.call(method, path, body), kind, **expected)
        except Malformed as error:
            raise NoAnswer(f"{self.url}{path}: {error}") from None

    def status(self):
        """What the server says of itself: a Status."""
        return Status(*self.ask(Status, "GET", "/status"))


class OracleClient(Client):
    """The oracle, as the two trainers see it."""
    port = 5001

    def estimate_gradients(self, h, y):
        """ĝ(h), or ĝ(h, y), the synthetic gradients (paper, section 2.1), (batch, width); and `learned`, or None."""
        return self.ask(Guess, "POST", "/estimate_gradients", encode(h=h, y=y), rows=len(h), gradients=h.shape[1])

    def provide_gradients(self, i, h, y, clock, gradients):
        """Examples for the oracle to learn from: the true gradients g at h."""
        self.ask(Accepted, "POST", "/provide_gradients", encode(i=i, h=h, y=y, clock=clock, gradients=gradients))


class LayerClient(Client):
    """The output trainer, as the input trainer sees it; GET /weights is the same on both."""
    port = 5002

    def training_examples(self, i, h, y, clock):
        """Activations to train on."""
        self.ask(Accepted, "POST", "/training_examples", encode(i=i, h=h, y=y, clock=clock))

    def true_gradients(self, h, y):
        """g = dL/dh, (batch, width), which the output half is updated along, too: backprop over a wire."""
        return self.ask(Truth, "POST", "/true_gradients", encode(h=h, y=y), rows=len(h), gradients=h.shape[1])[0]

    def weights(self, dims):
        """The half's [(w, b), ...], which must be finite and fit `dims`, its widths; and how many updates made them."""
        layers, updates = self.ask(Weights, "GET", "/weights")
        try:
            weights = [(json_to_ndarray(layer.w), json_to_ndarray(layer.b)) for layer in layers]
        except Malformed as error:
            raise NoAnswer(f"{self.url}/weights: {error}") from None
        shapes = [(w.shape, b.shape) for w, b in weights]
        if shapes != [(shape, shape[1:]) for shape in pairwise(dims)] or not all(
                np.isfinite(array).all() for pair in weights for array in pair):
            raise NoAnswer(f"{self.url}/weights: not finite, or not of layers of the widths {dims}")
        return weights, updates
