"""Fire and forget: bounded, newest per index, everything counted."""
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from synthgrad import Inbox, NoAnswer, Refused, Sender
from tests.processes import wait_until
from train_output import NewestPerIndex


class Gate:
    """A receiver that takes nothing until it is opened, and can be told to fail."""

    def __init__(self, fail=False):
        self.open, self.fail, self.received = threading.Event(), fail, []

    def post(self, i, h):
        self.open.wait(30)
        if self.fail:
            raise NoAnswer("dead")
        self.received.append((i, h))


def batch(i, value):
    return np.array(i), np.full((len(i), 2), value, "f")


def adds_up(counters):
    return counters["thrown"] == sum(counters[name] for name in ("sent", "replaced", "dropped", "waiting"))


def test_throwing_never_waits_and_the_oldest_are_dropped():
    gate = Gate()
    sender = Sender(gate.post, "the gate", max_examples=40)
    sender.throw(*batch([0], 0))
    wait_until(lambda: not sender.queue, "the thread to hang at the gate")
    began = time.monotonic()
    for k in range(1000):
        sender.throw(*batch(range(10 * k, 10 * k + 10), k))
    assert time.monotonic() - began < 1
    counters = sender.counters()
    assert counters["waiting"] <= 50 and counters["dropped"] >= 9950 and adds_up(counters)
    gate.open.set()
    sender.close(10)
    last = gate.received[-1][0]
    assert set(range(9960, 10000)) >= set(last) and 9999 in last
    assert adds_up(sender.counters()) and sender.counters()["waiting"] == 0


def test_the_newest_per_index_wins():
    gate = Gate()
    sender = Sender(gate.post, "the gate", max_examples=1000)
    sender.throw(*batch([99], 0))
    wait_until(lambda: not sender.queue, "the thread to hang at the gate")
    sender.throw(*batch([1, 2, 2], 1))
    sender.throw(*batch([2, 3], 2))
    gate.open.set()
    sender.close(10)
    i, h = gate.received[1]
    assert dict(zip(i, h[:, 0])) == {1: 1, 2: 2, 3: 2}
    assert sender.counters() == {"thrown": 6, "sent": 4, "replaced": 2, "dropped": 0, "waiting": 0}


def test_a_dead_server_is_survived_and_counted(capsys):
    gate = Gate(fail=True)
    gate.open.set()
    sender = Sender(gate.post, "the gate", max_examples=100)
    sender.throw(*batch([1, 2], 0))
    wait_until(lambda: sender.dropped == 2, "the drop to be counted")
    assert not sender.reachable
    gate.fail = False
    sender.throw(*batch([3], 1))
    wait_until(lambda: sender.sent == 1, "the server's return")
    assert sender.reachable and adds_up(sender.counters())
    assert capsys.readouterr().err.count("does not take") == 1


def test_closing_is_bounded_when_the_server_hangs():
    gate = Gate()
    sender = Sender(gate.post, "the gate", max_examples=100)
    sender.throw(*batch([1], 0))
    began = time.monotonic()
    sender.close(timeout=0.2)
    assert time.monotonic() - began < 2
    gate.open.set()


def test_a_job_that_was_withdrawn_is_not_done_later():
    inbox, done = Inbox(timeout=0.05), []
    with pytest.raises(Refused, match="busy"):
        inbox.ask(done.append, "late")
    asker = threading.Thread(target=inbox.ask, args=(done.append, "in time"))
    asker.start()
    wait_until(lambda: inbox.work(wait=True) or done, "the other job to be done")
    asker.join(10)
    assert done == ["in time"]


@settings(max_examples=200)
@given(st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=20), max_size=20), st.integers(1, 50))
def test_the_training_set_keeps_the_newest_per_index_within_its_bound(batches, capacity):
    examples, truth = NewestPerIndex(capacity, 1), {}
    for k, i in enumerate(batches):
        values = np.arange(len(i), dtype="f") + 100 * k
        examples.add(np.array(i), values[:, None], -values)
        for index, value in zip(i, values):
            truth[index % capacity] = (index, value)
    counters = examples.counters()
    assert counters["received"] == counters["stored"] + counters["replaced"] + counters["dropped"]
    assert counters["received"] == sum(map(len, batches)) and counters["stored"] == len(truth) <= capacity
    if truth:
        while examples.just_arrived:
            assert examples.minibatch(200, None)[0] is not None
        none, h, y = examples.minibatch(200, np.random.default_rng(0))
        assert none is None and set(h[:, 0]) <= {value for _, value in truth.values()}
        np.testing.assert_array_equal(h[:, 0], -y)
        rows = examples.rows[examples.row[list(truth)], 0]
        assert list(zip(examples.owner[list(truth)] - 1, rows)) == list(truth.values())
