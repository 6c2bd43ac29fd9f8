"""Whatever is sent to the ports: 4xx, JSON that names the field, and nothing changed. Against real
processes."""
import http.client
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plumbing.wire import MAX_BODY, ndarray_to_json
from tests.processes import Three, wait_until

pytestmark = pytest.mark.processes
WIDTH = 24
JSON = {"Content-Type": "application/json"}
FIELDS = {"/estimate_gradients": ("h", "y"),
          "/provide_gradients": ("i", "h", "y", "clock", "start", "gradients"),
          "/training_examples": ("i", "h", "y", "clock", "start"),
          "/true_gradients": ("i", "h", "y", "clock", "start")}


def request(three, name, method, path, body=None, headers=JSON):
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
    arrays = {"i": np.arange(3), "h": rng.random((3, WIDTH), "f"), "y": rng.random((3, 1), "f"),
              "clock": np.zeros(3, int), "start": np.ones(3, int),
              "gradients": rng.random((3, WIDTH), "f")}
    return {name: ndarray_to_json(arrays[name]) for name in FIELDS[path]}


def state(three):
    """Everything that a bad request must not change, bit for bit."""
    weights = request(three, "output", "GET", "/weights")[1]
    oracle = three.status("oracle")
    return weights, three.status("output")["examples"], {
        name: oracle[name] for name in ("examples", "updates", "learned")}


def is_refused(three, path, body, statuses=(400,), headers=JSON, method="POST"):
    status, answer = request(three, owner(path), method, path, body, headers)
    error = json.loads(answer)
    assert status in statuses and list(error) == ["error"], (status, answer[:300])
    assert "Traceback" not in error["error"] and len(error["error"]) < 1000
    return error["error"]


def matrices(numbers, shape=(3, WIDTH), dtype="f"):
    """A strategy of arrays that are filled with one of these numbers."""
    return st.sampled_from(numbers).map(
        lambda number: ndarray_to_json(np.full(shape, number, dtype)))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (st.lists(inner, max_size=4)
                   | st.dictionaries(st.text(max_size=8), inner, max_size=4)), max_leaves=8)
dtypes = st.sampled_from(["float16", "float64", "int8", "object", "O", ">f4", ""])
bad_arrays = st.one_of(
    json_values,
    st.fixed_dictionaries({"shape": st.lists(st.integers(-2, 2**70) | json_values, max_size=4),
                           "dtype": dtypes, "base64": st.text(max_size=40) | json_values}),
    st.fixed_dictionaries({"shape": st.just([3, WIDTH]),
                           "values": st.lists(json_values, max_size=80)}),
    matrices([np.nan, np.inf, -np.inf, 1e30]),
    matrices([-1, -2**63, 2**54, 2**63 - 1], (3,), "i8"),
    st.tuples(st.sampled_from([0, 1, 2, 4, 5]), st.integers(0, 40)).map(
        lambda shape: ndarray_to_json(np.zeros(shape, "f"))))


@pytest.mark.parametrize("path", FIELDS)
def test_messages_of_rubbish_are_refused_and_change_nothing(servers, path):
    before = state(servers)
    unhurried = settings(max_examples=100, deadline=None,
                         suppress_health_check=list(HealthCheck))

    @unhurried
    @given(st.sampled_from(FIELDS[path]), bad_arrays)
    def a_bad_field(name, bad):
        error = is_refused(servers, path, json.dumps(good(path) | {name: bad}))
        # not only `name`, because the others may disagree with it
        assert "JSON is malformed" in error or any(f"`$.{each}" in error for each in FIELDS[path])

    @unhurried
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
    before, body = state(servers), json.dumps(good("/training_examples"))
    for wrong in ({}, {"Content-Type": "text/plain"}):
        is_refused(servers, "/training_examples", body, (415,), wrong)
    is_refused(servers, "/training_examples", b" " * (MAX_BODY + 1), (413,))
    endless = JSON | {"Content-Length": "99999999999"}
    assert request(servers, "output", "POST", "/training_examples", b"", endless)[0] == 413
    for method, path in (("GET", "/training_examples"), ("DELETE", "/weights"),
                         ("POST", "/status")):
        is_refused(servers, path, None, (405,), method=method)
    for path in ("/nothing", "/../etc/passwd", "/weights/1"):
        is_refused(servers, path, None, (404,), method="GET")
    for path, name, width in (("/training_examples", "h", 25), ("/training_examples", "y", 2),
                              ("/true_gradients", "h", 1), ("/estimate_gradients", "h", 23),
                              ("/provide_gradients", "gradients", 25)):
        narrow = good(path) | {name: ndarray_to_json(np.zeros((3, width), "f"))}
        error = is_refused(servers, path, json.dumps(narrow))
        assert f"Expected shape (3, {1 if name == 'y' else WIDTH})" in error
    assert state(servers) == before


def test_good_messages_are_taken_after_all_that(servers):
    for path in FIELDS:
        status, answer = request(servers, owner(path), "POST", path, json.dumps(good(path)))
        assert status == 200, answer
    # of /training_examples and of /true_gradients
    assert servers.status("output")["examples"]["received"] == 6
    # what came from here and what the output trainer threw: nothing was learned from them yet
    wait_until(lambda: servers.status("output")["gradients_sent"]["sent"] == 3, "the gradients")
    assert servers.status("oracle")["examples"]["received"] == 6
    by_hand = {"h": {"shape": [1, WIDTH], "values": [0.5] * WIDTH},
               "y": {"shape": [1, 1], "values": [1]}}
    status, answer = request(servers, "oracle", "POST", "/estimate_gradients", json.dumps(by_hand))
    assert status == 200 and len(json.loads(answer)["gradients"]["values"]) == WIDTH


def test_a_token_is_insisted_on_and_sent(tmp_path, small_data):
    (tmp_path / "token").write_text("s3cret\n")
    shared = ["--token-file", tmp_path / "token"]
    with Three(tmp_path, gradients="true", output=shared,
               input=[*small_data, *shared, "--num-epochs", 2]) as three:
        three.start("output")
        wait_until(lambda: "answers on" in three.log("output"), "the output trainer")
        for headers, expected in (({}, 401), ({"Authorization": "Bearer wrong"}, 401),
                                  ({"Authorization": "Bearer s3cret"}, 200)):
            assert request(three, "output", "GET", "/status", None, headers)[0] == expected
        three.start("input")
        assert three.wait_for_input(60) == 0, three.log("input")
