"""Arrays as JSON, messages as types, and clients of servers that misbehave."""
import argparse
import getpass
import json
import socket
import subprocess
import sys
import threading
import time

import msgspec
import numpy as np
import pytest
from hypothesis import given as for_any
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

import over_http
import train_output
from replay import Replay
from links import UpperEnd, minibatches_of
from plumbing import process, serving
from plumbing.errors import NoAnswer, Refused
from plumbing.part import Part
from plumbing.posting import Outbox
from plumbing.wire import (
    MAX_BODY,
    Malformed,
    decode,
    encode,
    ndarray_to_json,
)
from sgd import make_layers, task_of
from synthgrad import Examples, Gradients, OracleClient, PartClient, Question, encode_weights
from tests.processes import ROOT, array_of, wait_until

dtypes = st.sampled_from(["float32", "float64", "int32", "int64"])
shapes = arrays_of.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)


@for_any(dtypes.flatmap(lambda dtype: arrays_of.arrays(dtype, shapes)), st.sampled_from(["C", "F"]))
def test_any_array_survives_base64(array, order):
    message = json.dumps(ndarray_to_json(np.asarray(array, order=order)))
    again = array_of(json.loads(message))
    assert again.dtype == array.dtype and again.shape == array.shape
    np.testing.assert_array_equal(again, array)


@for_any(arrays_of.arrays("float32", shapes, elements=st.floats(-1e6, 1e6, width=32)))
def test_any_array_survives_values(array):
    message = ndarray_to_json(array, values=True)
    assert set(message) == {"shape", "values"}
    np.testing.assert_array_equal(array_of(message), array)


def test_arrays_travel_little_endian():
    swapped = np.array([1.5, -2], ">f4")
    message = ndarray_to_json(swapped)
    assert message == {"shape": [2], "dtype": "float32", "base64": "AADAPwAAAMA="}
    assert array_of(message).dtype == np.dtype("float32")


GOOD = ndarray_to_json(np.zeros((2, 3), "f"))
Y = ndarray_to_json(np.zeros((2, 1), "f"))


@pytest.mark.parametrize("bad", [
    None, 7, "array", [], {}, {"shape": [2, 3]}, GOOD | {"extra": 1}, GOOD | {"values": [0] * 6},
    GOOD | {"dtype": "float64"}, GOOD | {"dtype": "object"}, GOOD | {"dtype": ["float32"]},
    GOOD | {"dtype": None}, GOOD | {"shape": [3, 2]}, GOOD | {"shape": [2, 3, 1]},
    GOOD | {"shape": [6]}, GOOD | {"shape": [2, 4]}, GOOD | {"shape": [-2, -3]},
    GOOD | {"shape": [2.5, 3]}, GOOD | {"shape": "23"}, GOOD | {"shape": 6},
    GOOD | {"shape": [2**62, 3]}, GOOD | {"shape": [True, 3]}, GOOD | {"shape": {"2": 3}},
    GOOD | {"base64": GOOD["base64"][:-2]}, GOOD | {"base64": "*" * 32}, GOOD | {"base64": 5},
    GOOD | {"base64": "é"}, {"shape": [2, 3], "values": [1, 2, 3]},
    {"shape": [2, 3], "values": "123456"}, {"shape": [2, 3], "values": [[1, 2, 3], [4, 5, 6]]},
    {"shape": [2, 3], "values": [1, 2, 3, 4, 5, None]},
    {"shape": [2, 3], "values": [1, 2, 3, 4, 5, "6"]}, {"shape": [2, 3], "values": {"0": 1}},
    {"shape": [2, 3], "values": [0] * 2**20}])
def test_malformed_arrays_are_refused_by_name(bad):
    with pytest.raises(Malformed, match=r"\$\.h"):
        decode(json.dumps({"h": bad, "y": Y}).encode(), Question, h=3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e7])
def test_numbers_out_of_bounds_are_refused(bad):
    h = np.zeros((2, 3), "f")
    h[1, 1] = bad
    with pytest.raises(Malformed, match=r"Expected finite numbers .* at `\$\.h`"):
        decode(json.dumps({"h": ndarray_to_json(h), "y": Y}).encode(), Question, h=3)


@pytest.mark.parametrize("name", ["i", "clock", "start"])
@pytest.mark.parametrize("bad", [[-1, 0], [0, 2**62]])
def test_indices_clocks_and_starts_out_of_bounds_are_refused(name, bad):
    good = dict(i=np.arange(2), h=np.zeros((2, 3), "f"), y=np.zeros((2, 1), "f"),
                clock=np.arange(2), start=np.arange(2))
    with pytest.raises(Malformed, match=rf"\$\.{name}"):
        decode(encode(**good | {name: np.array(bad)}), Examples, h=3)


def test_rows_must_agree_there_must_be_one_and_widths_must_fit():
    h, y = np.zeros((2, 3), "f"), np.zeros((3, 1), "f")
    for message, where in ((encode(h=h, y=y), "y"), (encode(h=h[:0], y=y[:0]), "h"),
                           (encode(h=h[:, :2], y=y[:2]), "h")):
        with pytest.raises(Malformed, match=rf"Expected shape .*\$\.{where}"):
            decode(message, Question, h=3)


@pytest.mark.parametrize("body", [b"", b"\xff", b'{"\xff": 1}', b'{"h": "\xff"}', b"[" * 10**5])
def test_what_is_no_message_at_all_is_malformed(body):
    with pytest.raises(Malformed, match="expected Question: an object of h, y"):
        decode(body, Question)


@pytest.mark.parametrize("value", [np.nan, -np.inf, 2e6])
def test_what_would_not_be_taken_is_never_sent(value):
    with pytest.raises(FloatingPointError, match="gradients is not finite, or beyond 1e"):
        encode(gradients=np.array([0, value], "f"))


@pytest.mark.processes
@pytest.mark.parametrize("body", [
    "b'[' + b'[],' * (n // 3) + b'[]]'", "b'{\"h\":{\"shape\":[' + b'0,' * (n // 2) + b'0]}}'",
    "b'{\"h\":{\"shape\":[1,1],\"values\":[' + b'1.5,' * (n // 4) + b'0]}}'", "b'[' * n"])
def test_a_malformed_message_costs_no_more_memory_than_its_own_bytes(body):
    code = f"""if True:
        import resource, sys; sys.path.insert(0, {str(ROOT)!r})
        import synthgrad
        from plumbing import wire
        n = wire.MAX_BODY
        body = {body}
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            wire.decode(body, synthgrad.Question, h=24)
        except wire.Malformed:
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            print(1024 * (after - before) / len(body))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and float(done.stdout) < 1.2, done


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


def http(body, status="200 OK", length=None, header=""):
    body = body if isinstance(body, bytes) else body.encode()
    head = f"HTTP/1.1 {status}\r\n{header}Content-Length: {length or len(body)}\r\n\r\n"
    return head.encode() + body


def guess(gradients, newest=None):
    return http(msgspec.json.encode({"gradients": ndarray_to_json(gradients), "newest": newest}))


@pytest.mark.parametrize("answer", [
    None, b"", b"rubbish\r\n\r\n", b"HTTP/1.1 200 OK\r\n", http("{}"), http("[]"),
    http("not json"), http("[" * 10**5), http('{"gradients": {"shape": [4, 3]', length=500),
    http('{"error": "x"}', "500 Oops"), http("{}", "302 Found"), guess(np.zeros((4, 4), "f")),
    guess(np.zeros((3, 3), "f")), guess(np.full((4, 3), np.nan, "f")),
    guess(np.zeros((4, 3), "f"), "yesterday"), guess(np.zeros((4, 3), "f"), 7),
    http("x", length=MAX_BODY * 4)])
def test_a_client_survives_a_server_that_misbehaves(answer):
    server = Misbehaving(answer)
    client = OracleClient(server.url, timeout=0.3)
    began = time.monotonic()
    with pytest.raises(NoAnswer, match="http://127.0.0.1"):
        client.estimate_gradients(np.zeros((4, 3), "f"), np.zeros((4, 1), "f"))
    with pytest.raises(NoAnswer):
        client.status()
    assert time.monotonic() - began < 10
    server.socket.close()


def test_a_redirect_is_no_answer_wherever_it_leads():
    there = Misbehaving(guess(np.zeros((4, 3), "f")))
    here = Misbehaving(http("{}", "307 Temporary Redirect",
                            header=f"Location: http://{there.url}/estimate_gradients\r\n"))
    question = np.zeros((4, 3), "f"), np.zeros((4, 1), "f")
    with pytest.raises(NoAnswer, match="status 307"):
        OracleClient(here.url, timeout=2).estimate_gradients(*question)
    assert OracleClient(there.url, timeout=2).estimate_gradients(*question)[1] is None
    here.socket.close()
    there.socket.close()


def test_no_proxy_of_the_environment_is_asked(monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert fetch(WEIGHTS, [3, 2, 1])[1] == [7, 9]


WEIGHTS = [(np.ones((3, 2), "f"), np.zeros(2, "f")), (np.ones((2, 1), "f"), np.zeros(1, "f"))]


def fetch(weights, dims):
    server = Misbehaving(http(encode_weights(weights, [7, 9])))
    try:
        return PartClient(server.url, timeout=2).weights(dims)
    finally:
        server.socket.close()


def test_weights_come_back_with_the_updates_of_each_part():
    given, updates = fetch(WEIGHTS, [3, 2, 1])
    assert updates == [7, 9]
    for mine, theirs in zip(WEIGHTS, given, strict=True):
        assert all((a == b).all() for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("dims", [[3, 2], [3, 1], [4, 2, 1], [3, 2, 1, 1]])
def test_weights_of_other_widths_are_no_answer(dims):
    with pytest.raises(NoAnswer, match="not of layers of the widths"):
        fetch(WEIGHTS, dims)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_weights_that_are_not_finite_are_no_answer(bad, which):
    weights = [tuple(array.copy() for array in pair) for pair in WEIGHTS]
    weights[1][which].flat[0] = bad
    with pytest.raises(NoAnswer, match="not finite"):
        fetch(weights, [3, 2, 1])


def test_weights_that_are_no_arrays_are_no_answer():
    body = encode_weights(WEIGHTS, [7]).replace(b'"shape":[2,1]', b'"shape":[9,9]')
    server = Misbehaving(http(body))
    with pytest.raises(NoAnswer, match="/weights: cannot reshape"):
        PartClient(server.url, timeout=2).weights([3, 2, 1])
    server.socket.close()


def test_what_a_server_refuses_is_refused_with_its_words():
    server = Misbehaving(http('{"error": "no"}', "401 Unauthorized"))
    with pytest.raises(Refused, match="/status: .*no") as refused:
        PartClient(server.url, timeout=2).status()
    assert refused.value.status == 401
    server.socket.close()


def test_a_dead_server_is_no_answer_and_a_bad_address_is_an_error():
    with pytest.raises(NoAnswer, match="refused"):
        PartClient("127.0.0.1:1").status()
    with pytest.raises(NoAnswer, match=r"http://\[::1\]:1/status"):
        PartClient("[::1]:1").status()
    assert OracleClient("localhost").url == "http://localhost:5001"
    assert PartClient("localhost").url.endswith(":5002")
    for bad in ("ftp://host:1", "http://", "host:port", "192.168..5:1", ".lab:1", f"{'a' * 64}:1"):
        with pytest.raises(ValueError, match="expected a server's address"):
            PartClient(bad)


# ---- each message goes where it belongs, over a real socket ----


@pytest.fixture
def recorder():
    """Real servers of an oracle's and a part's endpoints, in threads of this process: the address,
    and what came, [(endpoint, fields), ...]."""
    args = argparse.Namespace(host="127.0.0.1", port=0, token="secret", trace=None, allow_host=[])
    status = {"layers": [3, 2], "updates": 4, "condition_on_labels": 1, "needs": 5,
              "network": [3, 2, 1], "trained": [11, 6]}
    app, came, h = serving.make_app("test", lambda: status, args), [], np.ones((4, 3), "f")

    def serve(path, kind, **answer):
        @app.post(path, endpoint=path)
        def endpoint():
            came.append((path, serving.message(kind)))
            return serving.as_json(encode(**answer))
    serve("/estimate_gradients", Question, gradients=2 * h, newest=(11, 9))
    serve("/true_gradients", Examples, gradients=3 * h)
    serve("/training_examples", Examples, accepted=4, trained=(11, 6))
    serve("/provide_gradients", Gradients, accepted=4)
    app.get("/weights")(lambda: serving.as_json(encode_weights(WEIGHTS, [7, 9])))
    with serving.listen(args) as listener:
        serving.serve(app, listener, args)
        yield f"127.0.0.1:{listener.getsockname()[1]}", came


SENT_H, SENT_Y = np.full((4, 3), 0.5, "f"), np.full((4, 1), 0.25, "f")


SENT = [np.array([8, 1, 2, 3]), SENT_H, SENT_Y, np.full(4, 7), np.full(4, 11)]  # i, h, y, clock, …
G = np.full((4, 3), 0.125, "f")


def test_every_message_arrives_at_its_endpoint_as_it_was_sent_and_its_answer_comes_back(recorder):
    address, came = recorder
    oracle, part = OracleClient(address, "secret"), PartClient(address, "secret")
    guess, newest = oracle.estimate_gradients(SENT_H, SENT_Y)
    assert (guess == 2).all() and newest == (11, 9)
    assert (part.true_gradients(*SENT) == 3).all()
    assert part.training_examples(*SENT) == (11, 6)
    part.training_examples(*SENT, every=True)
    oracle.provide_gradients(*SENT, G)
    oracle.provide_gradients(*SENT, G, waiting=5)
    expected = [("/estimate_gradients", [SENT_H, SENT_Y]), ("/true_gradients", [*SENT, False]),
                ("/training_examples", [*SENT, False]), ("/training_examples", [*SENT, True]),
                ("/provide_gradients", [*SENT, G, 0]), ("/provide_gradients", [*SENT, G, 5])]
    for (path, fields), (wanted, sent) in zip(came, expected, strict=True):
        assert path == wanted
        for mine, theirs in zip(fields, sent, strict=True):
            assert np.array_equal(mine, theirs) and type(mine) is type(theirs)
            assert getattr(mine, "dtype", None) == getattr(theirs, "dtype", None)
    weights, updates = part.weights([3, 2, 1])
    assert (weights[0][0] == WEIGHTS[0][0]).all() and updates == [7, 9]
    said = part.status()
    assert said.layers == [3, 2] and said.updates == 4 and said.starts == [process.START]
    assert (said.condition_on_labels, said.needs, said.trained) == (1, 5, (11, 6))
    assert said.user == getpass.getuser()


@pytest.mark.parametrize("sent", [[each[:3] for each in SENT],
                                  [SENT[0], SENT_H[:, :2], *SENT[2:]]])
@pytest.mark.parametrize("ask", [
    lambda address, i, h, y, *_: OracleClient(address, "secret").estimate_gradients(h, y),
    lambda address, *sent: PartClient(address, "secret").true_gradients(*sent)])
def test_gradients_of_another_shape_than_the_question_are_no_answer(ask, sent, recorder):
    with pytest.raises(NoAnswer, match="Expected shape"):
        ask(recorder[0], *sent)


def test_gradients_are_examples_with_what_came_of_them():
    assert Examples.__struct_fields__[5:] == ("every",)
    assert Gradients.__struct_fields__ == (
        *Examples.__struct_fields__[:5], "gradients", "waiting")


# ---- what counts once ----


@pytest.fixture
def part():
    """post(path, **changed) at a part that trains on what comes: the JSON that is answered. And
    its UpperEnd."""
    args = argparse.Namespace(host="127.0.0.1", port=0, token=None, trace=None, allow_host=[])
    trained = Part(make_layers([3, 2, 1], np.random.default_rng(0)))
    below = UpperEnd(Replay(1000, 0), 4, np.random.default_rng(0), Outbox())
    app = serving.make_app("output trainer", below.status, args)
    over_http.serve_part(app, below, lambda: [3, 2, 1], lambda: (trained.weights()[0], [7]))
    stop = threading.Event()

    def minibatches():
        while not stop.is_set():
            if minibatch := below.next(60):
                yield minibatch
    losses = train_output.train(trained, minibatches(), task_of(1), lambda clock: 0.1, 0.0)
    loop = threading.Thread(target=lambda: list(losses))
    loop.start()

    def post(path, **changed):
        names = Examples.__struct_fields__
        body = encode(**{**dict(zip(names, SENT, strict=False)), **changed})
        return app.test_client().post(path, data=body, content_type="application/json").json
    yield post, trained, below
    stop.set()
    below.nudge()  # which ends the wait for a minibatch
    loop.join(10)


LATER = {"clock": np.full(4, 8)}, {"start": np.full(4, 12)}


def test_a_question_that_is_asked_again_is_one_update_and_gets_the_same_answer(part):
    post, trained, _ = part
    answers = [post("/true_gradients") for _ in range(3)]
    assert "gradients" in answers[0] and answers == answers[:1] * 3 and trained.clock == 1
    for updates, other in enumerate(LATER, 2):  # with the same contents
        answers.append(post("/true_gradients", **other))
        assert answers[-1] != answers[-2] and trained.clock == updates


@pytest.mark.parametrize("every", [False, True])
def test_examples_that_are_thrown_again_count_once_and_equal_ones_of_another_clock_do_not(
        every, part):
    post, trained, below = part
    for rows, changed in ((4, {}), (4, {}), (8, LATER[0]), (12, LATER[1]), (12, {})):
        assert post("/training_examples", every=every, **changed)["accepted"] == 4
        assert below.replay.counters()["received"] == rows
    wait_until(lambda: trained.clock >= 3, "the loop to train on all")
    post("/true_gradients", clock=np.full(4, 99))
    assert trained.clock == 4


def test_a_message_is_split_into_its_minibatches():
    clock, start = np.array([3, 3, 4, 3, 3]), np.array([1, 1, 1, 1, 2])
    found = list(minibatches_of(clock, start, np.arange(5)))
    assert [(its_start, its_clock, i.tolist()) for its_start, its_clock, (i,) in found] == [
        (1, 3, [0, 1]), (1, 4, [2]), (1, 3, [3]), (2, 3, [4])]
