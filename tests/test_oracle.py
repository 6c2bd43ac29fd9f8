"""The oracle as others see it, over its own HTTP interface."""
import numpy as np
import pytest

from oracle import NewestExamples, Oracle
from synthgrad import OracleClient
from tests.processes import Three, wait_until


def test_the_answer_is_the_keras_models_own():
    oracle = Oracle([24, 12, 24], learning_rate=0.01, batch_size=100, seed=0)
    rng = np.random.default_rng(0)
    h, g = rng.random((5000, 24), "f"), rng.normal(size=(5000, 24)).astype("f")
    assert not oracle.guess(h).any()
    examples = NewestExamples(5000, 48)
    examples.add(h, g)
    oracle.train(examples, rng)
    scale, mean, deviation, _ = oracle.published
    expected = scale * oracle.model((h - mean) / deviation).numpy()
    np.testing.assert_allclose(oracle.guess(h), expected, rtol=1e-3, atol=1e-4)
    assert np.abs(expected).max() > 1e-3


def test_the_newest_examples_are_kept():
    examples = NewestExamples(10, 2)
    for start in (0, 7, 14):
        column = np.arange(start, start + 7, dtype="f")[:, None]
        examples.add(column, -column)
    h, g = examples.rows.T
    assert sorted(h) == list(range(11, 21)) and (h == -g).all()
    assert (examples.received, examples.stored, examples.dropped) == (21, 10, 11)
    examples.add(np.zeros((25, 1), "f"), np.zeros((25, 1), "f"))
    assert (examples.received, examples.stored, examples.dropped) == (46, 10, 36)


@pytest.mark.parametrize("options", [["--layers", 6, 6], ["--layers", 6, 12, 6, "--condition-on-labels"]])
def test_it_learns_a_linear_gradient_field_over_http(tmp_path, options):
    rng = np.random.default_rng(0)
    field, by_label = rng.normal(size=(6, 6)), 2.0 * ("--condition-on-labels" in options)
    with Three(tmp_path, oracle=options) as three:
        three.start("oracle")
        client = OracleClient(f"127.0.0.1:{three.port('oracle')}")
        wait_until(lambda: three.status("oracle"), "the oracle to listen")

        def examples(n):
            h, y = rng.random((n, 6)).astype("f"), rng.normal(size=n).astype("f")
            return h, y, ((h - 0.5) @ field * 1e-3 + by_label * 1e-3 * y[:, None]).astype("f")

        h_test, y_test, g_test = examples(500)
        wait_until(lambda: three.status("oracle")["ready"], "TensorFlow to start")
        assert not client.estimate_gradients(h_test, y_test).any(), "zero before it has learned anything"

        def error_is_small():
            h, y, g = examples(1000)
            client.provide_gradients(np.arange(1000), h, y, g)
            guess = client.estimate_gradients(h_test, y_test)
            return np.mean((guess - g_test) ** 2) < 0.02 * np.mean(g_test**2)
        wait_until(error_is_small, "the guesses to come within 2% of the true field")
        wait_until(lambda: three.status("oracle")["loss"] < 0.05, "its own loss to say so")
