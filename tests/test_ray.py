"""The processes on a Ray cluster of three nodes, one of which is lost during a run."""
import os
import subprocess
import sys

import psutil
import pytest

from plumbing.launch import free_first_port
from plumbing.runs import read_json, read_metrics
from tests.processes import ROOT, end, local_cluster, start, status, wait_until

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
        if "-c" in words and each.info["cwd"] == str(folder):
            found[each.pid] = next((os.path.basename(w) for w in words if w.endswith(".py")), None)
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


def test_a_process_ends_when_its_actor_holds_the_pipe_no_longer(tmp_path):
    """Ray ends the processes of a lost actor, too, where it can; so this is tested without Ray."""
    pytest.importorskip("ray")
    from examples.on_ray import UNTIL_ORPHANED
    port = free_first_port()
    process = subprocess.Popen(
        [sys.executable, "-c", UNTIL_ORPHANED, str(ROOT), str(ROOT / "train_output.py"), "--port",
         str(port)], cwd=tmp_path, stdin=subprocess.PIPE)
    try:
        wait_until(lambda: status(port), "the output trainer to answer")
        process.stdin.close()
        assert process.wait(10) == 1
    finally:
        end(process)
