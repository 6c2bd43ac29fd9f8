"""The three processes together: what they learn, what they say when something does not fit, and how they stop."""
import json
import signal

import numpy as np
import pytest

from plumbing.runs import load_data, read_snapshot, snapshots
from sgd import (Sigmoid, backprop, descend, feed_forward, layers_from_weights, loss_gradient, make_layers, minibatches,
                 test_score as score)
from synthgrad import LayerClient, OracleClient
from tests.processes import Three, end, free_ports, start, wait_until


def test_true_gradients_over_the_wire_equal_backprop_in_one_process(tmp_path, small_data):
    rate = 0.5
    with Three(tmp_path, output=["--learning-rate", rate, "--decay", 1e12, "--replay", 0],
               input=[*small_data, "--gradients", "true", "--num-epochs", 2, "--learning-rate", rate, "--momentum", 0.9,
                      "--decay", 1e12, "--warm-up", 0]) as three:
        three.start("output", "input")  # no oracle: nobody needs it
        assert three.wait_for_input(60) == 0, three.log("input")
    x, y, x_test, y_test = load_data(*small_data)
    layers = [*make_layers([2, 24], np.random.default_rng([0, 1]), last=Sigmoid),
              *make_layers([24, 12, 1], np.random.default_rng([0, 2]), input_mean=0.5)]
    for i in minibatches(len(x), 100, 2, seed=0):
        backprop(layers, loss_gradient(feed_forward(layers, x[i]), y[i]))
        descend(layers, rate, 0.9)
    wire, row = read_snapshot(snapshots(three.progress)[-1])
    assert row["examples"] == 2 * len(x)
    for layer, (w, b) in zip(layers, wire):
        np.testing.assert_allclose(layer.w, w, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(layer.b, b, rtol=1e-4, atol=1e-5)
    assert row["test_mse"] == pytest.approx(score(layers, x_test, y_test), rel=1e-3)


def test_random_streams_are_independent_across_the_halves(tmp_path, small_data):
    with Three(tmp_path, input=[*small_data, "--gradients", "true", "--num-epochs", 1]) as three:
        three.start("output", "input")
        assert three.wait_for_input(60) == 0, three.log("input")
    (w1, _), (w2, _), _ = read_snapshot(snapshots(three.progress)[0])[0]
    n = min(w1.size, w2.size)
    assert abs(np.corrcoef(w1.ravel()[:n], w2.ravel()[:n])[0, 1]) < 0.5


def test_synthetic_gradients_beat_zero_ones(tmp_path, noisy_data):
    """Cut after layer 3, labels shown, 2 epochs each."""
    reached, cosine = {}, {}
    for gradients in ("synthetic", "zero"):
        folder = tmp_path / gradients
        folder.mkdir()
        with Three(folder, oracle=["--layers", 64, 64, 64, "--condition-on-labels"], output=["--layers", 64, 64, 1],
                   input=[*noisy_data, "--layers", 10, 64, 64, 64, "--learning-rate", 2, "--warm-up", 300,
                          "--gradients", gradients, "--num-epochs", 2]) as three:
            three.start("input", "output", "oracle")  # the wrong way round: each waits for whom it needs
            assert three.wait_for_input(120) == 0, three.log("input")
            assert [end(three.processes[name]) for name in ("output", "oracle")] == [0, 0]
        assert "waiting for the o" in three.log("input")
        assert not any("Traceback" in three.log(name) for name in three.commands)
        reached[gradients], cosine[gradients] = three.metrics("test_mse")[-1], three.metrics("gradient_cosine")[-1]
        first, *_, last = [read_snapshot(path)[0][0][0] for path in snapshots(three.progress)]
        assert (first == last).all() == (gradients == "zero")
        assert len(snapshots(three.progress)) == len(three.metrics("seconds"))
    assert reached["synthetic"] < 0.5 * reached["zero"], reached
    assert cosine["synthetic"] > 0.3, cosine


def test_the_gradient_cosine_is_that_of_guess_and_truth(tmp_path, small_data):
    with Three(tmp_path, oracle=["--condition-on-labels"], input=[*small_data, "--num-epochs", 40]) as three:
        three.start()
        assert three.wait_for_input(60) == 0, three.log("input")
        weights, row = read_snapshot(snapshots(three.progress)[-1])
        _, _, x, y = load_data(*small_data)
        layers = layers_from_weights(weights)
        h = feed_forward(layers[:1], x)
        g = backprop(layers[1:], loss_gradient(feed_forward(layers[1:], h), y))
        guess, _ = OracleClient(f"127.0.0.1:{three.port('oracle')}").estimate_gradients(h, y)
    cosines = [a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in zip(guess, g)]
    assert row["gradient_cosine"] == pytest.approx(np.mean(cosines), abs=0.1)  # the oracle has learned a little since
    assert row["gradient_cosine"] > 0.25


def test_classes_are_learned(tmp_path, small_digits):
    with Three(tmp_path, oracle=["--layers", 32, 32, "--condition-on-labels", 10], output=["--layers", 32, 10],
               input=[*small_digits, "--layers", 784, 32, "--learning-rate", 0.1, "--momentum", 0.9, "--num-epochs", 20]) as three:
        three.start()
        assert three.wait_for_input(60) == 0, three.log("input")
    assert three.metrics("test_error")[0] > 0.7 and three.metrics("test_error")[-1] < 0.3


def test_counters_are_what_was_thrown_and_ctrl_c_writes_a_last_snapshot(tmp_path, small_data):
    with Three(tmp_path, input=[*small_data, "--num-epochs", 10**6]) as three:
        three.start()
        wait_until(lambda: (three.status("input") or {}).get("examples", 0) > 20_000, "20,000 examples")
        assert end(three.processes["input"], signal.SIGINT) == 130, three.log("input")
        weights, row = read_snapshot(snapshots(three.progress)[-1])
        (w, _), = weights[:1]
        thrown = 100 * row["updates"]  # each minibatch once, on a run that never waited; the last of an epoch is whole, too
        assert row["examples"] == three.metrics("examples")[-1] == thrown > 20_000
        wait_until(lambda: three.status("output")["examples"]["received"] >= thrown, "what was thrown to arrive")
        wait_until(lambda: three.status("oracle")["examples"]["received"] >= thrown, "the gradients to arrive")
        assert three.status("output")["examples"]["received"] == three.status("oracle")["examples"]["received"] == thrown
        assert three.status("output")["gradients"] == {"thrown": thrown, "sent": thrown, "dropped": 0}
        assert json.loads((three.progress / "run.json").read_text())["ended"] == "stopped"
        assert end(three.processes["output"], signal.SIGINT) == 130 and end(three.processes["oracle"]) == 0
    assert not any("Traceback" in three.log(name) for name in three.commands)


@pytest.mark.parametrize("layers, data, message", [
    ([2, 8], "small_data", "the --layers of train_output.py begin with 24, ours end with 8"),
    ([3, 24], "small_data", "begins with 3, but x has 2 columns"),
    ([784, 24], "small_digits", "ends with 1, but y holds labels of 10 classes"),
    ([2, 24], "small_data", "oracle.py was started with --condition-on-labels 10; y has a width of 1")])
def test_processes_that_do_not_fit_say_so(layers, data, message, ill_fitting, request, tmp_path):
    process = start(*ill_fitting.commands["input"], *request.getfixturevalue(data), "--layers", *layers, log=tmp_path / "log")
    assert process.wait(60) == 2
    assert message in (tmp_path / "log").read_text() and "Traceback" not in (tmp_path / "log").read_text()


@pytest.fixture(scope="module")
def ill_fitting(tmp_path_factory):
    """An output trainer for numbers, and an oracle that wants to see ten classes."""
    with Three(tmp_path_factory.mktemp("ill"), oracle=["--condition-on-labels", 10]) as three:
        yield three.start("oracle", "output")


@pytest.mark.parametrize("who", ["output", "oracle"])
def test_whoever_diverges_says_so_and_stops_before_the_others_are_poisoned(who, tmp_path, small_data):
    with Three(tmp_path, input=[*small_data, "--num-epochs", 10**6], **{who: ["--learning-rate", 1e5]}) as three:
        three.start()
        assert three.processes[who].wait(60) == 1
        assert "diverged; try a lower --learning-rate" in three.log(who) and "Traceback" not in three.log(who)
        ((w, b),), _ = LayerClient(f"127.0.0.1:{three.port('input')}").weights([2, 24])
        assert max(np.abs(w).max(), np.abs(b).max()) < 100
        assert all(process.poll() is None for name, process in three.processes.items() if name != who)


@pytest.mark.parametrize("script", ["generate.py", "sgd.py", "oracle.py", "train_output.py", "train_input.py", "plot.py"])
def test_help_explains_and_an_unknown_option_is_one_clear_error(script, tmp_path):
    assert start(script, "--help", log=tmp_path / "help").wait(60) == 0
    text = (tmp_path / "help").read_text()
    assert "python " + script in text and len(text.splitlines()) > 8
    assert start(script, "--no-such-option", log=tmp_path / "error").wait(60) == 2
    error = (tmp_path / "error").read_text()
    assert "unrecognized arguments: --no-such-option" in error or "arguments are required: x.npy, y.npy" in error
    assert "Traceback" not in (tmp_path / "error").read_text()


def test_a_port_in_use_and_a_bad_option_are_one_line_and_exit_code_2(tmp_path, small_data):
    port = free_ports(1)[0]
    first = start("train_output.py", "--port", port, log=tmp_path / "first", cwd=tmp_path)
    try:
        wait_until(lambda: "answers on" in (tmp_path / "first").read_text(), "the port to be taken")
        elsewhere = ["--progress-dir", "elsewhere"]
        for script, extra in (("train_output.py", elsewhere), ("oracle.py", []), ("train_input.py", small_data)):
            assert start(script, *extra, "--port", port, log=tmp_path / script, cwd=tmp_path).wait(60) == 2
            text = (tmp_path / script).read_text()
            assert f"cannot listen on 127.0.0.1:{port}" in text and len(text.splitlines()) == 1
        assert start("train_output.py", log=tmp_path / "second", cwd=tmp_path).wait(60) == 2  # and touches no checkpoint
        assert "another process is writing to output_progress" in (tmp_path / "second").read_text()
    finally:
        end(first)
    for bad in (["--layers", "24"], ["--layers", "0", "1"], ["--batch-size", "0"], ["--learning-rate", "-1"],
                ["--port", "99999"], ["--decay", "0"], ["--keep", "0"], ["--replay", "-1"], ["--replay", "nan"],
                ["--momentum", "nan"], ["--oracle-server", "ftp://x"]):
        assert start("train_output.py", *bad, log=tmp_path / "bad", cwd=tmp_path).wait(60) == 2
    assert "Traceback" not in (tmp_path / "bad").read_text()
