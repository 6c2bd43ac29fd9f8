"""What asynchrony adds to SGD: fire-and-forget, replay, bounded staleness, and each source of
gradients. No process, no socket, no TensorFlow."""
import argparse
import copy
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import exchange
import replay
import oracle
import train_input
from exchange import BoundedStaleness
from replay import Replay
from examples import in_process
from links import LowerEnd
from plumbing import posting
from plumbing.errors import Diverged, NoAnswer
from plumbing.part import Part
from plumbing.posting import Outbox, Poster
from plumbing.wire import MAX_BODY, encode, rows_per_message
from sgd import HIDDEN, feed_forward, make_layers, task_of
from tests.processes import wait_until

ANY_SPEED = settings(max_examples=100, deadline=None,
                     suppress_health_check=[HealthCheck.too_slow])
START, BEFORE = 7, 8  # of this start of the part below, and of the one before a crash


class Gate:
    """A receiver that takes nothing until it is opened, and can be told to fail."""

    def __init__(self, error=None):
        self.open, self.error, self.received = threading.Event(), error, []

    def post(self, *columns):
        self.open.wait(30)
        if self.error:
            raise self.error
        self.received.append(columns)


def columns(i, clock=0, width=2, start=START):
    """i, h, y, clock, start of a minibatch whose activations name it."""
    i = np.array(i)
    h = np.stack([i + clock / 1000.0] * width, axis=1).astype("f")
    return i, h, h[:, :1], np.full(len(i), clock), np.full(len(i), start)


# ---- what is thrown ----


def test_throwing_never_waits_and_the_oldest_are_dropped():
    gate, outbox = Gate(), Outbox(max_rows=40)
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
    gate, outbox = Gate(error), Outbox()
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
    gate, outbox = Gate(NoAnswer("dead")), Outbox()
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


def test_a_message_holds_whole_minibatches_in_their_order_until_it_is_full(monkeypatch):
    outbox, three = Outbox(), sum(each.nbytes for each in columns(range(3)))
    monkeypatch.setattr(posting, "MAX_BYTES", three + 1)
    for k in range(4):
        outbox.throw(*columns([3 * k, 3 * k + 1, 3 * k + 2], clock=k))
    outbox.throw(*columns(range(20, 30), clock=4))
    outbox.closing = True
    messages = [outbox.next_message() for _ in range(4)]
    assert [len(message[0]) for message in messages[:3]] == [6, 6, 10] and messages[3] is None
    assert messages[0][0].tolist() == [0, 1, 2, 3, 4, 5]
    assert messages[1][3].tolist() == [2, 2, 2, 3, 3, 3]


@pytest.mark.parametrize("width", [1, 24, 1024, 20_000])
def test_a_full_message_and_the_largest_minibatch_after_it_are_not_too_large(width):
    n = rows_per_message(2 * width + 1)
    size, outbox = 4 * (2 * width + 1) + 24, Outbox(max_rows=10**9)
    for rows in (max(1, posting.MAX_BYTES // size), n):
        h, ones = np.zeros((rows, width), "f"), np.ones(rows, np.int64)
        outbox.throw(ones, h, h[:, :1], ones, ones, h)
    names = "i", "h", "y", "clock", "start", "gradients"
    message = encode(**dict(zip(names, outbox.next_message(), strict=True)))
    assert MAX_BODY / 4 < len(message) < MAX_BODY


def thrown_again(outbox, after):
    """The indices that throw_again(after) throws, of what has been sent before."""
    while outbox.queue:
        outbox.next_message()
    outbox.throw_again(after)
    return outbox.next_message()[0].tolist() if outbox.queue else []


def test_all_that_is_newer_than_a_clock_is_thrown_again():
    outbox = Outbox()
    for clock in range(5):
        outbox.throw(*columns([2 * clock, 2 * clock + 1], clock=clock))
    assert thrown_again(outbox, 2) == [6, 7, 8, 9]
    assert thrown_again(outbox, -1) == list(range(10))
    assert thrown_again(outbox, 4) == []
    assert outbox.counters()["thrown"] == 10 + 4 + 10


def test_what_still_waits_is_not_thrown_twice_and_what_is_kept_is_bounded():
    outbox = Outbox(max_rows=10)
    for clock in range(20):
        outbox.throw(*columns([clock], clock=clock))
    outbox.throw_again(-1)
    assert outbox.next_message()[0].tolist() == list(range(10, 20))
    assert thrown_again(outbox, -1) == list(range(10, 20))


def test_what_is_of_before_a_restart_of_the_part_below_is_not_thrown_again():
    """Else a fresh oracle could take it for the newest start, and the part below would wait."""
    outbox = Outbox()
    for clock in (8, 9):
        outbox.throw(*columns([clock], clock=clock, start=BEFORE))
    outbox.throw(*columns([5], clock=5))
    assert thrown_again(outbox, -1) == [5]


def test_what_diverged_ends_whoever_throws_it():
    """Nothing comes back from above any more, and a part that waits for it would wait for long."""
    outbox, gate = Outbox(), Gate(Diverged("h is not finite"))
    gate.open.set()
    poster = Poster(outbox, gate.post, "the gate")
    outbox.throw(*columns([1]))
    poster.thread.join(10)
    for throw in (lambda: outbox.throw(*columns([2])), lambda: outbox.throw_again(-1)):
        with pytest.raises(Diverged, match="h is not finite"):
            throw()


def test_a_minibatch_larger_than_the_bound_is_still_thrown():
    outbox = Outbox(max_rows=10)
    for clock in range(2):
        outbox.throw(*columns(range(12), clock=clock))
    assert outbox.next_message()[3].tolist() == [1] * 12 and outbox.counters()["dropped"] == 12


# ---- what is stored ----


@ANY_SPEED
@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 50))
def test_the_newest_examples_are_kept_and_no_others(sizes, keep):
    examples, sent = Replay(keep, replay=1e9), np.arange(sum(sizes))
    for part in np.split(sent, np.cumsum(sizes)[:-1]):
        examples.add(part, -part[:, None].astype("f"))
    i, h = examples.draw(2000, np.random.default_rng(0))
    assert set(i) == set(sent[-keep:]) and (i.dtype, h.dtype) == (np.int64, np.float32)
    np.testing.assert_array_equal(h[:, 0], -i)
    stored = min(keep, len(sent))
    assert examples.counters() == {"received": len(sent), "stored": stored, "drawn": 2000}


@ANY_SPEED
@given(st.lists(st.integers(0, 30), min_size=1, max_size=20), st.integers(1, 50),
       st.integers(1, 40))
def test_the_newest_first_all_that_has_come_since_the_last_draw_is_in_the_next(sizes, keep, count):
    examples, rng, sent = Replay(keep, replay=1e9), np.random.default_rng(0), 0
    examples.add(np.array([-1]))
    examples.draw(1, rng, newest_first=True)
    for size in sizes:
        examples.add(np.arange(sent, sent + size))
        sent += size
        drawn, = examples.draw(count, rng, newest_first=True)
        fresh = np.arange(sent)[::-1][:min(size, keep, count)]
        assert len(drawn) == count and drawn[:len(fresh)].tolist() == fresh.tolist()


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


def test_a_minibatch_is_new_once_for_each_start():
    examples = Replay(keep=1, replay=1)
    assert [examples.is_new(start, clock) for start in (1, 2) for clock in (3, 4, 3)] == [
        True, True, False] * 2


def test_what_is_remembered_of_old_minibatches_is_bounded():
    examples = Replay(keep=1, replay=1)
    for clock in range(150_000):
        assert examples.is_new(START, clock)
        assert len(examples.seen) <= 2 * replay.SEEN
    assert not any(examples.is_new(START, clock) for clock in range(150_000 - replay.SEEN,
                                                                   150_000))


# ---- what an oracle has learned from ----


class Mean:
    """In the place of oracle.Model: it guesses the mean gradient, and needs no TensorFlow."""

    def __init__(self, *_, **__):
        pass

    def train(self, h, g):
        mean = g.mean(axis=0)

        def guess(h):
            return np.tile(mean, (len(h), 1))
        return 0.5, guess


@pytest.fixture
def cheap(monkeypatch):
    monkeypatch.setattr(oracle, "Model", Mean)


def new_oracle(batch_size=1, keep=2000, replay=4, labels=0):
    return oracle.Oracle([2, 2], labels, keep, replay, 0.01, batch_size, seed=0).start()


def teach(student, *clocks, start=START, rows=1):
    """One gradient, of ones, for each clock. Then it trains on all that it may."""
    for clock in clocks:
        i, h, y, *marks = columns(range(rows), clock, start=start)
        student.add(start, clock, 0, i, h, y, *marks, np.ones_like(h))
    while student.train():
        pass


@pytest.mark.parametrize("keep, replay", [(2000, 4), (3, 50), (1, 50), (2000, 50)])
def test_newest_is_the_newest_clock_that_has_arrived_whatever_is_drawn(keep, replay, cheap):
    student = new_oracle(keep=keep, replay=replay)
    for clock in range(0, 240, 3):
        teach(student, clock, clock + 1, clock + 2)
        assert student.newest == student.published[0] == (START, clock + 2)


def test_news_that_come_in_another_order_do_not_put_newest_back(cheap):
    """The part above trains on its last arrival first, so the last gradient may be the oldest."""
    student = new_oracle()
    teach(student, 5, 9, 7)
    assert student.newest == (START, 9)
    teach(student, 1, 2, 3)
    assert student.newest == (START, 9)


def test_after_a_resume_newest_is_of_the_new_start_though_old_clocks_are_larger(cheap):
    student = new_oracle()
    teach(student, *range(880, 901), start=BEFORE)
    teach(student, 0, 1, 2)
    assert student.newest == (START, 2)


def test_gradients_of_before_a_crash_that_come_late_do_not_hide_what_was_learned_since(cheap):
    student = new_oracle()
    teach(student, 880, start=BEFORE)
    teach(student, 0, 1, 2)
    teach(student, 881, start=BEFORE)
    assert student.newest == (START, 2), "or the part below waits for ever for news of its start"


def test_what_was_forgotten_before_it_was_learned_from_counts_when_it_is_thrown_again(cheap):
    """Else the oracle would wait for news, and the part below for the oracle."""
    student = new_oracle(keep=5, replay=2)
    for clock in 9, 8, 4, 3, 2, 1, 0:  # the newest comes first
        i, h, y, *marks = columns([0], clock)
        student.add(START, clock, 0, i, h, y, *marks, np.ones_like(h))
    while student.train():
        pass
    assert student.newest == (START, 4)
    for _ in range(5):
        teach(student, 8, 9)
    assert student.newest == (START, 9)


def test_what_an_oracle_has_learned_is_published_whole_and_counts_its_steps(cheap):
    student = new_oracle()
    h = np.zeros((3, 2), "f")
    guess, newest = student.guess(h, None)
    assert not guess.any() and guess.shape == (3, 2) and newest is None
    assert not student.train() and student.updates == 0
    teach(student, 0, 1, 2)
    guess, newest = student.guess(h, None)
    assert (guess == 1).all() and newest == (START, 2) and student.updates == oracle.STEPS


def test_an_oracle_trains_again_after_exactly_as_many_examples_as_it_says(cheap):
    student = new_oracle(batch_size=7, replay=3)
    assert student.needs == 24
    teach(student, *range(23))
    assert student.updates == 0
    teach(student, 23)
    assert student.updates == oracle.STEPS


@pytest.mark.parametrize("examples, options", [
    (1500, ["--batch-size", 1, "--staleness", 250, "--num-epochs", 1]),
    (300, ["--batch-size", 1, "--staleness", 20, "--oracle-replay", 50]),
    (19, ["--batch-size", 10, "--staleness", 10, "--oracle-replay", 1.06, "--num-epochs", 100]),
    (19, ["--batch-size", 10, "--staleness", 10, "--num-epochs", 100, "--delay", 10_000])])
def test_the_part_below_never_stands_still(examples, options, cheap):
    """in_process.py raises NoAnswer if what it waits for has not come when all has arrived."""
    rng = np.random.default_rng(0)
    x, y = rng.random((examples, 2), "f"), rng.random((examples, 1), "f")
    loaded = SimpleNamespace(x=x, y=y, x_test=x, y_test=y)
    args = in_process.make_parser().parse_args([
        "x", "y", "--num-epochs", "2", "--replay", "0", *map(str, options)])
    *_, (updates, _, _, cut) = in_process.run(train_input.with_rates(args), loaded)
    assert updates == args.num_epochs * -(-examples // args.batch_size)
    assert cut.oracle.updates > 0
    assert 0 < cut.link.status()["staleness_p95"] <= args.staleness


# ---- bounded staleness ----


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


class Asker:
    """Asks what answers with `newest`, and notes after which clock minibatches are thrown again."""

    def __init__(self, bound, newest=None):
        self.newest, self.again = newest, []
        self.bounded = BoundedStaleness(bound, lambda attempt: attempt(), self.again.append, START)

    def ask(self, clock):
        """Whether there is an answer at this clock."""
        try:
            return self.bounded(clock, lambda: ("g", self.newest)) == "g"
        except NoAnswer:
            return False

    def answers(self, clocks):
        """How many questions in a row are answered."""
        return next((n for n, clock in enumerate(clocks) if not self.ask(clock)), len(clocks))


def test_a_guess_may_be_exactly_as_old_as_the_bound():
    asker = Asker(bound=7, newest=(START, 10))
    assert asker.answers(range(10, 100)) == 8
    asker.newest = START, 20
    assert asker.answers(range(18, 100)) == 10
    assert [staleness for staleness, _ in asker.bounded.recent] == list(range(8)) + [
        clock - 20 for clock in range(18, 28)]


@pytest.mark.parametrize("newest", [None, (BEFORE, 900), (BEFORE, 1001)])
def test_what_knows_nothing_of_this_start_is_bounded_from_the_first_question_on(newest):
    """After a resume, what is of before the crash does not count, whatever its clock is."""
    asker = Asker(bound=7, newest=newest)
    assert asker.answers(range(1000, 2000)) == 7
    assert asker.again == [999]
    asker.newest = START, 1003
    assert asker.answers(range(1007, 2000)) == 4


def test_an_oracle_that_is_restarted_knows_nothing_but_what_it_knew_still_counts():
    asker = Asker(bound=7, newest=(START, 2))
    assert asker.answers(range(3, 6)) == 3
    for _ in range(2):
        asker.newest = None
        assert asker.answers(range(6, 100)) == 4
    asker.newest = START, 12
    assert asker.answers(range(12, 100)) == 8


def test_minibatches_are_thrown_again_with_a_pause_and_only_while_it_waits(clock):
    asker = Asker(bound=7, newest=(START, 0))
    assert asker.answers(range(8)) == 8 and asker.again == []
    for _ in range(100):
        assert not asker.ask(8)
    assert asker.again == [0]
    clock.now += exchange.THROW_AGAIN + 0.01
    for _ in range(100):
        assert not asker.ask(8)
    assert asker.again == [0, 0]
    assert 0.1 <= exchange.THROW_AGAIN <= 5


def test_waits_are_counted_and_timed(clock):
    asker = Asker(bound=7, newest=(START, 0))

    def wait(attempt):
        try:
            return attempt()
        except NoAnswer:
            clock.now += 0.25
            asker.newest = START, 8
            return attempt()

    def slow_answer():
        clock.now += 0.5  # which is latency, and no wait
        return "g", asker.newest
    asker.bounded.wait = wait
    asker.bounded.waits, asker.bounded.waited = 2, 10.0  # of the run that is continued
    for each in range(10):
        asker.bounded(each, slow_answer)
    assert (asker.bounded.waits, asker.bounded.waited) == (3, pytest.approx(10 + 0.5 + 0.25))
    status = asker.bounded.status()
    assert status["waits"] == 3 and status["latency_ms"] == pytest.approx(500)


def test_staleness_and_latency_are_medians_and_95th_percentiles():
    bounded = BoundedStaleness(20, None, None, START)
    assert np.isnan(bounded.status()["staleness"])
    bounded.recent.extend((k, (200 + k) / 1000) for k in range(101))
    assert bounded.recent.maxlen == 1000
    assert bounded.status() == pytest.approx({
        "staleness": 50, "staleness_p95": 95, "latency_ms": 250, "latency_ms_p95": 295,
        "waits": 0, "waited": 0})


def test_what_it_waits_for_is_said_with_the_numbers():
    asker = Asker(bound=7, newest=(START, 3))
    assert asker.ask(10)
    with pytest.raises(NoAnswer, match="at update 17, .* of update 9, and --staleness is 7"):
        Asker(bound=7).bounded.raise_too_old(17, 9)
    with pytest.raises(NoAnswer, match="at update 20, .* of update 9"):
        asker.bounded(20, lambda: (None, None))


# ---- where a gradient comes from ----


class FakeAbove:
    """What carries messages, in the place of over_http.Above: answers with g and newest. While the
    part waits, news() is called."""
    news_seconds, window = 0, 1

    def __init__(self):
        self.g = self.newest = None
        self.thrown, self.again, self.asked = [], [], []

    def throw(self, *columns):
        self.thrown.append(columns)

    def throw_again(self, after):
        self.again.append(after)

    def guess(self, h, y):
        self.asked.append((h, y))
        return self.g, self.newest

    def true_gradients(self, *columns):
        self.asked.append(columns)
        return self.g

    def trained(self, enough):
        self.enough = enough
        return self.newest

    def news(self):
        raise NoAnswer("none will come")

    def wait(self, attempt):
        while True:
            try:
                return attempt()
            except NoAnswer:
                self.news()


def make_link(gradients, staleness=20, k=1):
    """A LowerEnd of a part 2 -> 3 and a FakeAbove."""
    args = argparse.Namespace(gradients=gradients, staleness=staleness, decay=10_000, head=[4],
                              head_rate=0.1, head_momentum=0.9)
    part = Part(make_layers([2, 3], np.random.default_rng(0), last=HIDDEN))
    return LowerEnd(part, FakeAbove(), START, k, args, np.random.default_rng(1))


def step(link, clock, rows=2):
    """Forward pass, throw, and [(g, x, tell), ...] of the updates that are made then. x is that of
    the minibatch to which g is applied; it names its clock, as does its tell."""
    layer, = link.source.part.layers
    i = np.arange(rows)
    h, y = layer.feed_forward(np.full((rows, 2), clock, "f")), np.zeros((rows, 1), "f")
    link.throw(i, h, y, clock)
    return [(g, layer.x, tell) for g, tell in link.gradients(h, y, clock, clock)]


G = np.array([[1, 20], [3, 20], [8, 50]], "f")


@pytest.mark.parametrize("gradients, applied", [
    ("synthetic", G - [4, 30]), ("true", G), ("zero", None)])
def test_a_gradient_is_centered_if_guessed_as_it_is_if_true_and_none_if_zero(gradients, applied):
    link = make_link(gradients)
    link.above.g, link.above.newest = G, (START, 0)
    steps = step(link, 0, rows=3)
    if applied is None:
        assert steps == []
    else:
        (g, x, tell), = steps
        np.testing.assert_array_equal(g, applied)
        assert tell == 0 and (x == 0).all()


def test_one_example_is_its_own_mean():
    assert (exchange.centered(G[:1]) == G[:1]).all()


def test_shuffled_permutes_the_rows_of_the_guess():
    link = make_link("shuffled")
    link.above.g = np.arange(100, dtype="f").reshape(50, 2)
    (g, _, tell), = step(link, 0, rows=50)
    centered = link.above.g - [49, 50]
    assert (g != centered).all() and tell == 0, "each example gets another one's"
    assert (np.sort(g, axis=0) == centered).all() and (g[:, 1] == g[:, 0]).all(), "rows stay whole"


@pytest.mark.parametrize("gradients", ["synthetic", "shuffled", "zero", "local"])
def test_all_sources_that_do_not_wait_for_gradients_are_paced_alike(gradients):
    link = make_link(gradients, staleness=5)
    link.above.g = np.ones((2, 3), "f")
    for clock in range(5):
        step(link, clock)
    with pytest.raises(NoAnswer, match="none will come"):
        step(link, 5)
    link.above.newest = START, 3
    step(link, 5)
    assert link.source.asks_oracle or link.above.enough == 0, "of clock 0 is new enough at 5"
    assert [int(clock[0]) for _, _, _, clock, _ in link.above.thrown] == [0, 1, 2, 3, 4, 5, 5]


def test_locked_asks_for_the_minibatch_itself_and_sends_it_once():
    link = make_link("true", staleness=1)
    for clock in range(9):  # however many: what is asked for is never too old
        link.above.g = np.full((2, 3), clock, "f")
        (g, x, _), = step(link, clock)
        assert (g == clock).all() and (x == clock).all()
    assert link.above.thrown == []
    for clock, (i, _, _, its_clock, start) in enumerate(link.above.asked):
        assert (its_clock == clock).all() and (start == START).all() and len(i) == 2
    assert len(link.above.asked) == 9


@pytest.mark.parametrize("k", [1, 3])
def test_local_gives_the_gradient_of_the_heads_loss_before_the_heads_step(k):
    """By central differences, in double precision."""
    link, rng = make_link("local", k=k), np.random.default_rng(2)
    h = rng.random((5, 3), "f")
    y = rng.random((5, 1), "f") if k == 1 else np.eye(3, dtype="f")[[0, 1, 2, 1, 0]]
    head = copy.deepcopy(link.source.layers)
    for layer in head:
        layer.w, layer.b = layer.w.astype(float), layer.b.astype(float)
    (g, _), = link.gradients(h, y, 0, None)

    def loss(h):
        return task_of(k).loss(feed_forward(head, h), y)
    for unit, e in enumerate(1e-5 * np.eye(3)):
        expected = (loss(h + e) - loss(h - e)) / 2e-5
        np.testing.assert_allclose(g[:, unit], expected, rtol=1e-3, atol=1e-6)
    before = loss(h.astype(float)).mean()
    for clock in range(300):
        link.above.newest = START, clock
        list(link.gradients(h, y, clock, None))
    after = task_of(k).loss(feed_forward(link.source.layers, h), y).mean()
    assert after < 0.5 * before


# ---- delayed gradients ----


def g_of(clock, rows=2):
    """A gradient that names its clock once its mean, which is 7, has been subtracted."""
    return 7 + np.outer(np.linspace(-clock, clock, rows), np.ones(3)).astype("f")


def come_back(link, *clocks, waiting=0, start=START):
    for clock in clocks:
        link.take_back(start, clock, waiting, "i", "h", g_of(clock))


def delayed_link(staleness=20, window=20):
    link = make_link("delayed", staleness)
    link.source.window = window
    return link


def clocks_of(steps):
    """The clocks of the updates, each of which must fit: gradient, minibatch and tell."""
    for g, x, tell in steps:
        assert (x == tell).all() and g.tolist() == [[-tell] * 3, [tell] * 3]
    return [tell for _, _, tell in steps]


def test_a_delayed_gradient_is_applied_once_to_its_own_minibatch_the_oldest_first():
    link = delayed_link()
    assert [clocks_of(step(link, clock)) for clock in range(5)] == [[]] * 5
    come_back(link, 3, 1, 2)
    assert clocks_of(step(link, 5)) == [1, 2, 3], "all that has come back"
    come_back(link, 2, 3)
    link.source.window = 20
    assert step(link, 6) == [], "what comes back twice is applied once"
    come_back(link, 6, 0)
    assert clocks_of(step(link, 7)) == [0, 6]
    assert [age for age, _ in link.bounded.recent] == [4, 3, 2, 7, 1], "the ages of those updates"


def test_a_gradient_that_is_back_before_it_is_asked_for_is_applied_at_once():
    link = delayed_link(window=1)

    def throw(i, h, y, clock, start):
        come_back(link, int(clock[0]))
    link.above.throw = throw
    assert [clocks_of(step(link, clock)) for clock in range(3)] == [[0], [1], [2]]


def test_a_middle_part_applies_what_has_come_back_when_nothing_arrives():
    link = delayed_link()
    for clock in range(3):
        step(link, clock)
    come_back(link, 1)
    assert [tell for _, tell in link.gradients(clock=3)] == [1]
    assert list(link.gradients(clock=3)) == []


def test_what_comes_again_while_it_is_applied_is_applied_once():
    link = delayed_link()
    for clock in range(3):
        step(link, clock)
    come_back(link, 0, 1, 2)
    updates = link.gradients(clock=3)
    assert next(updates)[1] == 0
    come_back(link, 1, 2)
    assert [tell for _, tell in updates] == [1, 2]
    assert list(link.gradients(clock=3)) == []


def test_a_middle_part_throws_again_what_is_lost_though_nothing_arrives(clock):
    """The part below may wait for just these gradients, and throw no new minibatch."""
    link = delayed_link()
    for n in range(3):
        step(link, n)
    come_back(link, 0)
    for seconds, again in ((0.0, []), (0.4, []), (0.2, [0]), (0.4, [0]), (0.2, [0, 0])):
        clock.now += seconds
        list(link.gradients(clock=3))
        assert link.above.again == again
    come_back(link, 1, 2)
    clock.now += 1
    assert [tell for _, tell in link.gradients(clock=3)] == [1, 2] and len(link.above.again) == 2


def test_without_a_gradient_there_is_no_update_whatever_the_momentum():
    link, x, y = delayed_link(), np.zeros((2, 2), "f"), np.zeros((2, 1), "f")
    part, (layer,) = link.source.part, link.source.part.layers
    layer.w_velocity, before = np.ones_like(layer.w), layer.w.copy()
    order = [np.arange(2)] * 3
    steps = train_input.train(part, x, y, order, lambda clock: 1.0, 0.9, link.throw, link.gradients)
    next(steps), next(steps)
    assert (layer.w == before).all()
    come_back(link, 0)
    next(steps)
    assert (layer.w != before).all()


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_minibatches_of_any_size_are_applied_whole(size):
    link, clock = delayed_link(), 4
    step(link, clock, rows=size)
    link.take_back(START, clock, 0, g_of(clock, size))
    (g, x, _), = step(link, 5)
    assert x.shape == (size, 2) and (x == clock).all()
    np.testing.assert_allclose(g, exchange.centered(g_of(clock, size)))


def test_a_gradient_of_before_a_crash_or_of_an_unknown_minibatch_is_not_applied():
    link = delayed_link()
    step(link, 0)
    come_back(link, 0, start=BEFORE)
    come_back(link, 17)
    assert step(link, 1) == []
    come_back(link, 0)
    assert clocks_of(step(link, 2)) == [0]


def test_only_a_source_that_takes_gradients_back_keeps_them():
    come_back(make_link("synthetic"), 0)


@pytest.mark.parametrize("staleness", [1, 2, 9])
def test_at_most_as_many_as_the_bound_are_on_their_way_however_late_they_are(staleness):
    """The network always holds back all but the oldest: so the window opens to the bound."""
    link = delayed_link(staleness, window=1)
    sizes = []
    link.above.news = lambda: come_back(link, min(link.source.on_their_way))
    for clock in range(120):
        applied = clocks_of(step(link, clock))
        sizes.append(len(link.source.on_their_way))
        assert len(applied) <= 1
    assert max(sizes) == sizes[-1] == staleness
    assert [age for age, _ in link.bounded.recent][-9:] == [staleness] * 9
    assert all(b - a in (0, 1) for a, b in zip(sizes, sizes[1:], strict=False))


def test_the_window_grows_by_one_a_round_trip_and_shrinks_when_several_wait_above():
    link = delayed_link(window=6)
    for clock in range(6):
        step(link, clock)
    a, b = 6 + 1 / 6, 6 + 1 / 6 + 1 / (6 + 1 / 6)
    for clock, waiting, window in ((0, 0, a), (1, 1, b), (2, 3, 4), (3, 9, 1), (4, 0, 2)):
        come_back(link, clock, waiting=waiting)
        assert link.source.window == pytest.approx(window)


def test_after_a_loss_all_on_their_way_are_thrown_again_and_the_part_goes_on(clock):
    link, lost = delayed_link(window=3), []

    def news():
        clock.now += 0.3
        lost.append(list(link.above.again))
        if len(lost) == 4:
            come_back(link, 5)
    link.above.news = news
    for n in (5, 6, 7):
        step(link, n)
    assert clocks_of(step(link, 8)) == [5]
    assert lost == [[4], [4], [4, 4], [4, 4]], "every THROW_AGAIN seconds"
    assert link.bounded.waits == 1 and link.bounded.waited == pytest.approx(1.2)


def test_a_lost_minibatch_is_thrown_again_before_its_gradient_is_older_than_the_bound():
    link = delayed_link(staleness=5, window=5)
    link.above.news = lambda: come_back(link, 0)
    for clock in range(30):
        step(link, clock)
        if clock:
            come_back(link, clock)
    assert link.above.again == [-1]
    assert max(age for age, _ in link.bounded.recent) == 5


def test_the_wait_for_a_gradient_ends_when_a_server_adds_it():
    link = delayed_link(window=1)
    link.above.news_seconds = 60
    step(link, 0)
    server = threading.Thread(target=come_back, args=(link, 0))
    server.start()
    assert clocks_of(step(link, 1)) == [0]
    server.join(10)


def test_the_window_of_delayed_gradients_leaves_one_waiting_above_and_grows_where_less_waits():
    link = make_link("delayed")
    link.source.window = 9
    for clock in range(5):
        step(link, clock)
    g = np.ones((2, 3), "f")
    link.source.add(START, 0, 2, g)
    assert link.source.window == 5 - 2 + 1
    link.source.add(START, 1, 1, g)
    assert link.source.window == 4 + 1 / 4
    step(link, 5)
    assert link.status()["bound"] == 20 and 0 < link.status()["latency_ms"] < 60_000


def test_a_head_expects_activations_at_their_mean():
    layer = make_link("local").source.layers[0]
    np.testing.assert_allclose(layer.b, -HIDDEN.mean * layer.w.sum(axis=0), rtol=1e-6)


def test_a_local_gradient_keeps_the_tell_of_its_minibatch():
    """Or a middle part with a local loss would tell nothing to the oracle below."""
    link = make_link("local")
    link.above.newest = START, 0
    assert [tell for clock in range(2) for _, _, tell in step(link, clock)] == [0, 1]
