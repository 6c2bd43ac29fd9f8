"""The two ends of a link, what carries them between processes, and what the trainers do around
their loops. No process, hardly a socket."""
import argparse
import concurrent.futures
import json
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

import over_http
import plumbing.part
import train_input
import train_middle
import train_output
from replay import Replay
from links import BACKLOG, BEHIND, UpperEnd, check_oracle
from over_http import Above, serve_gradients, serve_part
from plumbing import data, process, runs, serving
from plumbing.errors import Diverged, NoAnswer, Refused, UserError
from plumbing.part import Part
from plumbing.posting import THROWN, Outbox
from plumbing.wire import encode
from sgd import NUMBER, backprop, feed_forward, make_layers
from synthgrad import PartClient, Status
from tests.processes import array_of
from tests.test_exchange import BEFORE, START, Clock, FakeAbove, columns, delayed_link, new_oracle
from tests.test_exchange import cheap as cheap


@pytest.fixture(autouse=True)
def no_lingering(monkeypatch):
    monkeypatch.setattr(over_http, "LINGER", 0)



class NoPoster:
    """In the place of plumbing.posting.Poster: what is thrown stays in the outbox."""

    def __init__(self, outbox, post, to):
        self.outbox = outbox

    def close(self, timeout):
        pass


@pytest.fixture(autouse=True)
def no_posting(monkeypatch):
    monkeypatch.setattr(over_http, "Poster", NoPoster)


class StopAfter:
    """Turns true when it has been asked `count` times."""

    def __init__(self, count):
        self.count = count

    def __bool__(self):
        self.count -= 1
        return self.count < 0


# ---- the upper end ----


def make_upper(replay=0, batch_size=10, keep=1000, back=None):
    return UpperEnd(Replay(keep, replay), batch_size, np.random.default_rng(0), back)


def arrive(upper, *clocks, rows=10, every=False, start=START):
    for clock in clocks:
        upper.add(*columns(range(rows), clock, start=start), every=every)


def clocks_of(upper):
    """The clocks of all that can be trained on now, None where it is replayed."""
    return [minibatch.clock for minibatch in iter(upper.next, None)]


def test_the_newest_arrival_comes_first_then_replay_then_nothing():
    upper = make_upper(replay=1)
    arrive(upper, 0, 1, 2)
    assert clocks_of(upper) == [2, 1, 0, None, None, None]
    assert upper.trained == (START, 2)


def test_what_an_upper_end_says_of_itself():
    nobody = {"thrown": 0, "sent": 0, "dropped": 0}
    upper = make_upper(batch_size=10)
    assert upper.status() == {
        "gradients_sent": nobody, "waiting": 0, "skipped": 0, "trained": None,
        "examples": {"received": 0, "stored": 0, "drawn": 0}}
    back = Outbox()
    upper = make_upper(batch_size=10, back=back)
    arrive(upper, *range(1200))
    arrive(upper, 1200, 1201, every=True)
    upper.next().tell(np.ones((10, 3), "f"))
    back.sent = 7
    assert upper.status() == {
        "gradients_sent": {"thrown": 10, "sent": 7, "dropped": 0}, "waiting": 81, "skipped": 1120,
        "trained": (START, 1200),
        "examples": {"received": 12_020, "stored": 1000, "drawn": 0}}
    assert upper.line() == ("12,020 examples received, 1,120 minibatches skipped, 7 gradients sent")


def test_what_waits_of_before_a_restart_of_the_part_below_sends_no_gradient():
    """Or an Outbox would keep that one to throw again, in place of a newer start's."""
    upper = make_upper(back=Outbox())
    arrive(upper, 880, start=BEFORE)
    arrive(upper, 0)
    assert [(each.clock, each.tell is None) for each in iter(upper.next, None)] == [
        (0, False), (880, True)]
    assert upper.trained == (START, 0)


def test_all_gradients_of_a_message_that_came_before_are_thrown_again():
    upper = make_upper(back=Outbox())
    arrive(upper, 0, 1, 2)
    for minibatch in iter(upper.next, None):
        minibatch.tell(np.ones((10, 3), "f"))
    upper.back.next_message()
    upper.add(*map(np.concatenate, zip(*(columns(range(10), clock) for clock in (1, 2)),
                                       strict=True)))
    assert sorted(set(upper.back.next_message()[3])) == [1, 2]


def test_a_gradient_that_diverged_on_its_way_down_ends_the_loop_above_though_nothing_comes():
    upper = make_upper(back=Outbox())
    upper.back.diverged = Diverged("too large")
    with pytest.raises(Diverged):
        upper.next()


def test_what_is_new_in_a_message_counts_though_it_begins_with_what_is_known():
    upper = make_upper()
    arrive(upper, 0)
    both = map(np.concatenate, zip(columns(range(10), 0), columns(range(10), 1), strict=True))
    upper.add(*both)
    assert clocks_of(upper) == [1, 0]


@pytest.mark.parametrize("every", [False, True])
def test_what_has_been_trained_on_makes_room_for_what_comes(every):
    upper = make_upper()
    for clock in range(3 * max(BACKLOG, THROWN) // 100):
        arrive(upper, clock, rows=100, every=every)
        assert upper.next().clock == clock
    assert upper.skipped == 0 and upper.rows == {"due": 0, "waiting": 0}


def test_what_was_asked_about_is_not_said_to_be_trained_on():
    """The part below has its gradient, and need not be told. Only what was thrown names a start."""
    upper = make_upper()
    upper.ask(*columns([0], clock=9), lambda g: None)
    assert upper.next().clock == 9 and upper.trained is None


def test_too_many_minibatches_that_must_be_trained_on_are_refused_and_said_so():
    upper = make_upper()
    upper.rows["due"] = 2 * THROWN + 1
    with pytest.raises(Refused, match="^busy: too many minibatches wait for the training loop$"):
        arrive(upper, 0, every=True)
    assert not upper.due


def test_a_nudge_ends_one_wait_for_minibatches(monkeypatch):
    upper = make_upper()
    upper.nudge()
    began = time.monotonic()
    assert upper.next(5) is None and time.monotonic() - began < 2
    assert upper.next(0.3) is None and time.monotonic() - began > 0.3
    wait_for, waits = upper.changed.wait_for, threading.Event()
    monkeypatch.setattr(upper.changed, "wait_for", lambda *args: waits.set() or wait_for(*args))
    waiting = threading.Thread(target=upper.next, args=[20], daemon=True)
    waiting.start()
    assert waits.wait(5)
    upper.nudge()  # which gets the lock once next() has let go of it, and waits
    waiting.join(5)
    assert not waiting.is_alive()


def test_beyond_the_backlog_the_oldest_is_skipped_counted_and_left_to_replay():
    upper = make_upper(replay=1, keep=1000, batch_size=1000)
    arrive(upper, *range(100))
    assert upper.skipped == 20 and upper.status()["waiting"] == BACKLOG / 10
    assert upper.replay.counters()["received"] == 1000
    *waiting, replayed = iter(upper.next, None)
    assert [minibatch.clock for minibatch in waiting] == list(range(99, 19, -1))
    assert set(np.round(1000 * (replayed.h[:, 0] % 1)).astype(int)) == set(range(100))
    assert replayed.i is replayed.tell is None


def test_two_minibatches_may_always_wait_however_large_they_are():
    upper = make_upper()
    arrive(upper, 0, 1, 2, rows=BACKLOG)
    assert clocks_of(upper) == [2, 1] and upper.skipped == 1


@pytest.mark.parametrize("every", [True, False])
def test_minibatches_are_trained_on_whole_as_they_were_thrown_whatever_the_batch_above(every):
    back = Outbox()
    upper = make_upper(batch_size=7, back=back)
    thrown = [columns(range(rows), clock) for clock, rows in enumerate((10, 3, 12))]
    upper.add(*map(np.concatenate, zip(*thrown, strict=True)), every=every)
    order = range(3) if every else (2, 1, 0)
    for clock in order:
        minibatch = upper.next()
        i, h, y, _, _ = thrown[clock]
        assert minibatch.clock == clock
        for mine, its in zip(minibatch, (i, h, y), strict=False):
            np.testing.assert_array_equal(mine, its)
        minibatch.tell(-h)
        *told, g = back.next_message()
        assert (g == -h).all() and all(map(np.array_equal, told, thrown[clock]))
    assert upper.next() is None


def test_where_none_may_be_skipped_the_oldest_is_first_and_replay_keeps_up():
    upper, clocks = make_upper(replay=1), list(range(200))
    arrive(upper, *clocks, every=True)
    assert upper.skipped == 0
    upper.replay.allowed = 50  # of 5 minibatches; beyond BEHIND of them, replay comes first
    assert clocks_of(upper) == [None] * (5 - BEHIND) + clocks + [None] * BEHIND
    assert upper.trained == (START, 199)


@pytest.mark.parametrize("replay", [0.1, 0.3, 0.9, 1.5, 8])
def test_what_must_be_trained_on_is_so_however_little_is_replayed(replay):
    upper = make_upper(replay=replay)
    for clock in range(40):
        arrive(upper, clock, every=True)
        assert clock in clocks_of(upper), "next() gives None only if nothing waits"


def test_what_comes_twice_counts_once_and_its_gradient_is_thrown_again():
    back = Outbox()
    upper = make_upper(replay=2, back=back)
    arrive(upper, 6, 7)
    for minibatch in (upper.next(), upper.next()):
        minibatch.tell(np.full_like(minibatch.h, minibatch.clock))
    back.next_message()
    for _ in range(9):
        arrive(upper, 7)
        clock, start, g = back.next_message()[3:]
        assert (clock == 7).all() and (start == START).all() and (g == 7).all() and not back.queue
    assert upper.replay.counters()["received"] == 20 and clocks_of(upper) == [None] * 4


def test_equal_activations_of_a_start_after_a_crash_are_new():
    """With --gradients zero they are equal after --resume, and none of them would be trained on."""
    upper = make_upper()
    arrive(upper, 3, start=BEFORE)
    assert clocks_of(upper) == [3]
    arrive(upper, 3)
    assert clocks_of(upper) == [3] and upper.trained == (START, 3)


def test_what_still_waits_of_before_a_crash_does_not_hide_what_was_trained_since():
    upper = make_upper()
    arrive(upper, 900, 901, start=BEFORE)
    arrive(upper, 3, 4)
    clocks_of(upper)
    assert upper.trained == (START, 4), "or the part below waits for ever for news of its start"


def test_replay_that_would_never_begin_is_an_error():
    with pytest.raises(UserError, match="--keep times --replay must be at least --batch-size"):
        make_upper(keep=100, replay=0.5, batch_size=51)
    make_upper(keep=100, replay=0.5, batch_size=50)
    make_upper(keep=100, replay=0, batch_size=51)


@pytest.mark.parametrize("already", [2 * THROWN + 1, 2 * THROWN])
def test_what_finds_too_many_waiting_is_refused_whole_and_is_new_when_it_comes_again(already):
    upper = make_upper()
    arrive(upper, 1, every=True, rows=already)
    both = list(map(np.concatenate, zip(columns(range(10), 2), columns([0], 3), strict=True)))
    try:
        upper.add(*both, every=True)
    except Refused as error:
        assert error.status == 503 and already > 2 * THROWN
        assert clocks_of(upper) == [1]
        upper.add(*both, every=True)
        assert clocks_of(upper) == [2, 3]
    else:
        assert clocks_of(upper) == [1, 2, 3]


def test_an_arrival_and_a_nudge_end_the_wait_for_a_minibatch():
    upper, got = make_upper(), []
    for end in (lambda: arrive(upper, 5), upper.nudge):
        waiter = threading.Thread(target=lambda: got.append(upper.next(seconds=60)))
        waiter.start()
        end()
        waiter.join(10)
    assert got[0].clock == 5 and got[1] is None


# ---- what a part answers the part below ----


H, Y = np.random.default_rng(0).random((4, 3), "f"), np.ones((4, 1), "f")
EXAMPLES = dict(i=np.arange(4), h=H, y=Y, clock=np.full(4, 7), start=np.full(4, START))
SERVER = argparse.Namespace(host="127.0.0.1", token=None, trace=None, allow_host=[])


def post(client, path, **columns):
    return client.post(path, data=encode(**columns), content_type="application/json")


def make_part(folder=None, dims=(3, 2, 1)):
    return Part(make_layers(dims, np.random.default_rng(0)), folder)


def make_server(upper, network=(3, 2, 1), weights=lambda: ([], [])):
    app = serving.make_app("test", upper.status, SERVER)
    serve_part(app, upper, lambda: network, weights)
    return app.test_client()


def train(part, upper, count=1):
    """`count` updates of the output trainer with what has arrived."""
    minibatches = (upper.next(seconds=10) for _ in range(count))
    return list(train_output.train(part, minibatches, NUMBER, lambda clock: 0.1, 0.0))


@pytest.fixture
def impatient(monkeypatch):
    """Answers are not waited for: returns the seconds for which they would have been."""
    waited = []

    class Impatient(concurrent.futures.Future):
        def result(self, timeout=None):
            waited.append(timeout)
            return super().result(0)
    monkeypatch.setattr(concurrent.futures, "Future", Impatient)
    return waited


def test_a_question_is_one_update_however_often_it_is_asked(impatient):
    part, upper = make_part(), make_upper()
    client = make_server(upper)
    for _ in range(3):  # the loop is slow, so each of them is told to ask again
        answer = post(client, "/true_gradients", **EXAMPLES)
        assert answer.status_code == 503 and "training loop took over" in answer.json["error"]
    assert 1 <= impatient[0] < PartClient("127.0.0.1").timeout
    expected = make_part().layers
    g = backprop(expected, NUMBER.loss_gradient(feed_forward(expected, H), Y))
    train(part, upper)
    for _ in range(3):  # the first was lost
        answer = post(client, "/true_gradients", **EXAMPLES).json
        assert (array_of(answer["gradients"]) == g).all(), "of before the update"
    assert part.clock == 1 and not upper.due


def test_answers_that_are_kept_are_bounded(impatient):
    upper = make_upper()
    client = make_server(upper)
    for clock in range(serving.THREADS):
        for _ in range(2):
            post(client, "/true_gradients", **{**EXAMPLES, "clock": np.full(4, clock)})
    assert len(upper.due) == serving.THREADS
    for clock in (99, 0):
        post(client, "/true_gradients", **{**EXAMPLES, "clock": np.full(4, clock)})
    assert len(upper.due) == serving.THREADS + 2


def test_a_question_is_answered_by_the_training_loop():
    part, upper = make_part(), make_upper()
    loop = threading.Thread(target=train, args=(part, upper))
    loop.start()
    answer = post(make_server(upper), "/true_gradients", **EXAMPLES)
    loop.join(10)
    assert answer.status_code == 200 and part.clock == 1
    assert array_of(answer.json["gradients"]).shape == (4, 3)


@pytest.mark.parametrize("every", [True, False])
def test_what_is_thrown_is_one_update_and_its_gradient_is_thrown_each_time(every):
    part, upper = make_part(), make_upper(back=Outbox())
    client = make_server(upper)
    for _ in range(3):
        assert post(client, "/training_examples", every=every, **EXAMPLES).json == {
            "accepted": 4, "trained": None}
    assert (len(upper.due), len(upper.waiting)) == (every, not every)
    assert len(train(part, upper)) == 1 and upper.next() is None
    first = upper.back.next_message()
    post(client, "/training_examples", every=every, **EXAMPLES)
    for mine, expected in zip(upper.back.next_message(), first, strict=True):
        np.testing.assert_array_equal(mine, expected)
    assert all(map(np.array_equal, first, EXAMPLES.values())) and first[5].any()


def test_nothing_is_taken_before_the_width_of_y_is_known_or_if_it_differs():
    upper = make_upper()
    for path in ("/training_examples", "/true_gradients"):
        assert post(make_server(upper, None), path, **EXAMPLES).status_code == 503
        for wrong in ({"h": H[:, :2]}, {"y": H}, {"i": EXAMPLES["i"] - 1},
                      {"clock": EXAMPLES["clock"][:2]}, {"start": H}):
            answer = post(make_server(upper), path, **{**EXAMPLES, **wrong})
            assert answer.status_code == 400 and f"$.{next(iter(wrong))}" in answer.json["error"]
    assert make_server(upper, None).get("/weights").status_code == 503
    assert upper.replay.received == 0 and not upper.due


def test_weights_are_those_of_this_part_and_of_all_above_with_the_updates_of_each():
    theirs, part = [(np.ones((1, 4), "f"), np.zeros(4, "f"))], make_part()
    client = make_server(make_upper(), weights=lambda: (part.weights()[0] + theirs, [5, 9]))
    answer = client.get("/weights").json
    assert answer["updates"] == [5, 9] and len(answer["layers"]) == 3
    assert (array_of(answer["layers"][2]["w"]) == 1).all()
    assert (array_of(answer["layers"][0]["w"]) == part.layers[0].w).all()


def provide(add, k, *minibatches):
    """POST minibatches as one message of gradients: the status code."""
    app = serving.make_app("test", dict, SERVER)
    serve_gradients(app, minibatches[0][1].shape[1], lambda: k, add)
    i, h, y, clock, start = map(np.concatenate, zip(*minibatches, strict=True))
    return post(app.test_client(), "/provide_gradients", i=i, h=h, y=y, clock=clock, start=start,
                gradients=h + clock[:, None].astype("f"), waiting=3).status_code


def test_a_message_of_several_gradients_is_taken_back_minibatch_by_minibatch():
    link = delayed_link()
    thrown = [columns(range(rows), clock, width=3) for clock, rows in ((0, 2), (1, 5), (2, 3))]
    for i, h, y, clock, _ in thrown:
        link.source.part.layers[0].feed_forward(h[:, :2])
        link.throw(i, h, y, int(clock[0]))
        list(link.gradients(h, y, int(clock[0]), "tell"))
    assert provide(link.take_back, 2, *thrown) == 400, "y is of another width"
    assert provide(link.take_back, 1, *thrown, columns([0], 2, 3, BEFORE)) == 200
    for (g, tell), (_, h, _, _, _) in zip(link.gradients(clock=3), thrown, strict=True):
        np.testing.assert_allclose(g, h - h.mean(axis=0), atol=1e-5)
        assert tell == "tell"


def test_of_a_message_that_is_known_in_part_an_oracle_adds_only_the_rest(cheap):
    student = new_oracle(batch_size=100)
    assert provide(student.add, None, columns(range(10), 1), columns(range(9), 2)) == 200
    assert student.examples.received == 19
    student.newest = START, 3  # what was learned from does not count again
    for _ in range(2):
        provide(student.add, None, columns(range(9), 2), columns(range(5), 3))
    provide(student.add, None, columns(range(9), 2, start=BEFORE))
    assert student.examples.received == 19 + 5 + 9
    inputs, g, *_ = student.examples.columns
    np.testing.assert_allclose(g[:24], inputs[:24] + np.repeat([1, 2, 3], [10, 9, 5])[:, None])


@pytest.mark.parametrize("gradients, every", [("synthetic", False), ("shuffled", False),
                                              ("delayed", True), ("local", True), ("zero", True)])
def test_nothing_is_skipped_above_where_the_part_below_has_no_oracle(gradients, every, monkeypatch):
    """Or the part below would run ahead, and the part above would learn less in as many updates."""
    told = []
    monkeypatch.setattr(over_http, "Poster", lambda outbox, post, to: post)
    monkeypatch.setattr(PartClient, "training_examples", lambda *_, every: told.append(every))
    Above(options(gradients=gradients), stop=False).poster(*columns([0]))
    assert told == [every]


def test_how_far_the_part_above_is_is_asked_only_where_its_last_answer_is_too_old(monkeypatch):
    answers, asked = [(process.START, 9), (process.START + 1, 99)], []
    monkeypatch.setattr(over_http, "Poster", lambda outbox, post, to: post)
    monkeypatch.setattr(PartClient, "training_examples", lambda *_, every: answers.pop(0))
    monkeypatch.setattr(PartClient, "status", lambda self: asked.append(1) or SimpleNamespace(
        trained=(process.START, 30)))
    above = Above(options(gradients="local"), stop=False)
    above.poster(*columns([0]))
    assert above.trained(9) == (process.START, 9) and not asked
    assert above.trained(10) == above.trained(30) == (process.START, 30) and len(asked) == 1
    above.poster(*columns([0]))
    assert above.trained(5) == (process.START, 30) and len(asked) == 2, "99 is of another start"


def test_what_waits_above_is_told_with_each_gradient(monkeypatch):
    told, upper = [], make_upper()
    monkeypatch.setattr(over_http.OracleClient, "provide_gradients",
                        lambda self, *columns, waiting: told.append(waiting))
    monkeypatch.setattr(over_http, "Poster", lambda outbox, post, to: post)
    arrive(upper, 1, 2, 3, every=True)
    over_http.post_gradients("127.0.0.1:1", None, lambda: upper)(*columns([0]))
    assert told == [3] and over_http.post_gradients("none", None, None) is None


# ---- whether the others fit ----


def options(**changed):
    return argparse.Namespace(**{
        "layers": [2, 3], "batch_size": 4, "staleness": 20, "patience": 0, "gradients": "synthetic",
        "output_server": "127.0.0.1:1", "oracle_server": "127.0.0.1:2", "token": None, **changed})


def status(**changed):
    return Status(**{"process": "output trainer", "layers": [3, 2, 1], "network": [3, 2, 1],
                     "updates": 0, "starts": [7], "user": process.user(), **changed})


def oracle_status(**changed):
    return status(**{"process": "oracle", "layers": [3, 3], "network": None, "needs": 5,
                     "starts": [], **changed})


def make_above(above=None, oracle=None, **changed):
    made = Above(options(**changed), stop=False)
    made.part.status, made.oracle.status = lambda: above or status(), lambda: oracle or (
        oracle_status())
    return made


@pytest.mark.parametrize("above, oracle, changed, message", [
    ({}, {}, {}, None),
    ({"process": "middle trainer"}, {"condition_on_labels": 1}, {}, None),
    ({"layers": [4, 1]}, {}, {}, "the --layers of the part above .* begin with 4, ours end with 3"),
    ({}, {"layers": [5, 5]}, {}, "the oracle at .* begin with 5, ours end with 3"),
    ({}, {"condition_on_labels": 10}, {}, "with --condition-on-labels 10; y has a width of 1"),
    ({"process": "oracle"}, {}, {}, "the part above at .*:1 is not one: the process there is an "
                                    "oracle. --output-server names the part above"),
    ({}, {"process": "output trainer"}, {}, "the oracle at .*:2 is not one: .* output trainer"),
    ({"user": "mallory"}, {}, {}, "the part above .* was started by mallory, not by you"),
    ({}, {"user": "mallory"}, {}, "the oracle .* was started by mallory, not by you"),
    ({"user": "mallory"}, {}, {"output_server": "10.0.0.7:1"}, None),
    ({"starts": [7, process.START]}, {}, {}, "the parts form a cycle"),
    ({"starts": [7, process.START], "network": None}, {}, {}, "the parts form a cycle"),
    ({"network": None}, {}, {}, "waiting for the part above it"),
    ({}, {"needs": 81}, {}, "needs 81 new gradients .* but only 80 come"),
    ({}, {"needs": 80}, {}, None),
    ({}, {"needs": 81}, {"gradients": "true"}, None),
    ({}, {"user": "mallory"}, {"gradients": "local"}, None),
    ({}, {}, {"batch_size": 1191, "gradients": "delayed"}, f"at most {THROWN} with --gradients d"),
    ({}, {}, {"batch_size": 1190, "gradients": "delayed"}, None),
    ({}, {}, {"batch_size": 500_000}, "--batch-size must be at most")])
def test_partners_that_do_not_fit_are_refused_with_what_to_do(above, oracle, changed, message):
    made = make_above(status(**above), oracle_status(**oracle), **changed)
    if message is None:
        assert made.connect(1) == 1
        assert made.network == [3, 2, 1] and made.starts == [7]
    else:
        with pytest.raises(UserError, match=message) as error:
            made.connect(1)
        assert isinstance(error.value, NoAnswer) == ("waiting" in message)


def test_a_small_data_set_is_what_a_minibatch_is_checked_by():
    made = make_above(oracle=oracle_status(needs=61), batch_size=500_000)
    with pytest.raises(UserError, match="only 60 come"):
        made.connect(1, num_examples=3)


def test_a_middle_part_learns_the_width_of_y_from_the_network_above():
    above = status(layers=[3, 2, 10], network=[3, 2, 10])
    assert make_above(above, oracle_status(condition_on_labels=10)).connect() == 10


def test_a_cycle_is_noticed_though_no_part_of_it_is_ever_complete(monkeypatch):
    """Each of three middle parts has the next one above it. Each asks it in turn."""
    names = 1, 2, 3
    parts = {name: make_above(layers=[3, 3]) for name in names}

    def status_of(name):
        return status(process="middle trainer", layers=[3, 3], network=None,
                      starts=[name, *parts[name].starts])
    for name, above in zip(names, (2, 3, 1), strict=True):
        parts[name].part.status = lambda above=above: status_of(above)
    said = []
    for name in 3 * names:
        monkeypatch.setattr(process, "START", name)
        with pytest.raises(UserError) as error:
            parts[name].connect()
        said.append("form a cycle" in str(error.value))
    assert said[:2] == [False] * 2 and any(said[:6]) and said[-1]


@pytest.mark.parametrize("updates, oracles, before, resumed, message", [
    (0, 0, 0, False, None),
    (4, 0, 0, False, r"^the part above at .* \(at 4 updates\) took part in an earlier run"),
    (0, 4, 0, False, r"^the oracle at .* \(at 4 updates\) took .* restart what is named"),
    (4, 4, 3, True, None),
    (4, 0, 0, True, None),
    (0, 9, 3, True, "is as drawn, but had made 3 updates when this part's checkpoint was written")])
def test_used_partners_are_of_a_run_that_is_resumed_and_of_no_other(
        updates, oracles, before, resumed, message):
    made, part = make_above(status(updates=updates), oracle_status(updates=oracles)), make_part()
    made.connect(1)
    part.numbers["above"] = before
    if message is None:
        made.check_use(resumed, part)
        assert part.numbers["above"] == updates, "for the next checkpoint"
    else:
        with pytest.raises(UserError, match=message):
            made.check_use(resumed, part)


def test_what_comes_before_the_part_below_waits_is_counted_to_the_example():
    """Whichever minibatches it is that are on their way: in an epoch the last may be smaller."""
    rng = np.random.default_rng(0)
    for _ in range(1000):
        staleness, batch_size, num_examples = (int(rng.integers(1, n)) for n in (100, 30, 200))
        full, last = divmod(num_examples, batch_size)
        epoch = [batch_size] * full + [last] * (last > 0)
        sizes = epoch * (2 + staleness // len(epoch))
        ahead = min(sum(sizes[k:k + staleness]) for k in range(len(epoch)))
        ahead = min(ahead, BACKLOG // batch_size * batch_size)
        check_oracle(ahead, staleness, batch_size, num_examples)
        with pytest.raises(UserError, match=f"needs {ahead + 1} new .* but only {ahead} come"):
            check_oracle(ahead + 1, staleness, batch_size, num_examples)


@pytest.mark.parametrize("batch_size, ahead", [(100, BACKLOG), (300, 600), (1000, 2000)])
def test_more_than_may_wait_above_does_not_come(batch_size, ahead):
    check_oracle(ahead, 20, batch_size, 2**53)
    with pytest.raises(UserError, match=f"only {ahead} come"):
        check_oracle(ahead + 1, 20, batch_size, 2**53)


# ---- a part and its checkpoint ----


def checkpoint_of(part):
    """What is on the disk, read into layers of the same widths."""
    return part.checkpoint.resume(make_part().layers)


def test_weights_that_were_read_are_a_copy_with_the_clock_of_then():
    part = make_part()
    part.clock = 5
    weights, clock = part.weights()
    before = weights[0][0].copy()
    for layer in part.layers:
        layer.dL_dw, layer.dL_db = np.ones_like(layer.w), np.ones_like(layer.b)
    part.descend(1.0, 0.0)
    assert clock == 5 and (weights[0][0] == before).all()
    assert (part.layers[0].w == before - 1).all()


def test_weights_cannot_be_read_within_an_update():
    part, read = make_part(), []

    def slow_descend(*_):
        slow_descend.reader = threading.Thread(target=lambda: read.append(part.weights()))
        slow_descend.reader.start()
        slow_descend.reader.join(0.1)
        assert not read
    part.layers = [SimpleNamespace(descend=slow_descend, w=np.ones(1), b=np.ones(1))]
    part.descend(1.0, 0.0)
    slow_descend.reader.join(10)
    assert len(read) == 1


def test_the_average_is_over_the_last_hundred_or_so(tmp_path):
    part = make_part(tmp_path)
    part.train([0.0] + [1.0] * 100, "the test")
    assert part.average == pytest.approx(1 - 0.99**100)
    resumed = make_part(tmp_path)
    part.clock = 1
    part.save()
    resumed.resume(True)
    assert resumed.average == part.average


def test_a_resumed_part_continues_its_count_and_another_one_puts_the_checkpoint_aside(tmp_path):
    first, beside = make_part(tmp_path), make_layers([2, 4, 1], np.random.default_rng(1))
    assert not first.resume(False)
    first.besides = beside
    first.clock, first.average, first.numbers["above"] = 41, 0.5, 17
    for layer in first.layers + beside:
        layer.w += 1
        layer.b_velocity -= 1
    first.save()
    resumed, other = make_part(tmp_path), make_layers([2, 4, 1], np.random.default_rng(2))
    resumed.besides = other
    assert resumed.resume(True)
    assert (resumed.clock, resumed.average, resumed.numbers) == (41, 0.5, {"above": 17})
    for mine, its in zip(resumed.layers + other, first.layers + beside, strict=True):
        assert (mine.w == its.w).all() and (mine.b_velocity == its.b_velocity).all()
    new = make_part(tmp_path)
    assert not new.resume(False) and new.clock == 0 and not new.checkpoint.path.exists()
    assert (tmp_path / "checkpoint.1.npz").exists()


def test_a_checkpoint_of_before_the_first_update_is_one_and_none_is_none(tmp_path):
    part = make_part(tmp_path)
    assert not part.resume(True)
    part.numbers["above"] = 0
    part.save()
    assert make_part(tmp_path).resume(True)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_part_that_diverges_says_so_and_keeps_the_checkpoint_of_before(value, tmp_path):
    part = make_part(tmp_path)
    part.clock = 3
    part.save()

    def losses():
        part.clock += 1
        yield np.float32(value)
    with pytest.raises(Diverged, match="the test diverged; try a lower --learning-rate"):
        part.train(losses(), "the test")
    assert checkpoint_of(part)["updates"] == 3


def test_weights_that_are_not_finite_are_not_saved_whatever_the_loss_says(tmp_path):
    part = make_part(tmp_path)
    part.clock = 3
    part.save()
    part.layers[0].w[:] = np.nan
    part.clock = 4
    with pytest.raises(Diverged):
        part.try_to_save()
    assert checkpoint_of(part)["updates"] == 3


def test_whatever_ends_the_loop_there_is_a_checkpoint(tmp_path):
    part = make_part(tmp_path)

    def losses():
        part.clock += 1
        yield np.float32(0.25)
        raise process.Stopped
    with pytest.raises(process.Stopped):
        part.train(losses(), "the test")
    assert checkpoint_of(part) == {"updates": 1, "average": 0.25}


def disk_full(*_):
    raise OSError(28, "No space left on device")


def test_a_full_disk_is_reported_and_training_goes_on(tmp_path, monkeypatch, capsys):
    part = make_part(tmp_path)
    part.clock = 3
    with monkeypatch.context() as full:
        full.setattr(runs.os, "replace", disk_full)
        part.try_to_save()
    assert "no checkpoint: [Errno 28]" in capsys.readouterr().err
    part.try_to_save()
    assert checkpoint_of(part)["updates"] == 3


class Script:
    """What arrives, one after the other: minibatches of these clocks, None where there is none.
    Meanwhile a second passes."""

    def __init__(self, part, clock, clocks):
        self.part, self.clock, self.clocks, self.saved = part, clock, list(clocks), []
        part.save = self.save

    def save(self):
        self.saved.append(self.part.clock)
        Part.save(self.part)

    def next(self, seconds):
        self.clock.now += 1
        clock = self.clocks.pop(0)
        return None if clock is None else SimpleNamespace(clock=clock)

    def run(self, seconds):
        stop = StopAfter(len(self.clocks))
        reporter = SimpleNamespace(now_and_then=lambda clock: None)
        for minibatch in self.part.minibatches(self, stop, seconds, reporter):
            self.part.clock += minibatch is not None
        return self.saved


def scripted(tmp_path, monkeypatch, clocks):
    monkeypatch.setattr(plumbing.part, "time", Clock())
    return Script(make_part(tmp_path), plumbing.part.time, clocks)


def test_while_it_trains_there_is_a_checkpoint_every_so_many_seconds(tmp_path, monkeypatch):
    assert scripted(tmp_path, monkeypatch, range(13)).run(seconds=3) == [3, 7, 11]


def test_while_idle_the_last_updates_are_saved_and_again_only_if_there_are_new_ones(
        tmp_path, monkeypatch):
    script = scripted(tmp_path, monkeypatch, [0, 1] + [None] * 20 + [2] + [None] * 20)
    assert script.run(seconds=3) == [2, 3]


def trainer_options(folder, **changed):
    return argparse.Namespace(**{
        **train_output.DEFAULTS, **options(layers=[3, 2]).__dict__, "host": "127.0.0.1", "port": 0,
        "trace": None, "progress_dir": folder, "lower_oracle_server": "none", "warm_up": 0,
        **changed})


@pytest.mark.parametrize("trainer", [train_output, train_middle])
def test_a_start_on_a_port_that_is_taken_touches_no_checkpoint(trainer, tmp_path):
    make_part(tmp_path).save()
    args = trainer_options(tmp_path)
    with serving.listen(args) as taken:
        args.port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{args.port}.*another run"):
            trainer.main(args, False)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.npz"]


@pytest.mark.parametrize("trainer", [train_output, train_middle])
def test_a_start_on_a_folder_that_is_in_use_touches_no_checkpoint(trainer, tmp_path):
    make_part(tmp_path).save()
    with runs.lock(tmp_path), pytest.raises(UserError, match="another process"):
        trainer.main(trainer_options(tmp_path), False)
    assert (tmp_path / "checkpoint.npz").exists()


# ---- a run of the input trainer ----


class OneAbove(FakeAbove):
    """A part above that is not trained, and an oracle that guesses −h."""
    network = [24, 12, 1]

    def __init__(self):
        super().__init__()
        self.part, self.outbox, self.poster = make_part(dims=self.network), Outbox(), NoPoster(
            None, None, None)
        self.part.clock, self.newest, self.resumed = 100, (process.START, 0), None

    def connect(self, k, num_examples):
        pass

    def check_use(self, resumed, part):
        self.resumed = resumed

    def weights(self):
        weights, clock = self.part.weights()
        return weights, [clock]

    def throw(self, i, h, y, clock, start):
        super().throw(i, h, y, clock, start)
        self.newest = int(start[0]), int(clock[0])

    def guess(self, h, y):
        self.asked.append(h)
        return -h, self.newest

    def clocks(self):
        return [int(clock[0]) for _, _, _, clock, _ in self.thrown]


def input_options(tmp_path, small_data, **changed):
    x, y = small_data
    return train_input.with_rates(argparse.Namespace(**{
        **train_input.DEFAULTS, **train_input.HEAD, "num_epochs": 1, "snapshot_seconds": 0,
        "gradients": "synthetic", "progress_dir": tmp_path / "progress", "x": x, "y": y,
        "held_out": None, "host": "127.0.0.1", "port": 0, "token": None, "trace": None,
        "allow_host": [], **changed}))


@pytest.fixture
def make_run(tmp_path, small_data):
    """make_run(...) -> a train_input.Run that is connected to a OneAbove; closed at the end."""
    made = []

    def make(stop=False, folder=tmp_path, **changed):
        close()
        made.append(train_input.Run(input_options(folder, small_data, **changed), stop,
                                    data.load(*small_data), OneAbove()))
        made[-1].connect()
        return made[-1]

    def close():
        for run in made:
            run.progress.locked.close()
    yield make
    close()


def finish(run):
    run.train()
    run.end()
    return run


def same(layers, others):
    return all((mine.w == its.w).all() and (mine.b == its.b).all()
               for mine, its in zip(layers, others, strict=True))


def test_a_run_writes_rows_snapshots_and_a_checkpoint_that_agree(make_run):
    run = finish(make_run())
    assert run.above.clocks() == list(range(38))
    assert [int(row["updates"]) for row in run.progress.rows] == [*range(39), 38]
    weights, row, probe = runs.read_snapshot(runs.snapshots(run.args.progress_dir)[-1])
    assert row["examples"] == 3800 and row["epoch"] == 1
    np.testing.assert_array_equal(weights[0][0], run.part.layers[0].w)
    np.testing.assert_array_equal(weights[2][0], run.above.part.layers[1].w)
    np.testing.assert_array_equal(runs.load(run.part.checkpoint.path)["w0"], weights[0][0])
    assert (probe["guess"] == -feed_forward(run.part.layers, run.data.x_test)[:, :4]).all()


@pytest.mark.parametrize("gradients", ["synthetic", "local", "zero"])
def test_a_resumed_run_continues_its_clock_its_order_its_waits_and_its_head(
        gradients, make_run, tmp_path):
    run = make_run(StopAfter(9), gradients=gradients)
    assert run.above.resumed is False
    run.link.bounded.waits, run.link.bounded.waited = 3, 7.5
    finish(run)
    assert run.above.clocks() == list(range(10))
    resumed = make_run(resume=True, gradients=gradients)
    assert resumed.above.resumed is True and resumed.part.numbers["above"] == 100
    assert (resumed.examples, resumed.seconds) == (1000, run.seconds)
    assert (resumed.link.bounded.waits, resumed.link.bounded.waited) == (3, 7.5)
    assert same(resumed.part.besides, run.part.besides)
    finish(resumed)
    assert resumed.above.clocks() == list(range(10, 38))
    seconds = [float(row["seconds"]) for row in resumed.progress.rows]
    assert seconds == sorted(seconds)
    in_one_go = finish(make_run(folder=tmp_path / "other", gradients=gradients))
    assert same(resumed.part.layers, in_one_go.part.layers)
    assert same(resumed.part.besides, in_one_go.part.besides)
    assert len(in_one_go.part.besides) == 2 * (gradients == "local")


def test_both_rate_and_momentum_of_layer_1_are_what_was_asked_for(make_run, tmp_path):
    reached = [finish(make_run(folder=tmp_path / str(n), **changed)).part.layers
               for n, changed in enumerate(({}, {"decay": 5}, {"warm_up": 0}, {"momentum": 0.5},
                                            {"learning_rate": 2.0}))]
    assert not any(same(reached[0], other) for other in reached[1:])


def test_with_a_full_disk_a_run_goes_on_says_so_and_tears_nothing(make_run, monkeypatch, capsys):
    run, replace, calls = make_run(), runs.os.replace, []

    def sometimes_full(source, to):
        calls.append(to)
        if 20 < len(calls) < 35:
            disk_full()
        return replace(source, to)
    monkeypatch.setattr(runs.os, "replace", sometimes_full)
    finish(run)
    assert capsys.readouterr().err.count("no snapshot: [Errno 28]") > 10
    assert int(runs.read_rows(run.args.progress_dir)[-1]["updates"]) == 38
    for path in runs.snapshots(run.args.progress_dir):
        runs.read_snapshot(path)


def test_run_json_says_the_seconds_of_each_phase(make_run):
    run = make_run()
    run.link.bounded.waited = 0.25
    with run.progress.ending():
        finish(run)
    seconds = json.loads((run.progress.folder / "run.json").read_text())["seconds"]
    assert seconds["waiting"] == 0.25 and seconds["training"] == run.seconds > 0
    assert 0 < seconds["until_ready"] < 60
    assert seconds["snapshots"] > 0 and set(seconds) == {
        "until_ready", "training", "waiting", "snapshots"}


def run_main(monkeypatch, above, args):
    monkeypatch.setattr(over_http, "Above", lambda args, stop: above)
    monkeypatch.setattr(serving, "serve", lambda app, listener, args: listener.close())
    train_input.main(args, False)


def test_a_part_above_that_is_gone_at_the_end_leaves_a_checkpoint(
        tmp_path, small_data, monkeypatch, capsys):
    above, weights = OneAbove(), []

    def gone():
        if weights:
            raise NoAnswer("it is gone")
        weights.append(OneAbove.weights(above))
        return weights[0]
    above.weights = gone
    args = input_options(tmp_path, small_data, snapshot_seconds=1000)
    with pytest.raises(NoAnswer):
        run_main(monkeypatch, above, args)
    assert "without a last snapshot, but with a checkpoint" in capsys.readouterr().err
    assert runs.load(args.progress_dir / "checkpoint.npz")["updates"] == 38


def test_a_checkpoint_before_the_first_row_keeps_how_far_the_part_above_was(make_run):
    run = make_run()
    run.part.numbers["above"] = 7
    run.save()
    assert run.part.numbers["above"] == 7
    run.above.part.clock = 9
    run.take()
    assert run.part.numbers["above"] == 9


def test_a_layer_that_diverges_is_neither_saved_nor_written(make_run):
    run = make_run()
    run.take()
    run.part.layers[0].w[:] = np.nan
    with pytest.raises(Diverged, match="this part diverged; try a lower"):
        run.take()
    assert len(runs.snapshots(run.args.progress_dir)) == 1
    assert np.isfinite(runs.load(run.part.checkpoint.path)["w0"]).all()


def test_a_part_above_that_went_back_is_said_with_what_to_do(make_run, capsys):
    run, said = make_run(), ""
    for updates, times in ((100, 0), (120, 0), (7, 1), (9, 1)):
        run.above.part.clock = updates
        run.take()
        said += capsys.readouterr().err
        assert said.count("went back from [120] updates to [7]") == times
    assert "checkpoint.N.npz" in said and "--resume" in said


def test_the_cosine_and_the_score_are_of_held_out_examples(make_run):
    run = make_run()
    run.take()
    x, y, (h,), above = run.data.x_test, run.data.y_test, run.above.asked, run.above.part.layers
    np.testing.assert_array_equal(h, feed_forward(run.part.layers, x))
    y_hat = feed_forward(above, h)
    g = backprop(above, NUMBER.loss_gradient(y_hat, y))
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(-h, g, strict=True)]
    assert run.row["gradient_cosine"] == pytest.approx(np.mean(cosines), rel=1e-3)
    assert run.row["test_mse"] == pytest.approx(np.mean((y_hat - y) ** 2))


def test_without_an_oracle_no_cosine_is_asked_for(make_run):
    run = make_run(gradients="zero")
    run.take()
    assert run.above.asked == [] and np.isnan(run.row["gradient_cosine"])


def test_the_cosine_of_zero_gradients_is_zero_and_not_an_error():
    g = np.array([[3, 4], [1, 0]], "f")
    assert train_input.mean_cosine(g, 0 * g) == 0
    assert train_input.mean_cosine(g, g * [[2], [-1]]) == pytest.approx(0)
    assert train_input.mean_cosine(g, 5 * g) == pytest.approx(1)


@pytest.mark.parametrize("changed", ["seed", "held_out", "data", "gradients"])
def test_resume_with_other_options_or_data_is_one_clear_error(
        changed, make_run, tmp_path, small_data, monkeypatch):
    run = finish(make_run())
    run.progress.locked.close()
    before, y = (tmp_path / "progress" / "run.json").read_text(), np.load(small_data[1])
    np.save(tmp_path / "y.npy", np.where(np.arange(len(y)) == 17, 0, y))
    other = {"seed": {"seed": 1}, "held_out": {"held_out": 201},
             "data": {"y": tmp_path / "y.npy"}, "gradients": {"gradients": "local"}}[changed]
    with pytest.raises(UserError, match=f"--resume: .* of a run that differs in {changed}"):
        run_main(monkeypatch, OneAbove(), input_options(tmp_path, small_data, resume=True, **other))
    assert (tmp_path / "progress" / "run.json").read_text() == before


@pytest.mark.parametrize("resume, checkpoint", [(False, False), (False, True), (True, False)])
def test_without_a_checkpoint_that_is_wanted_a_run_is_new(resume, checkpoint, make_run):
    """A supervisor may always say --resume."""
    if checkpoint:
        finish(make_run())
    assert make_run(resume=resume).above.resumed is False


def test_a_resumed_run_without_its_checkpoint_does_not_go_on_with_its_rows(make_run):
    run = finish(make_run())
    run.progress.locked.close()
    run.part.checkpoint.path.unlink()
    again = make_run(resume=True)
    assert again.progress.rows == [] and "resumed" not in again.progress.options
