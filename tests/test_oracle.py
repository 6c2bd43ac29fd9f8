"""The oracle: what it answers, what it learns, what it needs of Keras, and its endpoints."""
from functools import partial

import numpy as np
import pytest

import oracle
from oracle import STEPS, Oracle
from plumbing.wire import Refused
from sgd import backprop, feed_forward, loss, loss_gradient, make_layers
from synthgrad import OracleClient
from tests.processes import Three, start, still, wait_until
from tests.test_in_process import differ, same, trained

pytestmark = pytest.mark.tensorflow
BATCH = 10
N = BATCH * STEPS


@pytest.fixture(autouse=True)
def ready_sooner(request, monkeypatch):
    """Only the tests of XLA wait for it to compile. Without it the oracle learns the same."""
    if "xla" not in request.node.name:
        without = partial(oracle.compiled_training, xla=False)
        monkeypatch.setattr(oracle, "compiled_training", without)


def examples(rng, width=6, n=N):
    h = rng.random((n, width), "f")
    return h, ((h - 0.5) @ rng.normal(size=(width, width)) * 1e-3).astype("f")


def test_before_it_has_learned_anything_the_model_itself_guesses_zero():
    """Not only guess(), which does not ask it (paper, section 3: the last layer starts at zero)."""
    model, h = oracle.make_model([6, 8, 6]), np.random.default_rng(0).random((5, 6), "f")
    assert not model(h).numpy().any()
    assert model.weights[0].numpy().any()
    new = Oracle([6, 8, 6], 0.01, BATCH, seed=0)
    guess, learned = new.guess(h)
    assert guess.shape == (5, 6) and guess.dtype == np.float32
    assert not guess.any() and learned is None
    assert not new.model(h).numpy().any(), "the call that compiles teaches nothing"


def test_the_answer_is_the_keras_models_own():
    rng, model = np.random.default_rng(0), Oracle([6, 12, 12, 6], 0.01, BATCH, seed=0)
    h, g = examples(rng)
    model.train(h, g, np.arange(N)[::-1], np.arange(N))
    learned, (mean, deviation, scale), _ = model.published
    expected = scale * model.model((h - mean) / deviation).numpy()
    guess, clock = model.guess(h)
    np.testing.assert_allclose(guess, expected, rtol=1e-3, atol=1e-6)
    assert np.abs(expected).max() > 1e-6 and clock == learned == N - 1


def test_an_answer_is_of_one_moment_whatever_is_trained_meanwhile():
    """Published weights and moments are replaced whole, and training does not write to them."""
    rng, model = np.random.default_rng(0), Oracle([6, 6], 0.01, BATCH, seed=0)
    h, g = examples(rng)
    model.train(h, g, np.zeros(N, int), np.zeros(N, int))
    published = model.published
    _, moments, weights = published
    before = [np.copy(each) for each in (*moments, *weights)]
    for _ in range(3):
        model.train(*examples(rng), np.ones(N, int), np.zeros(N, int))
    assert model.published is not published
    for then, now in zip(before, (*moments, *weights), strict=True):
        np.testing.assert_array_equal(then, now)


def test_the_moments_are_those_of_about_ten_calls():
    rng, model = np.random.default_rng(0), Oracle([6, 6], 0.01, BATCH, seed=0)
    h, g = examples(rng)
    model.train(h, g, np.zeros(N, int), np.zeros(N, int))
    mean, deviation, scale = model.moments
    np.testing.assert_allclose(mean, h.mean(axis=0))
    np.testing.assert_allclose(deviation, h.std(axis=0) + 1e-3)
    assert scale == pytest.approx(np.sqrt(np.mean(g**2)))
    model.train(h + 10, 3 * g, np.zeros(N, int), np.zeros(N, int))
    np.testing.assert_allclose(model.moments[0], mean + 1, rtol=1e-5)
    np.testing.assert_allclose(model.moments[1], deviation, rtol=1e-3)
    assert model.moments[2] == pytest.approx(1.2 * scale)


def test_it_has_learned_from_the_newest_arrivals_whatever_their_clocks_say():
    """After a resume from an older checkpoint the newest arrivals have older clocks. And the part
    above tells the newest minibatch of its backlog first, so the last to arrive is the oldest."""
    model, rng = Oracle([6, 6], 0.01, 10, seed=0), np.random.default_rng(0)
    h, g = rng.random((100, 6), "f"), rng.normal(size=(100, 6)).astype("f")
    ages = np.arange(100) * 20
    for clock in (np.repeat([9, 7, 8, 3000], 25), np.repeat([2, 9, 3000, 3000], 25)):
        order = rng.permutation(100)
        model.train(h, g, clock[order], ages[order])
        assert model.published[0] == 9


def test_it_learns_a_linear_gradient_field_and_its_loss_says_so():
    rng, model = np.random.default_rng(0), Oracle([6, 6], 0.01, BATCH, seed=0)
    field = rng.normal(size=(6, 6))
    losses = []
    for _ in range(100):
        h = rng.random((N, 6), "f")
        g = ((h - 0.5) @ field * 1e-3).astype("f")
        losses.append(model.train(h, g, np.zeros(N, int), np.zeros(N, int)))
    assert losses[0] == pytest.approx(1, abs=0.3) and losses[-1] < 0.05
    guess, _ = model.guess(h)
    assert np.mean((guess - g) ** 2) < 0.05 * np.mean(g**2)
    assert model.updates == 100 * STEPS


def test_it_diverges_in_one_clear_error():
    model = Oracle([6, 6], 1e6, BATCH, seed=0)
    with pytest.raises(FloatingPointError, match="the oracle diverged; try a lower"):
        for _ in range(10):
            model.train(*examples(np.random.default_rng(0)), np.zeros(N, int), np.zeros(N, int))


def test_where_xla_cannot_compile_it_says_so_once_and_trains_without(monkeypatch, capsys):
    import tensorflow as tf
    function, tried = tf.function, []

    def failing_function(jit_compile):
        tried.append(jit_compile)
        compiled = function(jit_compile=False)
        if not jit_compile:
            return compiled

        def decorate(python_function):
            def fail(*_):
                raise tf.errors.InvalidArgumentError(None, None, "no registered platform\nMETAL")
            return fail
        return decorate
    monkeypatch.setattr(tf, "function", failing_function)
    model = Oracle([6, 6], 0.01, BATCH, seed=0)
    h, g = examples(np.random.default_rng(0))
    first = model.train(h, g, np.zeros(N, int), np.zeros(N, int))
    for _ in range(20):
        last = model.train(h, g, np.zeros(N, int), np.zeros(N, int))
    assert tried == [True, False] and last < first
    said = capsys.readouterr().err
    assert said.count("XLA cannot compile here (no registered platform): training without") == 1


def test_an_error_without_xla_is_not_tried_for_ever(monkeypatch):
    import tensorflow as tf

    def failing_function(jit_compile):
        def fail(*_):
            raise tf.errors.InternalError(None, None, "broken")
        return lambda python_function: fail
    monkeypatch.setattr(tf, "function", failing_function)
    with pytest.raises(tf.errors.InternalError):
        Oracle([6, 6], 0.01, BATCH, seed=0)


def test_with_and_without_xla_it_learns_the_same():
    rng = np.random.default_rng(0)
    h, g = examples(rng)
    reached = []
    for xla in (True, False):
        import keras
        keras.utils.set_random_seed(0)
        model = oracle.make_model([6, 4, 6])
        step = oracle.compiled_training(model, 0.01, BATCH, xla=xla)
        reached.append([each.numpy() for each in step(h - 0.5, 1e3 * g)[1]])
    for mine, theirs in zip(*reached, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-5)


def test_labels_are_seen_beside_h_and_must_have_the_stated_width():
    h, y = np.ones((2, 3), "f"), np.zeros((2, 10), "f")
    assert oracle.model_input(h, y, 0) is h
    assert oracle.model_input(h, y, 10).shape == (2, 13)
    with pytest.raises(Refused, match="--condition-on-labels 1, but y has a width of 10"):
        oracle.model_input(h, y, 1)


# ---- in one process: the runs of test_in_process.py with the real oracle ----

def test_an_untrained_oracle_equals_zero_gradients_bit_for_bit(loaded):
    """The first true gradient would arrive after the last update."""
    late = ["--delay", 10_000, "--num-epochs", 1, "--oracle-layers", 8]
    synthetic, zero = (trained(loaded, "--gradients", gradients, *late)
                       for gradients in ("synthetic", "zero"))
    assert same(synthetic, zero)
    start = make_layers([2, 24, 12, 1], np.random.default_rng([0, 1]))
    assert same(synthetic[:1], start[:1]) and differ(synthetic[1:], start[1:])


def test_the_same_options_give_the_same_bits_with_the_real_oracle(loaded):
    options = ["--num-epochs", 1, "--condition-on-labels", "--oracle-layers", 8]
    assert same(trained(loaded, *options), trained(loaded, *options))


def test_the_oracle_writes_to_no_array_that_it_is_given():
    model, rng = Oracle([6, 4, 6], 0.01, 10, seed=0), np.random.default_rng(0)
    h, g = rng.random((100, 6), "f"), rng.normal(size=(100, 6)).astype("f")
    clock = np.arange(100)
    for each in (h, g, clock):
        each.flags.writeable = False
    model.train(h, g, clock, clock[::-1])
    model.guess(h)


@pytest.mark.parametrize("k", [1, 10])
def test_backprop_matches_keras_gradients(k):
    """sgd.py's, which stands here so that one file of tests starts TensorFlow."""
    import keras
    import tensorflow as tf
    rng = np.random.default_rng(2)
    layers = make_layers([2, 24, 12, k], rng)
    x = rng.normal(size=(100, 2)).astype("f")
    y = rng.normal(size=(100, 1)).astype("f")
    if k > 1:
        y = np.eye(k, dtype="f")[rng.integers(k, size=100)]
    g = backprop(layers, loss_gradient(feed_forward(layers, x), y))
    last = keras.layers.Dense(k, None if k == 1 else "softmax")
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(24, "sigmoid"),
                              keras.layers.Dense(12, "sigmoid"), last])
    model.set_weights([array for layer in layers for array in (layer.w, layer.b)])
    inputs = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        each = (0.5 * tf.square(model(inputs) - y) if k == 1
                else keras.losses.categorical_crossentropy(y, model(inputs)))
        value = tf.reduce_mean(each)
    *weights, dL_dx = tape.gradient(value, [*model.trainable_variables, inputs])
    assert float(loss(feed_forward(layers, x), y).mean()) == pytest.approx(float(value), rel=1e-4)
    ours = [array for layer in layers for array in (layer.dL_dw, layer.dL_db)]
    for mine, theirs in zip(ours, weights, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(g / len(x), dL_dx, rtol=1e-4, atol=1e-7)


# ---- the process ----

@pytest.mark.processes
def test_over_http_it_learns_a_gradient_field_that_depends_on_labels(tmp_path, monkeypatch):
    """Whatever Keras is set to, by the environment and by ~/.keras/keras.json. `learned` never runs
    ahead of what the answering model has seen."""
    (tmp_path / "keras.json").write_text(
        '{"backend": "torch", "floatx": "float64", "image_data_format": "channels_first"}')
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    rng = np.random.default_rng(0)
    field = rng.normal(size=(6, 6))

    def sample(n):
        h, y = rng.random((n, 6), "f"), rng.normal(size=(n, 2)).astype("f")
        return h, y, ((h - 0.5) @ field * 1e-3 + 2e-3 * y[:, :1]).astype("f")

    def provide(examples, clock):
        h, y, g = examples
        client.provide_gradients(np.arange(len(h)), h, y, np.full(len(h), clock), g)

    def learned():
        return client.estimate_gradients(h_test, y_test)[1]
    with Three(tmp_path, oracle=["--layers", 6, 12, 6, "--condition-on-labels", 2]) as three:
        three.start("oracle").wait_until_ready("oracle")
        client = OracleClient(f"127.0.0.1:{three.port('oracle')}")
        h_test, y_test, g_test = sample(500)
        guess, clock = client.estimate_gradients(h_test, y_test)
        assert not guess.any() and clock is None
        with pytest.raises(Refused, match="--condition-on-labels 2, but y has a width of 1"):
            client.estimate_gradients(h_test, y_test[:, :1])
        needs = three.status("oracle")["needs"]
        provide(sample(needs - 1), clock=1000)  # too little to train on
        guess, clock = client.estimate_gradients(h_test, y_test)
        assert clock is None and not guess.any()
        provide(sample(1), clock=5)
        wait_until(lambda: learned() is not None, "it to learn")
        still(lambda: three.status("oracle")["updates"])
        before = learned()
        assert before in (5, 1000)
        provide(sample(needs - 1), clock=5000)  # received, and too little to train on
        assert three.status("oracle")["examples"]["received"] == 2 * needs - 1
        assert all(learned() == before for _ in range(20))
        provide(sample(1), clock=6000)
        wait_until(lambda: learned() in (5000, 6000), "it to learn from the news")
        error = np.inf
        for clock in range(7000, 9000):
            newest_examples = sample(1000)
            provide(newest_examples, clock)
            guess, newest = client.estimate_gradients(h_test, y_test)
            assert newest <= clock
            error = np.mean((guess - g_test) ** 2) / np.mean(g_test**2)
            if error < 0.02 and three.status("oracle")["loss"] < 0.05:
                break
        assert error < 0.02
        before = three.status("oracle")["examples"]["received"]
        for _ in range(5):  # thrown again: it counts once
            provide(newest_examples, clock)
        assert three.status("oracle")["examples"]["received"] == before


@pytest.mark.processes
def test_what_does_not_fit_is_one_line(tmp_path):
    for n, (options, message) in enumerate((
            (["--layers", 6, 4], "the first and the last must be equal"),
            (["--keep", 100], "--keep times --replay must be at least 10 times --batch-size"))):
        log = tmp_path / str(n)
        assert start("oracle.py", *options, log=log).wait(60) == 2
        line, = log.read_text().splitlines()
        assert message in line
