"""Traces: what a process writes, how several are joined, and the picture of two runs."""
import collections
import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from plumbing import timeline, trace
from plumbing.errors import UserError
from plumbing.posting import Outbox
from plumbing.proxy import Proxy
from links import UpperEnd
from replay import Replay
from synthgrad import OracleClient
from tests.processes import ROOT
from tests.test_exchange import START, columns, make_link, step

# Processes that throw minibatches at each other through a pipe, each clock from a thread of its own
LOWER = """
import sys, threading
from plumbing import trace
trace.start(sys.argv[1], "input trainer")
def update(clock):
    with trace.span("update", clock=clock):
        with trace.span("throw", clock=clock):
            trace.flow_out("examples", clock)
            print(clock, flush=True)
for clock in range(20):
    thread = threading.Thread(target=update, args=[clock], name=f"trainer {clock % 2}")
    thread.start()
    thread.join()
trace.write()
trace.write()
"""
UPPER = """
import sys
from plumbing import trace
trace.start(sys.argv[1], "output trainer")
for line in sys.stdin:
    with trace.span("minibatch", clock=int(line)):
        trace.flow_in("examples", int(line))
trace.write()
"""


@pytest.fixture(autouse=True)
def off(monkeypatch):
    monkeypatch.setattr(trace, "recorder", None)


def read(path):
    return json.loads(path.read_text())["traceEvents"]


def check(events):
    """What must be true of every trace: each begin has its end, in order of time and properly
    nested, and no arrow goes back in time. Returns how many spans and arrows there are."""
    stacks, sent, spans, arrows = collections.defaultdict(list), {}, 0, 0
    timed = [event for event in events if event["ph"] != "M"]
    assert timed == sorted(timed, key=lambda event: event["ts"])
    for event in timed:
        stack = stacks[event["pid"], event["tid"]]
        if event["ph"] == "B":
            stack.append(event["name"])
        elif event["ph"] == "E":
            assert stack.pop() == event["name"]
            spans += 1
        elif event["ph"] == "s":
            sent[event["id"]] = event
        else:
            assert sent[event["id"]]["name"] == event["name"]
            assert sent[event["id"]]["ts"] <= event["ts"]
            arrows += 1
    assert not any(stacks.values())
    return spans, arrows


@pytest.fixture(scope="module")
def two_files(tmp_path_factory):
    """Traces of two processes."""
    folder = tmp_path_factory.mktemp("traces")
    files = [folder / "lower.json", folder / "upper.json"]
    lower, upper = ([sys.executable, "-c", code, str(file)]
                    for code, file in zip((LOWER, UPPER), files, strict=True))
    first = subprocess.Popen(lower, cwd=ROOT, stdout=subprocess.PIPE)
    second = subprocess.Popen(upper, cwd=ROOT, stdin=first.stdout)
    assert [first.wait(), second.wait()] == [0, 0]
    return files


def test_begin_and_end_pair_up_and_no_arrow_goes_back_in_time(two_files):
    assert check(timeline.join(two_files)["traceEvents"]) == (60, 20)


def test_a_trace_names_its_process_and_its_threads(two_files):
    names = {event["args"]["name"] for event in read(two_files[0]) if event["ph"] == "M"}
    assert {"input trainer", "trainer 0", "trainer 1"} >= names > {"input trainer"}


def test_the_clock_is_an_argument(two_files):
    clocks = [event["args"]["clock"] for event in read(two_files[1]) if event["ph"] == "B"]
    assert clocks == list(range(20))


def test_nothing_is_recorded_or_written_unless_started(tmp_path):
    with trace.span("forward", clock=1):
        trace.flow_out("examples", 1)
    trace.write()
    assert trace.recorder is None and not list(tmp_path.iterdir())


def test_the_newest_events_are_kept_and_no_pair_is_torn(tmp_path):
    trace.start(tmp_path / "a.json", "input trainer", last=100)
    for clock in range(1000):
        with trace.span("update", clock=clock), trace.span("forward", clock=clock):
            trace.flow_out("examples", clock)
    with trace.span("open"):
        trace.write()
    events = read(tmp_path / "a.json")
    assert sum(event["ph"] == "s" for event in events) in (33, 34)
    assert check(events)[0] in (66, 67)
    assert {event["args"]["clock"] for event in events if event["name"] == "update"
            and event["ph"] == "B"} == set(range(966, 1000))


def test_threads_may_record_while_the_file_is_written(tmp_path):
    trace.start(tmp_path / "a.json", "oracle")
    done = threading.Event()

    def work():
        while not done.is_set():
            with trace.span("answer"), trace.span("inner"):
                pass
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(2):
        trace.write()
        check(read(tmp_path / "a.json"))
    done.set()
    for thread in threads:
        thread.join()


def test_spans_nest_where_the_clock_is_coarse(tmp_path, monkeypatch):
    monkeypatch.setattr(trace.time, "perf_counter_ns", lambda: 7)
    trace.start(tmp_path / "a.json", "oracle")
    for _ in range(3):
        with trace.span("outer"), trace.span("inner"):
            pass
    assert check(trace.events()) == (6, 0)


def test_a_span_ends_with_an_exception_too(tmp_path):
    trace.start(tmp_path / "a.json", "oracle")
    with pytest.raises(KeyError), trace.span("train"):
        raise KeyError
    assert check(trace.events()) == (1, 0)


def test_an_array_is_a_key_that_both_ends_know(tmp_path):
    trace.start(tmp_path / "a.json", "oracle")
    h = np.random.default_rng(0).random((100, 24), dtype="f")
    with trace.span("ask", clock=np.int64(3)):
        for key in (h, h.copy(), 2 * h, np.int64(3), 3):
            trace.flow_out("question", key)
    trace.write()
    ids = [event["id"] for event in read(tmp_path / "a.json") if event["ph"] == "s"]
    assert ids[0] == ids[1] != ids[2] and ids[3:] == ["question 3"] * 2


def test_a_disk_that_is_full_does_not_end_the_run(tmp_path, capsys):
    (tmp_path / "file").touch()
    trace.start(tmp_path / "file" / "a.json", "oracle")
    trace.write()
    assert "no trace: " in capsys.readouterr().err


def test_the_folder_of_a_trace_is_made(tmp_path):
    trace.start(tmp_path / "new" / "a.json", "oracle")
    trace.write()
    assert (tmp_path / "new" / "a.json").exists()


class Process:
    """Events of a process, at given milliseconds."""

    def __init__(self, pid, name):
        self.pid, self.rows = pid, []
        self.names = [{"ph": "M", "name": "process_name", "pid": pid, "tid": 0,
                       "args": {"name": name}}]

    def span(self, name, begin, seconds, clock=0, tid=0):
        """Returns when it ends."""
        for ph, ms in (("B", begin), ("E", begin + seconds)):
            self.rows.append({"ph": ph, "name": name, "pid": self.pid, "tid": tid, "ts": 1e3 * ms,
                              "args": {"clock": clock}})
        return begin + seconds

    def flow(self, ph, name, ms, clock):
        self.rows.append({"ph": ph, "name": name, "pid": self.pid, "tid": 0, "ts": 1e3 * ms,
                          "id": f"{name} {clock}"})

    def write(self, path):
        path.write_text(json.dumps({"traceEvents": self.names + self.rows}))
        return path


def run_that_waits(folder, updates=40):
    """Files of a run with true gradients, 10 ms to the part above and as many back."""
    lower, upper, ms = Process(1, "input trainer"), Process(2, "output trainer"), 0.0
    for clock in range(updates):
        ms = lower.span("forward", ms, 0.4, clock)
        lower.flow("s", "examples", ms, clock)
        arrival = ms + 10.5
        upper.flow("f", "examples", arrival, clock)
        end = upper.span("minibatch", arrival, 0.9, clock)
        upper.flow("s", "gradients", end, clock)
        for _ in range(8):
            end = upper.span("replay", end + 0.1, 0.7)
        lower.flow("f", "gradients", arrival + 11.5, clock)
        ms = lower.span("wait", ms, 21.9, clock)
        ms = lower.span("update", lower.span("backprop", ms, 0.5, clock), 0.2, clock) + 0.2
    return [each.write(folder / f"{each.pid}.json") for each in (lower, upper)]


def run_that_guesses(folder, updates=200):
    """Files of a run with guesses: messages share a post of every 24 ms, as in the trainers."""
    lower, upper = Process(1, "input trainer"), Process(2, "output trainer")
    oracle, ms, thrown, rng = Process(3, "oracle"), 0.0, [], np.random.default_rng(0)
    for clock in range(updates):
        ms = lower.span("forward", ms, 0.6, clock)
        lower.flow("s", "examples", ms + 0.1, clock)
        ms = lower.span("throw", ms, 0.2, clock)
        thrown.append((24 * (ms // 24 + 1) + 10, clock))
        lower.flow("s", "question", ms, clock)
        oracle.span("answer", ms + 1, 0.4, clock, tid=1)
        oracle.flow("s", "guess", ms + 1.3, clock)
        ms = lower.span("ask", ms, 2 + rng.random(), clock)
        lower.flow("f", "guess", ms, clock)
        ms = lower.span("update", lower.span("backprop", ms, 0.7, clock), 0.3, clock) + 0.4
    end, done = 0.0, ms
    while thrown or end < done:
        if thrown and thrown[0][0] <= end:
            clock = thrown.pop(0)[1]
            upper.flow("f", "examples", end, clock)
            end = upper.span("minibatch", end, 1, clock)
            upper.flow("s", "gradients", end, clock)
            oracle.flow("f", "gradients", end + 11 + 5 * rng.random(), clock)
        else:
            end = upper.span("replay", end + 0.1, 0.7)
    for k in range(int(done / 7)):
        oracle.span("train", 7 * k, 6.2)
    return [each.write(folder / f"{each.pid}.json") for each in (lower, upper, oracle)]


@pytest.fixture
def runs(tmp_path):
    return [timeline.join(make(tmp_path))["traceEvents"]
            for make in (run_that_waits, run_that_guesses)]


def test_a_picture_shows_waiting_hatched_in_the_run_that_waits_alone(runs):
    figure = Figure((9, 5.6), layout="constrained")
    timeline.draw(figure, *runs)
    figure.canvas.draw()
    locked, decoupled = figure.axes

    def hatched(ax):
        return sum(len(bars.get_paths()) for bars in ax.collections if bars.get_hatch())
    assert hatched(locked) >= timeline.UPDATES and hatched(decoupled) == 0
    assert "10 updates take 232 ms" in locked.get_title(loc="left")
    assert len(locked.patches) >= 2 * timeline.UPDATES  # an arrow up and one back of each


def test_the_picture_shows_ten_updates_of_the_middle(runs):
    for events in runs:
        bars, arrows = timeline.bars_and_arrows(events)
        begin, end = timeline.window(bars)
        ends = [bar.end for bar in bars if bar.name == "update"]
        assert sum(begin < each <= end for each in ends) == timeline.UPDATES
        assert ends[len(ends) // 3 - 2] < begin < end < ends[2 * len(ends) // 3 + 2]
        assert all(arrow.begin <= arrow.end for arrow in arrows)


def test_a_trace_of_too_few_updates_is_refused(tmp_path):
    events = timeline.join(run_that_waits(tmp_path, updates=10))["traceEvents"]
    with pytest.raises(UserError, match="fewer than 11 updates"):
        timeline.window(timeline.bars_and_arrows(events)[0])


def test_join_gives_each_arrival_the_last_departure_before_it(tmp_path):
    lower, upper = Process(1, "input trainer"), Process(2, "output trainer")
    for ms, clock in ((0, 1), (5, 1), (20, 1), (1, 2)):  # 1 was thrown three times, 2 was lost
        lower.flow("s", "examples", ms, clock)
    for ms, clock in ((3, 1), (9, 1), (4, 3)):           # the departure of 3 was forgotten
        upper.flow("f", "examples", ms, clock)
    files = [each.write(tmp_path / f"{each.pid}.json") for each in (lower, upper)]
    _, arrows = timeline.bars_and_arrows(timeline.join(files)["traceEvents"])
    assert [(arrow.begin, arrow.end) for arrow in arrows] == [(0, 3), (5, 9)]


def test_join_does_not_hide_an_arrow_that_goes_back_in_time(tmp_path):
    lower, upper = Process(1, "input trainer"), Process(2, "output trainer")
    lower.flow("s", "examples", 5, 1)
    upper.flow("f", "examples", 3, 1)
    files = [each.write(tmp_path / f"{each.pid}.json") for each in (lower, upper)]
    with pytest.raises((AssertionError, KeyError)):
        check(timeline.join(files)["traceEvents"])


def test_a_slow_network_delays_each_direction_and_keeps_the_order():
    with socket.create_server(("127.0.0.1", 0)) as server:
        slow = Proxy(server.getsockname()[1], 0.05)
        with contextlib.closing(slow), socket.create_connection(("127.0.0.1", slow.port)) as near:
            far = server.accept()[0]
            with far:
                began = time.monotonic()
                for _ in range(100):
                    near.sendall(b"question")
                assert read_bytes(far, 800) == b"question" * 100
                arrived = time.monotonic()
                far.sendall(b"answer")
                assert read_bytes(near, 6) == b"answer"
                back = time.monotonic()
                near.shutdown(socket.SHUT_WR)
                assert far.recv(1) == b""  # the end is passed on
    assert 0.05 <= arrived - began < 2.5  # 5 s, if each of the hundred waited for the last
    assert back - arrived >= 0.05


def read_bytes(connection, count):
    data = b""
    while len(data) < count:
        data += connection.recv(count)
    return data


@pytest.mark.parametrize("gradients, slow", [
    ("true", [("input", "--output-server")]),  # the answers come back through the same proxy
    ("synthetic", [("input", "--output-server"), ("output", "--oracle-server")])])
def test_the_network_is_slow_around_the_part_above(gradients, slow, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    commands, traces = {}, []

    def launched(given, signals):
        commands.update(given)
        for words in given.values():  # a process may have nothing to tell
            Path(words[words.index("--trace") + 1]).write_text('{"traceEvents": []}')
        for process in (Process(1, "input trainer"), Process(2, "output trainer")):
            words = given[process.names[0]["args"]["name"].split()[0]]
            traces.append(process.write(Path(words[words.index("--trace") + 1])))
        return 0
    monkeypatch.setattr(timeline.launch, "run", launched)
    Path("timeline").mkdir()
    assert timeline.run("a", ["--gradients", gradients], ["x.npy", "y.npy"], [])[0] == 0
    assert {"input", "output"} <= set(commands) and len(traces) == 2
    for name, option in (("input", "--output-server"), ("output", "--oracle-server")):
        assert commands[name].count(option) == 1 + ((name, option) in slow)  # the last one counts
    assert Path("timeline/a.json").exists()


# ---- what the algorithm records ----


def recorded():
    """[phase and name of each event, its clock or the key of its arrow], in the order of time."""
    return [(f"{event['ph']} {event['name']}", event.get("id", event.get("args", {}).get("clock")))
            for event in trace.events() if event["ph"] != "M"]


def test_an_update_along_a_guess_is_recorded_from_its_forward_pass_to_its_end(tmp_path):
    trace.start(tmp_path / "a.json", "input trainer")
    link = make_link("synthetic")
    link.above.g = np.ones((2, 3), "f")
    with trace.span("before"):
        pass
    step(link, 7)
    spans = [(name, 7) for name in ("forward", "throw", "ask", "update")]
    found = recorded()[2:]
    assert [(name[2:], key) for name, key in found if name[0] == "B"] == spans
    assert ("s examples", "examples 7") in found and len(found) == 9


def test_a_wait_for_a_true_gradient_is_a_span_in_which_its_arrow_ends(tmp_path):
    trace.start(tmp_path / "a.json", "input trainer")
    link = make_link("true")
    link.above.g = np.ones((2, 3), "f")
    step(link, 7)
    assert [each for each in recorded() if "wait" in each[0] or each[0].startswith("f")] == [
        ("B wait", 7), ("f gradients", "gradients 7"), ("E wait", None)]


def test_a_wait_for_a_delayed_gradient_is_a_span_and_each_arrow_ends_once(tmp_path):
    trace.start(tmp_path / "a.json", "input trainer")
    link = make_link("delayed", staleness=2)
    link.source.window = 2

    def news():
        link.source.add(START, 0, 0, np.ones((2, 3), "f"))
    link.above.news = news
    for clock in range(3):
        step(link, clock)
    found = recorded()
    assert ("B wait", 2) in found and found.count(("f gradients", "gradients 0")) == 1


def test_the_arrow_of_an_answered_gradient_begins_with_the_clock_of_its_minibatch(tmp_path):
    trace.start(tmp_path / "a.json", "output trainer")
    upper = UpperEnd(Replay(10, 0), 10, np.random.default_rng(0))
    got = []
    upper.ask(*columns([0], clock=9), got.append)
    g, minibatch = np.ones((1, 3), "f"), upper.next()
    minibatch.tell(g)
    assert minibatch.clock == 9 and got == [g] and recorded() == [("s gradients", "gradients 9")]


def test_a_question_and_its_answer_are_arrows_that_end_where_the_key_is_h(tmp_path, monkeypatch):
    trace.start(tmp_path / "a.json", "input trainer")
    h = np.ones((2, 3), "f")
    monkeypatch.setattr(OracleClient, "ask", lambda *_, **__: (-h, None))
    assert (OracleClient("127.0.0.1:1").estimate_gradients(h, h[:, :1])[0] == -h).all()
    key = trace.fingerprint(h)
    assert recorded() == [("s question", f"question {key}"), ("f guess", f"guess {key}")]


def test_the_arrow_of_a_thrown_gradient_begins_with_the_clock_of_its_minibatch(tmp_path):
    trace.start(tmp_path / "a.json", "output trainer")
    upper = UpperEnd(Replay(10, 0), 10, np.random.default_rng(0), Outbox())
    upper.add(*columns([0], 4))
    upper.next().tell(np.ones((1, 3), "f"))
    assert recorded() == [("s gradients", "gradients 4")]
