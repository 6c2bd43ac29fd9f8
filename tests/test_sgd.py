"""The layers, the losses, the loop, and the plain baseline."""
import csv
import subprocess
import sys

import numpy as np
import pytest

from generate import sample, target
from plumbing import runs
from sgd import (Layer, Linear, Sigmoid, backprop, descend, feed_forward, layers_from_weights, loss, loss_gradient,
                 make_layers, minibatches, test_score as score)
from tests.processes import ROOT, start


def mean_loss(layers, x, y):
    return float(loss(feed_forward(layers, x), y).mean())


@pytest.fixture(params=[1, 4], ids=["a number, squared error", "four classes, cross-entropy"])
def network(request):
    """A small network in float64, so that finite differences are exact enough, and a batch of 7."""
    rng, k = np.random.default_rng(1), request.param
    layers = make_layers([2, 5, 3, k], rng)
    for layer in layers:
        layer.w, layer.b = layer.w.astype(float), rng.normal(size=layer.b.shape)
    return layers, rng.normal(size=(7, 2)), rng.normal(size=(7, 1)) if k == 1 else np.eye(k)[rng.integers(k, size=7)]


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
    for index in np.ndindex(x.shape):  # dL/dx is per example: the loss's mean divides it by the batch
        moved = x.copy()
        moved[index] += epsilon
        above = mean_loss(layers, moved, y)
        moved[index] -= 2 * epsilon
        assert g[index] / len(x) == pytest.approx((above - mean_loss(layers, moved, y)) / (2 * epsilon), abs=1e-8)


@pytest.mark.parametrize("k", [1, 10])
def test_backprop_matches_keras_gradients(k):
    import keras
    import tensorflow as tf
    rng = np.random.default_rng(2)
    layers = make_layers([2, 24, 12, k], rng)
    x = rng.normal(size=(100, 2)).astype("f")
    y = rng.normal(size=(100, 1)).astype("f") if k == 1 else np.eye(k, dtype="f")[rng.integers(k, size=100)]
    g = backprop(layers, loss_gradient(feed_forward(layers, x), y))
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(24, "sigmoid"), keras.layers.Dense(12, "sigmoid"),
                              keras.layers.Dense(k, None if k == 1 else "softmax")])
    model.set_weights([array for layer in layers for array in (layer.w, layer.b)])
    inputs = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        value = (tf.reduce_mean(0.5 * tf.square(model(inputs) - y)) if k == 1
                 else tf.reduce_mean(keras.losses.categorical_crossentropy(y, model(inputs))))
    *weights, dL_dx = tape.gradient(value, [*model.trainable_variables, inputs])
    assert mean_loss(layers, x, y) == pytest.approx(float(value), rel=1e-4)
    ours = [array for layer in layers for array in (layer.dL_dw, layer.dL_db)]
    for mine, theirs in zip(ours, weights):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(g / len(x), dL_dx, rtol=1e-4, atol=1e-7)


def test_the_gradient_of_a_batch_is_the_mean_of_its_examples(network):
    layers, x, y = network
    singles = []
    for k in range(len(x)):
        backprop(layers, loss_gradient(feed_forward(layers, x[k:k + 1]), y[k:k + 1]))
        singles.append([layer.dL_dw for layer in layers])
    backprop(layers, loss_gradient(feed_forward(layers, x), y))
    for layer, one_by_one in zip(layers, zip(*singles)):
        np.testing.assert_allclose(layer.dL_dw, np.mean(one_by_one, axis=0))


def test_momentum_accumulates_past_gradients():
    layer = Layer(np.zeros((1, 1), "f"), np.zeros(1, "f"), Linear)
    for _ in range(2):
        layer.dL_dw, layer.dL_db = np.ones((1, 1), "f"), np.zeros(1, "f")
        descend([layer], 1.0, momentum=0.5)
    assert layer.w[0, 0] == pytest.approx(-(1 + 1.5))


def test_sigmoid_neither_overflows_nor_warns():
    with np.errstate(all="raise"):
        np.testing.assert_allclose(Sigmoid.activate(np.array([-1e4, 0, 1e4], "f")), [0, 0.5, 1])


def test_what_is_reported_is_the_mse_or_the_share_of_wrong_classes():
    layers = [Layer(np.eye(3, dtype="f"), np.zeros(3, "f"), Linear)]
    y = np.eye(3, dtype="f")[[0, 1, 2, 2]]
    assert score(layers, np.eye(3, dtype="f")[[0, 1, 2, 0]], y) == 0.25
    assert score([Layer(np.ones((1, 1), "f"), np.zeros(1, "f"), Linear)], np.array([[1.0], [2]]), np.array([[1.0], [4]])) == 2


def test_minibatches_visit_every_example_once_an_epoch_and_can_be_resumed():
    order = list(minibatches(10, 4, num_epochs=3, seed=5))
    assert [len(i) for i in order] == [4, 4, 2] * 3
    epochs = np.concatenate(order).reshape(3, 10)
    assert (np.sort(epochs) == np.arange(10)).all() and (epochs[0] != epochs[1]).any()
    resumed = list(minibatches(10, 4, num_epochs=3, seed=5, skip=14))
    assert all((mine == theirs).all() for mine, theirs in zip(resumed, order[4:], strict=True))


def test_target_has_the_stated_variance():
    assert target(sample(100_000, 3)[0].astype(float)).var() == pytest.approx(0.161, abs=0.002)


def test_sgd_learns_and_writes_metrics_and_snapshots(tmp_path, small_data):
    process = start("sgd.py", *small_data, "--num-epochs", 8, "--learning-rate", 0.1, "--progress-dir",
                    tmp_path / "run", log=tmp_path / "log")
    assert process.wait(120) == 0, (tmp_path / "log").read_text()
    rows = list(csv.DictReader(open(tmp_path / "run" / "metrics.csv")))
    assert [int(row["epoch"]) for row in rows] == list(range(1, 9))
    assert [int(row["examples"]) for row in rows] == [3800 * n for n in range(1, 9)]
    assert float(rows[-1]["test_mse"]) < 0.1 < 0.15 < float(rows[0]["test_mse"])
    weights, row = runs.read_snapshot(runs.snapshots(tmp_path / "run")[-1])
    _, _, x_test, y_test = runs.load_data(*small_data)
    assert score(layers_from_weights(weights), x_test, y_test) == pytest.approx(row["test_mse"])


def test_sgd_learns_classes(tmp_path, small_digits):
    process = start("sgd.py", *small_digits, "--layers", 784, 32, 10, "--num-epochs", 5, "--batch-size", 20,
                    "--learning-rate", 0.1, "--progress-dir", tmp_path / "run", log=tmp_path / "log")
    assert process.wait(120) == 0, (tmp_path / "log").read_text()
    assert runs.read_metrics(tmp_path / "run")["test_error"][-1] < 0.3  # by chance 0.9


@pytest.mark.parametrize("module", ["sgd", "generate", "plot"])
def test_the_simple_scripts_import_neither_tensorflow_nor_flask(module):
    check = f"import {module}, sys; sys.exit(any(name in sys.modules for name in ('tensorflow', 'flask')))"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0
