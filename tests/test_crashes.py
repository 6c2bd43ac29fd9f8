"""kill -9 in the middle of a run: the same command again is enough, and nobody else has to be restarted."""
import numpy as np
import pytest

from sgd import read_snapshot, snapshots
from tests.processes import Three, end, wait_until


def goes_on(three, examples=30_000):
    """Until the run has trained on some more examples, and written a snapshot of that."""
    before = three.metrics("examples")[-1]
    wait_until(lambda: three.metrics("examples")[-1] > before + examples, "the run to go on")


@pytest.fixture
def run(tmp_path, large_data):
    with Three(tmp_path, input=[*large_data, "--num-epochs", 1000, "--snapshot-seconds", 1]) as three:
        three.start()
        wait_until(lambda: len(three.metrics("seconds")) > 4, "a few snapshots")
        yield three


def kill(three, name):
    three.processes[name].kill()
    three.processes[name].wait()


def test_a_killed_oracle_learns_again(run):
    kill(run, "oracle")
    wait_until(lambda: "waiting for the oracle" in run.log("input"), "the input trainer to say for whom it waits")
    run.start("oracle")
    goes_on(run)
    assert run.status("oracle")["updates"] > 0 and run.metrics("test_mse")[-1] < 0.15


def test_a_killed_output_trainer_gets_its_weights_back(run):
    before = run.status("output")["updates"]
    kill(run, "output")
    wait_until(lambda: "waiting for the output trainer" in run.log("input"), "the input trainer to say so")
    run.start("output")
    wait_until(lambda: "gave it the newest snapshot's weights" in run.log("input"), "the weights to be given back")
    goes_on(run)
    assert run.status("output")["updates"] > before / 2  # counted on from the snapshot, not from zero
    assert run.metrics("test_mse")[-1] < 0.15


def test_a_killed_input_trainer_resumes_and_passes_over_a_torn_snapshot(run):
    kill(run, "input")
    newest = snapshots(run.progress)[-1]
    run.start("input", extra=["--resume", "--layers", 2, 8])
    assert run.processes["input"].wait(60) == 2 and "other layers than --layers [2, 8]" in run.log("input")
    whole, count = newest.read_bytes(), len(run.metrics("seconds"))
    newest.write_bytes(whole[:len(whole) // 2])
    run.start("input", extra=["--resume"])
    wait_until(lambda: len(run.metrics("seconds")) > count + 2, "the resumed run to append to metrics.csv")
    log = run.log("input")
    assert f"{newest} is not a whole snapshot" in log and "using the one before" in log and "going on from" in log
    examples = run.metrics("examples")
    assert examples[count] == read_snapshot(snapshots(run.progress)[count - 2])[1]["examples"]
    assert (np.diff(examples[count:]) >= 0).all()


def test_stopping_is_bounded_when_the_others_are_gone(run):
    kill(run, "oracle")
    kill(run, "output")
    code = end(run.processes["input"], timeout=30)
    assert code in (0, 2) and "Traceback" not in run.log("input")
