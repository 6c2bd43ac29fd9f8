"""The oracle: what it answers, what it learns, what it needs of Keras, and its endpoints. What it
says that it has learned from is in test_exchange.py, which needs no TensorFlow."""
from functools import partial

import numpy as np
import pytest

import oracle
from oracle import STEPS, Model, Oracle
from plumbing.errors import Diverged, Refused, UserError
from sgd import backprop, feed_forward, make_layers, task_of
from synthgrad import OracleClient
from tests.processes import Three, start, still, wait_until

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


def new_oracle(dims=(6, 8, 6), labels=0, seed=0, **changed):
    return Oracle([*dims], labels, **{"keep": 2000, "replay": 4, "learning_rate": 0.01,
                                      "batch_size": BATCH, "seed": seed, **changed})


def test_before_it_has_learned_anything_the_model_itself_guesses_zero():
    """Not only guess(), which does not ask it (paper, section 3: the last layer starts at zero)."""
    h = np.random.default_rng(0).random((5, 6), "f")
    untrained = oracle.make_model([6, 8, 6])
    assert not untrained(h).numpy().any() and untrained.weights[0].numpy().any()
    new = new_oracle().start()
    guess, newest = new.guess(h, None)
    assert guess.shape == (5, 6) and guess.dtype == np.float32
    assert not guess.any() and newest is None
    assert not new.model.model(h).numpy().any(), "the call that compiles teaches nothing"


def sequential(*layers):
    import keras
    return keras.Sequential([keras.Input((6,)), *layers])


def dense(width, activation=None, **options):
    import keras
    return keras.layers.Dense(width, activation, **options)


@pytest.mark.parametrize("layers", [
    (),
    ((5, "tanh"), (7, "relu"), (6, "linear")),
    ((8, "elu"), (9, "softplus"), (6, None)),
    ((4, "silu"), (3, "sigmoid"), (6, "tanh"))])
@pytest.mark.parametrize("use_bias", [True, False])
def test_the_guess_is_the_keras_models_own(layers, use_bias, monkeypatch):
    if layers:
        monkeypatch.setattr(oracle, "make_model", lambda dims: sequential(
            *(dense(*each, use_bias=use_bias) for each in layers)))
    model = Model([6, 12, 6], 0.01, BATCH, seed=0)
    rng = np.random.default_rng(0)
    for _ in range(3):
        h, g = examples(rng)
        _, guess = model.train(h, g)
    mean, deviation, scale = model.moments
    expected = scale * model.model((h - mean) / deviation).numpy()
    np.testing.assert_allclose(guess(h), expected, rtol=1e-3, atol=1e-4 * scale)
    assert np.abs(expected).max() > 1e-6


def tanh(z):
    """A namesake of Keras' own, and another function."""
    return 0.5 * z


def unfollowed(kind):
    import keras
    return {"normalization": lambda: [keras.layers.BatchNormalization(), dense(6)],
            "dropout": lambda: [dense(6), keras.layers.Dropout(0.5), dense(6)],
            "unknown": lambda: [dense(6, "gelu"), dense(6)],
            "namesake": lambda: [dense(6, tanh), dense(6)],
            "namesake, zeros": lambda: [dense(6, tanh), dense(6, kernel_initializer="zeros")],
            "activation": lambda: [dense(6), keras.layers.Activation("tanh"), dense(6)],
            }[kind]()




@pytest.mark.parametrize("kind", [
    "normalization", "dropout", "unknown", "namesake", "namesake, zeros",
    "activation"])
def test_a_model_that_forward_does_not_follow_is_an_error_at_the_start(kind, monkeypatch):
    monkeypatch.setattr(oracle, "make_model", lambda dims: sequential(*unfollowed(kind)))
    with pytest.raises(UserError, match="the oracle's model has the layers .*: name the new one"):
        new_oracle().start()


def test_the_seed_and_the_stream_of_an_oracle_matter():
    def weights(**changed):
        return new_oracle(**changed).start().model.model.get_weights()[0]
    same, again, *others = weights(), weights(), weights(seed=1), weights(stream=[6])
    assert (same == again).all() and all((same != other).any() for other in others)


def test_an_answer_is_of_one_moment_whatever_is_trained_meanwhile():
    """Published weights and moments are replaced whole, and training does not write to them."""
    rng, model = np.random.default_rng(0), Model([6, 6], 0.01, BATCH, seed=0)
    h, g = examples(rng)
    _, guess = model.train(h, g)
    before = guess(h)
    for _ in range(3):
        _, later = model.train(*examples(rng))
    assert (guess(h) == before).all() and (later(h) != before).any()


def test_the_moments_are_those_of_about_ten_calls():
    rng, model = np.random.default_rng(0), Model([6, 6], 0.01, BATCH, seed=0)
    h, g = examples(rng)
    model.train(h, g)
    mean, deviation, scale = model.moments
    np.testing.assert_allclose(mean, h.mean(axis=0))
    np.testing.assert_allclose(deviation, h.std(axis=0) + 1e-3)
    assert scale == pytest.approx(np.sqrt(np.mean(g**2)))
    model.train(h + 10, 3 * g)
    np.testing.assert_allclose(model.moments[0], mean + 1, rtol=1e-5)
    np.testing.assert_allclose(model.moments[1], deviation, rtol=1e-3)
    assert model.moments[2] == pytest.approx(1.2 * scale)


def test_it_learns_a_linear_gradient_field_and_its_loss_says_so():
    """From examples that arrive, the newest first; every array of them stays as it was."""
    rng, student = np.random.default_rng(0), new_oracle([6, 6], replay=1, keep=N).start()
    field, losses = rng.normal(size=(6, 6)), []
    for clock in range(100):
        h = rng.random((N, 6), "f")
        g = ((h - 0.5) @ field * 1e-3).astype("f")
        columns = [np.arange(N), h, h[:, :1], np.full(N, clock), np.zeros(N, int), g]
        for each in columns:
            each.flags.writeable = False
        student.add(0, clock, 0, *columns)
        assert student.train() and not student.train()
        losses.append(student.loss)
    assert losses[0] == pytest.approx(1, abs=0.3) and losses[-1] < 0.05
    guess, newest = student.guess(h, None)
    assert np.mean((guess - g) ** 2) < 0.05 * np.mean(g**2)
    assert newest == (0, 99) and student.updates == 100 * STEPS


def test_it_diverges_in_one_clear_error():
    model = Model([6, 6], 1e6, BATCH, seed=0)
    with pytest.raises(Diverged, match="the oracle diverged; try a lower"):
        for _ in range(10):
            model.train(*examples(np.random.default_rng(0)))


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
    model = Model([6, 6], 0.01, BATCH, seed=0)
    h, g = examples(np.random.default_rng(0))
    losses = [model.train(h, g)[0] for _ in range(20)]
    assert tried == [True, False] and losses[-1] < losses[0]
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
        Model([6, 6], 0.01, BATCH, seed=0)


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
    h, y = np.ones((2, 6), "f"), np.zeros((2, 10), "f")
    assert new_oracle().inputs(h, y) is h
    assert new_oracle(labels=10).inputs(h, y).shape == (2, 16)
    assert new_oracle(labels=10).options[0] == [16, 8, 6]
    for ask in (new_oracle(labels=1).guess, lambda h, y: new_oracle(labels=1).add(
            0, 0, 0, None, h, y, None, None, None)):
        with pytest.raises(Refused, match="--condition-on-labels 1, but y has a width of 10") as no:
            ask(h, y)
        assert no.value.status == 400


@pytest.mark.parametrize("changed, message", [
    ({"dims": [6, 4]}, "the first and the last must be equal"),
    ({"keep": 100, "replay": 0.9}, "--keep times its --replay must be at least 10 times --batch")])
def test_what_does_not_fit_is_an_error_before_tensorflow_starts(changed, message):
    with pytest.raises(UserError, match=message):
        new_oracle(**changed)


@pytest.mark.parametrize("k", [1, 10])
def test_backprop_matches_keras_gradients(k):
    """sgd.py's, which stands here so that one file of tests starts TensorFlow."""
    import keras
    import tensorflow as tf
    rng = np.random.default_rng(2)
    layers, task = make_layers([2, 24, 12, k], rng), task_of(k)
    x = rng.normal(size=(100, 2)).astype("f")
    y = rng.normal(size=(100, 1)).astype("f")
    if k > 1:
        y = np.eye(k, dtype="f")[rng.integers(k, size=100)]
    g = backprop(layers, task.loss_gradient(feed_forward(layers, x), y))
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
    ours = float(task.loss(feed_forward(layers, x), y).mean())
    assert ours == pytest.approx(float(value), rel=1e-4)
    ours = [array for layer in layers for array in (layer.dL_dw, layer.dL_db)]
    for mine, theirs in zip(ours, weights, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(g / len(x), dL_dx, rtol=1e-4, atol=1e-7)


# ---- the process ----

@pytest.mark.processes
def test_over_http_it_learns_a_gradient_field_that_depends_on_labels(tmp_path, monkeypatch):
    """Whatever Keras is set to, by the environment and by ~/.keras/keras.json. `newest` never runs
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
        marks = np.full(len(h), clock), np.full(len(h), 7)
        client.provide_gradients(np.arange(len(h)), h, y, *marks, g)

    def newest():
        return client.estimate_gradients(h_test, y_test)[1]
    with Three(tmp_path, oracle=["--layers", 6, 12, 6, "--condition-on-labels", 2]) as three:
        three.start("oracle").wait_until_ready("oracle")
        client = OracleClient(f"127.0.0.1:{three.port('oracle')}")
        h_test, y_test, g_test = sample(500)
        guess, learned = client.estimate_gradients(h_test, y_test)
        assert not guess.any() and learned is None
        with pytest.raises(Refused, match="--condition-on-labels 2, but y has a width of 1"):
            client.estimate_gradients(h_test, y_test[:, :1])
        needs = three.status("oracle")["needs"]
        provide(sample(needs - 1), clock=1000)  # too little to train on
        assert newest() is None
        provide(sample(1), clock=5)
        wait_until(lambda: newest() == (7, 1000), "it to learn")
        still(lambda: three.status("oracle")["updates"])
        provide(sample(needs - 1), clock=5000)  # received, and too little to train on
        assert three.status("oracle")["examples"]["received"] == 2 * needs - 1
        assert all(newest() == (7, 1000) for _ in range(20))
        provide(sample(1), clock=4000)
        wait_until(lambda: newest() == (7, 5000), "it to learn from the news")
        error = np.inf
        for clock in range(7000, 9000):
            newest_examples = sample(1000)
            provide(newest_examples, clock)
            guess, learned = client.estimate_gradients(h_test, y_test)
            assert learned <= (7, clock)
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
    log = tmp_path / "log"
    assert start("oracle.py", "--layers", 6, 4, log=log).wait(60) == 2
    line, = log.read_text().splitlines()
    assert "the first and the last must be equal" in line
