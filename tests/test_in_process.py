"""The whole algorithm in one process: what it equals, what depends on what, in which order things
happen, and what it does without."""
import argparse
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import oracle
import train_input
import train_output
from examples import in_process
from exchange import SOURCES
from plumbing import data, serving
from plumbing.errors import UserError
from plumbing.part import Part
from sgd import (
    HIDDEN,
    backprop,
    descend,
    feed_forward,
    make_layers,
    minibatches,
    schedule,
    task_of,
    train,
)
from tests.processes import ROOT


class Silent:
    """An oracle's model that learns nothing, and needs no TensorFlow."""

    def __init__(self, dims, learning_rate, batch_size, seed):
        self.width = dims[-1]

    def train(self, h, g):
        return 1.0, lambda h: np.zeros((len(h), self.width), np.float32)


class Linear(Silent):
    """One that fits ĝ = [h, 1] W by ridge regression."""

    def train(self, h, g):
        inputs = np.column_stack([h, np.ones(len(h))])
        w = np.linalg.solve(inputs.T @ inputs + np.eye(inputs.shape[1]), inputs.T @ g).astype("f")
        return 1.0, lambda h: np.column_stack([h, np.ones(len(h))]).astype("f") @ w


@pytest.fixture
def silent(monkeypatch):
    monkeypatch.setattr(oracle, "Model", Silent)


@pytest.fixture
def linear(monkeypatch):
    monkeypatch.setattr(oracle, "Model", Linear)


def parse(*options):
    return train_input.with_rates(in_process.make_parser().parse_args(
        ["x.npy", "y.npy", *map(str, options)]))


def run(loaded, *options):
    """The scores, the layers of all parts after the run, and the cuts, the lowest first."""
    epochs = list(in_process.run(parse(*options), loaded))
    _, _, layers, cut = epochs[-1]
    cuts = []
    while cut:
        cuts.append(cut)
        cut = cut.higher
    return [score for _, score, *_ in epochs], layers, cuts


def trained(loaded, *options):
    """The layers of all parts after the run."""
    return run(loaded, *options)[1]


def same(layers, others, atol=0.0):
    for mine, theirs in zip(layers, others, strict=True):
        np.testing.assert_allclose(mine.w, theirs.w, rtol=0, atol=atol)
        np.testing.assert_allclose(mine.b, theirs.b, rtol=0, atol=atol)
    return True


def differ(layers, others):
    return any((mine.w != theirs.w).any() for mine, theirs in zip(layers, others, strict=True))


# ---- what it equals ----


RATES = ["--learning-rate", 0.5, "--output-rate", 0.5, "--decay", 700, "--warm-up", 9, "--replay",
         0, "--num-epochs", 2, "--momentum", 0.9, "--output-momentum", 0.9]


@pytest.mark.parametrize("dims, cuts", [([2, 24, 12, 1], [1]), ([2, 24, 12, 1], [2]),
                                        ([2, 24, 12, 1], [1, 2]), ([2, 9, 8, 7, 6, 1], [1, 2, 4])])
def test_with_true_gradients_it_equals_backprop_and_descent(dims, cuts, loaded, monkeypatch):
    """Through a chain of parts, too; with momentum, warm-up and decay."""
    rate = schedule(0.5, decay=700, warm_up=9)
    monkeypatch.setattr(in_process, "schedule", lambda *_: rate)  # the highest part's, too
    layers = trained(loaded, "--gradients", "true", *RATES, "--layers", *dims, "--cuts", *cuts)
    expected = make_layers(dims, np.random.default_rng([0, 1]))
    order = minibatches(len(loaded.x), 100, 2, seed=0)
    for _ in train(expected, loaded.x, loaded.y, order, rate, 0.9):
        pass
    assert same(layers, expected, atol=1e-6)
    assert differ(layers, make_layers(dims, np.random.default_rng([0, 1])))


@pytest.mark.parametrize("gradients", ["true", "delayed"])
def test_each_side_of_a_cut_has_its_own_rate_and_both_decay(gradients, loaded, monkeypatch):
    """With --delay 0, a delayed gradient is the true one, centered, in the same update."""
    monkeypatch.setitem(train_output.DEFAULTS, "decay", 50)
    layers = trained(loaded, "--gradients", gradients, "--delay", 0, *RATES, "--output-rate", 0.2)
    below, above = schedule(0.5, 700, 9), schedule(0.2, 50)
    expected = make_layers([2, 24, 12, 1], np.random.default_rng([0, 1]))
    for clock, i in enumerate(minibatches(len(loaded.x), 100, 2, seed=0)):
        y_hat = feed_forward(expected, loaded.x[i])
        g = backprop(expected[1:], task_of(1).loss_gradient(y_hat, loaded.y[i]))
        backprop(expected[:1], g if gradients == "true" else g - g.mean(axis=0))
        descend(expected[:1], below(clock), 0.9)
        descend(expected[1:], above(clock), 0.9)
    assert same(layers, expected, atol=1e-6)


@pytest.mark.parametrize("gradients", SOURCES)
def test_the_same_options_give_the_same_bits_and_another_seed_does_not(gradients, loaded, linear):
    options = ["--gradients", gradients, "--num-epochs", 1, "--cuts", 1, 2]
    once = trained(loaded, *options)
    assert same(once, trained(loaded, *options))
    assert differ(once, trained(loaded, *options, "--seed", 1))


def test_nothing_that_the_oracle_does_changes_the_parts_above(loaded, silent):
    """Along zero guesses the lowest part stays as drawn, and the run is the one with zero
    gradients."""
    synthetic, zero = (trained(loaded, "--gradients", gradients, "--num-epochs", 2)
                       for gradients in ("synthetic", "zero"))
    assert same(synthetic, zero)
    start = make_layers([2, 24, 12, 1], np.random.default_rng([0, 1]))
    assert same(zero[:1], start[:1]) and differ(zero[1:], start[1:])


def test_shuffled_gradients_differ_from_guesses(loaded, linear):
    guesses, shuffled, zero = (
        trained(loaded, "--gradients", gradients, "--num-epochs", 1, "--warm-up", 0)
        for gradients in ("synthetic", "shuffled", "zero"))
    assert differ(guesses[:1], zero[:1]) and differ(shuffled[:1], zero[:1])
    assert differ(shuffled[:1], guesses[:1])


# ---- what is learned ----


@pytest.fixture(scope="session")
def deep_data(tmp_path_factory):
    """20,000 examples of the target with four columns of noise, so that the lower part must
    learn."""
    from generate import sample
    x, y = sample(20_000, seed=0)
    noise = np.random.default_rng(0).uniform(-1, 1, (len(x), 4)).astype("f")
    x, y = np.column_stack([x, noise]), y[:, None]
    return data.Data(x[:-1000], y[:-1000], x[-1000:], y[-1000:])


def test_guesses_beat_zero_gradients_where_the_lower_part_must_learn(deep_data, linear):
    options = ["--layers", 6, 32, 32, 16, 1, "--cuts", 2, "--condition-on-labels", "--warm-up",
               100, "--learning-rate", 8, "--num-epochs", 2, "--delay", 3]
    reached = {gradients: run(deep_data, *options, "--gradients", gradients)[0][-1]
               for gradients in ("synthetic", "zero")}
    assert reached["synthetic"] < 0.93 * reached["zero"], reached  # shuffled ones reach 1.11


def test_zero_gradients_do_no_better_than_a_constant_guess_where_layer_1_must_learn(noisy_data):
    """test_training.py shows that guesses do better."""
    problem = data.load(*noisy_data)
    reached, *_ = run(problem, "--layers", 10, 8, 64, 1, "--gradients", "zero", "--num-epochs", 2)
    assert min(reached) > 0.95 * data.constant_guess(problem, task_of)


@pytest.mark.parametrize("kind, dims, options", [
    ("noisy_data", [10, 8, 32, 1], ["--num-epochs", 2, "--replay", 2]),
    ("small_digits", [784, 8, 8, 10], ["--num-epochs", 4, "--batch-size", 50, "--learning-rate",
                                       0.1])])
def test_local_gradients_teach_every_lower_part_of_a_chain(kind, dims, options, request):
    """Numbers, and classes."""
    problem = data.load(*request.getfixturevalue(kind))
    (local, layers, _), (zero, untaught, _) = (
        run(problem, "--layers", *dims, "--cuts", 1, 2, *options, "--gradients", gradients)
        for gradients in ("local", "zero"))
    assert min(local) < 0.7 * min(zero)
    assert all(differ([mine], [drawn]) for mine, drawn in zip(layers, untaught, strict=True))


# ---- in which order things happen ----


@pytest.fixture
def record(monkeypatch):
    """What the next runs do, [(what, cut, clock, more), ...], in its order. Cut 0 is the highest.

    throw: up; tell: the gradient down; deliver: that arrives; guess: an answer, and the newest
    clock that it was learned from; apply: a gradient that came back, and how late.
    """
    record, names, original = [], {}, in_process.Cut

    def note(cut, what, clock, more=None):
        record.append((what, names[cut], int(clock), more))

    class Recording(original):
        def __init__(self, *args):
            names[self] = len(names)
            super().__init__(*args)
            if self.oracle:
                add, guess, throw_down = self.take, self.guess, self.late.throw

                def recorded_add(start, clock, *rest):
                    note(self, "deliver", clock)
                    add(start, clock, *rest)

                def recorded_guess(h, y):
                    answer, newest = guess(h, y)
                    note(self, "guess", self.part.clock, newest and newest[1])
                    return answer, newest

                def recorded_tell(*columns):
                    note(self, "tell", columns[3][0])
                    throw_down(*columns)
                self.take, self.guess = recorded_add, recorded_guess
                self.late.throw = recorded_tell

        def throw(self, *columns):
            note(self, "throw", columns[3][0])
            super().throw(*columns)
    monkeypatch.setattr(in_process, "Cut", Recording)
    return record


def events(record, *kind):
    return [(clock, more) for *which, clock, more in record if which == list(kind)]


@pytest.mark.parametrize("delay", [0, 1, 6])
def test_every_message_follows_from_what_happened_before_it(delay, record, loaded, linear):
    """A gradient arrives `delay` updates after its minibatch was thrown, and is known to the next
    guess."""
    trained(loaded, "--num-epochs", 1, "--replay", 0, "--delay", delay, "--oracle-replay", 10)
    expected = []
    for clock in range(38):
        expected += [("throw", 0, clock, None), ("tell", 0, clock, None)]
        arrived = clock - delay if clock >= delay else None
        if arrived is not None:
            expected.append(("deliver", 0, arrived, None))
        expected.append(("guess", 0, clock, arrived))
    assert record == expected


def test_in_a_chain_every_cut_has_the_same_delay_and_a_part_tells_after_its_guess(
        record, loaded, linear):
    trained(loaded, "--num-epochs", 1, "--cuts", 1, 2, "--delay", 4, "--oracle-replay", 10)
    for cut in (0, 1):
        guesses = events(record, "guess", cut)
        assert guesses == [(clock, clock - 4 if clock >= 4 else None) for clock in range(38)]
    assert [event[:3] for event in record if event[0] != "deliver" and event[2] == 20] == [
        ("throw", 1, 20), ("throw", 0, 20), ("tell", 0, 20), ("guess", 0, 20), ("tell", 1, 20),
        ("guess", 1, 20)]


def ages(cuts):
    """How late the gradients were that each cut's lower part applied, the highest cut first."""
    return [[age for age, _ in cut.link.bounded.recent] for cut in reversed(cuts)]


@pytest.mark.parametrize("delay", [0, 1, 5])
def test_delayed_gradients_are_as_late_as_the_delays_of_all_cuts_above(delay, loaded):
    *_, cuts = run(loaded, "--gradients", "delayed", "--delay", delay, "--num-epochs", 1,
                   "--layers", 2, 9, 8, 7, 1, "--cuts", 1, 2, 3)
    assert ages(cuts) == [[n * delay] * (38 - n * delay) for n in (1, 2, 3)]


def test_gradients_at_replayed_activations_are_not_told(record, loaded, linear):
    *_, cuts = run(loaded, "--num-epochs", 1, "--replay", 8)
    assert cuts[0].above.replay.drawn > 5 * 3800
    assert len(events(record, "tell", 0)) == 38


def test_with_true_gradients_nothing_is_thrown_and_the_part_above_makes_one_update_each(
        record, loaded):
    *_, cuts = run(loaded, "--num-epochs", 1, "--gradients", "true", "--replay", 0)
    assert record == [] and cuts[0].above.replay.received == 3800


@pytest.mark.parametrize("gradients", ["synthetic", "delayed"])
def test_within_the_bound_nothing_is_waited_for_and_beyond_it_the_part_waits(
        gradients, loaded, linear):
    for bound, late in ((20, True), (3, False)):
        *_, (cut,) = run(loaded, "--gradients", gradients, "--num-epochs", 2, "--delay", 12,
                         "--staleness", bound)
        assert max(ages([cut])[0]) <= bound
        assert (max(ages([cut])[0]) > 10) == late


def test_a_staleness_of_one_works_where_one_minibatch_teaches_the_oracle(loaded, linear):
    *_, (cut,) = run(loaded, "--staleness", 1, "--batch-size", 300, "--oracle-replay", 20,
                     "--num-epochs", 1)
    assert set(ages([cut])[0]) == {0, 1}


@pytest.mark.parametrize("options", [["--batch-size", 100], ["--batch-size", 300]])
def test_a_staleness_with_which_the_oracle_would_starve_is_refused(options, loaded, linear):
    with pytest.raises(UserError, match="needs .* new gradients .* but only .* come before"):
        run(loaded, "--staleness", 1, "--num-epochs", 1, *options)


def test_the_cut_parts_are_the_whole_networks_layers(loaded, silent):
    _, layers, cuts = run(loaded, "--layers", 2, 9, 8, 7, 1, "--cuts", 1, 3, "--num-epochs", 1)
    assert [cut.part.layers for cut in cuts] == [layers[:1], layers[1:3]]
    assert all(layer.activation is HIDDEN for layer in layers[:-1])


# ---- what only the processes do ----


@pytest.mark.parametrize("used", [lambda guess: guess, lambda guess: guess[::-1]])
def test_a_probe_holds_the_true_gradient_and_the_guess_each_in_its_place(used, loaded):
    """And the cosine is theirs, with the guess as it is used: --gradients shuffled permutes it."""
    network = make_layers([2, 24, 12, 1], np.random.default_rng(0))
    run = SimpleNamespace(
        k=1, data=loaded, part=SimpleNamespace(layers=network[:1]),
        link=SimpleNamespace(source=SimpleNamespace(asks_oracle=True, used=used)),
        above=SimpleNamespace(
            wait=lambda attempt: attempt(), guess=lambda h, y: (-h, None)))
    cosine, probe = train_input.Run.compare_gradients(run, network)
    x, y = loaded.x_test, loaded.y_test
    h = feed_forward(network[:1], x)
    g = backprop(network[1:], feed_forward(network[1:], h) - y)
    for name, expected in (("x", x), ("g", g[:, :4]), ("guess", -h[:, :4])):
        np.testing.assert_array_equal(probe[name], expected)
    run.above.guess = lambda h, y: (asked.append(h.shape) or -h, None)
    asked, wide = [], make_layers([2, 2**15, 1], np.random.default_rng(0))
    run.part.layers = wide[:1]
    train_input.Run.compare_gradients(run, wide)
    assert asked == [(2**22 // 2**15, 2**15)], "more would not fit into a message"
    lengths = np.linalg.norm(g, axis=1) * np.linalg.norm(used(h), axis=1)
    assert cosine == pytest.approx(np.mean((g * used(-h)).sum(axis=1) / lengths), rel=1e-4)


def test_the_output_trainers_seed_decides_its_weights(tmp_path, monkeypatch):
    drawn = []

    def noted(layers, *folder):
        drawn.append(layers)
        return Part(layers, *folder)
    monkeypatch.setattr(train_output, "Part", noted)
    monkeypatch.setattr(serving, "serve", lambda app, listener, args: listener.close())
    for seed in (0, 0, 1):
        train_output.main(argparse.Namespace(**train_output.DEFAULTS | {
            "host": "127.0.0.1", "port": 0, "token": None, "trace": None, "allow_host": [],
            "oracle_server": "none", "seed": seed, "progress_dir": tmp_path}), stop=True)
    assert same(*drawn[:2]) and differ(*drawn[1:])


# ---- the command ----


@pytest.mark.parametrize(("bad", "expected"), [
    *((f"--cuts {cuts}", "--cuts must rise from 1 to 2 at most")
      for cuts in ("0", "3", "2 1", "1 1")),
    ("--batch-size 1000", "must be at least 10 times"), ("--delay -1", "at least 0")])
def test_what_cannot_work_is_one_line(bad, expected, small_data, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["in_process.py", *map(str, small_data), *bad.split()])
    with pytest.raises(SystemExit) as ended:
        in_process.main()
    assert ended.value.code == 2 and expected in capsys.readouterr().err.splitlines()[-1]


def test_where_no_oracle_is_asked_it_need_not_train(loaded):
    trained(loaded, "--gradients", "delayed", "--batch-size", 1000, "--num-epochs", 1)


def test_the_command_prints_a_line_per_epoch(small_data, silent, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["in_process.py", *map(str, small_data), "--num-epochs", "2"])
    in_process.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" updates")[0].strip() for line in lines[1:]] == ["38", "76"]


CHECK = """
import json, runpy, sys, threading
started, start = [], threading.Thread.start
def noted(thread):
    started.append(type(thread).__name__)
    start(thread)
threading.Thread.start = noted
script, kinds, *words = sys.argv[1:]
for kind in kinds.split():
    sys.argv = [script, *words, "--gradients", kind]
    runpy.run_path(script, run_name="__main__")
print(json.dumps([started, [name for name in (
    "flask", "waitress", "requests", "plumbing.wire", "tensorflow") if name in sys.modules]]))
"""


def started_and_imported(small_data, kinds):
    """The kinds of threads that examples/in_process.py started, and which packages it imported."""
    done = subprocess.run([sys.executable, "-c", CHECK, ROOT / "examples" / "in_process.py", kinds,
                           *small_data, "--num-epochs", "1", "--cuts", "1", "2"],
                          capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_without_an_oracle_it_needs_neither_http_nor_tensorflow_nor_threads(small_data):
    started, imported = started_and_imported(small_data, "true delayed local zero")
    assert set(started) <= {"TMonitor"} and imported == []  # tqdm's


@pytest.mark.processes
def test_with_an_oracle_it_needs_tensorflow_but_no_http(small_data):
    imported = started_and_imported(small_data, "synthetic")[1]
    assert set(imported) - {"requests"} == {"tensorflow"}  # Keras has requests
