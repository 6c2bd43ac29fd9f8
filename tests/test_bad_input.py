"""Whatever is sent to the ports: 4xx, JSON that names the field, and nothing changed. Against real processes."""
import http.client
import json
import socket

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from synthgrad import MAX_BODY, ndarray_to_json
from tests.processes import Three, start, wait_until

WIDTH = 24
FIELDS = {"/estimate_gradients": ("h", "y"), "/provide_gradients": ("i", "h", "y", "clock", "gradients"),
          "/training_examples": ("i", "h", "y", "clock"), "/true_gradients": ("h", "y")}


def request(three, name, method, path, body=None, headers={"Content-Type": "application/json"}):
    connection = http.client.HTTPConnection("127.0.0.1", three.port(name), timeout=30)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    return response.status, answer


def owner(path):
    return "oracle" if path in ("/estimate_gradients", "/provide_gradients") else "output"


def good(path):
    """A message that would be taken."""
    rng = np.random.default_rng(0)
    arrays = {"i": np.arange(3), "h": rng.random((3, WIDTH), "f"), "y": rng.random((3, 1), "f"), "clock": np.arange(3),
              "gradients": rng.random((3, WIDTH), "f")}
    return {name: ndarray_to_json(arrays[name]) for name in FIELDS[path]}


def state(three):
    """Everything that a bad request must not change, bit for bit."""
    weights = request(three, "output", "GET", "/weights")[1]
    return weights, three.status("output")["examples"], {
        name: three.status("oracle")[name] for name in ("examples", "updates", "learned")}


def is_refused(three, path, body, statuses=(400,), headers={"Content-Type": "application/json"}, method="POST"):
    status, answer = request(three, owner(path), method, path, body, headers)
    error = json.loads(answer)
    assert status in statuses and list(error) == ["error"], (status, answer[:300])
    assert "Traceback" not in error["error"] and len(error["error"]) < 1000
    return error["error"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=8)
bad_arrays = st.one_of(
    json_values,
    st.fixed_dictionaries({"shape": st.lists(st.integers(-2, 2**70) | json_values, max_size=4),
                           "dtype": st.sampled_from(["float16", "float64", "int8", "object", "O", ">f4", ""]),
                           "base64": st.text(max_size=40) | json_values}),
    st.fixed_dictionaries({"shape": st.just([3, WIDTH]), "values": st.lists(json_values, max_size=80)}),
    st.sampled_from([np.nan, np.inf, -np.inf, 1e30]).map(lambda bad: ndarray_to_json(np.full((3, WIDTH), bad, "f"))),
    st.sampled_from([-1, -2**63, 2**54, 2**63 - 1]).map(lambda bad: ndarray_to_json(np.full(3, bad))),
    st.tuples(st.sampled_from([0, 1, 2, 4, 5]), st.integers(0, 40)).map(
        lambda shape: ndarray_to_json(np.zeros(shape, "f"))))


@pytest.mark.parametrize("path", FIELDS)
def test_messages_of_rubbish_are_refused_and_change_nothing(servers, path):
    before = state(servers)

    @settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(FIELDS[path]), bad_arrays)
    def a_bad_field(name, bad):
        error = is_refused(servers, path, json.dumps(good(path) | {name: bad}))
        assert "JSON is malformed" in error or any(f"`$.{field}" in error for field in FIELDS[path]), error  # not only `name`

    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode()))
    def a_bad_body(body):
        is_refused(servers, path, body)

    a_bad_field()
    a_bad_body()
    for name in FIELDS[path]:
        missing = good(path)
        del missing[name]
        assert name in is_refused(servers, path, json.dumps(missing))
    assert "extra" in is_refused(servers, path, json.dumps(good(path) | {"extra": 1}))
    is_refused(servers, path, b"[" * 100_000)
    assert state(servers) == before


def test_wrong_types_sizes_paths_and_methods(servers):
    before, json_type = state(servers), {"Content-Type": "application/json"}
    body = json.dumps(good("/training_examples"))
    for wrong in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}):
        is_refused(servers, "/training_examples", body, (415,), wrong)
    is_refused(servers, "/training_examples", b" " * (MAX_BODY + 1), (413,))
    status, _ = request(servers, "output", "POST", "/training_examples", b"", json_type | {"Content-Length": "99999999999"})
    assert status == 413
    for method, path in (("GET", "/training_examples"), ("DELETE", "/weights"), ("PUT", "/weights"), ("POST", "/status")):
        is_refused(servers, path, None, (405,), method=method)
    for path in ("/nothing", "/../etc/passwd", "/weights/1"):
        is_refused(servers, path, None, (404,), method="GET")
    for path, name, width in (("/training_examples", "h", 25), ("/training_examples", "y", 2), ("/true_gradients", "h", 1),
                              ("/estimate_gradients", "h", 23), ("/provide_gradients", "gradients", 25)):
        narrow = good(path) | {name: ndarray_to_json(np.zeros((3, width), "f"))}
        assert f"Expected shape (3, {1 if name == 'y' else WIDTH})" in is_refused(servers, path, json.dumps(narrow))
    assert state(servers) == before


def test_good_messages_are_taken_after_all_that(servers):
    for path in FIELDS:
        status, answer = request(servers, owner(path), "POST", path, json.dumps(good(path)))
        assert status == 200, answer
    assert servers.status("output")["examples"]["received"] == 6  # of /training_examples and of /true_gradients
    wait_until(lambda: servers.status("oracle")["examples"]["received"] == 6, "one half of these from here, one from there")
    by_hand = {"h": {"shape": [1, WIDTH], "values": [0.5] * WIDTH}, "y": {"shape": [1, 1], "values": [1]}}
    status, answer = request(servers, "oracle", "POST", "/estimate_gradients", json.dumps(by_hand))
    assert status == 200 and json.loads(answer)["gradients"]["shape"] == [1, WIDTH]


@pytest.mark.parametrize("host, answered", [
    ("127.0.0.1", True), ("localhost:5001", True), ("[::1]:5001", True), ("192.0.2.7", True), (socket.gethostname(), True),
    ("evil.example", False), ("evil.example:5001", False), ("127.0.0.1.evil.example", False), ("", False), ("a b", False)])
def test_only_its_own_names_reach_a_process(host, answered, servers):
    """A page in a browser that has its own name resolved to 127.0.0.1 (DNS rebinding) sends that name as Host."""
    for name in ("oracle", "output"):
        assert (request(servers, name, "GET", "/status", None, {"Host": host})[0] == 200) == answered


@pytest.mark.parametrize("secret", ["", " \n", "two words", "schlüssel", "a=b"])
def test_a_token_that_no_header_can_carry_is_refused(secret, tmp_path):
    (tmp_path / "token").write_text(secret)
    assert start("train_output.py", "--token-file", tmp_path / "token", log=tmp_path / "log").wait(60) == 2
    assert "token: expected a secret of letters, digits" in (tmp_path / "log").read_text()


def test_a_token_is_insisted_on_and_sent(tmp_path, small_data):
    (tmp_path / "token").write_text("s3cret\n")
    shared = ["--token-file", tmp_path / "token"]
    with Three(tmp_path, output=shared, input=[*small_data, *shared, "--gradients", "true", "--num-epochs", 2]) as three:
        three.start("output")
        wait_until(lambda: "answers on" in three.log("output"), "the output trainer")
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic OndyZW9uZw=="}):
            assert request(three, "output", "GET", "/status", None, headers)[0] == 401
        for headers in ({"Authorization": "Bearer s3cret"}, {"Authorization": "Basic OnMzY3JldA=="}):
            assert request(three, "output", "GET", "/status", None, headers)[0] == 200
        three.start("input")
        assert three.wait_for_input(60) == 0, three.log("input")
