"""kill -9 of anything at any time: the same command with --resume is enough, and nobody else has
to be restarted."""
import numpy as np
import pytest

from plumbing.runs import Checkpoint, snapshots
from sgd import make_layers
from tests.processes import Three, end, start, wait_until

pytestmark = pytest.mark.processes
UPDATES = 20 * 38  # of 20 epochs of 3,800 examples


@pytest.mark.parametrize("victim", ["oracle", "output", "input"])
def test_a_restart_at_any_stage_ends_in_a_finished_run(victim, tmp_path, small_data):
    three = Three(tmp_path, output=["--resume", "--checkpoint-seconds", 0.5], input=[
        *small_data, "--num-epochs", 20, "--resume", "--staleness", 300, "--learning-rate", 0.3,
        "--snapshot-seconds", 1])
    three.commands["input"] += ["--output-server", f"127.0.0.1:{three.to_output.port}"]

    def restart():
        three.kill(victim)
        three.start(victim)

    def waits():
        return three.log("input").count("waiting for the ")
    with three:
        three.start(victim)  # killed as soon as it is there, before the others are started
        wait_until(lambda: three.status(victim), f"the {victim} process to answer")
        three.start(*(name for name in three.commands if name != victim))
        restart()
        wait_until(lambda: three.updates() > 100, "training")
        before, three.to_output.cut = waits(), True
        wait_until(lambda: waits() > before, "layer 1 to wait")
        restart()
        three.to_output.cut = False
        wait_until(lambda: UPDATES > three.updates() > UPDATES - 250, "the run to come near its "
                   "end", timeout=120, pause=0.01)
        before, three.to_output.cut = waits(), True  # no last snapshot, nor the one before
        wait_until(lambda: waits() > before, "it to wait for weights or for the oracle")
        restart()
        three.to_output.cut = False
        assert three.wait_for_input(60) == 0, three.log("input")
    assert not any("Traceback" in three.log(name) for name in three.commands)
    assert three.metrics("updates")[-1] == UPDATES
    assert np.isfinite(three.metrics("test_mse")).all()
    assert (np.diff(three.metrics("examples")) >= 0).all() or victim == "input"


def test_the_output_trainer_continues_from_its_own_checkpoint(tmp_path, small_data):
    with Three(tmp_path, output=["--checkpoint-seconds", 0.2],
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
        assert status["loss"] == pytest.approx(kept["loss"])


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
