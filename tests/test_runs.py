"""Data in; metrics and snapshots out: what is refused, what is kept, and what comes back."""
import json

import numpy as np
import pytest

from plumbing import runs
from sgd import make_layers
from tests.processes import start


def weights(dims, seed=0):
    return [(layer.w, layer.b) for layer in make_layers(dims, np.random.default_rng(seed))]


def test_snapshot_comes_back_whole_and_a_damaged_one_is_refused(tmp_path):
    written = weights([2, 4, 1])
    runs.Progress(tmp_path, ["seconds", "test_mse"], {}).write(written, seconds=1.5, test_mse=0.25)
    path, = runs.snapshots(tmp_path)
    assert path.name == "snapshot_000000.npz"
    again, row = runs.read_snapshot(path)
    assert row == {"seconds": 1.5, "test_mse": 0.25} and len(again) == 2
    for mine, theirs in zip(written, again):
        assert all((a == b).all() for a, b in zip(mine, theirs))
    whole = path.read_bytes()
    for damaged in (b"", whole[:len(whole) // 2], whole[:200] + b"\xff" * 40 + whole[240:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a whole file"):
            runs.read_snapshot(path)


def test_earlier_runs_are_moved_aside_and_never_deleted(tmp_path, capsys):
    def run(value):
        progress = runs.Progress(tmp_path / "run", ["seconds"], {"seed": value})
        progress.write(weights([2, 1]), seconds=value)
        progress.end("finished")
    for value in (1, 2, 3):
        run(value)
    for name, value in (("run", "3"), ("run.1", "1"), ("run.2", "2")):
        assert (tmp_path / name / "metrics.csv").read_text().split() == ["seconds", value]
        assert [path.stem for path in runs.snapshots(tmp_path / name)] == ["snapshot_000000"]
        assert json.loads((tmp_path / name / "run.json").read_text()) == {"seed": int(value), "ended": "finished"}
    assert f"{tmp_path / 'run'} held an earlier run: moved to {tmp_path / 'run.2'}" in capsys.readouterr().err


def test_a_resumed_run_goes_on_in_its_folder(tmp_path):
    runs.Progress(tmp_path, ["seconds"], {}).write(weights([2, 1]), seconds=1)
    runs.Progress(tmp_path, ["seconds"], {}, resume=True).write(weights([2, 1]), seconds=2)
    assert (tmp_path / "metrics.csv").read_text().split() == ["seconds", "1", "2"] and len(runs.snapshots(tmp_path)) == 2


def test_a_folder_that_holds_no_run_is_never_touched(tmp_path):
    (tmp_path / "metrics.csv").write_text("somebody else's")
    with pytest.raises(ValueError, match="something other than a run"):
        runs.Progress(tmp_path, ["seconds"], {})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_two_processes_cannot_write_to_one_folder(tmp_path, small_data):
    run = tmp_path / "run"
    progress = runs.Progress(run, ["seconds"], {})
    process = start("sgd.py", *small_data, "--num-epochs", 1, "--progress-dir", run, log=tmp_path / "log")
    assert process.wait(60) == 2 and "another process is writing to" in (tmp_path / "log").read_text()
    progress.write(weights([2, 1]), seconds=1)
    assert (run / "metrics.csv").read_text().split() == ["seconds", "1"] and not (tmp_path / "run.1").exists()


def save(folder, x, y):
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", y)
    return folder / "x.npy", folder / "y.npy"


def test_the_last_examples_are_held_out(tmp_path):
    paths = save(tmp_path, np.arange(80.0).reshape(40, 2), np.arange(40.0))
    for held_out, expected in ((None, 2), (7, 7)):
        x, y, x_test, y_test = runs.load_data(*paths, held_out)
        assert y.shape == (40 - expected, 1) and list(y_test[:, 0]) == list(range(40 - expected, 40))
        np.testing.assert_array_equal(np.concatenate([x, x_test])[:, 0], np.arange(0, 80, 2))


def test_integers_are_classes_and_become_one_hot(tmp_path):
    labels = np.arange(40) % 3
    _, y, _, y_test = runs.load_data(*save(tmp_path, np.zeros((40, 2)), labels))
    y = np.concatenate([y, y_test])
    assert y.shape == (40, 3) and (y.argmax(axis=1) == labels).all() and (y.sum(axis=1) == 1).all()


@pytest.mark.parametrize("script", ["sgd.py", "train_input.py"])
@pytest.mark.parametrize("x, y, options, message", [
    (None, None, (), "generate.py"),
    (b"not numpy", np.zeros(50), (), "expected a NumPy .npy file"),
    (np.zeros((50, 2)), np.zeros(49), (), "expected (n, columns) and (n,)"),
    (np.full((50, 2), np.nan), np.zeros(50), (), "NaN, infinity"),
    (np.zeros((50, 2)), np.full(50, 2e6), (), "numbers beyond a million"),
    (np.zeros((50, 2)), np.zeros(50), ("--held-out", 50), "--held-out must be from 1 to 49"),
    (np.zeros((50, 2)), np.arange(50) % 4 + 1, (), "expected 0 … k − 1, each at least once"),
    (np.zeros((50, 2)), np.zeros(50, int), (), "expected 0 … k − 1, each at least once")])
def test_bad_data_is_one_line_and_exit_code_2(script, x, y, options, message, tmp_path):
    for name, content in (("x.npy", x), ("y.npy", y)):
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        elif content is not None:
            np.save(tmp_path / name, content)
    process = start(script, tmp_path / "x.npy", tmp_path / "y.npy", *options, "--progress-dir", tmp_path / "run",
                    log=tmp_path / "log")
    assert process.wait(60) == 2
    assert message in (tmp_path / "log").read_text().splitlines()[-1] and "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize("bad", [np.array([{}] * 50), np.array(["a"] * 50), np.zeros(50, complex)])
def test_what_is_not_numbers_is_refused(bad, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((50, 2)))
    np.save(tmp_path / "y.npy", bad, allow_pickle=True)
    with pytest.raises(ValueError, match="y.npy: expected a NumPy .npy file that holds an array of numbers"):
        runs.load_data(tmp_path / "x.npy", tmp_path / "y.npy")


@pytest.mark.parametrize("columns, labels, dims, message", [
    (3, False, [2, 4, 1], "begins with 2, but x has 3 columns"),
    (2, False, [2, 4, 10], "ends with 10, but y holds numbers: it must end with 1"),
    (2, True, [2, 4, 1], "ends with 1, but y holds labels of 5 classes"),
    (2, True, [2, 4, 4], "ends with 4, but y holds labels of 5 classes")])
def test_a_network_that_does_not_fit_the_data_is_one_line(columns, labels, dims, message, tmp_path):
    paths = save(tmp_path, np.zeros((50, columns)), np.arange(50) % 5 if labels else np.arange(50.0))
    process = start("sgd.py", *paths, "--layers", *dims, "--progress-dir", tmp_path / "run", log=tmp_path / "log")
    assert process.wait(60) == 2 and message in (tmp_path / "log").read_text().splitlines()[-1]
