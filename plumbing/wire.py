"""Arrays as JSON, messages as bytes, a bare HTTP client. What messages mean: synthgrad.py."""
import base64
from typing import Annotated, Generic, Literal, TypeVar

import msgspec
import numpy as np
import requests
from msgspec import UNSET, UnsetType
from requests.adapters import HTTPAdapter
from urllib3.util import parse_url

from plumbing import MAX_MAGNITUDE
from plumbing.errors import Diverged, NoAnswer, Refused, UserError

MAX_BODY = 2**25        # bytes of a request; a minibatch in base64 takes half of that at most
MAX_VALUES = 2**20      # bytes of an array that is spelled out in "values", which is for people
MAX_INTEGER = 2**53     # of an index or a clock

Shape, DType = TypeVar("Shape"), TypeVar("DType")
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class Array(msgspec.Struct, Generic[Shape, DType], forbid_unknown_fields=True):
    """{"shape": [100, 24], "dtype": "float32", "base64": "..."}, little-endian, in C order. Or, for
    people with curl, {"shape": [2, 2], "values": [1, 2, 3, 4]}. `values` is not parsed before its
    size has been checked."""
    shape: Shape
    dtype: DType | UnsetType = UNSET
    base64: bytes | UnsetType = UNSET
    values: msgspec.Raw | UnsetType = UNSET


Vector = Array[tuple[Count], Literal["float32"]]
Matrix = Array[tuple[Count, Count], Literal["float32"]]
Integers = Array[tuple[Count], Literal["int64"]]


class Malformed(ValueError):
    """A message is not what it must be. Says where, and what was expected. A server answers 400."""


def ndarray_to_json(array, values=False):
    """An array of any shape -> a dict that json.dumps takes, as Array describes it."""
    array = np.asarray(array)
    if values:
        return {"shape": list(array.shape), "values": array.ravel().tolist()}
    little_endian = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return {"shape": list(array.shape), "dtype": array.dtype.name,
            "base64": base64.b64encode(little_endian).decode()}


def json_to_ndarray(message, dtype="float32"):
    """The inverse: an Array -> an array. `dtype` is that of `values` that do not name one. Raises
    Malformed."""
    try:
        dtype = np.dtype(message.dtype or dtype)
        if (message.base64 is UNSET) == (message.values is UNSET):
            raise ValueError('expected either "base64" or "values"')
        if message.values is UNSET:
            flat = np.frombuffer(bytearray(message.base64), dtype.newbyteorder("<"))
            return flat.astype(dtype, copy=False).reshape(message.shape)
        if len(message.values) > MAX_VALUES:
            raise ValueError(f'at most {MAX_VALUES} bytes of "values"; "base64" may be longer')
        number = int if dtype.kind == "i" else float
        flat = msgspec.json.decode(message.values, type=list[number])
        return np.array(flat, dtype).reshape(message.shape)
    except (msgspec.DecodeError, ValueError, OverflowError, TypeError, RecursionError) as error:
        raise Malformed(str(error)) from None


def encode(values=False, **fields):
    """A message as bytes; with `values` its arrays are spelled out.

    What decode() would refuse for its magnitude is never sent: raises Diverged.
    """
    for name, value in fields.items():
        if isinstance(value, np.ndarray):
            if value.dtype.kind == "f" and not (np.abs(value) <= MAX_MAGNITUDE).all():  # nor is NaN
                raise Diverged(f"{name} is not finite, or beyond {MAX_MAGNITUDE:g}: "
                               "diverged; try a lower --learning-rate")
            fields[name] = ndarray_to_json(value, values)
    return msgspec.json.encode(fields)


def decode(body, kind, rows=None, **widths):
    """The bytes of a message -> its fields in order. Raises Malformed, naming the field.

    `widths` are those that matrices must have, such as h=24. All arrays must have the same number
    of rows, `rows` if it is given, at least one, and hold finite numbers of sane magnitudes.
    """
    try:
        message = msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"{error}; expected {kind.__name__}: an object of "
                        f"{', '.join(kind.__struct_fields__)}, where an array is like "
                        '{"shape": [2, 2], "values": [1, 2, 3, 4]}') from None
    fields = []
    for name in kind.__struct_fields__:
        value = getattr(message, name)
        if isinstance(value, Array):
            value = _checked(value, name, rows, widths.get(name))
            rows = len(value)
        fields.append(value)
    return fields


def _checked(value, name, rows, width):
    integers = len(value.shape) == 1  # i and clock; all others are matrices
    try:
        value = json_to_ndarray(value, "int64" if integers else "float32")
    except Malformed as error:
        raise Malformed(f'{error}; expected like {{"shape": [2, 2], "values": [1, 2, 3, 4]}} - at '
                        f"`$.{name}`") from None
    rows = len(value) if rows is None else rows
    wanted = (rows,) if value.ndim == 1 else (rows, value.shape[1] if width is None else width)
    if value.shape != wanted or not rows:
        raise Malformed(f"Expected shape {wanted}, at least one row, got {value.shape} - at "
                        f"`$.{name}`")
    low, high = (0, MAX_INTEGER) if integers else (-MAX_MAGNITUDE, MAX_MAGNITUDE)
    if value.size and not (value.min() >= low and value.max() <= high):  # NaN fails both
        raise Malformed(f"Expected finite numbers from {low:g} to {high:g} - at `$.{name}`")
    return value


def rows_per_message(width):
    """How many examples of `width` floats fit into a message. In base64 a float takes 16/3 bytes;
    i, clock and start take as much as 6 floats."""
    return max(1, MAX_BODY // 2 // (6 * (width + 6)))


class Client:
    """Asks one server over kept connections. Belongs to one thread. Waits `timeout` seconds for the
    next bytes. Its methods raise Refused if the server answers 4xx, or NoAnswer."""
    port = None

    def __init__(self, server, token=None, timeout=10):
        try:
            address = parse_url(server if "//" in server else f"http://{server}")
            if address.scheme != "http" or not address.host or not (address.port or self.port):
                raise ValueError
            address.host.encode("idna")  # UnicodeError, a ValueError, if it can be no host's name
        except ValueError:
            raise UserError(f"{server}: expected a server's address like "
                             f"127.0.0.1:{self.port or 5003}") from None
        self.url, self.timeout = f"http://{address.host}:{address.port or self.port}", timeout
        self.adapter = HTTPAdapter()  # not a Session: no cookies, redirects, or proxies of the
        self.headers = {"Content-Type": "application/json"}  # environment between these processes
        if token:
            self.headers["Authorization"] = f"Bearer {token}"
        self.prepared = {}  # (method, path) -> a request without a body

    def call(self, method, path, body=None):
        """The bytes that are answered. A request is prepared once and copied: that, without a
        session, takes three quarters of the time."""
        if (method, path) not in self.prepared:
            self.prepared[method, path] = requests.Request(
                method, self.url + path, self.headers).prepare()
        request = self.prepared[method, path].copy()
        if body is not None:
            request.body, request.headers["Content-Length"] = body, str(len(body))
        try:
            answer = self.adapter.send(request, timeout=self.timeout)
            content = answer.content
        except requests.RequestException as error:
            reason = str(error)
            if len(reason) > 150:
                reason = f"… {reason[-150:].split(' ', 1)[-1]}"  # the cause stands at the end
            raise NoAnswer(f"{self.url}{path}: {type(error).__name__}: {reason}") from None
        if 400 <= answer.status_code < 500:
            raise Refused(f"{self.url}{path}: {answer.text[:500].strip()}", answer.status_code)
        if answer.status_code != 200:
            raise NoAnswer(f"{self.url}{path}: status {answer.status_code}, "
                           f"{answer.text[:150].strip()}")
        return content

    def ask(self, kind, method, path, body=None, **expected):
        """The fields of the answer, which must be a `kind`."""
        try:
            return decode(self.call(method, path, body), kind, **expected)
        except Malformed as error:
            raise NoAnswer(f"{self.url}{path}: {error}") from None


def holder(address):
    """A sentence about who listens at an address that is taken."""
    try:
        status = Client(address, timeout=1).call("GET", "/status")
        status = msgspec.json.decode(status, type=dict)
        return f"The {status['process']} (process {status['pid']}) of another run answers there."
    except Refused as error:
        if "--token-file" in str(error):
            return "A process of another run, which asks for a token, answers there."
    except (msgspec.DecodeError, LookupError, ValueError):
        pass
    return "Another program, or a process of another run that does not answer, listens there."
