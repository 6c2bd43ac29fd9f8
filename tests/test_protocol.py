"""Arrays as JSON, messages, and clients of servers that misbehave."""
import json
import socket
import threading
import time

import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as arrays_of

from synthgrad import (MAX_BODY, LayerClient, NoAnswer, OracleClient, Refused, decode, encode, json_to_ndarray,
                       ndarray_to_json)

dtypes = st.sampled_from(["float32", "float64", "int32", "int64"])
shapes = arrays_of.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)


@given(dtypes.flatmap(lambda dtype: arrays_of.arrays(dtype, shapes)), st.sampled_from(["C", "F"]))
def test_any_array_survives_base64(array, order):
    again = json_to_ndarray(json.loads(json.dumps(ndarray_to_json(np.asarray(array, order=order)))))
    assert again.dtype == array.dtype and again.shape == array.shape
    np.testing.assert_array_equal(again, array)


@given(arrays_of.arrays("float32", shapes, elements=st.floats(-1e6, 1e6, width=32)))
def test_any_array_survives_values(array):
    message = {"shape": list(array.shape), "values": array.ravel().tolist()}
    np.testing.assert_array_equal(json_to_ndarray(json.loads(json.dumps(message)), "float32"), array)


def test_arrays_travel_little_endian():
    swapped = np.array([1.5, -2], ">f4")
    message = ndarray_to_json(swapped)
    assert message == {"shape": [2], "dtype": "float32", "base64": "AADAPwAAAMA="}
    assert json_to_ndarray(message).dtype == np.dtype("float32")


GOOD = ndarray_to_json(np.zeros((2, 3), "f"))


@pytest.mark.parametrize("bad", [
    None, 7, "array", [], {}, {"shape": [2]}, GOOD | {"extra": 1}, GOOD | {"values": [0] * 6},
    GOOD | {"dtype": "float64"}, GOOD | {"dtype": "object"}, GOOD | {"dtype": ["float32"]}, GOOD | {"dtype": None},
    GOOD | {"shape": [3, 2]}, GOOD | {"shape": [2, 3, 1]}, GOOD | {"shape": [6]}, GOOD | {"shape": [2, 4]},
    GOOD | {"shape": [-2, -3]}, GOOD | {"shape": [2.0, 3]}, GOOD | {"shape": "23"}, GOOD | {"shape": 6},
    GOOD | {"shape": [2**62, 3]}, GOOD | {"shape": [True, 3]}, GOOD | {"shape": {"2": 3}},
    GOOD | {"base64": GOOD["base64"][:-2]}, GOOD | {"base64": "*" * 32}, GOOD | {"base64": 5}, GOOD | {"base64": "é"},
    {"shape": [2, 3], "values": [1, 2, 3]}, {"shape": [2, 3], "values": "123456"},
    {"shape": [2, 3], "values": [[1, 2, 3], [4, 5, 6]]}, {"shape": [2, 3], "values": [1, 2, 3, 4, 5, None]},
    {"shape": [2, 3], "values": [1, 2, 3, 4, 5, "6"]}, {"shape": [2, 3], "values": [1, 2, 3, 4, 5, 10**400]},
    {"shape": [2, 3], "values": {"0": 1}}, {"shape": [2, 3], "values": ["x" * 10_000] + [""] * 100_000}])
def test_malformed_arrays_are_refused_by_name(bad):
    with pytest.raises(Refused, match="^h: .*expected float32 of shape"):
        json_to_ndarray(bad, "float32", (2, 3), "h")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e7])
def test_numbers_out_of_bounds_are_refused(bad):
    h = np.zeros((2, 3), "f")
    h[1, 1] = bad
    with pytest.raises(Refused, match="^h: expected .* finite"):
        decode({"h": ndarray_to_json(h)}, h=(3,))


@pytest.mark.parametrize("i", [[-1, 0], [0, 2**31], [0, 2**63 - 1]])
def test_indices_out_of_bounds_are_refused(i):
    with pytest.raises(Refused, match="^i: "):
        decode({"i": ndarray_to_json(np.array(i))}, i=())


def test_rows_must_agree_and_there_must_be_one():
    with pytest.raises(Refused, match="^y: "):
        decode(encode(h=np.zeros((2, 3), "f"), y=np.zeros(3, "f")), h=(3,), y=())
    with pytest.raises(Refused, match="at least one row"):
        decode(encode(h=np.zeros((0, 3), "f")), h=(3,))


def test_nan_is_never_sent():
    with pytest.raises(FloatingPointError, match="gradients"):
        encode(gradients=np.array([0, np.nan], "f"))


class Misbehaving:
    """A real server that answers every connection with the same bytes, or, given None, never."""

    def __init__(self, answer):
        self.socket, self.answer, self.open = socket.create_server(("127.0.0.1", 0)), answer, []
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.open.append(connection)
            connection.recv(65536)
            if self.answer is not None:
                connection.sendall(self.answer)
                connection.close()

    @property
    def url(self):
        return f"127.0.0.1:{self.socket.getsockname()[1]}"


def http(body, status="200 OK", length=None):
    return f"HTTP/1.1 {status}\r\nContent-Length: {length or len(body)}\r\n\r\n{body}".encode()


@pytest.mark.parametrize("answer", [
    None, b"", b"rubbish\r\n\r\n", b"HTTP/1.1 200 OK\r\n", http("{}"), http("[]"), http("not json"), http("[" * 10**5),
    http('{"gradients": {"shape": [4, 3]', length=500), http('{"error": "x"}', "500 Oops"), http("{}", "302 Found"),
    http(json.dumps(encode(gradients=np.zeros((4, 4), "f")))), http("x", length=MAX_BODY * 4),
    http(json.dumps({"gradients": ndarray_to_json(np.full((4, 3), np.nan, "f"))}))])
def test_a_client_survives_a_server_that_misbehaves(answer):
    server = Misbehaving(answer)
    client = OracleClient(server.url, timeout=0.5)
    began = time.monotonic()
    with pytest.raises(NoAnswer, match="http://127.0.0.1"):
        client.estimate_gradients(np.zeros((4, 3), "f"), np.zeros(4, "f"))
    with pytest.raises(NoAnswer):
        client.status()
    assert time.monotonic() - began < 10
    server.socket.close()


def test_a_dead_server_is_no_answer_and_a_bad_address_is_an_error():
    with pytest.raises(NoAnswer, match="refused"):
        LayerClient("127.0.0.1:1").status()
    with pytest.raises(NoAnswer, match=r"http://\[::1\]:1/status"):
        LayerClient("[::1]:1").status()
    for bad in ("ftp://host:1", "http://", "host:port"):
        with pytest.raises(ValueError):
            LayerClient(bad)
