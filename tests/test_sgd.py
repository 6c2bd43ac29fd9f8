"""The layers, the losses, the loop, and the plain baseline."""
import argparse
import re
import subprocess
import sys

import numpy as np
import pytest

import sgd
from generate import sample, target
from plumbing import data, runs
from sgd import (
    HIDDEN,
    Layer,
    Linear,
    Sigmoid,
    Softmax,
    backprop,
    descend,
    feed_forward,
    layers_from_weights,
    make_layers,
    minibatches,
    schedule,
    task_of,
    train,
)
from sgd import test_score as score
from tests.processes import ROOT
from tests.test_in_process import same, trained


def loss_gradient(y_hat, y):
    return task_of(y.shape[1]).loss_gradient(y_hat, y)


def mean_loss(layers, x, y):
    return float(task_of(y.shape[1]).loss(feed_forward(layers, x), y).mean())


# ---- what a reader adds: a loss and an activation ----


class Huber(sgd.MeanSquare):
    """L = ½ e² where |e| < ½, else ½ (|e| − ¼), of e = ŷ − y."""
    score, label = "test_huber", "held-out Huber loss"

    @staticmethod
    def loss(y_hat, y):
        e = np.abs(y_hat - y)[:, 0]
        return np.where(e < 0.5, 0.5 * e**2, 0.5 * (e - 0.25))

    @staticmethod
    def loss_gradient(y_hat, y):
        return np.clip(y_hat - y, -0.5, 0.5)

    @staticmethod
    def test(y_hat, y):
        return float(Huber.loss(y_hat, y).mean())


class ReLU:
    gain, mean = np.sqrt(2), 0

    @staticmethod
    def activate(z):
        return np.maximum(z, 0)

    @staticmethod
    def backprop(h, g):
        return g * (h > 0)


@pytest.fixture
def added(monkeypatch):
    """A loss and an activation that sgd.py does not have, in the places where it looks for them."""
    monkeypatch.setattr(sgd, "NUMBER", Huber)
    monkeypatch.setattr(sgd, "HIDDEN", ReLU)


def test_a_network_with_a_loss_and_an_activation_from_outside_is_trained(
        added, tmp_path, small_data, monkeypatch):
    run_sgd(monkeypatch, *small_data, "--num-epochs", 8, "--learning-rate", 0.3, "--batch-size", 4,
            "--progress-dir", tmp_path / "run")
    reached = runs.read_metrics(tmp_path / "run")["test_huber"]
    assert reached[-1] < 0.25 * runs.read_json(tmp_path / "run" / "run.json")["constant_guess"]


def test_they_are_trained_in_parts_too(added, loaded):
    """By examples/in_process.py, whose true gradients are those of the whole network."""
    layers = trained(
        loaded, "--gradients", "true", "--cuts", 1, 2, "--replay", 0, "--num-epochs", 2, "--decay",
        200_000, "--learning-rate", 0.1, "--output-rate", 0.1, "--momentum", 0,
        "--output-momentum", 0)
    expected = make_layers([2, 24, 12, 1], np.random.default_rng([0, 1]))
    before = score(expected, loaded.x_test, loaded.y_test)
    order = minibatches(len(loaded.x), 100, 2, seed=0)
    for _ in train(expected, loaded.x, loaded.y, order, schedule(0.1, 200_000), 0.0):
        pass
    assert same(layers, expected, atol=1e-6)
    assert score(layers, loaded.x_test, loaded.y_test) < 0.7 * before
    assert [layer.activation for layer in layers] == [ReLU, ReLU, Linear]


@pytest.fixture(params=["a number, squared error", "four classes, cross-entropy",
                        "a number, Huber's loss, ReLUs"])
def network(request):
    """A small network in float64, so that finite differences are exact enough, a batch of 7."""
    rng, k = np.random.default_rng(1), 4 if "four" in request.param else 1
    if "Huber" in request.param:
        request.getfixturevalue("added")
    layers = make_layers([2, 5, 3, k], rng)
    for layer in layers:
        layer.w, layer.b = layer.w.astype(float), rng.normal(size=layer.b.shape)
    y = rng.normal(size=(7, 1)) if k == 1 else np.eye(k)[rng.integers(k, size=7)]
    return layers, rng.normal(size=(7, 2)), y


def test_backprop_matches_finite_differences(network):
    layers, x, y = network
    g = backprop(layers, loss_gradient(feed_forward(layers, x), y))
    epsilon = 1e-6
    for layer in layers:
        for array, gradient in ((layer.w, layer.dL_dw), (layer.b, layer.dL_db)):
            for index in np.ndindex(array.shape):
                before = array[index]
                array[index] = before + epsilon
                above = mean_loss(layers, x, y)
                array[index] = before - epsilon
                below = mean_loss(layers, x, y)
                array[index] = before
                assert gradient[index] == pytest.approx((above - below) / (2 * epsilon), abs=1e-8)
    for index in np.ndindex(x.shape):  # dL/dx is per example: the mean divides it by the batch
        moved = x.copy()
        moved[index] += epsilon
        above = mean_loss(layers, moved, y)
        moved[index] -= 2 * epsilon
        slope = (above - mean_loss(layers, moved, y)) / (2 * epsilon)
        assert g[index] / len(x) == pytest.approx(slope, abs=1e-8)


@pytest.mark.parametrize("size", [2, None])
def test_the_gradient_of_a_batch_is_the_mean_of_its_examples(size, network):
    layers, x, y = network
    x, y, singles = x[:size], y[:size], []
    for k in range(len(x)):
        backprop(layers, loss_gradient(feed_forward(layers, x[k:k + 1]), y[k:k + 1]))
        singles.append([layer.dL_dw for layer in layers])
    backprop(layers, loss_gradient(feed_forward(layers, x), y))
    for layer, one_by_one in zip(layers, zip(*singles, strict=True), strict=True):
        np.testing.assert_allclose(layer.dL_dw, np.mean(one_by_one, axis=0))


def test_momentum_accumulates_past_gradients_of_weights_and_biases():
    layer = Layer(np.zeros((1, 1), "f"), np.zeros(1, "f"), Linear)
    for _ in range(2):
        layer.dL_dw, layer.dL_db = np.ones((1, 1), "f"), np.full(1, 2, "f")
        descend([layer], 1.0, momentum=0.5)
    assert layer.w[0, 0] == pytest.approx(-(1 + 1.5))
    assert layer.b[0] == pytest.approx(-2 * (1 + 1.5))


def test_momentum_never_changes_the_velocities_in_place():
    """A checkpoint's arrays, or a copy of the layer, may share them."""
    layer = Layer(np.zeros((1, 1), "f"), np.zeros(1, "f"), Linear)
    velocity = layer.w_velocity
    layer.dL_dw, layer.dL_db = np.ones((1, 1), "f"), np.ones(1, "f")
    descend([layer], 1.0, momentum=0.5)
    assert velocity[0, 0] == 0 and layer.w_velocity[0, 0] == 1


def test_sigmoid_neither_overflows_nor_warns():
    with np.errstate(all="raise"):
        large = np.array([-1e4, 0, 1e4], "f")
        np.testing.assert_allclose(Sigmoid.activate(large), [0, 0.5, 1])


def test_softmax_neither_overflows_nor_returns_zero_nor_depends_on_a_constant():
    z = np.array([[1e4, 1e4, -1e4], [1, 2, 3]], "f")
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        h = Softmax.activate(z)
        assert np.isfinite(np.log(h)).all() and h.dtype == np.float32
    np.testing.assert_allclose(h[0], [0.5, 0.5, 0], atol=1e-6)
    np.testing.assert_allclose(h.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(Softmax.activate(z[1:] + 64), h[1:], rtol=1e-5)


def test_backprop_through_softmax_and_cross_entropy_is_y_hat_minus_y():
    z = np.random.default_rng(0).normal(size=(5, 3))
    y = np.eye(3)[[0, 1, 2, 0, 1]]
    y_hat = Softmax.activate(z)
    np.testing.assert_allclose(Softmax.backprop(y_hat, loss_gradient(y_hat, y)), y_hat - y)


def test_what_is_reported_is_the_mse_or_the_share_of_wrong_classes():
    layers, y = [Layer(np.eye(3, dtype="f"), np.zeros(3, "f"), Linear)], np.eye(3, dtype="f")
    assert score(layers, y[[0, 1, 2, 0]], y[[0, 1, 2, 2]]) == 0.25
    one = [Layer(np.ones((1, 1), "f"), np.zeros(1, "f"), Linear)]
    assert score(one, np.array([[1.0], [2]]), np.array([[1.0], [4]])) == 2


@pytest.mark.parametrize("k, last", [(1, Linear), (3, Softmax)])
def test_layers_from_weights_compute_what_the_layers_did(k, last):
    layers = make_layers([2, 4, k], np.random.default_rng(0))
    again = layers_from_weights([(layer.w, layer.b) for layer in layers])
    x = np.random.default_rng(1).normal(size=(6, 2)).astype("f")
    np.testing.assert_array_equal(feed_forward(again, x), feed_forward(layers, x))
    assert [layer.activation for layer in again] == [HIDDEN, last]


def test_deep_stacks_pass_a_signal_on():
    """What a layer's activations vary by over examples neither vanishes nor saturates."""
    x = np.random.default_rng(0).uniform(-1, 1, (500, 64)).astype("f")
    layers = make_layers([64] * 8, np.random.default_rng(1), last=HIDDEN)
    assert 0.1 < feed_forward(layers, x).std(axis=0).mean() < 0.5
    assert {array.dtype for layer in layers for array in (layer.w, layer.b)} == {np.dtype("f")}
    h = Sigmoid.activate(x)
    upper = make_layers([64, 64], np.random.default_rng(1), last=HIDDEN, input_mean=h.mean())
    assert abs(feed_forward(upper, h).mean() - 0.5) < 0.05


def test_minibatches_visit_every_example_once_an_epoch_and_can_be_resumed():
    order = list(minibatches(10, 4, num_epochs=3, seed=5))
    assert [len(i) for i in order] == [4, 4, 2] * 3
    epochs = np.concatenate(order).reshape(3, 10)
    assert (np.sort(epochs) == np.arange(10)).all()
    resumed = list(minibatches(10, 4, num_epochs=3, seed=5, skip=14))
    assert all((mine == theirs).all() for mine, theirs in zip(resumed, order[4:], strict=True))


def test_every_epoch_and_every_seed_has_another_order():
    orders = [tuple(np.concatenate(list(minibatches(50, 50, 3, seed))).reshape(3, 50)[epoch])
              for seed in (0, 1) for epoch in range(3)]
    assert len(set(orders)) == 6


def test_the_rate_of_the_decoupled_trainers_warms_up_and_halves_after_decay_updates():
    rate = schedule(3.0, decay=100, warm_up=9)
    assert rate(0) == pytest.approx(0.3) and rate(4) == pytest.approx(1.5 / 1.04)
    assert rate(100) == pytest.approx(1.5) and rate(300) == pytest.approx(0.75)
    assert schedule(3.0, decay=100)(0) == 3.0


def test_train_descends_with_the_rate_of_each_clock():
    x, y, asked = np.ones((4, 1), "f"), np.zeros((4, 1), "f"), []

    def rate(clock):
        asked.append(clock)
        return 0.5 ** (clock + 1)
    layer = Layer(np.ones((1, 1), "f"), np.zeros(1, "f"), Linear)
    assert list(train([layer], x, y, minibatches(4, 2, 1, seed=0), rate, 0.0)) == [2, 2]
    assert asked == [0, 1]
    # w + b, what the network says, is halved twice: first by 2 · 0.5 of itself, to zero
    assert layer.w[0, 0] + layer.b[0] == pytest.approx(0)


def test_target_has_the_stated_variance():
    x = sample(100_000, 3)[0].astype(float)
    assert target(x).var() == pytest.approx(0.161, abs=0.002)


def run_sgd(monkeypatch, *args):
    """`python sgd.py ARGS` in this process."""
    monkeypatch.setattr(sys, "argv", ["sgd.py", *map(str, args)])
    sgd.main()


def test_sgd_learns_and_writes_metrics_and_snapshots(tmp_path, small_data, monkeypatch, capsys):
    run_sgd(monkeypatch, *small_data, "--num-epochs", 8, "--learning-rate", 0.3, "--batch-size", 4,
            "--progress-dir", tmp_path / "run")
    rows = runs.read_rows(tmp_path / "run")
    assert [int(row["epoch"]) for row in rows] == list(range(1, 9))
    assert [int(row["examples"]) for row in rows] == [3800 * n for n in range(1, 9)]
    assert float(rows[-1]["test_mse"]) < 0.1 < 0.15 < float(rows[0]["test_mse"])
    assert 0 < float(rows[0]["seconds"]) < float(rows[-1]["seconds"]) < 60
    assert re.search(r"^8 epochs in \d\d? s: .*metrics.csv$", capsys.readouterr().out, re.M)
    weights, row, _ = runs.read_snapshot(runs.snapshots(tmp_path / "run")[-1])
    loaded = data.load(*small_data)
    reached = score(layers_from_weights(weights), loaded.x_test, loaded.y_test)
    assert reached == pytest.approx(row["test_mse"])
    assert runs.read_json(tmp_path / "run" / "run.json")["ended"] == "finished"


def test_sgd_is_its_own_loop_with_a_rate_that_decays(tmp_path, small_data, monkeypatch):
    run_sgd(monkeypatch, *small_data, "--num-epochs", 3, "--learning-rate", 0.5, "--decay", 40,
            "--batch-size", 100, "--momentum", 0.5, "--seed", 7, "--progress-dir", tmp_path / "run")
    loaded = data.load(*small_data)
    layers = make_layers([2, 24, 12, 1], np.random.default_rng([7, 1]))
    for n, i in enumerate(minibatches(len(loaded.x), 100, 3, seed=7)):
        backprop(layers, loss_gradient(feed_forward(layers, loaded.x[i]), loaded.y[i]))
        descend(layers, 0.5 / (1 + n / 40), 0.5)
    weights, *_ = runs.read_snapshot(runs.snapshots(tmp_path / "run")[-1])
    for layer, (w, b) in zip(layers, weights, strict=True):
        np.testing.assert_array_equal(layer.w, w)
        np.testing.assert_array_equal(layer.b, b)


def test_sgd_that_has_learned_nothing_says_so(tmp_path, small_data, monkeypatch, capsys):
    run_sgd(monkeypatch, *small_data, "--num-epochs", 1, "--learning-rate", 1e-9, "--batch-size",
            100, "--progress-dir", tmp_path / "run")
    assert "no better than" in capsys.readouterr().out


def test_sgd_learns_classes(tmp_path, small_digits, monkeypatch):
    run_sgd(monkeypatch, *small_digits, "--layers", 784, 32, 10, "--num-epochs", 5, "--batch-size",
            20, "--learning-rate", 0.1, "--progress-dir", tmp_path / "run")
    assert runs.read_metrics(tmp_path / "run")["test_error"][-1] < 0.3  # by chance 0.9


def test_sgd_that_diverges_says_so_in_one_line_and_ends_with_code_1(
        tmp_path, small_data, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run_sgd(monkeypatch, *small_data, "--learning-rate", 1e5, "--num-epochs", 2,
                "--progress-dir", tmp_path / "run")
    assert ended.value.code == 1
    assert "diverged in epoch 1; try a lower" in capsys.readouterr().err.splitlines()[-1]
    assert "diverged" in runs.read_json(tmp_path / "run" / "run.json")["ended"]


def test_a_network_without_a_layer_is_refused(tmp_path, small_data, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run_sgd(monkeypatch, *small_data, "--layers", 2, "--progress-dir", tmp_path / "run")
    assert ended.value.code == 2 and "two or more widths" in capsys.readouterr().err


def test_a_network_that_does_not_fit_the_data_is_refused(tmp_path):
    x, y = sample(50, 0)
    wide = x[:, [0, 0, 1]]
    for layers, cure in (([2, 4, 1], "3 4 1"), ([2, 24], "3 24")):  # the latter of train_input.py
        with pytest.raises(ValueError, match=f"x has 3 columns: --layers {cure}$"):
            data.check_columns(data.Data(wide, y[:, None], wide, y[:, None]), layers)
    with pytest.raises(ValueError, match="ends with 10, but y holds numbers: .* with 1"):
        data.check_targets(data.Data(x, y[:, None], x, y[:, None]), 10, "--layers", sgd.task_of)
    classes = np.eye(5, dtype="f")[np.arange(50) % 5]
    with pytest.raises(ValueError, match="ends with 4, but y holds class labels: .* with 5"):
        data.check_targets(data.Data(x, classes, x, classes), 4, "--layers", sgd.task_of)


def test_sgd_with_a_full_disk_ends_with_one_line(tmp_path, small_data, monkeypatch, capsys):
    replace = runs.os.replace

    def full(source, to):
        if "snapshot_000001" in str(to):
            raise OSError(28, "No space left on device")
        return replace(source, to)
    monkeypatch.setattr(runs.os, "replace", full)
    with pytest.raises(SystemExit) as ended:
        run_sgd(monkeypatch, *small_data, "--num-epochs", 3, "--batch-size", 100,
                "--progress-dir", tmp_path / "run")
    assert ended.value.code == 2
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert len(runs.read_rows(tmp_path / "run")) == 1
    assert "No space left" in runs.read_json(tmp_path / "run" / "run.json")["ended"]


def test_run_takes_every_option_from_args_and_changes_none(tmp_path, small_data):
    """A function does not change its args."""
    args = argparse.Namespace(layers=[2, 4, 1], batch_size=100, num_epochs=1, seed=0, decay=9.0,
                              learning_rate=0.1, momentum=0.0)
    before, loaded = dict(vars(args)), data.load(*small_data)
    progress = runs.Progress(tmp_path / "run", ["seconds", "examples", "epoch", "test_mse"], {})
    sgd.run(args, loaded, progress)
    assert vars(args) == before


@pytest.mark.processes
@pytest.mark.parametrize("module", ["sgd", "generate", "plot"])
def test_the_simple_scripts_import_neither_tensorflow_nor_flask(module):
    check = (f"import {module}, sys; "
             "sys.exit(any(name in sys.modules for name in ('tensorflow', 'flask')))")
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0
