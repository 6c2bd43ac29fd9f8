"""The two ends of a link, and what the trainers do around their loops. No process, hardly a
socket."""
import argparse
import threading
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

import links
import train_input
import train_middle
import train_output
from exchange import BoundedStaleness, Part
from plumbing import data, runs, serving
from plumbing.posting import Outbox
from plumbing.errors import FileError, NoAnswer, Refused, UserError
from plumbing.wire import MAX_BODY, encode, json_to_ndarray
from sgd import HIDDEN, backprop, feed_forward, loss_gradient, make_layers
from synthgrad import Status
from tests.test_in_process import differ, same


class NoPoster:
    """In the place of plumbing.posting.Poster: what is thrown stays in the outbox."""

    def __init__(self, outbox, post, to):
        self.closed = False

    def close(self, timeout):
        self.closed = True


@pytest.fixture(autouse=True)
def no_posting(monkeypatch):
    monkeypatch.setattr(links, "Poster", NoPoster)


def options(tmp_path, **changed):
    return argparse.Namespace(**{
        **train_output.DEFAULTS, "host": "127.0.0.1", "port": 0, "token": None, "layers": [3, 2, 1],
        "batch_size": 4, "checkpoint_seconds": 0, "progress_dir": tmp_path / "output",
        "output_server": "127.0.0.1:1", "oracle_server": "127.0.0.1:1", "staleness": 20,
        "patience": 0, "gradients": "synthetic", **changed})


def make_upper(tmp_path, **changed):
    args = options(tmp_path, **changed)
    part = Part(make_layers(args.layers, np.random.default_rng(0)))
    upper = links.UpperEnd(args, part, np.random.default_rng(1), args.oracle_server,
                           args.replay)
    upper.open(args.layers)
    return upper


def client_of(upper, weights_above=lambda: ([], [])):
    app = serving.make_app("test", upper.status, upper.args)
    upper.routes(app, weights_above)
    return app.test_client()


def train(upper, count):
    """`count` steps of the output trainer on what has arrived."""
    minibatches = (upper.arrivals.next() for _ in range(count))
    return list(train_output.train(upper.part, minibatches, lambda clock: 0.1, 0.0))


H, Y = np.random.default_rng(0).random((4, 3), "f"), np.ones((4, 1), "f")
INDICES, CLOCK = np.arange(4), np.full(4, 7)


def post(client, path, **columns):
    return client.post(path, data=encode(**columns), content_type="application/json")


class StopAfter:
    """Turns true when it has been asked `count` times."""

    def __init__(self, count):
        self.count = count

    def __bool__(self):
        self.count -= 1
        return self.count < 0


# ---- the upper end ----


def test_a_question_is_one_update_however_often_it_is_asked(tmp_path):
    upper = make_upper(tmp_path)
    for _ in range(3):  # the loop is slow, so each of them is told to ask again
        with pytest.raises(Refused, match="busy") as refused:
            upper.locked_update(H, Y, seconds=0.01)
        assert refused.value.status == 503
    assert len(upper.arrivals.questions) == 1
    train(upper, 1)
    answers = [upper.locked_update(H, Y, seconds=1) for _ in range(3)]  # the first was lost
    assert all((answer == answers[0]).all() for answer in answers)
    assert upper.part.updates == 1 and not upper.arrivals.questions
    with pytest.raises(Refused):
        upper.locked_update(H + 1, Y, seconds=0.01)
    assert len(upper.arrivals.questions) == 1


def test_the_answer_is_the_true_gradient_of_before_the_update(tmp_path):
    upper = make_upper(tmp_path, replay=0)
    expected = make_layers([3, 2, 1], np.random.default_rng(0))
    g = backprop(expected, loss_gradient(feed_forward(expected, H), Y))
    with pytest.raises(Refused):
        upper.locked_update(H, Y, seconds=0.01)
    train(upper, 1)
    np.testing.assert_array_equal(upper.locked_update(H, Y), g)
    assert not upper.outbox.queue, "the answer goes to whom has asked"


def test_questions_that_wait_and_answers_that_are_kept_are_bounded(tmp_path):
    upper = make_upper(tmp_path)
    for n in range(100):
        with pytest.raises(Refused):
            upper.locked_update(H + n, Y, seconds=0)
    assert len(upper.answers) == len(upper.arrivals.questions) == 2 * serving.THREADS


def test_a_question_over_http_is_given_up_before_the_client_gives_up(tmp_path, monkeypatch):
    waited, client = [], client_of(make_upper(tmp_path))

    class Slow(links.concurrent.futures.Future):
        def result(self, timeout=None):
            waited.append(timeout)
            return super().result(0)
    monkeypatch.setattr(links.concurrent.futures, "Future", Slow)
    answer = post(client, "/true_gradients", h=H, y=Y)
    assert answer.status_code == 503 and "the training loop took over" in answer.json["error"]
    assert 1 <= waited[0] < links.PartClient("127.0.0.1").timeout


def test_a_question_over_http_is_answered_by_the_training_loop(tmp_path):
    upper = make_upper(tmp_path)
    client, minibatches = client_of(upper), iter(lambda: upper.arrivals.next(seconds=10), None)
    loop = threading.Thread(target=lambda: next(train_output.train(
        upper.part, minibatches, lambda clock: 0.1, 0.0)))
    loop.start()
    answer = post(client, "/true_gradients", h=H, y=Y)
    loop.join(10)
    assert answer.status_code == 200 and upper.part.updates == 1
    assert json_to_ndarray(answer.json["gradients"]).shape == (4, 3)


def test_what_is_thrown_again_over_http_is_one_update_and_its_gradients_are_thrown_again(tmp_path):
    upper = make_upper(tmp_path, replay=0)
    client = client_of(upper)
    for _ in range(3):
        assert post(client, "/training_examples", i=INDICES, h=H, y=Y, clock=CLOCK).json == {
            "accepted": 4}
    losses = train(upper, 1)
    assert len(losses) == 1 and upper.arrivals.next() is None
    i, h, y, clock, g = upper.outbox.next_message()
    assert (i == INDICES).all() and (h == H).all() and (clock == 7).all() and g.any()
    assert not upper.outbox.queue
    post(client, "/training_examples", i=INDICES, h=H, y=Y, clock=CLOCK)
    assert (upper.outbox.next_message()[4] == g).all()
    assert upper.status()["examples"]["received"] == 4 and upper.part.updates == 1


def test_nothing_is_taken_before_the_width_of_y_is_known_or_if_it_differs(tmp_path):
    upper = make_upper(tmp_path)
    client, upper.network = client_of(upper), None
    assert post(client, "/training_examples", i=INDICES, h=H, y=Y, clock=CLOCK).status_code == 503
    assert client.get("/weights").status_code == 503
    upper.open([3, 2, 1])
    for wrong in ({"h": H[:, :2]}, {"y": H}, {"i": INDICES - 1}, {"clock": CLOCK[:2]}):
        columns = {"i": INDICES, "h": H, "y": Y, "clock": CLOCK, **wrong}
        answer = post(client, "/training_examples", **columns)
        assert answer.status_code == 400 and f"$.{next(iter(wrong))}" in answer.json["error"]
    assert upper.arrivals.replay.received == 0


def test_weights_are_those_of_this_part_and_of_all_above_with_the_updates_of_each(tmp_path):
    upper = make_upper(tmp_path)
    upper.part.updates = 5
    theirs = [(np.ones((1, 4), "f"), np.zeros(4, "f"))]
    answer = client_of(upper, lambda: (theirs, [9])).get("/weights").json
    assert answer["updates"] == [5, 9] and len(answer["layers"]) == 3
    assert (json_to_ndarray(answer["layers"][2]["w"]) == 1).all()
    assert (json_to_ndarray(answer["layers"][0]["w"]) == upper.part.layers[0].w).all()


def test_a_batch_that_fits_into_no_message_is_refused_once_the_width_of_y_is_known(tmp_path):
    upper = make_upper(tmp_path, batch_size=200_000, layers=[3, 1])
    with pytest.raises(ValueError, match="--batch-size must be at most"):
        upper.open([3, 1000])


def test_while_idle_the_last_updates_are_written_down_and_again_only_if_there_are_new_ones(
        tmp_path, monkeypatch):
    upper = make_upper(tmp_path)
    upper.part.updates, upper.loss = 3, 0.5
    saved, save = [], upper.checkpoint.save
    monkeypatch.setattr(upper.checkpoint, "save", lambda *layers, **numbers: (
        saved.append(numbers["updates"]), save(*layers, **numbers)))
    monkeypatch.setattr(upper.arrivals, "next", lambda seconds: None)
    assert list(upper.minibatches(StopAfter(5))) == []
    assert saved == [3]
    assert upper.checkpoint.resume(make_layers([3, 2, 1], np.random.default_rng(0)))[
        "updates"] == 3


def test_a_resumed_part_continues_its_count_and_another_one_puts_the_checkpoint_aside(tmp_path):
    first = make_upper(tmp_path)
    first.part.updates, first.loss = 41, 0.5
    first.part.layers[0].w += 1
    first.save()
    resumed = make_upper(tmp_path, resume=True)
    resumed.resume()
    assert resumed.part.updates == 41 and resumed.loss == 0.5
    assert same(resumed.part.layers, first.part.layers)
    new = make_upper(tmp_path)
    new.resume()
    assert new.part.updates == 0 and not new.checkpoint.path.exists()
    assert (tmp_path / "output" / "checkpoint.1.npz").exists()


def test_a_part_that_diverges_says_so_and_keeps_the_checkpoint_of_before(tmp_path):
    upper = make_upper(tmp_path)
    upper.part.updates, upper.loss = 3, 0.5
    upper.save()

    def losses():
        upper.part.updates += 1
        upper.part.layers[0].w *= np.nan
        yield np.float32(np.nan)
    with pytest.raises(FloatingPointError, match="the test diverged; try a lower"):
        upper.follow(losses(), "the test")
    layers = make_layers([3, 2, 1], np.random.default_rng(0))
    assert upper.checkpoint.resume(layers)["updates"] == 3 and np.isfinite(layers[0].w).all()
    assert upper.poster.closed


def test_whatever_ends_the_loop_there_is_a_checkpoint(tmp_path):
    upper = make_upper(tmp_path)

    def losses():
        upper.part.updates += 1
        yield np.float32(0.25)
        raise serving.Stopped
    with pytest.raises(serving.Stopped):
        upper.follow(losses(), "the test")
    assert upper.checkpoint.resume(upper.part.layers) == {"updates": 1, "loss": 0.25}


def test_a_checkpoint_from_before_the_first_loss_can_be_resumed_and_its_loss_begins_anew(tmp_path):
    make_upper(tmp_path).save(always=True)
    resumed = make_upper(tmp_path, resume=True)
    resumed.resume()
    assert resumed.resumed and resumed.loss is None
    resumed.follow(iter([np.float32(0.25)]), "the test")
    assert resumed.loss == 0.25


def test_a_checkpoint_that_cannot_be_written_is_said_and_tried_again(
        tmp_path, monkeypatch, capsys):
    upper = make_upper(tmp_path)
    upper.part.updates, upper.loss = 3, 0.5
    with monkeypatch.context() as full:
        full.setattr(runs.os, "replace", disk_full)
        upper.save()
    assert "no checkpoint: [Errno 28]" in capsys.readouterr().err
    upper.save()
    assert upper.checkpoint.resume(upper.part.layers)["updates"] == 3


def disk_full(*_):
    raise FileError("[Errno 28] No space left on device")


@pytest.mark.parametrize("trainer", [train_output, train_middle])
def test_a_start_on_a_port_that_is_taken_touches_no_checkpoint(trainer, tmp_path):
    first = make_upper(tmp_path, layers=[3, 2])
    first.part.updates = 41
    first.save()
    args = options(tmp_path, layers=[3, 2], lower_oracle_server="127.0.0.1:2", warm_up=0)
    with serving.listen(args) as taken:
        args.port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{args.port}.*another run"):
            trainer.main(args, False)
    assert [path.name for path in first.checkpoint.path.parent.iterdir()] == ["checkpoint.npz"]


def test_a_start_on_a_folder_that_is_in_use_touches_no_checkpoint(tmp_path):
    first = make_upper(tmp_path)
    first.part.updates = 41
    first.save()
    with runs.lock(tmp_path / "output"), pytest.raises(ValueError, match="another process"):
        train_output.main(options(tmp_path), False)
    assert first.checkpoint.path.exists()


# ---- the lower end ----


def status(**changed):
    return Status(**{"layers": [3, 2, 1], "network": [3, 2, 1], "updates": 0, "backlog": 400,
                     "ids": ["above"], **changed})


def oracle_status(**changed):
    return Status(**{"layers": [3, 3], "updates": 0, "needs": 5, **changed})


def make_lower(tmp_path, above=None, oracle=None, **changed):
    lower = links.LowerEnd(options(tmp_path, **{"layers": [2, 3], **changed}), stop=False)
    lower.above.status, lower.oracle.status = lambda: above, lambda: oracle
    return lower


@pytest.mark.parametrize("above, oracle, changed, message", [
    ({}, {}, {}, None),
    ({"layers": [4, 1]}, {}, {}, "the --layers of the part above .* begin with 4, ours end with 3"),
    ({}, {"layers": [5, 5]}, {}, "the oracle at .* begin with 5, ours end with 3"),
    ({}, {"condition_on_labels": 10}, {}, "with --condition-on-labels 10; y has a width of 1"),
    ({}, {"condition_on_labels": 1}, {}, None),
    ({"ids": ["above", serving.ID]}, {}, {}, "the parts form a cycle"),
    ({"network": None}, {}, {}, "waiting for the part above it"),
    ({}, {"needs": 81}, {}, "needs 81 new gradients .* but only 80 come"),
    ({}, {"needs": 80}, {}, None),
    ({"backlog": 70}, {"needs": 80}, {}, "but only 70 come"),
    ({}, {"needs": 81}, {"gradients": "true"}, None),
    ({"updates": 4}, {}, {}, r"the part above .* \(at 4 updates\) took part in an earlier run"),
    ({}, {"updates": 4}, {}, r"the oracle .* \(at 4 updates\) .* restart what is named"),
    ({}, {}, {"batch_size": 500_000}, "--batch-size must be at most")])
def test_partners_that_do_not_fit_are_refused_with_the_numbers(
        above, oracle, changed, message, tmp_path):
    lower = make_lower(tmp_path, status(**above), oracle_status(**oracle), **changed)
    if message is None:
        lower.connect(new=True, k=1)
        assert lower.network == [3, 2, 1] and lower.ids == ["above"]
    else:
        with pytest.raises((ValueError, NoAnswer), match=message):
            lower.connect(new=True, k=1)


def test_used_partners_are_taken_by_a_run_that_is_resumed(tmp_path):
    make_lower(tmp_path, status(updates=4), oracle_status(updates=4)).connect(new=False, k=1)


def test_a_middle_part_learns_the_width_of_y_from_the_network_above(tmp_path):
    above = status(layers=[3, 2, 10], network=[3, 2, 10])
    lower = make_lower(tmp_path, above, oracle_status(condition_on_labels=10))
    lower.connect(new=True)
    assert lower.network[-1] == 10


@pytest.mark.parametrize("width", [24, 12_583, 20_000, 200_000])
def test_whatever_is_thrown_across_a_wide_cut_heeds_the_message_limit(width, tmp_path):
    lower = make_lower(tmp_path, status(layers=[width, 1], network=[width, 1]),
                       oracle_status(layers=[width, width]), layers=[2, width])
    lower.connect(new=True, k=1)
    rows, h = lower.outbox.per_message, np.zeros((lower.outbox.per_message, width), "f")
    message = encode(i=np.arange(rows), h=h, y=h[:, :1], clock=np.arange(rows))
    assert len(message) < MAX_BODY and rows >= 4


def test_with_true_gradients_nothing_is_thrown_because_the_question_brings_it(tmp_path):
    for gradients, thrown in (("true", 0), ("synthetic", 4), ("delayed", 4), ("zero", 4)):
        lower = make_lower(tmp_path, gradients=gradients)
        lower.throw(INDICES, H, Y, 9)
        assert lower.outbox.counters()["thrown"] == thrown
        assert not thrown or (lower.outbox.next_message()[3] == 9).all()
        assert lower.has_oracle == (gradients in ("synthetic", "zero"))


def test_what_waits_is_bounded(tmp_path):
    lower = make_lower(tmp_path)
    for clock in range(1000):
        lower.throw(INDICES, H, Y, clock)
    assert sum(len(each[0]) for each in lower.outbox.queue) == 4 * 20 * 4
    assert lower.outbox.counters()["dropped"] == 4000 - 4 * 20 * 4
    assert make_upper(tmp_path, keep=100).outbox.queue.max_rows == 100
    assert make_upper(tmp_path, keep=10**6).outbox.queue.max_rows == links.THROWN


# ---- where gradients come from ----


def test_each_source_of_gradients_is_what_it_says():
    g, asked = np.arange(100, dtype="f").reshape(50, 2), []

    def guess(*minibatch):
        asked.append(minibatch)
        return g
    source = {kind: train_input.gradient_source(kind, guess, lambda *_: -g,
                                                np.random.default_rng(0))("i", "h", "y", 3)
              for kind in train_input.GRADIENTS}
    assert source["delayed"] is g and (source["true"] == -g).all()
    assert (source["synthetic"] == g - 49 - np.array([0, 1])).all(), "without its mean"
    alone = train_input.gradient_source("synthetic", lambda h: h, None, None)(g[:1])
    assert (alone == g[:1]).all(), "one example is its own mean"
    assert not source["zero"].any() and source["zero"].shape == g.shape
    shuffled = source["shuffled"]
    assert (shuffled != source["synthetic"]).any()
    assert (np.sort(shuffled, axis=0) == source["synthetic"]).all()
    assert (shuffled[:, 1] == shuffled[:, 0]).all(), "rows are permuted, each stays whole"
    assert asked == [("i", "h", "y", 3)] * 4, "all but the true one pace layer 1 alike"


def make_delayed(clocks, bound=20):
    """A Delayed that has seen minibatches of these clocks; their indices are 10 · clock, + 1."""
    layer, = make_layers([2, 3], np.random.default_rng(0), last=HIDDEN)
    delayed = train_input.Delayed([layer], bound)
    for clock in clocks:
        h = layer.feed_forward(np.full((2, 2), clock, "f"))
        delayed.answer(np.array([10 * clock, 10 * clock + 1]), h, None, clock)
    return delayed, layer


def message(*clocks):
    i = np.concatenate([[10 * clock, 10 * clock + 1] for clock in clocks])
    clock = np.repeat(clocks, 2)
    g = 7 + np.outer(clock * np.tile([1, -1], len(clocks)), [1, 1, 1]).astype("f")
    return i, None, None, clock, g


def test_a_delayed_gradient_is_applied_to_its_own_minibatch_the_oldest_first():
    delayed, layer = make_delayed(range(5))
    delayed.add(*message(1, 2))  # posted together
    delayed.add(*message(3))
    for clock, expected in ((5, 1), (6, 2), (7, 3)):
        h = layer.feed_forward(np.full((2, 2), clock, "f"))
        g, learned = delayed.answer(np.array([50, 51]), h, None, clock)
        assert learned == expected and (layer.x == expected).all()
        assert g.tolist() == [[expected] * 3, [-expected] * 3], "without the mean, which is 7"
    g, learned = delayed.answer(np.array([80, 81]), h, None, 8)
    assert not g.any() and learned == 3


def test_rows_of_a_delayed_gradient_belong_to_its_indices():
    delayed, layer = make_delayed([4])
    delayed.add(np.array([41]), None, None, np.array([4]), np.ones((1, 3), "f"))
    g, _ = delayed.answer(np.array([50, 51]), layer.h, None, 5)
    assert g.tolist() == [[0] * 3, [1] * 3], "what was split on its way leaves the others alone"


def test_a_delayed_gradient_that_comes_twice_in_part_is_applied_once_in_each_row():
    delayed, layer = make_delayed([4])
    half = np.array([40]), None, None, np.array([4]), np.full((1, 3), 4, "f")
    applied = []
    for come in (half, message(4), message(4), message(4)):
        delayed.add(*come)
        g, learned = delayed.answer(np.array([50, 51]), layer.h, None, 5)
        applied.append(g[:, 0].tolist())
    assert applied == [[4, 0], [0, -4], [0, 0], [0, 0]] and learned == 4


@pytest.mark.parametrize("late", [message(0), message(9), (np.array([77]), None, None,
                                                           np.array([30]), np.ones((1, 3), "f"))])
def test_a_gradient_that_is_too_late_or_of_unknown_examples_is_dropped(late):
    delayed, layer = make_delayed(range(31), bound=20)
    delayed.add(*late)
    g, learned = delayed.answer(np.array([310, 311]), layer.h, None, 31)
    assert not g.any() and learned is None
    assert len(delayed.memory) == 21


def test_gradients_that_wait_to_be_applied_are_bounded():
    delayed, _ = make_delayed([], bound=5)
    for clock in range(100):
        delayed.add(*message(clock))
    assert [clock[0] for clock, *_ in delayed.returned] == list(range(90, 100))


# ---- a run of the input trainer ----


class FakeLink:
    """A link without a network: a part above that is not trained, and an oracle that guesses
    −h."""
    network, has_oracle = [24, 12, 1], True

    def __init__(self):
        self.part = Part(make_layers(self.network, np.random.default_rng(5)), updates=100)
        self.outbox, self.thrown, self.asked = Outbox(20_000, per_message=150), [], []
        self.poster = SimpleNamespace(close=lambda timeout: None)
        self.bounded = BoundedStaleness(lambda i, h, y, clock: (-h, clock), 20,
                                        lambda ask: ask(), lambda after: None)
        self.above = self.oracle = self
        self.ask_above = None

    def from_above(self, call):
        return call()

    from_oracle = from_above

    def weights(self, dims):
        assert dims == self.network
        weights, updates = self.part.weights()
        return weights, [updates]

    def estimate_gradients(self, h, y):
        self.asked.append(h)
        return -h, None

    def throw(self, i, h, y, clock):
        self.thrown.append(clock)


class Run:
    """What train_input.main puts together, around a FakeLink."""

    def __init__(self, tmp_path, small_data, resume=False, **changed):
        self.args = argparse.Namespace(**{
            **train_input.DEFAULTS, "num_epochs": 1, "snapshot_seconds": 0, "resume": resume,
            "gradients": "synthetic", "progress_dir": tmp_path / "progress", **changed})
        self.loaded, self.link = data.load(*small_data), FakeLink()
        self.layers = make_layers([2, 24], np.random.default_rng(0), last=HIDDEN)
        self.checkpoint = runs.Checkpoint(self.args.progress_dir)
        same = {"seed": 0, "held_out": 200, "data": self.loaded.digest}
        self.counts = {"examples": 0, "updates": 0, "seconds": 0.0, "waits": 0, "waited": 0.0}
        if resume:
            self.counts.update(self.checkpoint.resume(self.layers, **same))
        columns = ["seconds", "examples", "epoch", "test_mse", "gradient_cosine", "staleness",
                   "waits", "updates"]
        self.report = train_input.Report(self.loaded, self.layers, self.link, self.counts, same)
        self.progress = runs.Progress(self.args.progress_dir, columns, {}, resume)

    def __call__(self, stop=False):
        try:
            with self.progress.ending():
                train_input.run(self.args, stop, self.report, self.progress, self.checkpoint)
        finally:
            self.progress.locked.close()
        return self


def test_a_run_writes_rows_snapshots_and_a_checkpoint_that_agree(tmp_path, small_data):
    run = Run(tmp_path, small_data)()
    assert run.link.thrown == list(range(38))
    rows = run.progress.rows
    assert [int(row["updates"]) for row in rows] == [*range(39), 38]
    weights, row, probe = runs.read_snapshot(runs.snapshots(run.args.progress_dir)[-1])
    assert row["examples"] == 3800 and row["epoch"] == 1
    np.testing.assert_array_equal(weights[0][0], run.layers[0].w)
    np.testing.assert_array_equal(weights[2][0], run.link.part.layers[1].w)
    assert (probe["guess"] == -feed_forward(run.layers, run.loaded.x_test[:150])[:, :4]).all()


def test_a_resumed_run_continues_its_clock_its_order_and_its_waits(tmp_path, small_data):
    run = Run(tmp_path, small_data)
    run.link.bounded.waits, run.link.bounded.waited = 3, 7.5
    with pytest.raises(serving.Stopped):
        run(StopAfter(9))
    assert run.link.thrown == list(range(10))
    resumed = Run(tmp_path, small_data, resume=True)
    assert resumed.counts == {**run.counts, "waits": 3, "waited": 7.5}
    resumed()
    assert resumed.link.thrown == list(range(10, 38))
    seconds = [float(row["seconds"]) for row in resumed.progress.rows]
    assert seconds == sorted(seconds)
    in_one_go = Run(tmp_path / "other", small_data)()
    assert same(resumed.layers, in_one_go.layers, atol=1e-6)


def test_both_rate_and_momentum_of_layer_1_are_what_was_asked_for(tmp_path, small_data):
    reached = [Run(tmp_path / str(n), small_data, **changed)().layers for n, changed in enumerate(
        ({}, {"decay": 5}, {"warm_up": 0}, {"momentum": 0.5}, {"learning_rate": 2.0}))]
    assert all(differ(reached[0], other) for other in reached[1:])


def test_with_a_full_disk_a_run_goes_on_says_so_and_tears_nothing(
        tmp_path, small_data, monkeypatch, capsys):
    run, replace, calls = Run(tmp_path, small_data), runs.os.replace, []

    def sometimes_full(source, to):
        calls.append(to)
        if 20 < len(calls) < 35:
            disk_full()
        return replace(source, to)
    monkeypatch.setattr(runs.os, "replace", sometimes_full)
    run()
    assert capsys.readouterr().err.count("no snapshot: [Errno 28]") > 10
    rows = runs.read_rows(run.args.progress_dir)
    assert int(rows[-1]["updates"]) == 38
    assert runs.read_json(run.args.progress_dir / "run.json")["ended"] == "finished"
    for path in runs.snapshots(run.args.progress_dir):
        runs.read_snapshot(path)


def test_a_part_above_that_is_gone_at_the_end_leaves_a_checkpoint(tmp_path, small_data, capsys):
    run = Run(tmp_path, small_data, snapshot_seconds=1000)
    weights, calls = run.link.weights, []

    def gone(dims):
        calls.append(dims)
        if len(calls) > 1:
            raise NoAnswer("it is gone")
        return weights(dims)
    run.link.weights = gone
    with pytest.raises(NoAnswer):
        run()
    assert "without a last snapshot, but with a checkpoint" in capsys.readouterr().err
    assert Run(tmp_path, small_data, resume=True).counts["updates"] == 38


def test_a_layer_that_diverges_is_neither_saved_nor_written(tmp_path, small_data):
    run = Run(tmp_path, small_data)
    run.report.take(run.progress, run.checkpoint)
    run.layers[0].w[:] = np.nan
    with pytest.raises(FloatingPointError, match="this part diverged; try a lower"):
        run.report.take(run.progress, run.checkpoint)
    assert len(runs.snapshots(run.args.progress_dir)) == 1
    assert np.isfinite(runs.load(run.checkpoint.path)["w0"]).all()


def test_a_part_above_that_went_back_is_said_with_what_to_do(tmp_path, small_data, capsys):
    run = Run(tmp_path, small_data)
    for updates, said in ((100, 0), (120, 0), (7, 1), (9, 1)):
        run.link.part.updates = updates
        run.report.take(run.progress, run.checkpoint)
        run.said = getattr(run, "said", "") + capsys.readouterr().err
        assert run.said.count("went back from 120 updates to 7") == said
    assert "checkpoint.N.npz" in run.said and "--resume" in run.said


def test_the_cosine_and_the_score_are_of_held_out_examples(tmp_path, small_data):
    run = Run(tmp_path, small_data)
    run.report.take(run.progress, run.checkpoint)
    loaded, (h,) = run.loaded, run.link.asked
    x, y = loaded.x_test[:150], loaded.y_test[:150]  # as many as fit into a message
    np.testing.assert_array_equal(h, feed_forward(run.layers, x))
    above = run.link.part.layers
    g = backprop(above, loss_gradient(feed_forward(above, h), y))
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(-h, g, strict=True)]
    assert run.report.row["gradient_cosine"] == pytest.approx(np.mean(cosines), rel=1e-3)
    y_hat = feed_forward(above, feed_forward(run.layers, loaded.x_test))
    assert run.report.row["test_mse"] == pytest.approx(np.mean((y_hat - loaded.y_test) ** 2))


def test_without_an_oracle_no_cosine_is_asked_for(tmp_path, small_data):
    run = Run(tmp_path, small_data)
    run.link.has_oracle = False
    run.report.take(run.progress, run.checkpoint)
    assert run.link.asked == [] and np.isnan(run.report.row["gradient_cosine"])


def test_the_cosine_of_zero_gradients_is_zero_and_not_an_error():
    g = np.array([[3, 4], [1, 0]], "f")
    assert train_input.mean_cosine(g, 0 * g) == 0
    assert train_input.mean_cosine(g, g * [[2], [-1]]) == pytest.approx(0)
    assert train_input.mean_cosine(g, 5 * g) == pytest.approx(1)


def input_args(tmp_path, small_data, **changed):
    x, y = small_data
    return argparse.Namespace(**{
        **train_input.DEFAULTS, "x": x, "y": y, "held_out": None, "host": "127.0.0.1", "port": 0,
        "token": None, "gradients": "synthetic", "snapshot_seconds": 0,
        "progress_dir": tmp_path / "progress", **changed})


@pytest.mark.parametrize("changed", ["seed", "held_out", "data"])
def test_resume_with_another_seed_or_held_out_or_data_is_one_clear_error(
        changed, tmp_path, small_data, small_digits):
    Run(tmp_path, small_data)()
    before = (tmp_path / "progress" / "run.json").read_text()
    x, y = np.load(small_data[0]), np.load(small_data[1])
    np.save(tmp_path / "y.npy", np.where(np.arange(len(y)) == 17, 0, y))
    other = {"seed": {"seed": 1}, "held_out": {"held_out": 201},
             "data": {"y": tmp_path / "y.npy"}}[changed]
    with pytest.raises(ValueError, match=f"--resume: .* of a run with another {changed}"):
        train_input.main(input_args(tmp_path, small_data, resume=True, **other), False)
    assert (tmp_path / "progress" / "run.json").read_text() == before
    assert len(x) == 4000


@pytest.mark.parametrize("resume, checkpoint, new", [
    (False, False, True), (False, True, True), (True, False, True), (True, True, False)])
def test_only_a_run_that_really_continues_takes_used_partners(
        resume, checkpoint, new, tmp_path, small_data, monkeypatch):
    """A supervisor may always say --resume: without a checkpoint it is a new run."""
    if checkpoint:
        Run(tmp_path, small_data)()
    asked = []

    class Lower(links.LowerEnd):
        def connect(self, new, k=None):
            asked.append(new)
            raise serving.Stopped
    monkeypatch.setattr(train_input, "LowerEnd", Lower)
    monkeypatch.setattr(serving, "serve", lambda app, listener, args: listener.close())
    with pytest.raises(serving.Stopped):
        train_input.main(input_args(tmp_path, small_data, resume=resume), False)
    assert asked == [new]


def test_messages_say_what_they_hold():
    """What a link's ends send is what synthgrad.py's types name."""
    question = msgspec.json.decode(encode(h=H, y=Y), type=links.Question)
    assert question.__struct_fields__ == ("h", "y")
    assert links.Examples.__struct_fields__ == ("i", "h", "y", "clock")
