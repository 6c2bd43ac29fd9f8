"""The processes together: what they learn, what they say when something does not fit, and how they
stop."""
import contextlib
import json
import signal

import numpy as np
import pytest

from plumbing import data
from plumbing.runs import read_snapshot, snapshots
from sgd import (
    HIDDEN,
    NUMBER,
    backprop,
    descend,
    feed_forward,
    layers_from_weights,
    make_layers,
    minibatches,
    schedule,
    task_of,
)
from sgd import test_score as score
from synthgrad import OracleClient
from tests.processes import Three, end, free_ports, start, wait_until

pytestmark = pytest.mark.processes
RATES = ["--learning-rate", 0.5, "--momentum", 0.9, "--decay", 60]


def equals_backprop(loaded, progress, parts, warm_ups):
    """Whether the run's last snapshot is what backprop and descent give in one process."""
    layers = [layer for part in parts for layer in part]
    for clock, i in enumerate(minibatches(len(loaded.x), 100, 2, seed=0)):
        backprop(layers, NUMBER.loss_gradient(feed_forward(layers, loaded.x[i]), loaded.y[i]))
        for part, warm_up in zip(parts, warm_ups, strict=True):
            descend(part, schedule(0.5, 60, warm_up)(clock), 0.9)
    weights, row, _ = read_snapshot(snapshots(progress)[-1])
    assert row["examples"] == 2 * len(loaded.x)
    for layer, (w, b) in zip(layers, weights, strict=True):
        np.testing.assert_allclose(layer.w, w, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(layer.b, b, rtol=1e-4, atol=1e-5)
    reached = score(layers, loaded.x_test, loaded.y_test)
    assert row["test_mse"] == pytest.approx(reached, rel=1e-3)
    return True


def test_true_gradients_over_the_wire_equal_backprop_in_one_process(tmp_path, small_data):
    """With momentum, warm-up and decay on both sides; and no oracle, because nobody needs it."""
    with Three(tmp_path, gradients="true", output=[*RATES, "--replay", 0], input=[
            *small_data, *RATES, "--num-epochs", 2, "--warm-up", 9]) as three:
        three.start()
        assert three.wait_for_input(60) == 0, three.log("input")
    parts = [make_layers([2, 24], np.random.default_rng([0, 1]), last=HIDDEN),
             make_layers([24, 12, 1], np.random.default_rng([0, 2]), input_mean=0.5)]
    assert equals_backprop(data.load(*small_data), three.progress, parts, [9, 0])
    (w1, _), (w2, _), _ = read_snapshot(snapshots(three.progress)[0])[0]
    assert abs(np.corrcoef(w1.ravel(), w2.ravel()[:w1.size])[0, 1]) < 0.5, "streams of their own"


def test_true_gradients_through_a_chain_of_three_equal_backprop_in_one_process(
        tmp_path, small_data):
    a, b, c = free_ports(3)
    true, below = ["--gradients", "true"], "--output-server"
    commands = {
        "output": ["train_output.py", "--port", a, "--oracle-server", "none", "--layers", 12, 1,
                   "--replay", 0],
        "middle": ["train_middle.py", "--port", b, below, f"127.0.0.1:{a}", *true, "--warm-up", 9,
                   "--lower-oracle-server", "none"],
        "input": ["train_input.py", *small_data, "--port", c, below, f"127.0.0.1:{b}", *true,
                  "--num-epochs", 2, "--warm-up", 9]}
    with contextlib.ExitStack() as stack:
        processes = {}
        for name in ("input", "middle", "output"):  # the wrong way round: each waits for the next
            processes[name] = start(*commands[name], *RATES, "--progress-dir", tmp_path / name,
                                    log=tmp_path / f"{name}.log")
            stack.callback(end, processes[name])
        wait_until(lambda: processes["input"].poll() is not None, "the run to end")
        logs = {name: (tmp_path / f"{name}.log").read_text() for name in commands}
        assert processes["input"].returncode == 0, logs["input"]
        assert [end(processes[name]) for name in ("middle", "output")] == [0, 0], logs
    middle = np.random.default_rng([0, 6, 24, 12])
    parts = [make_layers([2, 24], np.random.default_rng([0, 1]), last=HIDDEN),
             make_layers([24, 12], middle, last=HIDDEN, input_mean=0.5),
             make_layers([12, 1], np.random.default_rng([0, 2]), input_mean=0.5)]
    assert equals_backprop(data.load(*small_data), tmp_path / "input", parts, [9, 9, 0])
    assert (tmp_path / "middle" / "checkpoint.npz").exists()


def test_guesses_teach_layer_1_where_it_must_learn(tmp_path, noisy_data):
    """With zero gradients this network does no better than a constant guess: test_in_process.py."""
    with Three(tmp_path, oracle=["--layers", 8, 32, 8, "--condition-on-labels"],
               output=["--layers", 8, 64, 1], input=[
                   *noisy_data, "--layers", 10, 8, "--warm-up", 100, "--num-epochs", 2]) as three:
        three.start("input", "output", "oracle")  # the wrong way round
        assert three.wait_for_input(120) == 0, three.log("input")
        assert [end(three.processes[name]) for name in ("output", "oracle")] == [0, 0]
    assert "waiting for the " in three.log("input")
    assert not any("Traceback" in three.log(name) for name in three.commands)
    reached, cosine = three.metrics("test_mse")[-1], three.metrics("gradient_cosine")[-1]
    constant = data.constant_guess(data.load(*noisy_data), task_of)
    assert reached < 0.8 * constant and cosine > 0.3, (reached, cosine)


@pytest.mark.parametrize("gradients", ["delayed", "local"])
def test_layer_1_learns_without_an_oracle(gradients, tmp_path, noisy_data):
    """With zero gradients this network does no better than a constant guess: test_in_process.py."""
    with Three(tmp_path, gradients=gradients, output=["--layers", 8, 64, 1], input=[
            *noisy_data, "--layers", 10, 8, "--num-epochs", 2]) as three:
        three.start()
        assert three.wait_for_input(60) == 0, three.log("input")
        reached = three.metrics("test_mse")[-1]
        assert reached < 0.8 * data.constant_guess(data.load(*noisy_data), task_of), reached


def test_delayed_gradients_come_back_soon_also_after_a_stall_and_none_is_skipped(
        tmp_path, small_data):
    with Three(tmp_path, gradients="delayed",
               input=[*small_data, "--num-epochs", 10**6]) as three:
        three.start()
        wait_until(lambda: three.updates() > 300, "training")

        def behind():
            """How many minibatches the output trainer is behind."""
            return three.updates() - three.status("output")["trained"][1]
        before = np.median([behind() for _ in range(9)])
        assert three.status("input")["staleness"] <= 8
        three.processes["output"].send_signal(signal.SIGSTOP)
        wait_until(lambda: "waiting for the part above" in three.log("input"), "a stall of 1 s")
        stalled = three.updates()
        three.processes["output"].send_signal(signal.SIGCONT)
        wait_until(lambda: three.updates() > stalled + 20 and behind() <= before + 2,
                   "the delay to fall again", timeout=2)
        wait_until(lambda: three.updates() > stalled + 100, "training")
        assert three.status("input")["staleness"] <= 8
        assert three.status("output")["skipped"] == 0


@pytest.mark.parametrize("batch_size, minibatches", [(1000, 4), (700, 6)])
def test_each_delayed_minibatch_is_one_update_above_whatever_its_size(
        batch_size, minibatches, tmp_path, small_data):
    with Three(tmp_path, gradients="delayed", output=["--replay", 0], input=[
            *small_data, "--batch-size", batch_size, "--num-epochs", 10]) as three:
        three.start()
        assert three.wait_for_input(60) == 0, three.log("input")
        wait_until(lambda: three.updates("output") >= 10 * minibatches, "the last ones")
        status = three.status("output")
    assert status["updates"] == 10 * minibatches == three.metrics("updates")[-1]
    assert status["examples"]["received"] == 10 * 3800


@pytest.mark.parametrize("gradients", ["synthetic", "local"])
def test_classes_are_learned(gradients, tmp_path, small_digits):
    with Three(tmp_path, gradients=gradients,
               oracle=["--layers", 32, 32, "--condition-on-labels", 10],
               output=["--layers", 32, 10], input=[
                   *small_digits, "--layers", 784, 32, "--learning-rate", 0.1, "--momentum", 0.9,
                   "--warm-up", 0, "--num-epochs", 12]) as three:
        three.start()
        assert three.wait_for_input(60) == 0, three.log("input")
    assert three.metrics("test_error")[0] > 0.7 and three.metrics("test_error")[-1] < 0.3


def test_an_interrupted_run_writes_a_last_snapshot_and_all_counters_and_its_cosine_are_true(
        tmp_path, small_data):
    with Three(tmp_path, oracle=["--condition-on-labels"],
               input=[*small_data, "--num-epochs", 10**6, "--staleness", 200]) as three:
        three.start()
        wait_until(lambda: (three.status("input") or {}).get("examples", 0) > 40_000, "training")
        assert end(three.processes["input"], signal.SIGINT) == 130, three.log("input")
        weights, row, _ = read_snapshot(snapshots(three.progress)[-1])
        thrown = 100 * row["updates"]  # each minibatch once; the last of an epoch is whole, too
        assert row["examples"] == three.metrics("examples")[-1] == thrown > 40_000

        def received():
            output, oracle = three.status("output"), three.status("oracle")
            told = thrown - 100 * output["skipped"]
            return (output["examples"]["received"] == thrown
                    and output["gradients_sent"]["sent"] == oracle["examples"]["received"] == told)
        wait_until(received, "what was thrown to arrive, and what was not skipped to be told")
        assert "interrupted; --resume continues" in three.log("input")
        assert json.loads((three.progress / "run.json").read_text())["ended"] == "stopped"
        loaded, layers = data.load(*small_data), layers_from_weights(weights)
        h = feed_forward(layers[:1], loaded.x_test)
        y_hat = feed_forward(layers[1:], h)
        g = backprop(layers[1:], NUMBER.loss_gradient(y_hat, loaded.y_test))
        client = OracleClient(f"127.0.0.1:{three.port('oracle')}")
        guess, _ = client.estimate_gradients(h, loaded.y_test)
        assert end(three.processes["output"], signal.SIGINT) == 130
        assert end(three.processes["oracle"]) == 0
    assert not any("Traceback" in three.log(name) for name in three.commands)
    cosines = [a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
               for a, b in zip(guess, g, strict=True)]
    # the oracle has learned a little since
    assert row["gradient_cosine"] == pytest.approx(np.mean(cosines), abs=0.1)
    assert row["gradient_cosine"] > 0.25


@pytest.mark.parametrize("who", ["output", "oracle"])
def test_whoever_diverges_says_so_and_stops_before_the_others_are_poisoned(
        who, tmp_path, small_data):
    with Three(tmp_path, input=[*small_data, "--num-epochs", 10**6, "--snapshot-seconds", 0],
               **{who: ["--learning-rate", 1e5]}) as three:
        three.start()
        assert three.processes[who].wait(60) == 1
        assert "diverged; try a lower --learning-rate" in three.log(who)
        assert "Traceback" not in three.log(who)
        others = [process for name, process in three.processes.items() if name != who]
        assert all(process.poll() is None for process in others)
        assert end(three.processes["input"]) == 0
    (w, b), *_ = read_snapshot(snapshots(three.progress)[-1])[0]
    assert max(np.abs(w).max(), np.abs(b).max()) < 100
    with np.load(three.progress / "checkpoint.npz") as checkpoint:  # of after it diverged
        assert np.abs(checkpoint["w0"]).max() < 100 and checkpoint["updates"] > 0


@pytest.mark.parametrize("script", ["generate.py", "sgd.py", "oracle.py", "train_output.py",
                                    "train_middle.py", "train_input.py", "plot.py",
                                    "examples/in_process.py"])
def test_help_explains_and_an_unknown_option_is_one_clear_error(script, tmp_path):
    assert start(script, "--help", log=tmp_path / "help").wait(60) == 0
    text = (tmp_path / "help").read_text()
    assert "python " + script in text and len(text.splitlines()) > 8
    assert start(script, "--no-such-option", log=tmp_path / "error").wait(60) == 2
    error = (tmp_path / "error").read_text()
    assert "unrecognized arguments: --no-such-option" in error or "are required: x.npy" in error
    assert "Traceback" not in error


def test_a_port_in_use_is_one_line_and_exit_code_2(tmp_path, small_data):
    port, = free_ports(1)
    first = start("train_output.py", "--port", port, log=tmp_path / "first", cwd=tmp_path)
    try:
        wait_until(lambda: "answers on" in (tmp_path / "first").read_text(), "the first")
        for script, extra in (("train_output.py", ["--progress-dir", "elsewhere"]),
                              ("oracle.py", []), ("train_input.py", small_data)):
            log = tmp_path / script
            assert start(script, *extra, "--port", port, log=log, cwd=tmp_path).wait(60) == 2
            line, = log.read_text().splitlines()
            assert f"cannot listen on 127.0.0.1:{port}" in line
    finally:
        end(first)


def test_two_middle_trainers_in_a_cycle_are_one_clear_error_of_each(tmp_path):
    ports, processes = free_ports(2), []
    try:
        for mine, above in zip(ports, reversed(ports), strict=True):
            processes.append(start(
                "train_middle.py", "--gradients", "local", "--layers", 24, 24, "--port", mine,
                "--output-server", f"127.0.0.1:{above}", "--lower-oracle-server", "none",
                "--progress-dir", tmp_path / f"{mine}", log=tmp_path / f"{mine}.log"))
        for port, process in zip(ports, processes, strict=True):
            assert process.wait(20) == 2
            line = (tmp_path / f"{port}.log").read_text().splitlines()[-1]
            assert "has this process above it" in line
    finally:
        for process in processes:
            end(process)


def test_an_oracle_in_place_of_the_part_above_is_one_clear_error(tmp_path, small_data):
    oracle, mine = free_ports(2)
    process = start("oracle.py", "--port", oracle, log=tmp_path / "oracle")
    try:
        trainer = start("train_input.py", *small_data, "--port", mine, "--gradients", "local",
                        "--output-server", f"127.0.0.1:{oracle}", cwd=tmp_path,
                        log=tmp_path / "log")
        assert trainer.wait(60) == 2
        assert "the process there is an oracle. --output-server names the part above" in (
            (tmp_path / "log").read_text().splitlines()[-1])
    finally:
        end(process)
