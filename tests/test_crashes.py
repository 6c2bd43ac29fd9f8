"""kill -9 in the middle of a run: the same command again is enough, and nobody else has to be restarted."""
import csv

import pytest

from sgd import read_snapshot, snapshots
from tests.processes import Three, end, wait_until


def rows(three):
    return list(csv.DictReader(open(three.progress / "metrics.csv")))


def goes_on(three, examples=30_000):
    """Until the run has trained on some more examples, and written a snapshot of that."""
    before = int(rows(three)[-1]["examples"])
    wait_until(lambda: int(rows(three)[-1]["examples"]) > before + examples, "the run to go on")


@pytest.fixture
def run(tmp_path, large_data):
    with Three(tmp_path, input=[*large_data, "--num-epochs", 1000, "--snapshot-seconds", 1]) as three:
        three.start()
        wait_until(lambda: (three.progress / "metrics.csv").exists() and len(rows(three)) > 4, "a few snapshots")
        yield three


def kill(three, name):
    three.processes[name].kill()
    three.processes[name].wait()


def test_a_killed_oracle_learns_again(run):
    kill(run, "oracle")
    wait_until(lambda: "waiting for the oracle" in run.log("input"), "the input trainer to say for whom it waits")
    run.start("oracle")
    goes_on(run)
    assert run.status("oracle")["updates"] > 0 and float(rows(run)[-1]["test_mse"]) < 0.15


def test_a_killed_output_trainer_gets_its_weights_back(run):
    before = run.status("output")["updates"]
    kill(run, "output")
    wait_until(lambda: "waiting for the output trainer" in run.log("input"), "the input trainer to say so")
    run.start("output")
    wait_until(lambda: "gave it the newest snapshot's weights" in run.log("input"), "the weights to be given back")
    goes_on(run)
    assert run.status("output")["updates"] > before / 2  # counted on from the snapshot, not from zero
    assert float(rows(run)[-1]["test_mse"]) < 0.15


def test_a_killed_input_trainer_resumes_and_passes_over_a_torn_snapshot(run):
    kill(run, "input")
    newest = snapshots(run.progress)[-1]
    whole, count = newest.read_bytes(), len(rows(run))
    newest.write_bytes(whole[:len(whole) // 2])
    run.start("input", extra=["--resume"])
    wait_until(lambda: len(rows(run)) > count + 2, "the resumed run to append to metrics.csv")
    log = run.log("input")
    assert f"{newest} is not a whole snapshot" in log and "using the one before" in log and "going on from" in log
    examples = [int(row["examples"]) for row in rows(run)]
    assert examples[count] == int(read_snapshot(snapshots(run.progress)[count - 2])[1]["examples"])
    assert examples[count:] == sorted(examples[count:])


def test_stopping_is_bounded_when_the_others_are_gone(run):
    kill(run, "oracle")
    kill(run, "output")
    code = end(run.processes["input"], timeout=30)
    assert code in (0, 2) and "Traceback" not in run.log("input")
