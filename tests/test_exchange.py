"""What asynchrony adds to SGD: fire-and-forget, arrivals, replay, bounded staleness. No sockets."""
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import exchange
from exchange import Arrivals, BoundedStaleness, Part, Replay
from plumbing import posting
from plumbing.posting import Outbox, Poster
from plumbing.wire import MAX_BODY, NoAnswer, encode, rows_per_message
from sgd import make_layers
from tests.processes import wait_until


class Gate:
    """A receiver that takes nothing until it is opened, and can be told to fail."""

    def __init__(self, error=None):
        self.open, self.error, self.received = threading.Event(), error, []

    def post(self, *columns):
        self.open.wait(30)
        if self.error:
            raise self.error
        self.received.append(columns)


def columns(i, clock=0, width=2):
    """i, h, y, clock of a minibatch whose activations name it."""
    i = np.array(i)
    h = np.stack([i + clock / 1000.0] * width, axis=1).astype("f")
    return i, h, h[:, :1], np.full(len(i), clock)


# ---- what is thrown ----


def test_throwing_never_waits_and_the_oldest_are_dropped():
    gate, outbox = Gate(), Outbox(max_rows=40, per_message=1000)
    poster = Poster(outbox, gate.post, "the gate")
    outbox.throw(*columns([0]))
    wait_until(lambda: not outbox.queue, "the thread to hang at the gate")
    began = time.monotonic()
    for k in range(1000):
        outbox.throw(*columns(range(10 * k, 10 * k + 10)))
    assert time.monotonic() - began < 1
    gate.open.set()
    poster.close(10)
    received = np.concatenate([i for i, *_ in gate.received])
    np.testing.assert_array_equal(received, [0, *range(9960, 10_000)])
    assert outbox.counters() == {"thrown": 10_001, "sent": 41, "dropped": 9960}


@pytest.mark.parametrize("error", [NoAnswer("dead"), MemoryError(), FloatingPointError("diverged")])
def test_a_server_that_fails_is_survived_counted_and_said_once(error, capsys, monkeypatch):
    monkeypatch.setattr(posting, "TRY_AGAIN", 0.05)
    gate, outbox = Gate(error), Outbox(max_rows=100, per_message=1000)
    gate.open.set()
    poster = Poster(outbox, gate.post, "the gate")
    for k in (1, 2):
        outbox.throw(*columns([k]))
        wait_until(lambda k=k: outbox.counters()["dropped"] == k, "the drop to be counted")
    gate.error = None
    outbox.throw(*columns([3]))
    wait_until(lambda: outbox.counters() == {"thrown": 3, "sent": 1, "dropped": 2}, "its return")
    poster.close(10)
    said = capsys.readouterr().err
    assert said.count("the gate does not take") == 1
    assert said.count("the gate takes messages again") == 1


@pytest.mark.parametrize("hangs", [True, False])
def test_closing_is_bounded_when_the_server_hangs_or_fails(hangs):
    gate, outbox = Gate(NoAnswer("dead")), Outbox(max_rows=100, per_message=1000)
    poster = Poster(outbox, gate.post, "the gate")
    if not hangs:
        gate.open.set()
    for k in range(20):
        outbox.throw(*columns([k]))
    began = time.monotonic()
    poster.close(timeout=0.2)
    assert time.monotonic() - began < 2
    gate.open.set()
    poster.thread.join(10)
    assert not poster.thread.is_alive()


def test_a_message_holds_whole_minibatches_in_their_order_and_not_more_than_fit():
    outbox = Outbox(max_rows=100, per_message=7)
    for k in range(4):
        outbox.throw(*columns([3 * k, 3 * k + 1, 3 * k + 2], clock=k))
    outbox.throw(*columns(range(20, 30), clock=4))
    outbox.closing = True
    messages = [outbox.next_message() for _ in range(4)]
    assert [len(message[0]) for message in messages[:3]] == [6, 6, 10] and messages[3] is None
    assert messages[0][0].tolist() == [0, 1, 2, 3, 4, 5]
    assert messages[1][3].tolist() == [2, 2, 2, 3, 3, 3]


@pytest.mark.parametrize("width", [1, 24, 1024, 20_000])
def test_what_is_posted_together_fits_into_a_message(width):
    n = rows_per_message(2 * width + 1)
    zeros = np.zeros((n, width), "f")
    message = encode(i=np.arange(n), h=zeros, y=zeros[:, :1], clock=np.arange(n), gradients=zeros)
    assert MAX_BODY / 4 < len(message) < MAX_BODY


def thrown_again(outbox, after):
    """The indices that throw_again(after) throws, of what has been sent before."""
    while outbox.queue:
        outbox.next_message()
    outbox.throw_again(after)
    return outbox.next_message()[0].tolist() if outbox.queue else []


def test_all_that_is_newer_than_what_was_learned_is_thrown_again():
    outbox = Outbox(max_rows=1000, per_message=1000)
    for clock in range(5):
        outbox.throw(*columns([2 * clock, 2 * clock + 1], clock=clock))
    assert thrown_again(outbox, 2) == [6, 7, 8, 9]
    assert thrown_again(outbox, None) == list(range(10))
    assert thrown_again(outbox, 4) == []
    assert outbox.counters()["thrown"] == 10 + 4 + 10


def test_what_still_waits_is_not_thrown_twice_and_what_is_kept_is_bounded():
    outbox = Outbox(max_rows=10, per_message=1000)
    for clock in range(20):
        outbox.throw(*columns([clock], clock=clock))
    outbox.throw_again(None)
    assert outbox.next_message()[0].tolist() == list(range(10, 20))
    assert thrown_again(outbox, None) == list(range(10, 20))


def test_a_minibatch_larger_than_the_bound_is_still_thrown():
    outbox = Outbox(max_rows=10, per_message=1000)
    for clock in range(2):
        outbox.throw(*columns(range(12), clock=clock))
    assert outbox.next_message()[3].tolist() == [1] * 12 and outbox.counters()["dropped"] == 12


def test_with_minibatches_of_one_everything_lost_in_flight_is_thrown_again_at_once():
    """--batch-size 1 --staleness 250: the oracle needs 125 examples, so one alone helps nobody."""
    outbox = Outbox(max_rows=4 * 250 * 1, per_message=1000)
    for clock in range(1000):
        outbox.throw(*columns([clock], clock=clock))
        outbox.next_message()  # and lost
    asked = []

    def answer(i, h, y, clock):
        asked.append(clock)
        return h, 700
    bounded = BoundedStaleness(answer, 250, lambda ask: ask(), outbox.throw_again)
    with pytest.raises(NoAnswer):
        bounded(*columns([1000])[:3], 1000)
    again = outbox.next_message()
    assert again[3].tolist() == list(range(701, 1000))


# ---- what is stored ----


@settings(max_examples=100)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 50))
def test_the_newest_examples_are_kept_and_no_others(sizes, keep):
    examples, sent = Replay(keep, replay=1e9), np.arange(sum(sizes))
    for part in np.split(sent, np.cumsum(sizes)[:-1]):
        examples.add(part, -part[:, None].astype("f"))
    i, h, _ = examples.draw(2000, np.random.default_rng(0))
    assert set(i) == set(sent[-keep:]) and (i.dtype, h.dtype) == (np.int64, np.float32)
    np.testing.assert_array_equal(h[:, 0], -i)
    stored = min(keep, len(sent))
    assert examples.counters() == {"received": len(sent), "stored": stored, "drawn": 2000}


def test_what_is_drawn_tells_how_many_have_arrived_since():
    examples, rng = Replay(keep=50, replay=1000), np.random.default_rng(0)
    examples.add(np.arange(50))
    examples.add(np.arange(50, 60))
    for _ in range(20):
        number, ages = examples.draw(40, rng)
        np.testing.assert_array_equal(ages, 59 - number)
    assert examples.counters()["drawn"] == 800


def test_replay_is_bounded_by_what_arrives_and_by_what_is_kept():
    examples, rng = Replay(keep=100, replay=3), np.random.default_rng(0)

    def draw_all():
        count = 0
        while examples.draw(10, rng):
            count += 10
        return count
    assert draw_all() == 0
    examples.add(np.zeros(50))
    assert draw_all() == 150
    examples.add(np.zeros(5))
    assert draw_all() == 10  # of the 15 that are allowed, 5 are left for the next time
    for _ in range(20):
        examples.add(np.zeros(50))
    assert draw_all() == 300  # not 3005: no more than `replay` times what is stored


def test_without_replay_nothing_is_drawn():
    examples = Replay(keep=100, replay=0)
    examples.add(np.zeros(100))
    assert examples.draw(1, np.random.default_rng(0)) is None


def test_waiting_for_news_ends_when_it_comes():
    examples, drawn = Replay(keep=100, replay=1), []

    def wait():
        drawn.append(examples.draw(10, np.random.default_rng(0), seconds=60))
    waiter = threading.Thread(target=wait)
    waiter.start()
    examples.add(np.ones(10))
    waiter.join(10)
    assert drawn[0][0].sum() == 10


def is_new(examples, i, clock=0, shift=0.0):
    i, h, _, clock = columns(i, clock)
    return examples.is_new(i, h + np.float32(shift), clock).tolist()


def test_an_example_is_new_once_for_each_clock_and_activation():
    examples = Replay(keep=1000, replay=1)
    assert is_new(examples, [1, 2, 3]) == [True] * 3
    assert is_new(examples, [3, 4, 1]) == [False, True, False]
    assert is_new(examples, [1, 2], clock=38) == [True] * 2, "the next epoch"
    assert is_new(examples, [1, 2], shift=0.5) == [True] * 2, "a resumed run, from other weights"
    _, h, _, clock = columns([1, 1])
    assert examples.is_new(np.array([8, 9]), h, clock).all(), "two that are equal"


def test_what_is_remembered_of_old_examples_is_bounded():
    examples = Replay(keep=100, replay=1)
    for clock in range(150):
        assert all(is_new(examples, range(1000), clock))
        assert len(examples.seen) <= 40_000
    for k in range(20):  # each of them tells the newest again, whenever old ones were forgotten
        assert is_new(examples, range(1000), 150 + k) == [True] * 1000
        assert is_new(examples, range(1000), 150 + k) == [False] * 1000
        assert is_new(examples, range(1000), 140 + k) == [False] * 1000


# ---- what arrives ----


def new_arrivals(replay=0, batch_size=10, keep=1000, backlog=40):
    return Arrivals(Replay(keep, replay), batch_size, np.random.default_rng(0), backlog)


def nothing(*_):
    pass


def test_the_newest_arrival_comes_first_then_replay_then_nothing():
    arrivals = new_arrivals(replay=1)
    for clock in range(3):
        arrivals.add(*columns(range(10), clock), nothing, nothing)
    seen = [arrivals.next() for _ in range(7)]
    newest = [minibatch.h[0, 0] for minibatch in seen[:3]]
    assert newest == pytest.approx([0.002, 0.001, 0.0])
    assert [minibatch.tell is not None for minibatch in seen[:6]] == [True] * 3 + [False] * 3
    assert seen[6] is None


def test_beyond_the_backlog_the_oldest_is_skipped_counted_and_left_to_replay():
    arrivals = new_arrivals(replay=1)
    for clock in range(100):
        arrivals.add(*columns(range(10), clock), nothing, nothing)
    assert len(arrivals.waiting) == 4 and arrivals.skipped == 96
    assert arrivals.replay.counters()["received"] == 1000
    assert arrivals.next().h[0, 0] == pytest.approx(0.099)


def test_two_minibatches_may_always_wait_however_large_they_are():
    arrivals = new_arrivals(batch_size=100, backlog=40)
    for clock in range(3):
        arrivals.add(*columns(range(100), clock), nothing, nothing)
    assert len(arrivals.waiting) == 2 and arrivals.skipped == 1 and arrivals.backlog == 200


def test_a_message_of_several_minibatches_is_trained_on_one_by_one():
    arrivals, told = new_arrivals(), []
    arrivals.add(*columns(range(25), 3), lambda *told_columns: told.append(told_columns), nothing)
    sizes = []
    while minibatch := arrivals.next():
        sizes.append(len(minibatch.h))
        minibatch.tell(-minibatch.h)
    assert sizes == [5, 10, 10]
    for i, h, y, clock, g in told:
        assert (g == -h).all() and (h[:, 0] == y[:, 0]).all() and set(clock) == {3}
        np.testing.assert_allclose(h[:, 0], i + 0.003, rtol=1e-5)


def test_what_is_thrown_again_counts_once_and_its_gradients_are_told_again():
    arrivals, again = new_arrivals(replay=2), []
    arrivals.add(*columns(range(10), 7), nothing, again.append)
    for _ in range(50):
        arrivals.add(*columns(range(10), 7), nothing, again.append)
    assert again == [6] * 50, "what is newer than clock 6 is to be told again"
    assert arrivals.replay.counters()["received"] == 10 and len(arrivals.waiting) == 1
    updates = 0
    while arrivals.next():
        updates += 1
    assert updates == 1 + 2


def test_of_a_message_that_is_known_in_part_only_the_rest_is_trained_on():
    arrivals, again = new_arrivals(), []
    arrivals.add(*columns(range(10), 7), nothing, again.append)
    both = [np.concatenate(pair) for pair in
            zip(columns(range(10), 7), columns(range(10, 20), 8), strict=True)]
    arrivals.add(*both, nothing, again.append)
    assert again == [6]
    assert arrivals.next().i.tolist() == list(range(10, 20))
    assert arrivals.next().i.tolist() == list(range(10)) and arrivals.next() is None


def test_questions_come_first_in_their_order_and_none_is_skipped():
    arrivals, told = new_arrivals(), []
    arrivals.add(*columns(range(10)), nothing, nothing)
    for k in range(20):
        _, h, y, _ = columns(range(10), k)
        arrivals.add_question(h, y, told.append)
    questions = [arrivals.next() for _ in range(20)]
    clocks = [1000 * question.h[0, 0] for question in questions]
    assert all((question.i == range(10)).all() for question in questions)
    assert clocks == pytest.approx(list(range(20)), abs=0.01)
    assert arrivals.next().i is not None and arrivals.next() is None


def test_a_minibatch_that_arrives_ends_the_wait_for_one():
    arrivals, got = new_arrivals(), []
    waiter = threading.Thread(target=lambda: got.append(arrivals.next(seconds=60)))
    waiter.start()
    arrivals.add(*columns(range(10)), nothing, nothing)
    waiter.join(10)
    assert len(got[0].h) == 10


# ---- what comes back ----


class Clock:
    """A clock that only goes on when it is told to."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now

    perf_counter = monotonic


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(exchange, "time", Clock())
    return exchange.time


class Oracle:
    """Answers with `learned`, and notes after which clock minibatches were thrown again."""

    def __init__(self, bound, learned=None):
        self.learned, self.again = learned, []
        self.bounded = BoundedStaleness(self.answer, bound, lambda ask: ask(), self.again.append)

    def answer(self, i, h, y, clock):
        return -h, self.learned

    def ask(self, clock):
        """Whether there is an answer at this clock."""
        try:
            i, h, y, _ = columns(range(3), clock)
            assert (self.bounded(i, h, y, clock) == -h).all()
            return True
        except NoAnswer:
            return False

    def answers(self, clocks):
        """How many questions in a row are answered."""
        return next((n for n, clock in enumerate(clocks) if not self.ask(clock)), len(clocks))


def test_a_guess_may_be_exactly_as_old_as_the_bound():
    oracle = Oracle(bound=7, learned=10)
    assert oracle.answers(range(10, 100)) == 8
    oracle.learned = 20
    assert oracle.answers(range(18, 100)) == 10
    assert oracle.bounded.status()["staleness_p95"] <= 7


def test_an_oracle_that_knows_nothing_is_bounded_from_the_first_question_on():
    oracle = Oracle(bound=7)
    assert oracle.answers(range(1000, 2000)) == 8


def test_an_oracle_that_is_restarted_twice_is_bounded_each_time():
    oracle = Oracle(bound=7)
    assert oracle.ask(0)
    oracle.learned = 2
    assert oracle.ask(3)
    oracle.learned = None
    assert oracle.answers(range(4, 100)) == 8, "it counts from when it began to know nothing again"
    oracle.learned = 12
    assert oracle.ask(12)
    oracle.learned = None
    assert oracle.answers(range(13, 100)) == 8


def test_after_a_resume_from_an_older_checkpoint_layer_1_does_not_run_unbounded():
    """The oracle has learned from clock 3000 and learns nothing new; layer 1 resumes at 1500."""
    oracle = Oracle(bound=20, learned=3000)
    assert oracle.answers(range(1500, 3000)) == 21
    assert max(staleness for staleness, _ in oracle.bounded.recent) == 20
    assert min(staleness for staleness, _ in oracle.bounded.recent) == 0, "and never negative"
    assert oracle.again == [None], "all that is kept, for all of it is older than what was learned"
    oracle.learned = 1519
    assert oracle.answers(range(1521, 3000)) == 19


def test_minibatches_are_thrown_again_with_a_pause_and_only_while_it_waits(clock):
    oracle = Oracle(bound=7, learned=0)
    assert oracle.answers(range(8)) == 8 and oracle.again == []
    for _ in range(100):
        assert not oracle.ask(8)
    assert oracle.again == [0]
    clock.now += exchange.THROW_AGAIN + 0.01
    for _ in range(100):
        assert not oracle.ask(8)
    assert oracle.again == [0, 0]
    assert 0.1 <= exchange.THROW_AGAIN <= 5


def test_waits_are_counted_and_timed(clock):
    oracle = Oracle(bound=7, learned=0)

    def wait(ask):
        try:
            return ask()
        except NoAnswer:
            clock.now += 0.25
            oracle.learned = 8
            return ask()

    def slow_answer(*minibatch):
        clock.now += 0.5  # which is latency, and no wait
        return oracle.answer(*minibatch)
    oracle.bounded.wait, oracle.bounded.answer = wait, slow_answer
    oracle.bounded.waits, oracle.bounded.waited = 2, 10.0  # of the run that is continued
    assert oracle.answers(range(10)) == 10
    assert (oracle.bounded.waits, oracle.bounded.waited) == (3, pytest.approx(10 + 0.5 + 0.25))
    assert oracle.bounded.status()["waits"] == 3


def test_staleness_and_latency_are_medians_and_95th_percentiles():
    bounded = BoundedStaleness(None, 20, None, None)
    bounded.recent.extend((k, (200 + k) / 1000) for k in range(101))
    assert bounded.recent.maxlen == 1000
    assert bounded.status() == pytest.approx({
        "staleness": 50, "staleness_p95": 95, "latency_ms": 250, "latency_ms_p95": 295,
        "waits": 0, "waited": 0})


def test_what_it_waits_for_is_said_with_the_numbers():
    oracle = Oracle(bound=7, learned=3)
    with pytest.raises(NoAnswer, match=r"of update 3, .* at update 11, --staleness is 7"):
        oracle.bounded(*columns([0])[:3], 11)
    oracle = Oracle(bound=0)
    assert oracle.ask(0)
    with pytest.raises(NoAnswer, match="none has come yet"):
        oracle.bounded(*columns([0])[:3], 1)


# ---- a part ----


def test_weights_that_were_read_are_a_copy_with_the_number_of_updates_that_made_them():
    part = Part(make_layers([2, 3, 1], np.random.default_rng(0)), updates=5)
    weights, updates = part.weights()
    before = weights[0][0].copy()
    for layer in part.layers:
        layer.dL_dw, layer.dL_db = np.ones_like(layer.w), np.ones_like(layer.b)
    part.descend(1.0, 0.0)
    assert updates == 5 and (weights[0][0] == before).all()
    assert part.updates == 6 and (part.layers[0].w == before - 1).all()
    weights[0][0][:] = 0
    assert part.layers[0].w.any()


def test_a_number_of_updates_belongs_to_its_weights_whenever_they_are_read():
    """Each update adds 1 to every weight: so the weights say which update they are of."""
    part = Part(make_layers([40, 40, 40], np.random.default_rng(0)))
    for layer in part.layers:
        layer.w[:], layer.b[:] = 0, 0
        layer.dL_dw, layer.dL_db = -np.ones_like(layer.w), -np.ones_like(layer.b)

    def train():
        for _ in range(2000):
            part.descend(1.0, 0.0)
    trainer = threading.Thread(target=train)
    trainer.start()
    seen = set()
    while trainer.is_alive() or not seen:
        weights, updates = part.weights()
        assert {value for pair in weights for array in pair for value in array.flat} == {updates}
        seen.add(updates)
    trainer.join()


def test_weights_cannot_be_read_within_an_update(monkeypatch):
    part, read = Part(make_layers([2, 1], np.random.default_rng(0))), []

    def slow_descend(layers, *_):
        reader = threading.Thread(target=lambda: read.append(part.weights()[1]))
        reader.start()
        reader.join(0.1)
        assert not read
        layers[0].w += 1
        slow_descend.reader = reader
    monkeypatch.setattr(exchange, "descend", slow_descend)
    part.descend(1.0, 0.0)
    slow_descend.reader.join(10)
    assert read == [1]
