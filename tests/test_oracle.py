"""The oracle as others see it, over its own HTTP interface."""
import numpy as np
import pytest

from oracle import STEPS, Oracle
from synthgrad import OracleClient, Refused
from tests.processes import Three, wait_until


def test_the_answer_is_the_keras_models_own():
    oracle = Oracle([24, 12, 24], learning_rate=0.01, batch_size=100, seed=0)
    rng, n = np.random.default_rng(0), 100 * STEPS
    h, g = rng.random((n, 24), "f"), rng.normal(size=(n, 24)).astype("f")
    oracle.train(h, g, np.arange(n))
    learned, (mean, deviation, scale), _ = oracle.published
    expected = scale * oracle.model((h - mean) / deviation).numpy()
    guess, clock = oracle.guess(h)
    np.testing.assert_allclose(guess, expected, rtol=1e-3, atol=1e-4)
    assert np.abs(expected).max() > 1e-3 and clock == learned == n - 1


@pytest.mark.parametrize("options", [["--layers", 6, 6], ["--layers", 6, 12, 6, "--condition-on-labels"]])
def test_it_learns_a_linear_gradient_field_over_http(tmp_path, options):
    rng = np.random.default_rng(0)
    field, by_label = rng.normal(size=(6, 6)), 2.0 * ("--condition-on-labels" in options)
    with Three(tmp_path, oracle=options) as three:
        three.start("oracle")
        client = OracleClient(f"127.0.0.1:{three.port('oracle')}")
        wait_until(lambda: three.status("oracle"), "the oracle to listen")

        def examples(n):
            h, y = rng.random((n, 6), "f"), rng.normal(size=(n, 1)).astype("f")
            return h, y, ((h - 0.5) @ field * 1e-3 + by_label * 1e-3 * y).astype("f")

        h_test, y_test, g_test = examples(500)
        wait_until(lambda: three.status("oracle")["ready"], "TensorFlow to start")
        guess, learned = client.estimate_gradients(h_test, y_test)
        assert not guess.any() and learned is None, "zero before it has learned anything"

        def error_is_small():
            h, y, g = examples(1000)
            client.provide_gradients(np.arange(1000), h, y, np.arange(1000), g)
            guess, _ = client.estimate_gradients(h_test, y_test)
            return np.mean((guess - g_test) ** 2) < 0.02 * np.mean(g_test**2)
        wait_until(error_is_small, "the guesses to come within 2% of the true field")
        wait_until(lambda: three.status("oracle")["loss"] < 0.05, "its own loss to say so")


def test_labels_of_another_width_are_refused(tmp_path):
    with Three(tmp_path, oracle=["--layers", 6, 6, "--condition-on-labels", 10]) as three:
        three.start("oracle")
        wait_until(lambda: (three.status("oracle") or {}).get("ready"), "the oracle")
        client, h = OracleClient(f"127.0.0.1:{three.port('oracle')}"), np.zeros((2, 6), "f")
        with pytest.raises(Refused, match="--condition-on-labels 10, but y has a width of 1"):
            client.estimate_gradients(h, h[:, :1])
        assert client.estimate_gradients(h, np.zeros((2, 10), "f"))[0].shape == (2, 6)
