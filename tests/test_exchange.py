"""Fire and forget: bounded, counted, never waiting. The newest examples: a ring, and replay that is bounded."""
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from plumbing.exchange import NewestExamples, Sender
from synthgrad import MAX_BODY, NoAnswer, encode, rows_per_message
from tests.processes import wait_until


class Gate:
    """A receiver that takes nothing until it is opened, and can be told to fail."""

    def __init__(self, error=None):
        self.open, self.error, self.received = threading.Event(), error, []

    def post(self, i, h):
        self.open.wait(30)
        if self.error:
            raise self.error
        self.received.append((i, h))


def batch(i, value):
    return np.array(i), np.full((len(i), 2), value, "f")


def test_throwing_never_waits_and_the_oldest_are_dropped():
    gate = Gate()
    sender = Sender(gate.post, "the gate", max_rows=40, width=2)
    sender.throw(*batch([0], 0))
    wait_until(lambda: not sender.queue, "the thread to hang at the gate")
    began = time.monotonic()
    for k in range(1000):
        sender.throw(*batch(range(10 * k, 10 * k + 10), k))
    assert time.monotonic() - began < 1
    gate.open.set()
    sender.close(10)
    received = np.concatenate([i for i, _ in gate.received])
    np.testing.assert_array_equal(received, [0, *range(9960, 10_000)])
    assert sender.counters() == {"thrown": 10_001, "sent": 41, "dropped": 9960}


@pytest.mark.parametrize("error", [NoAnswer("dead"), MemoryError(), FloatingPointError("diverged")])
def test_a_server_that_fails_is_survived_counted_and_said_once(error, capsys):
    gate = Gate(error)
    gate.open.set()
    sender = Sender(gate.post, "the gate", max_rows=100, width=2)
    for k in (1, 2):
        sender.throw(*batch([k], 0))
        wait_until(lambda: sender.counters()["dropped"] == k, "the drop to be counted")
    gate.error = None
    sender.throw(*batch([3], 1))
    wait_until(lambda: sender.counters() == {"thrown": 3, "sent": 1, "dropped": 2}, "the server's return")
    assert capsys.readouterr().err.count("the gate does not take") == 1


def test_closing_is_bounded_when_the_server_hangs():
    gate = Gate()
    sender = Sender(gate.post, "the gate", max_rows=100, width=2)
    sender.throw(*batch([1], 0))
    began = time.monotonic()
    sender.close(timeout=0.2)
    assert time.monotonic() - began < 2
    gate.open.set()


@pytest.mark.parametrize("width", [1, 24, 1024])
def test_what_is_posted_together_fits_into_a_message(width):
    n = rows_per_message(2 * width + 1)
    zeros = np.zeros((n, width), "f")
    message = encode(i=np.arange(n), h=zeros, y=zeros[:, :1], clock=np.arange(n), gradients=zeros)
    assert MAX_BODY / 4 < len(message) < MAX_BODY


@settings(max_examples=200)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 50))
def test_the_newest_examples_are_kept_and_no_others(sizes, keep):
    examples, sent = NewestExamples(keep, replay=1e9), np.arange(sum(sizes))
    for part in np.split(sent, np.cumsum(sizes)[:-1]):
        examples.add(part, -part[:, None].astype("f"))
    i, h = examples.draw(2000, np.random.default_rng(0))
    assert set(i) == set(sent[-keep:])
    np.testing.assert_array_equal(h[:, 0], -i)
    assert examples.counters() == {"received": len(sent), "stored": min(keep, len(sent)), "drawn": 2000}


def test_replay_is_bounded_by_what_arrives_and_by_what_is_kept():
    examples, rng = NewestExamples(keep=100, replay=3), np.random.default_rng(0)

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


def test_waiting_for_news_ends_when_it_comes():
    examples, drawn = NewestExamples(keep=100, replay=1), []
    waiter = threading.Thread(target=lambda: drawn.append(examples.draw(10, np.random.default_rng(0), seconds=60)))
    waiter.start()
    examples.add(np.ones(10))
    waiter.join(10)
    assert drawn[0][0].sum() == 10
