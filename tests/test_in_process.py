"""The whole algorithm in one process: what it equals, what depends on what, and in which order
things happen."""
import itertools

import numpy as np
import pytest

import oracle
import train_output
from examples import in_process
from plumbing import data
from sgd import (
    HIDDEN,
    backprop,
    descend,
    feed_forward,
    loss_gradient,
    make_layers,
    minibatches,
    schedule,
    train,
)


class Silent:
    """An oracle that learns nothing, and needs no TensorFlow."""

    def __init__(self, dims, *_):
        self.width = dims[-1]

    def guess(self, h):
        return np.zeros((len(h), self.width), np.float32), None

    def train(self, h, g, clock, ages):
        pass


class Linear(Silent):
    """An oracle that fits ĝ = [h, 1] W by ridge regression, and needs no TensorFlow."""
    learned, w = None, None

    def guess(self, h):
        if self.w is None:
            return super().guess(h)
        return np.column_stack([h, np.ones(len(h))]).astype("f") @ self.w, self.learned

    def train(self, h, g, clock, ages):
        inputs = np.column_stack([h, np.ones(len(h))])
        ridge = inputs.T @ inputs + np.eye(inputs.shape[1])
        self.w = np.linalg.solve(ridge, inputs.T @ g).astype("f")
        self.learned = int(clock[ages == ages.min()].max())


@pytest.fixture
def silent(monkeypatch):
    monkeypatch.setattr(oracle, "Oracle", Silent)


@pytest.fixture
def linear(monkeypatch):
    monkeypatch.setattr(oracle, "Oracle", Linear)


def parse(*options):
    return in_process.make_parser().parse_args(["x.npy", "y.npy", *map(str, options)])


def trained(loaded, *options):
    """The layers of all parts after the run."""
    *_, (_, _, layers, _) = in_process.run(parse(*options), loaded)
    return layers


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
def test_with_true_gradients_it_equals_backprop_and_descent(
        dims, cuts, loaded, silent, monkeypatch):
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


def test_each_side_of_a_cut_has_its_own_rate_and_both_decay(loaded, silent, monkeypatch):
    monkeypatch.setitem(train_output.DEFAULTS, "decay", 50)
    layers = trained(loaded, "--gradients", "true", *RATES, "--output-rate", 0.2)
    below, above = schedule(0.5, 700, 9), schedule(0.2, 50)
    expected = make_layers([2, 24, 12, 1], np.random.default_rng([0, 1]))
    for clock, i in enumerate(minibatches(len(loaded.x), 100, 2, seed=0)):
        y_hat = feed_forward(expected, loaded.x[i])
        backprop(expected, loss_gradient(y_hat, loaded.y[i]))
        descend(expected[:1], below(clock), 0.9)
        descend(expected[1:], above(clock), 0.9)
    assert same(layers, expected, atol=1e-6)


def test_with_delayed_gradients_and_no_delay_layer_1_takes_each_step_one_update_later(
        loaded, silent):
    """A gradient comes back after the update of its clock, so the next update applies it, to the
    weights as they were: w(n + 1) = w(n) − rate(n) · dL/dw of minibatch n − 1."""
    layers = trained(loaded, "--gradients", "delayed", "--delay", 0, *RATES)
    below, above = schedule(0.5, 700, 9), schedule(0.5, train_output.DEFAULTS["decay"])
    expected = make_layers([2, 24, 12, 1], np.random.default_rng([0, 1]))
    layer = expected[0]
    step = np.zeros_like(layer.w), np.zeros_like(layer.b)
    for clock, i in enumerate(minibatches(len(loaded.x), 100, 2, seed=0)):
        y_hat = feed_forward(expected, loaded.x[i])
        g = backprop(expected[1:], loss_gradient(y_hat, loaded.y[i]))
        backprop(expected[:1], g - g.mean(axis=0))
        fresh = layer.dL_dw, layer.dL_db
        layer.dL_dw, layer.dL_db = step
        descend(expected[:1], below(clock), 0.9)
        descend(expected[1:], above(clock), 0.9)
        step = fresh
    assert same(layers, expected, atol=1e-6)


@pytest.mark.parametrize("delay", [1, 5])
def test_delayed_gradients_are_applied_once_each_in_their_order_delay_updates_later(
        delay, loaded, silent, monkeypatch):
    applied = []
    add = in_process.train_input.Delayed.answer

    def answer(self, i, h, y, clock):
        g, learned = add(self, i, h, y, clock)
        applied.append((clock, learned, bool(g.any())))
        return g, learned
    monkeypatch.setattr(in_process.train_input.Delayed, "answer", answer)
    trained(loaded, "--gradients", "delayed", "--delay", delay, "--num-epochs", 1, "--replay", 0)
    for clock, learned, any_gradient in applied:
        assert learned == (clock - delay if clock >= delay else None)
        assert any_gradient == (clock >= delay)


@pytest.mark.parametrize("gradients", in_process.train_input.GRADIENTS)
def test_the_same_options_give_the_same_bits_and_another_seed_does_not(gradients, loaded, linear):
    options = ["--gradients", gradients, "--num-epochs", 1]
    once = trained(loaded, *options)
    assert same(once, trained(loaded, *options))
    assert differ(once, trained(loaded, *options, "--seed", 1))


def test_nothing_that_the_oracle_does_changes_a_trainers_weights(loaded, linear, silent):
    """With zero gradients the run is the same, whatever oracle is trained beside it."""
    reached = []
    for kind in (Silent, Linear):
        oracle.Oracle = kind  # the fixtures put the real one back
        reached.append(trained(loaded, "--gradients", "zero", "--num-epochs", 2))
    assert same(*reached)


def test_zero_leaves_the_lowest_part_as_drawn_and_shuffled_permutes_the_guesses(loaded, linear):
    start = make_layers([2, 24, 12, 1], np.random.default_rng([0, 1]))
    synthetic, zero, shuffled = (
        trained(loaded, "--gradients", gradients, "--num-epochs", 1)
        for gradients in ("synthetic", "zero", "shuffled"))
    assert same(zero[:1], start[:1])
    assert differ(synthetic[:1], start[:1]) and differ(shuffled[:1], synthetic[:1])


# ---- what is learned ----


def scores(loaded, *options):
    return [score for _, score, *_ in in_process.run(parse(*options), loaded)]


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
    reached = {gradients: scores(deep_data, *options, "--gradients", gradients)[-1]
               for gradients in ("synthetic", "zero")}
    assert reached["synthetic"] < 0.93 * reached["zero"], reached  # shuffled ones reach 1.11


def test_zero_gradients_do_no_better_than_a_constant_guess_where_layer_1_must_learn(
        noisy_data, silent):
    """test_training.py shows that guesses do better."""
    problem = data.load(*noisy_data)
    reached = scores(problem, "--layers", 10, 8, 64, 1, "--gradients", "zero", "--num-epochs", 2)
    assert min(reached) > 0.95 * problem.constant_guess


# ---- in which order things happen ----


class Record(list):
    """What was sent when: ("throw", link, clock, …), in the order in which it happened."""

    def index_of(self, *event):
        return next(n for n, each in enumerate(self) if each[:len(event)] == event)

    def count_of(self, *event):
        return sum(each[:len(event)] == event for each in self)


@pytest.fixture
def record(monkeypatch):
    """Every message and update of the next runs, through wrappers around Link's methods."""
    record, links = Record(), itertools.count()

    class Recording(in_process.Link):
        def __init__(self, *args):
            self.name = next(links)
            super().__init__(*args)
            descend, add, late = self.part.descend, self.examples.add, self.delayed.add

            def recorded_descend(*rate):
                descend(*rate)
                record.append(("update above", self.name, self.part.updates))

            def recorded_add(h, g, clock):
                record.append(("deliver", self.name, int(clock[0])))
                add(h, g, clock)

            def recorded_late(i, h, y, clock, g):
                record.append(("deliver", self.name, int(clock[0])))
                late(i, h, y, clock, g)
            self.part.descend, self.examples.add = recorded_descend, recorded_add
            self.delayed.add = recorded_late

        def throw(self, i, h, y, clock):
            record.append(("throw", self.name, clock))
            super().throw(i, h, y, clock)

        def ask(self, i, h, y, clock):
            g, learned = super().ask(i, h, y, clock)
            record.append(("ask", self.name, clock, learned))
            return g, learned

        def tell(self, i, h, y, clock, g):
            record.append(("tell", self.name, int(clock[0]), self.part.updates))
            super().tell(i, h, y, clock, g)
    monkeypatch.setattr(in_process, "Link", Recording)
    return record


def test_every_message_follows_from_what_happened_before_it(record, loaded, linear):
    trained(loaded, "--num-epochs", 2, "--replay", 0, "--delay", 6)
    clocks = range(2 * 38)
    for clock in clocks:
        throw, ask = (record.index_of(what, 0, clock) for what in ("throw", "ask"))
        update, tell = record.index_of("update above", 0, clock + 1), record.index_of(
            "tell", 0, clock)
        assert throw < ask < update < tell, "activations are thrown before the guess is asked for"
        assert record[tell][3] == clock + 1, "a gradient is told after the update with it"
        for what in ("throw", "tell"):
            assert record.count_of(what, 0, clock) == 1
    delivered = [event[2] for event in record if event[0] == "deliver"]
    assert delivered == list(clocks)[:-5]
    for clock in delivered:
        deliver = record.index_of("deliver", 0, clock)
        assert record.index_of("tell", 0, clock) < deliver
        assert record.index_of("ask", 0, clock + 5) < deliver
        assert deliver < (record.index_of("ask", 0, clock + 6) if clock < 70 else len(record))


@pytest.mark.parametrize("cuts", [[1], [1, 2]])
def test_learned_is_never_newer_than_what_was_delivered(cuts, record, loaded, linear):
    trained(loaded, "--num-epochs", 1, "--cuts", *cuts)
    newest, answers = {}, []
    for what, link, clock, *learned in record:
        if what == "deliver":
            newest[link] = max(clock, newest.get(link, -1))
        if what == "ask" and learned[0] is not None:
            assert learned[0] <= newest[link] < clock
            answers.append(learned[0])
    assert len(answers) > 20


def test_in_a_chain_a_middle_part_throws_asks_updates_and_tells_in_this_order(
        record, loaded, linear):
    trained(loaded, "--num-epochs", 1, "--cuts", 1, 2)
    for clock in range(38):
        order = [record.index_of("throw", 0, clock), record.index_of("throw", 1, clock),
                 record.index_of("ask", 1, clock), record.index_of("update above", 0, clock + 1),
                 record.index_of("tell", 0, clock)]
        assert order == sorted(order)
    assert record.count_of("throw", 1) == 38, "replayed activations are not thrown upwards"


def test_gradients_at_replayed_activations_are_not_told(record, loaded, linear):
    trained(loaded, "--num-epochs", 1, "--replay", 8)
    assert record.count_of("update above", 0) > 5 * 38
    assert record.count_of("tell", 0) == 38


def test_nobody_is_told_or_asked_anything_but_true_gradients_when_these_are_wanted(
        record, loaded, linear):
    trained(loaded, "--num-epochs", 1, "--gradients", "true", "--replay", 0)
    assert record.count_of("ask", 0) == record.count_of("tell", 0) == 0
    assert record.count_of("update above", 0) == 38


@pytest.mark.parametrize("gradients", ["synthetic", "delayed"])
def test_within_the_bound_nothing_is_waited_for_and_beyond_it_layer_1_waits(
        gradients, loaded, linear):
    for bound, waits in ((20, False), (3, True)):
        *_, (_, _, _, links) = in_process.run(parse(
            "--gradients", gradients, "--num-epochs", 2, "--delay", 12, "--staleness", bound),
            loaded)
        stalenesses = [staleness for staleness, _ in links[0].bounded.recent]
        assert max(stalenesses) <= bound
        assert (max(stalenesses) > 10) != waits


def test_the_cut_parts_are_the_whole_networks_layers(loaded, silent):
    *_, (_, _, layers, links) = in_process.run(
        parse("--layers", 2, 9, 8, 7, 1, "--cuts", 1, 3, "--num-epochs", 1), loaded)
    assert [[len(layer.b) for layer in link.part.layers] for link in links] == [[8, 7], [1]]
    assert [link.part.layers[0] for link in links] == [layers[1], layers[3]]
    assert all(layer.activation is HIDDEN for layer in layers[:-1])


@pytest.mark.parametrize(("bad", "expected"), [
    *((f"--cuts {cuts}", "--cuts must rise from 1 to 2 at most")
      for cuts in ("0", "3", "2 1", "1 1")),
    ("--batch-size 1000", "--oracle-replay must be at least 5"), ("--delay -1", "at least 0")])
def test_what_cannot_work_is_one_line(bad, expected, small_data, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["in_process.py", *map(str, small_data), *bad.split()])
    with pytest.raises(SystemExit) as ended:
        in_process.main()
    assert ended.value.code == 2 and expected in capsys.readouterr().err.splitlines()[-1]


def test_where_no_oracle_is_asked_it_need_not_train(loaded, silent):
    trained(loaded, "--gradients", "delayed", "--batch-size", 1000, "--num-epochs", 1)


def test_the_command_prints_a_line_per_epoch(small_data, silent, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["in_process.py", *map(str, small_data), "--num-epochs", "2"])
    in_process.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" updates")[0].strip() for line in lines[1:]] == ["38", "76"]
