"""kill -9 of anything at any time: the same command with --resume is enough, and nobody else has to be restarted."""
import numpy as np
import pytest

from plumbing.runs import Checkpoint, snapshots
from sgd import make_layers
from tests.processes import Three, end, start, wait_until

UPDATES = 30 * 38  # of 30 epochs of 3,800 examples


@pytest.mark.parametrize("victim", ["oracle", "output", "input"])
def test_a_restart_at_any_stage_ends_in_a_finished_run(victim, tmp_path, small_data):
    three = Three(tmp_path, output=["--resume", "--checkpoint-seconds", 0.5], input=[
        *small_data, "--num-epochs", 30, "--resume", "--staleness", 300, "--learning-rate", 0.3, "--snapshot-seconds", 1])
    three.commands["input"] += ["--output-server", f"127.0.0.1:{three.to_output.port}"]

    def restart():
        three.kill(victim)
        three.start(victim)

    def updates():
        return (three.status("input") or {}).get("updates", 0)
    with three:
        three.start(victim)  # before the first message: killed as soon as it is there, the others not even started
        wait_until(lambda: three.status(victim), f"the {victim} process to answer")
        three.start(*(name for name in three.commands if name != victim))
        restart()
        wait_until(lambda: updates() > 100, "training")
        three.to_output.cut = True
        wait_until(lambda: "waiting for the o" in three.log("input"), "layer 1 to wait")
        restart()
        three.to_output.cut = False
        wait_until(lambda: UPDATES > updates() > UPDATES - 250, "the run to come near its end", pause=0.01)
        waited = three.log("input").count("waiting for the o")
        three.to_output.cut = True  # so that it cannot take its last snapshot, or the one before
        wait_until(lambda: three.log("input").count("waiting for the o") > waited, "it to wait, for weights or, if it is that far ahead, for the oracle")
        restart()
        three.to_output.cut = False
        assert three.wait_for_input(60) == 0, three.log("input")
    assert not any("Traceback" in three.log(name) for name in three.commands)
    assert three.metrics("updates")[-1] == UPDATES and np.isfinite(three.metrics("test_mse")).all()
    assert (np.diff(three.metrics("examples")) >= 0).all() or victim == "input"


def test_the_output_trainer_goes_on_from_its_own_checkpoint(tmp_path, small_data):
    with Three(tmp_path, output=["--checkpoint-seconds", 0.2], input=[*small_data, "--num-epochs", 10**6]) as three:
        three.start()
        wait_until(lambda: (three.status("output") or {}).get("updates", 0) > 2000, "some training")
        three.kill("output")
        three.kill("input")
        kept = Checkpoint(three.folder / "output_progress").start(make_layers([24, 12, 1], np.random.default_rng(0)), resume=True)
        three.start("output", extra=["--resume"])
        status = wait_until(lambda: three.status("output"), "the output trainer")
        assert status["updates"] == kept["updates"] > 1000 and status["loss"] == pytest.approx(kept["loss"])
        for _ in range(2):  # started without --resume by mistake, and stopped again: nothing is lost
            assert end(three.processes["output"]) == 0
            three.start("output")
            wait_until(lambda: three.status("output"), "the output trainer")
        assert end(three.processes["output"]) == 0
    checkpoints = three.folder / "output_progress"
    assert not (checkpoints / "checkpoint.npz").exists() and (checkpoints / "checkpoint.old.npz").exists()


def test_a_checkpoint_holds_weights_and_velocities_and_must_fit(tmp_path):
    layers, others = (make_layers([3, 4, 1], np.random.default_rng(seed)) for seed in (0, 1))
    for layer in layers:
        layer.w_velocity += 1.5
        layer.b_velocity -= 2.5
    assert Checkpoint(tmp_path).start(layers, resume=True) == {}
    Checkpoint(tmp_path).save(layers, updates=7, loss=0.5)
    assert Checkpoint(tmp_path).start(others, resume=True) == {"updates": 7, "loss": 0.5}
    for mine, theirs in zip(layers, others):
        for part in ("w", "b", "w_velocity", "b_velocity"):
            np.testing.assert_array_equal(getattr(mine, part), getattr(theirs, part))
    for dims in ([3, 5, 1], [3, 4], [3, 4, 1, 1]):
        with pytest.raises(ValueError, match="other --layers"):
            Checkpoint(tmp_path).start(make_layers(dims, np.random.default_rng(0)), resume=True)
    assert Checkpoint(tmp_path).start(layers, resume=False) == {} and (tmp_path / "checkpoint.old.npz").exists()
    Checkpoint(tmp_path).save(layers, updates=8)
    whole = Checkpoint(tmp_path).path.read_bytes()
    Checkpoint(tmp_path).path.write_bytes(whole[:100])
    with pytest.raises(ValueError, match="not a whole file"):
        Checkpoint(tmp_path).start(layers, resume=True)


def test_a_new_run_on_used_partners_is_refused_and_says_what_to_restart(tmp_path, small_data):
    with Three(tmp_path, input=[*small_data, "--num-epochs", 20]) as three:
        three.start()
        assert three.wait_for_input(60) == 0, three.log("input")
        rows = len(three.metrics("seconds"))
        again = start(*three.commands["input"], log=tmp_path / "again")
        assert again.wait(60) == 2
        last = (tmp_path / "again").read_text().splitlines()[-1]
        assert "train_output.py (at" in last and "oracle.py (at" in last and "restart" in last
        assert len(three.metrics("seconds")) == rows
        assert start(*three.commands["input"], "--resume", log=tmp_path / "on").wait(60) == 0


def test_stopping_is_bounded_when_the_others_are_gone(tmp_path, small_data):
    with Three(tmp_path, input=[*small_data, "--num-epochs", 10**6]) as three:
        three.start()
        wait_until(lambda: (three.status("input") or {}).get("updates", 0) > 50, "training")
        three.kill("oracle")
        three.kill("output")
        assert end(three.processes["input"], timeout=30) == 0
        assert "without a last snapshot" in three.log("input") and "Traceback" not in three.log("input")
        assert len(snapshots(three.progress)) == 1
        restored = make_layers([2, 24], np.random.default_rng(0))
        assert Checkpoint(three.progress).start(restored, resume=True)["updates"] > 50
