"""The processes on a Ray cluster of three nodes, one of which is lost during a run; and the driver
without Ray."""
import importlib
import os
import sys
from types import SimpleNamespace

import psutil
import pytest

from plumbing import launch
from plumbing.launch import free_first_port
from plumbing.runs import read_json, read_metrics
from tests.processes import end, local_cluster, start, status, wait_until

pytestmark = pytest.mark.processes
EPOCHS = 60  # half a minute


@pytest.fixture
def cluster():
    pytest.importorskip("ray")
    with local_cluster() as cluster:
        yield cluster


def trainers(folder):
    """{pid: script} of the processes that actors have started in this folder."""
    found = {}
    for each in psutil.process_iter(["cmdline", "cwd"]):
        words = each.info["cmdline"] or []
        script = os.path.basename(words[1]) if len(words) > 1 else ""
        if script.startswith(("oracle", "train_")) and each.info["cwd"] == str(folder):
            found[each.pid] = script
    return found


@pytest.mark.parametrize("parts", [["2-24", "24-12-1"]], ids=["two parts"])
def test_a_run_survives_the_loss_of_a_node(parts, cluster, tmp_path, small_data):
    cluster, nodes = cluster
    first = free_first_port()
    driver = start("examples/on_ray.py", *small_data, "--parts", *parts, "--num-epochs", EPOCHS,
                   "--snapshot-seconds", 1, "--first-port", first, cwd=tmp_path,
                   log=tmp_path / "log")
    try:
        wait_until(lambda: (status(first + 2) or {}).get("updates", 0) > 300, "training", 100)
        before = trainers(tmp_path)
        assert sorted(before.values()) == ["oracle.py", "train_input.py", "train_output.py"]
        cluster.remove_node(nodes[1], allow_graceful=False)
        wait_until(lambda: set(trainers(tmp_path)) - set(before), "a process to start again", 100)
        wait_until(lambda: driver.poll() is not None, "the run to end", 200)
        assert driver.returncode == 0, (tmp_path / "log").read_text()
        assert read_json(tmp_path / "progress" / "run.json")["ended"] == "finished"
        assert read_metrics(tmp_path / "progress")["examples"][-1] == EPOCHS * 3800
        assert not trainers(tmp_path)
    except BaseException:
        sys.stderr.write((tmp_path / "log").read_text()[-5000:])
        raise
    finally:
        end(driver)


def test_nobody_is_left_when_an_actor_and_then_the_driver_is_killed(cluster, tmp_path, small_data):
    first = free_first_port()
    driver = start("examples/on_ray.py", *small_data, "--num-epochs", 10**6, "--first-port", first,
                   cwd=tmp_path, log=tmp_path / "log")
    try:
        wait_until(lambda: (status(first + 2) or {}).get("updates"), "training", 100)
        before = trainers(tmp_path)
        output = next(pid for pid in before if before[pid] == "train_output.py")
        psutil.Process(output).parent().kill()  # the actor
        wait_until(lambda: not psutil.pid_exists(output), "the actor's process to end", 20)
        wait_until(lambda: len(trainers(tmp_path)) == 3, "Ray to start it again")
        driver.kill()
        wait_until(lambda: not trainers(tmp_path), "all processes to end")
    finally:
        end(driver)
        for pid in trainers(tmp_path):
            psutil.Process(pid).kill()


# ---- the driver and an actor, without Ray ----


@pytest.fixture
def on_ray(monkeypatch):
    """examples.on_ray with a Ray that calls everything at once."""
    def wait(calls, num_returns, timeout):
        late = [call for call in calls if call == "late"]
        return [call for call in calls if call not in late], late
    ray = SimpleNamespace(
        remote=lambda **_: lambda kind: kind, init=lambda **_: None, wait=wait,
        get=lambda calls: calls, util=SimpleNamespace(get_node_ip_address=lambda: "127.0.0.1"))
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.delitem(sys.modules, "examples.on_ray", raising=False)
    module = importlib.import_module("examples.on_ray")
    yield module
    del sys.modules["examples.on_ray"]


@pytest.fixture
def runner(on_ray, tmp_path, monkeypatch):
    """runner(code) -> an actor whose command is a script of this code, and that command. The actor
    has `starts`, the words of each start."""
    def make(code):
        (tmp_path / "script.py").write_text(code)
        made = on_ray.Runner(str(tmp_path), str(tmp_path), None)
        made.starts = []

        def start(words, **options):
            made.starts.append(words[1:])
            return launch.start(words, **options)
        monkeypatch.setattr(on_ray, "start", start)
        made_here.append(made)
        return made, ["script.py", "--port", "5001"]
    made_here = []
    yield make
    for made in made_here:
        made.stop()


@pytest.mark.parametrize("code, starts", [(2, 5), (1, 1), (0, 1)])
def test_a_process_that_fails_is_started_a_few_times_and_one_that_diverged_is_not(
        code, starts, runner):
    actor, command = runner(f"raise SystemExit({code})")
    while (ended := actor.run(command, [])[0]) is None:
        actor.process.wait(20)
    assert ended == code and len(actor.starts) == starts


@pytest.mark.parametrize("whose, answered", [("its own", True), ("another's", False)])
def test_only_the_answer_of_its_own_process_counts(whose, answered, runner, on_ray, monkeypatch):
    actor, command = runner("import signal\nsignal.alarm(60)\nsignal.pause()")
    assert actor.run(command, []) == (None, False)
    pid = actor.process.pid if answered else os.getpid()
    monkeypatch.setattr(on_ray, "Process", lambda address, token: SimpleNamespace(
        ask=lambda: {"process": "oracle", "pid": pid}))
    assert actor.run(command, []) == (None, answered)
    actor.process.kill()
    actor.process.wait(20)
    assert actor.run(command, ["--resume"]) == (None, False)
    assert actor.starts[1] == ["--port", "5001", "--resume", "--host", "127.0.0.1"]


class Actor:
    """Instead of a Runner: answers from the third time on, and the input trainer ends later."""

    asked = {}

    def __init__(self, *_):
        self.address, self.run, self.stop = (
            SimpleNamespace(remote=call) for call in (lambda: "::1", self._run, lambda: "stopped"))

    @classmethod
    def remote(cls, *args):
        return cls(*args)

    def _run(self, command, resume):
        times = self.asked.setdefault(command[0], [])
        times.append(list(resume))
        ended = command[0] == "train_input.py" and len(times) == 5
        return -9 if ended else None, len(times) >= 3


def test_only_a_trainer_that_has_answered_is_told_to_resume(on_ray, monkeypatch, capsys):
    monkeypatch.setattr(on_ray, "Runner", Actor)
    monkeypatch.setattr(on_ray.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(Actor, "asked", {})
    assert on_ray.main(["x.npy", "y.npy"]) == -9
    assert Actor.asked["train_input.py"] == [[], [], [], ["--resume"], ["--resume"]]
    assert Actor.asked["train_output.py"] == Actor.asked["train_input.py"]
    assert Actor.asked["oracle.py"] == [[]] * 5
    assert "The run is over: input was ended by SIGKILL" in capsys.readouterr().out


def test_an_actor_that_ray_cannot_place_is_not_waited_for_at_the_end(on_ray, capsys):
    actors = {name: Actor() for name in ("oracle1", "output", "input")}
    actors["output"].stop.remote = lambda: "late"
    on_ray.stop(actors)
    assert "Ray cannot reach them: output. They end with this driver" in capsys.readouterr().out
