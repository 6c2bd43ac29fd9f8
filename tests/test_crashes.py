"""kill -9 of anything at any time: the same command with --resume is enough, and nobody else has
to be restarted."""
from functools import partial

import numpy as np
import pytest

from plumbing.part import UNDO
from plumbing.runs import Checkpoint, snapshots
from sgd import make_layers
from tests.processes import Three, end, start, wait_until

pytestmark = pytest.mark.processes
UPDATES = 20 * 38  # of 20 epochs of 3,800 examples


def test_a_restart_at_any_stage_ends_in_a_finished_run(tmp_path, small_data):
    """Each of the three is killed as soon as it answers, in the middle, and near the end."""
    three = Three(tmp_path, output=["--resume", "--checkpoint-seconds", 0.5], input=[
        *small_data, "--num-epochs", 20, "--resume", "--staleness", 50, "--learning-rate", 0.3,
        "--snapshot-seconds", 1])
    three.commands["input"] += ["--output-server", f"127.0.0.1:{three.to_output.port}"]

    def restart(*victims):
        """While layer 1 cannot reach the output trainer, and waits for it or for the oracle."""
        before, three.to_output.cut = three.log("input").count("waiting for the "), True
        wait_until(lambda: three.log("input").count("waiting for the ") > before, "it to wait")
        for victim in victims:
            three.kill(victim)
            three.start(victim)
        three.to_output.cut = False
    with three:
        three.start()
        for name in three.commands:
            wait_until(partial(three.status, name), f"the {name} process to answer")
            three.kill(name)
            three.start(name)
        for victim in three.commands:
            reached = three.updates()
            wait_until(lambda: three.updates() > reached + 50, "training")  # noqa: B023
            restart(victim)
        wait_until(lambda: UPDATES > three.updates() > UPDATES - 250, "the run to come near its "
                   "end", timeout=120, pause=0.01)
        restart(*three.commands)  # no last snapshot, nor the one before
        assert three.wait_for_input(60) == 0, three.log("input")
    assert not any("Traceback" in three.log(name) for name in three.commands)
    assert three.metrics("updates")[-1] == UPDATES
    assert np.isfinite(three.metrics("test_mse")).all()


def test_the_output_trainer_continues_from_its_own_checkpoint(tmp_path, small_data):
    with Three(tmp_path, gradients="delayed", output=["--checkpoint-seconds", 0.2],
               input=[*small_data, "--num-epochs", 10**6]) as three:
        three.start()
        wait_until(lambda: three.updates("output") > 500, "some training")
        three.kill("input")
        kept, layers = {}, make_layers([24, 12, 1], np.random.default_rng(0))

        def all_is_written():  # though it idles by now
            kept.update(Checkpoint(three.folder / "output_progress").resume(layers))
            return kept["updates"] == three.updates("output")
        wait_until(all_is_written, "a checkpoint of the last update")
        three.kill("output")
        three.start("output", extra=["--resume"])
        status = wait_until(lambda: three.status("output"), "the output trainer")
        assert status["updates"] == kept["updates"] > 500
        assert status["loss"] == pytest.approx(kept["average"])


@pytest.mark.parametrize("batch_size, staleness, on, oracle", [
    (1, 250, 2300, []), (10, 50, 300, []), (100, 5, 300, []), (1, 20, 600, ["--replay", 50])])
def test_a_small_bound_never_stops_a_run_not_even_after_kill_9(
        batch_size, staleness, on, oracle, tmp_path, small_data):
    """The oracle trains again after exactly as many gradients as this bound lets through. A part
    that skips minibatches stands still within so many updates."""
    with Three(tmp_path, oracle=oracle, input=[
            *small_data, "--num-epochs", 10**6, "--batch-size", batch_size, "--staleness",
            staleness, "--snapshot-seconds", 0.5]) as three:
        def goes_on_to(updates):
            for mark in range(three.updates() + 50, updates, 50):
                wait_until(lambda: three.updates() > mark, "50 updates", 10)  # noqa: B023
        three.start("oracle", "output")
        three.wait_until_ready("oracle", "output")
        three.start("input")
        wait_until(three.updates, "it to begin")
        goes_on_to(on)
        three.kill("input")
        three.start("input", extra=["--resume", *["--staleness", 4] * (staleness == 5)])
        goes_on_to(wait_until(three.updates, "it to resume") + 200)


@pytest.mark.parametrize("gradients", ["zero", "local"])
def test_a_part_that_needs_nothing_from_above_resumes_alone(gradients, tmp_path, small_data):
    with Three(tmp_path, gradients=gradients, input=[
            *small_data, "--num-epochs", 10**6, "--snapshot-seconds", 0.2]) as three:
        three.start()
        wait_until(lambda: three.updates() > 100, "training")
        three.kill("input")
        three.start("input", extra=["--resume"])
        resumed = wait_until(three.updates, "it to resume")
        wait_until(lambda: three.updates() > resumed + 100, "it to go on")


def test_the_head_of_a_local_loss_is_resumed_too(tmp_path, small_data):
    with Three(tmp_path, gradients="local", input=[*small_data, "--num-epochs", 5]) as three:
        three.start()
        assert three.wait_for_input(60) == 0, three.log("input")
        before = dict(np.load(three.progress / "checkpoint.npz"))
        three.start("input", extra=["--resume"])  # with nothing left to train, it writes it again
        assert three.wait_for_input(60) == 0, three.log("input")
        after = np.load(three.progress / "checkpoint.npz")
        assert before["w2"].shape == (12, 1)
        assert all((before[name] == after[name]).all() for name in ("w0", "w1", "w2", "b2"))


def test_a_resumed_run_on_an_output_trainer_as_drawn_is_refused_in_one_line(tmp_path, small_data):
    with Three(tmp_path, gradients="local", input=[
            *small_data, "--num-epochs", 10**6, "--snapshot-seconds", 0.2]) as three:
        three.start()
        wait_until(lambda: len(three.metrics("updates")) > 1, "a checkpoint")
        three.kill("input")
        three.kill("output")
        three.start("output")
        log = tmp_path / "again"
        assert start(*three.commands["input"], "--resume", log=log).wait(60) == 2
        line = log.read_text().splitlines()[-1]
        assert "is as drawn, but had made" in line and line.endswith(f"written: {UNDO}")


def test_a_new_run_on_used_partners_is_refused_and_says_what_to_restart(tmp_path, small_data):
    with Three(tmp_path, input=[*small_data, "--num-epochs", 5]) as three:
        three.start()
        assert three.wait_for_input(60) == 0, three.log("input")
        rows = len(three.metrics("seconds"))
        elsewhere = ["--resume", "--progress-dir", tmp_path / "other"]  # there is no checkpoint
        for n, extra in enumerate(([], elsewhere)):
            log = tmp_path / f"again{n}"
            assert start(*three.commands["input"], *extra, log=log).wait(60) == 2
            last = log.read_text().splitlines()[-1]
            assert last.count("updates)") == 2 and "restart what is named" in last
        assert len(three.metrics("seconds")) == rows
        assert start(*three.commands["input"], "--resume", log=tmp_path / "on").wait(60) == 0


def test_stopping_is_bounded_when_the_others_are_gone(tmp_path, small_data):
    with Three(tmp_path, input=[*small_data, "--num-epochs", 10**6]) as three:
        three.start()
        wait_until(lambda: three.updates() > 50, "training")
        three.kill("oracle")
        three.kill("output")
        assert end(three.processes["input"], timeout=30) == 0
        assert "without a last snapshot" in three.log("input")
        assert "Traceback" not in three.log("input")
        assert len(snapshots(three.progress)) == 1
        restored = make_layers([2, 24], np.random.default_rng(0))
        assert Checkpoint(three.progress).resume(restored)["updates"] > 50
