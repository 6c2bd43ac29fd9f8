"""The layers, the files that a run writes, and the plain baseline."""
import csv
import subprocess
import sys

import numpy as np
import pytest

import sgd
from generate import sample, target
from sgd import Layer, Linear, Sigmoid, backprop, feed_forward, make_layers
from tests.processes import ROOT, start


def half_squared_error(layers, x, y):
    return float(np.mean(0.5 * (feed_forward(layers, x)[:, 0] - y) ** 2))


@pytest.fixture
def network():
    """A small network in float64, so that finite differences are exact enough, and a batch of 7."""
    rng = np.random.default_rng(1)
    layers = make_layers([2, 5, 3, 1], rng)
    for layer in layers:
        layer.w, layer.b = layer.w.astype(float), rng.normal(size=layer.b.shape)
    return layers, rng.normal(size=(7, 2)), rng.normal(size=7)


def test_backprop_matches_finite_differences(network):
    layers, x, y = network
    g = backprop(layers, feed_forward(layers, x) - y[:, None])
    epsilon = 1e-6
    for layer in layers:
        for array, gradient in ((layer.w, layer.dL_dw), (layer.b, layer.dL_db)):
            for index in np.ndindex(array.shape):
                before = array[index]
                array[index] = before + epsilon
                above = half_squared_error(layers, x, y)
                array[index] = before - epsilon
                below = half_squared_error(layers, x, y)
                array[index] = before
                assert gradient[index] == pytest.approx((above - below) / (2 * epsilon), abs=1e-8)
    for index in np.ndindex(x.shape):  # dL/dx is per example: the loss's mean divides it by the batch
        moved = x.copy()
        moved[index] += epsilon
        above = half_squared_error(layers, moved, y)
        moved[index] -= 2 * epsilon
        assert g[index] / len(x) == pytest.approx((above - half_squared_error(layers, moved, y)) / (2 * epsilon), abs=1e-8)


def test_backprop_matches_keras_gradients():
    import tensorflow as tf
    rng = np.random.default_rng(2)
    layers = make_layers([2, 24, 12, 1], rng)
    x, y = rng.normal(size=(100, 2)).astype("f"), rng.normal(size=100).astype("f")
    g = backprop(layers, feed_forward(layers, x) - y[:, None])
    model = tf.keras.Sequential([tf.keras.Input((2,)), tf.keras.layers.Dense(24, "sigmoid"),
                                 tf.keras.layers.Dense(12, "sigmoid"), tf.keras.layers.Dense(1)])
    model.set_weights([array for layer in layers for array in (layer.w, layer.b)])
    inputs = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        loss = tf.reduce_mean(0.5 * tf.square(model(inputs)[:, 0] - y))
    *weights, dL_dx = tape.gradient(loss, [*model.trainable_variables, inputs])
    ours = [array for layer in layers for array in (layer.dL_dw, layer.dL_db)]
    for mine, theirs in zip(ours, weights):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(g / len(x), dL_dx, rtol=1e-4, atol=1e-7)


def test_the_gradient_of_a_batch_is_the_mean_of_its_examples(network):
    layers, x, y = network
    singles = []
    for k in range(len(x)):
        backprop(layers, feed_forward(layers, x[k:k + 1]) - y[k:k + 1, None])
        singles.append([layer.dL_dw for layer in layers])
    backprop(layers, feed_forward(layers, x) - y[:, None])
    for layer, one_by_one in zip(layers, zip(*singles)):
        np.testing.assert_allclose(layer.dL_dw, np.mean(one_by_one, axis=0))


def test_momentum_accumulates_past_gradients():
    layer = Layer(1, 1, Linear)
    layer.w[:], layer.dL_dw, layer.dL_db = 0, np.ones((1, 1), "f"), np.zeros(1, "f")
    layer.descend(1.0, momentum=0.5)
    layer.dL_dw = np.ones((1, 1), "f")
    layer.descend(1.0, momentum=0.5)
    assert layer.w[0, 0] == pytest.approx(-(1 + 1.5))


def test_sigmoid_neither_overflows_nor_warns():
    with np.errstate(all="raise"):
        np.testing.assert_allclose(Sigmoid.activate(np.array([-1e4, 0, 1e4], "f")), [0, 0.5, 1])


def test_target_has_the_stated_variance():
    assert target(sample(100_000, 3)[0].astype(float)).var() == pytest.approx(0.161, abs=0.002)


def test_snapshot_comes_back_whole_and_a_damaged_one_is_refused(tmp_path):
    layers = make_layers([2, 4, 1], np.random.default_rng(0))
    sgd.Progress(tmp_path, ["seconds", "test_mse"]).write(layers, seconds=1.5, test_mse=0.25)
    path, = sgd.snapshots(tmp_path)
    assert path.name == "snapshot_000000.npz"
    again, row = sgd.read_snapshot(path)
    assert row == {"seconds": 1.5, "test_mse": 0.25}
    for mine, theirs in zip(layers, again):
        assert (mine.w == theirs.w).all() and (mine.b == theirs.b).all()
    whole = path.read_bytes()
    for damaged in (b"", whole[:len(whole) // 2], whole[:200] + b"\xff" * 40 + whole[240:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a whole snapshot"):
            sgd.read_snapshot(path)


def test_a_new_run_moves_an_earlier_one_aside(tmp_path):
    for value in (1, 2):
        sgd.Progress(tmp_path / "run", ["seconds"]).write(make_layers([2, 1], None), seconds=value)
    assert (tmp_path / "run" / "metrics.csv").read_text().split() == ["seconds", "2"]
    assert (tmp_path / "run.old" / "metrics.csv").read_text().split() == ["seconds", "1"]


def test_sgd_learns_and_writes_metrics_and_snapshots(tmp_path, small_data):
    process = start("sgd.py", *small_data, "--num-epochs", 4, "--learning-rate", 0.02, "--progress-dir",
                    tmp_path / "run", log=tmp_path / "log")
    assert process.wait(120) == 0, (tmp_path / "log").read_text()
    rows = list(csv.DictReader(open(tmp_path / "run" / "metrics.csv")))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4]
    assert [int(row["examples"]) for row in rows] == [3800, 7600, 11400, 15200]
    assert float(rows[-1]["test_mse"]) < 0.16 and len(sgd.snapshots(tmp_path / "run")) == 4
    layers, row = sgd.read_snapshot(sgd.snapshots(tmp_path / "run")[-1])
    _, _, x_test, y_test = sgd.load_data(*small_data)
    assert sgd.mean_squared_error(layers, x_test, y_test) == pytest.approx(row["test_mse"])


@pytest.mark.parametrize("module", ["sgd", "generate", "plot"])
def test_the_simple_scripts_import_neither_tensorflow_nor_flask(module):
    check = f"import {module}, sys; sys.exit(any(name in sys.modules for name in ('tensorflow', 'flask')))"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0
