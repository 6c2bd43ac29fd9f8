"""The three processes together: what they learn, what they say when something does not fit, and how they stop."""
import signal

import numpy as np
import pytest

from sgd import (Sigmoid, backprop, feed_forward, load_data, make_layers, mean_squared_error, read_snapshot,
                 snapshots)
from synthgrad import LayerClient
from tests.processes import Three, end, free_ports, start, wait_until
from train_input import minibatches


def write(folder, name, array):
    np.save(folder / name, array)
    return folder / name


def test_true_gradients_over_the_wire_equal_backprop_in_one_process(tmp_path, small_data):
    rate = 0.5
    with Three(tmp_path, output=["--learning-rate", rate, "--decay", 1e12],
               input=[*small_data, "--gradients", "true", "--num-epochs", 2, "--learning-rate", rate, "--momentum", 0.9,
                      "--decay", 1e12, "--warm-up", 0]) as three:
        three.start("output", "input")  # no oracle: nobody needs it
        assert three.wait_for_input(60) == 0, three.log("input")
    x, y, x_test, y_test = load_data(*small_data)
    layers = [*make_layers([2, 24], np.random.default_rng(0), last=Sigmoid),
              *make_layers([24, 12, 1], np.random.default_rng(0), input_mean=0.5)]
    order = minibatches(len(x), 100, 0, 0)
    for step in range(2 * len(x) // 100):
        i = next(order)
        backprop(layers, feed_forward(layers, x[i]) - y[i, None])
        for layer in layers:
            layer.descend(rate, 0.9)
    wire, row = read_snapshot(snapshots(three.progress)[-1])
    assert row["examples"] == 2 * len(x)
    for mine, theirs in zip(layers, wire):
        np.testing.assert_allclose(mine.w, theirs.w, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(mine.b, theirs.b, rtol=1e-4, atol=1e-5)
    assert row["test_mse"] == pytest.approx(mean_squared_error(layers, x_test, y_test), rel=1e-3)


def test_synthetic_gradients_beat_the_control_and_nothing_is_left_behind(tmp_path, large_data):
    """The default problem, network and oracle; 30 seconds of training each."""
    reached = {}
    for gradients in ("synthetic", "zero"):
        folder = tmp_path / gradients
        folder.mkdir()
        with Three(folder, input=[*large_data, "--gradients", gradients, "--num-epochs", 1000, "--snapshot-seconds", 2]
                   ) as three:
            three.start("input", "output", "oracle")  # the wrong way round: each waits for whom it needs
            wait_until(lambda: max(three.metrics("seconds"), default=0) > 30, "30 s of training", 120)
            codes = [end(three.processes[name]) for name in ("input", "output", "oracle")]
        assert codes == [0, 0, 0]
        assert "waiting for the o" in three.log("input")
        for name in three.commands:
            assert "Traceback" not in three.log(name)
        reached[gradients] = np.median(three.metrics("test_mse")[-3:])
        assert len(snapshots(three.progress)) == len(three.metrics("seconds"))
    assert reached["synthetic"] < 0.8 * reached["zero"], reached


def test_counters_add_up_and_ctrl_c_writes_a_last_snapshot(tmp_path, small_data):
    with Three(tmp_path, input=[*small_data, "--num-epochs", 10**6]) as three:
        three.start()
        wait_until(lambda: (three.status("input") or {}).get("examples", 0) > 20_000, "20,000 examples")
        assert end(three.processes["input"], signal.SIGINT) == 130, three.log("input")
        output, oracle = three.status("output"), three.status("oracle")
        examples, sent = output["examples"], output["gradients"]
        assert examples["received"] == examples["stored"] + examples["replaced"] + examples["dropped"] > 0
        assert sent["thrown"] == sent["sent"] + sent["replaced"] + sent["dropped"] + sent["waiting"] > 0
        assert oracle["received"] == oracle["stored"] + oracle["dropped"] > 0
        _, row = read_snapshot(snapshots(three.progress)[-1])
        assert row["examples"] == three.metrics("examples")[-1] > 20_000
        assert end(three.processes["output"], signal.SIGINT) == 130 and end(three.processes["oracle"]) == 0
    assert not any("Traceback" in three.log(name) for name in three.commands)


def test_processes_that_do_not_fit_say_so(tmp_path, small_data):
    with Three(tmp_path, output=["--layers", 8, 4, 1], oracle=["--layers", 10, 10], input=[*small_data]) as three:
        three.start()
        assert three.processes["output"].wait(60) == 2 and three.processes["input"].wait(60) == 2
    assert "gradients of 10 activations, but --layers begins with 8" in three.log("output")
    assert "--layers begin with 8, ours end with 24" in three.log("input") or "waiting for" in three.log("input")


@pytest.mark.parametrize("who", ["output", "oracle"])
def test_whoever_diverges_says_so_and_stops_before_the_others_are_poisoned(who, tmp_path, small_data):
    with Three(tmp_path, input=[*small_data, "--num-epochs", 10**6], **{who: ["--learning-rate", 1e5]}) as three:
        three.start()
        assert three.processes[who].wait(60) == 1
        assert "diverged; try a lower --learning-rate" in three.log(who) and "Traceback" not in three.log(who)
        (w, b), = LayerClient(f"127.0.0.1:{three.port('input')}").weights([2, 24])[0]
        assert max(np.abs(w).max(), np.abs(b).max()) < 100
        assert all(process.poll() is None for name, process in three.processes.items() if name != who)


@pytest.mark.parametrize("script", ["generate.py", "sgd.py", "oracle.py", "train_output.py", "train_input.py", "plot.py"])
def test_help_explains_and_an_unknown_option_is_one_clear_error(script, tmp_path):
    assert start(script, "--help", log=tmp_path / "help").wait(60) == 0
    text = (tmp_path / "help").read_text()
    assert "python " + script in text and len(text.splitlines()) > 8
    assert start(script, "--no-such-option", log=tmp_path / "error").wait(60) == 2
    assert "unrecognized arguments: --no-such-option" in (tmp_path / "error").read_text() or script == "sgd.py"
    assert "Traceback" not in (tmp_path / "error").read_text()


@pytest.mark.parametrize("script", ["sgd.py", "train_input.py"])
@pytest.mark.parametrize("x, y, message", [
    (None, None, "generate.py"),
    (b"not numpy", np.zeros(50), "expected a NumPy .npy file"),
    (np.array([{}] * 50), np.zeros(50), "expected a NumPy .npy file"),
    (np.zeros((50, 2)), np.zeros(49), "expected (n, columns) and (n,)"),
    (np.zeros((50, 3)), np.zeros(50), "3"),
    (np.full((50, 2), np.nan), np.zeros(50), "NaN or infinity")])
def test_bad_data_is_one_line_and_exit_code_2(script, x, y, message, tmp_path):
    paths = []
    for name, content in (("x.npy", x), ("y.npy", y)):
        paths.append(tmp_path / name)
        if isinstance(content, bytes):
            paths[-1].write_bytes(content)
        elif content is not None:
            np.save(paths[-1], content, allow_pickle=True)
    process = start(script, *paths, "--progress-dir", tmp_path / "run", log=tmp_path / "log")
    assert process.wait(60) == 2
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert message in last and "Traceback" not in (tmp_path / "log").read_text()


def test_a_port_in_use_and_a_bad_option_are_one_line_and_exit_code_2(tmp_path, small_data):
    port = free_ports(1)[0]
    first = start("train_output.py", "--port", port, log=tmp_path / "first")
    try:
        wait_until(lambda: "answers on" in (tmp_path / "first").read_text(), "the port to be taken")
        for script, extra in (("train_output.py", []), ("oracle.py", []), ("train_input.py", small_data)):
            assert start(script, *extra, "--port", port, log=tmp_path / script).wait(60) == 2
            text = (tmp_path / script).read_text()
            assert f"cannot listen on 127.0.0.1:{port}" in text and len(text.splitlines()) == 1
    finally:
        end(first)
    for bad in (["--layers", "24"], ["--layers", "0", "1"], ["--batch-size", "0"], ["--learning-rate", "-1"],
                ["--port", "99999"], ["--layers", "24", "12", "2"], ["--decay", "0"], ["--keep", "0"],
                ["--momentum", "nan"], ["--oracle-server", "ftp://x"]):
        assert start("train_output.py", *bad, log=tmp_path / "bad").wait(60) == 2
    assert "Traceback" not in (tmp_path / "bad").read_text()
