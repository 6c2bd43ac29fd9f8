"""What runs write: what is refused, what is kept, and what comes back."""
import contextlib
import errno
import json
import os
import signal

import numpy as np
import pytest

from plumbing import report, runs
from plumbing.errors import FileError, UserError
from sgd import make_layers
from tests.processes import start


def weights(dims, seed=0):
    return [(layer.w, layer.b) for layer in make_layers(dims, np.random.default_rng(seed))]


@contextlib.contextmanager
def full_disk(size):
    """Files cannot grow beyond `size` bytes, as on a disk with so much space left."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_snapshot_comes_back_whole_and_a_damaged_one_is_refused(tmp_path):
    written, probe = weights([2, 4, 1]), {"x": np.ones((3, 2), "f")}
    columns = ["seconds", "test_mse"]
    runs.Progress(tmp_path, columns, {}).write(written, probe, seconds=1.5, test_mse=0.25)
    path, = runs.snapshots(tmp_path)
    assert path.name == "snapshot_000000.npz"
    again, row, probed = runs.read_snapshot(path)
    assert row == {"seconds": 1.5, "test_mse": 0.25} and len(again) == 2
    assert list(probed) == ["x"] and (probed["x"] == 1).all()
    for mine, theirs in zip(written, again, strict=True):
        assert all((a == b).all() for a, b in zip(mine, theirs, strict=True))
    whole = path.read_bytes()
    header = whole.index(b"'shape': (")
    for damaged in (b"", whole[:len(whole) // 2], whole[:200] + b"\xff" * 40 + whole[240:],
                    whole[:header] + whole[header:].replace(b"(2, 4)", b"2, 4))", 1)):
        assert damaged != whole
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a whole file"):
            runs.read_snapshot(path)


def test_arrays_that_are_no_snapshot_are_refused(tmp_path):
    for arrays in ({"x": np.ones(3)}, {"w1": np.ones((1, 1)), "b1": np.ones(1), "x": np.ones(3)}):
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(ValueError, match="is not a snapshot"):
            runs.read_snapshot(tmp_path / "a.npz")


def test_earlier_runs_are_moved_aside_and_never_deleted(tmp_path, capsys):
    def run(value):
        progress = runs.Progress(tmp_path / "lr0.5", ["seconds"], {"seed": value})
        progress.write(weights([2, 1]), seconds=value)
        progress.end("finished")
        progress.locked.close()
    for value in (1, 2, 3):
        run(value)
    said = capsys.readouterr().err
    for folder in tmp_path.iterdir():
        value = int(runs.read_rows(folder)[0]["seconds"])
        assert [path.stem for path in runs.snapshots(folder)] == ["snapshot_000000"]
        assert runs.read_json(folder / "run.json") == {"seed": value, "ended": "finished"}
        assert value == 3 or f"moved to {folder}" in said
        assert (folder == tmp_path / "lr0.5") == (value == 3)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_folder_is_no_longer_locked_when_it_is_renamed(tmp_path, monkeypatch):
    """Windows renames no folder in which a file is open."""
    runs.Progress(tmp_path / "run", ["seconds"], {}).locked.close()
    opened, rename = [], runs.Path.rename
    lock = runs.lock

    def recording_lock(folder):
        opened.append(lock(folder))
        return opened[-1]

    def recording_rename(path, to):
        assert opened and all(file.closed for file in opened)
        return rename(path, to)
    monkeypatch.setattr(runs, "lock", recording_lock)
    monkeypatch.setattr(runs.Path, "rename", recording_rename)
    progress = runs.Progress(tmp_path / "run", ["seconds"], {})
    assert (tmp_path / "run.1").exists() and not progress.locked.closed


def test_a_resumed_run_continues_in_its_folder_and_leaves_a_trace(tmp_path):
    def run(resume, seconds):
        progress = runs.Progress(tmp_path, ["seconds"], {"seed": 3}, resume)
        progress.write(weights([2, 1]), seconds=seconds)
        progress.locked.close()
    run(False, 1)
    run(True, 2)
    run(True, 3)
    assert (tmp_path / "metrics.csv").read_text().split() == ["seconds", "1", "2", "3"]
    assert len(runs.snapshots(tmp_path)) == 3
    assert runs.read_json(tmp_path / "run.json") == {"seed": 3, "resumed": 2, "ended": None}


@pytest.mark.parametrize("columns, options", [
    (["seconds", "examples", "test_mse"], {"seed": 4}),
    (["seconds", "examples", "test_error"], {"seed": 4}), (["seconds"], {"seed": 4, "decay": 1})],
    ids=["other columns", "another score", "other options"])
def test_a_resumed_run_moves_another_kind_of_run_aside_and_says_so(
        columns, options, tmp_path, capsys):
    mine = ["seconds"] if columns == ["seconds"] else ["seconds", "test_mse"]
    other = runs.Progress(tmp_path / "run", columns, options)
    other.write(weights([2, 1]), **dict.fromkeys(columns, 1))
    other.locked.close()
    before = {path.name: path.read_bytes() for path in other.folder.iterdir()}
    progress = runs.Progress(tmp_path / "run", mine, {"seed": 3}, resume=True)
    assert progress.rows == [] and progress.count == 0
    aside = {path.name: path.read_bytes() for path in (tmp_path / "run.1").iterdir()}
    assert aside == before
    said = f"{tmp_path / 'run'} held another kind of run: moved to {tmp_path / 'run.1'}"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("emptied", ["metrics.csv", "run.json"])
def test_a_resumed_run_keeps_its_folder_where_a_power_cut_has_emptied_a_file(emptied, tmp_path):
    progress = runs.Progress(tmp_path / "run", ["seconds"], {"seed": 3})
    progress.write(weights([2, 1]), seconds=1)
    progress.locked.close()
    (tmp_path / "run" / emptied).write_bytes(b"")
    runs.Progress(tmp_path / "run", ["seconds"], {"seed": 3}, True).write(
        weights([2, 1]), seconds=2)
    assert not (tmp_path / "run.1").exists() and len(runs.snapshots(tmp_path / "run")) == 2
    rows = ["1"] * (emptied != "metrics.csv") + ["2"]
    assert (tmp_path / "run" / "metrics.csv").read_text().split() == ["seconds", *rows]


def test_a_folder_that_holds_no_run_is_never_touched(tmp_path):
    (tmp_path / "metrics.csv").write_text("somebody else's")
    for resume in (False, True):
        with pytest.raises(ValueError, match="something other than a run"):
            runs.Progress(tmp_path, ["seconds"], {}, resume)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_folder_in_which_a_start_failed_on_a_full_disk_is_taken(tmp_path):
    for name in ("lock", "run.json.tmp"):
        (tmp_path / name).touch()
    runs.Progress(tmp_path, ["seconds"], {}).write(weights([2, 1]), seconds=1)
    assert len(runs.snapshots(tmp_path)) == 1


def test_a_folder_belongs_to_one_writer(tmp_path):
    progress = runs.Progress(tmp_path / "run", ["seconds"], {})
    for resume in (False, True):
        with pytest.raises(ValueError, match="another process is writing to"):
            runs.Progress(tmp_path / "run", ["seconds"], {}, resume)
    progress.write(weights([2, 1]), seconds=1)
    assert (tmp_path / "run" / "metrics.csv").read_text().split() == ["seconds", "1"]
    assert not (tmp_path / "run.1").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_the_file_system_knows_no_locks_a_run_warns_and_goes_on(
        number, tmp_path, monkeypatch, capsys):
    flock_that_fails(monkeypatch, number)
    runs.Progress(tmp_path / "run", ["seconds"], {}).write(weights([2, 1]), seconds=1)
    assert f"warning: {tmp_path / 'run'} cannot be locked" in capsys.readouterr().err
    assert len(runs.snapshots(tmp_path / "run")) == 1


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES])
def test_a_lock_that_is_refused_means_another_writer(number, tmp_path, monkeypatch):
    flock_that_fails(monkeypatch, number)
    with pytest.raises(UserError, match="another process is writing to"):
        runs.lock(tmp_path)


def flock_that_fails(monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", flock)


@pytest.mark.processes
def test_two_processes_cannot_write_to_one_folder(tmp_path, small_data):
    progress = runs.Progress(tmp_path / "run", ["seconds"], {})
    process = start("sgd.py", *small_data, "--num-epochs", 1, "--progress-dir", tmp_path / "run",
                    log=tmp_path / "log")
    assert process.wait(60) == 2
    assert "another process is writing to" in (tmp_path / "log").read_text()
    progress.write(weights([2, 1]), seconds=1)


def test_torn_rows_are_left_out_when_read_and_when_a_run_continues(tmp_path):
    columns = ["seconds", "test_mse"]
    progress = runs.Progress(tmp_path, columns, {})
    progress.write(weights([2, 1]), seconds=1, test_mse=0.5)
    progress.locked.close()
    whole = (tmp_path / "metrics.csv").read_text()
    for torn in ("2", "2,0.4", "2,0.4,3,0.3"):
        (tmp_path / "metrics.csv").write_text(whole + torn)
        assert runs.read_metrics(tmp_path)["seconds"].tolist() == [1]
    progress = runs.Progress(tmp_path, columns, {}, resume=True)
    progress.write(weights([2, 1]), seconds=3, test_mse=0.3)
    assert (tmp_path / "metrics.csv").read_text() == whole + "3,0.3\n"


def test_a_row_is_appended_and_nothing_is_rewritten(tmp_path, monkeypatch):
    progress = runs.Progress(tmp_path, ["seconds"], {})
    file_number = progress.metrics.stat().st_ino
    replaced, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (replaced.append(paths[1]), replace(*paths)))
    for seconds in range(3):
        before = progress.metrics.read_text()
        progress.write(weights([2, 1]), seconds=seconds)
        assert progress.metrics.read_text() == f"{before}{seconds}\n"
    assert progress.metrics.stat().st_ino == file_number
    assert [path.name[:8] for path in replaced] == ["snapshot"] * 3


def test_a_row_that_the_disk_had_no_space_for_is_written_later_and_once(tmp_path, monkeypatch):
    progress = runs.Progress(tmp_path, ["seconds", "examples"], {})
    before = progress.metrics.read_text()
    monkeypatch.setattr(runs.np, "savez", lambda *_, **__: None)  # the snapshots fit
    with full_disk(len(before) + 2):
        for seconds in (1, 2, 2, 2):  # at its end a run tries again
            with pytest.raises(FileError):
                progress.write([], seconds=seconds, examples=1000 * seconds)
            assert runs.read_rows(tmp_path) == []
    progress.write([], seconds=3, examples=3000)
    assert progress.metrics.read_text() == before + "1,1000\n2,2000\n3,3000\n"
    assert [row["seconds"] for row in progress.rows] == [1, 2, 3] and progress.count == 3


def test_of_a_long_run_some_snapshots_are_kept_evenly_spread(tmp_path, monkeypatch):
    monkeypatch.setattr(runs.Progress, "KEPT", 8)
    progress = runs.Progress(tmp_path, ["seconds"], {})

    def numbers():
        return [runs.number_of(path) for path in runs.snapshots(tmp_path)]
    for n in range(75):
        if n == 40:
            progress.locked.close()
            progress = runs.Progress(tmp_path, ["seconds"], {}, resume=True)
        progress.write(weights([2, 1]), seconds=n)
        kept = numbers()
        assert kept[0] == 0 and kept[-1] == n and n - 1 in [-1, *kept] and len(kept) <= 8 + 2
        spread = [number for number in kept if number < n - 1]
        assert len(set(np.diff(spread))) <= 1 and (n < 8 or len(spread) >= 3)
    assert kept == [0, 16, 32, 48, 64, 73, 74] and len(runs.read_rows(tmp_path)) == 75


def test_snapshots_are_in_the_order_of_their_numbers_and_copies_are_none(tmp_path):
    for name in ("snapshot_1000000", "snapshot_999999", "snapshot_000001 (copy)", "snapshot_best"):
        (tmp_path / f"{name}.npz").touch()
    assert [path.stem for path in runs.snapshots(tmp_path)] == [
        "snapshot_999999", "snapshot_1000000"]


def test_with_a_full_disk_nothing_is_torn_and_no_row_is_lost_when_there_is_space_again(tmp_path):
    progress = runs.Progress(tmp_path, ["seconds", "examples"], {})
    progress.write(weights([2, 1]), seconds=1, examples=1)
    before = (tmp_path / "metrics.csv").read_text()
    for size in (0, 10, 300):
        with full_disk(size), pytest.raises(OSError):
            progress.write(weights([2, 1]), seconds=2, examples=2)
        assert (tmp_path / "metrics.csv").read_text() == before
        assert len(runs.snapshots(tmp_path)) == 1
    progress.write(weights([2, 1]), seconds=3, examples=3)
    assert (tmp_path / "metrics.csv").read_text() == before + "3,3\n"
    for path in runs.snapshots(tmp_path):
        runs.read_snapshot(path)


def test_what_cannot_be_moved_aside_is_one_clear_error(tmp_path, monkeypatch):
    """Such as a folder that a Docker volume is mounted on."""
    def busy(*_):
        raise OSError(errno.EBUSY, "Device or resource busy")
    runs.Progress(tmp_path / "run", ["seconds"], {}).locked.close()
    checkpoint = runs.Checkpoint(tmp_path)
    checkpoint.save([])
    monkeypatch.setattr(type(tmp_path), "rename", busy)
    for move in (lambda: runs.Progress(tmp_path / "run", ["seconds"], {}), checkpoint.put_aside):
        with pytest.raises(FileError, match="resource busy"):
            move()


def test_a_number_in_a_folders_name_stays_when_it_is_put_aside(tmp_path, monkeypatch):
    for aside in "rate0.3.1", "rate0.3.2":
        runs.Progress(tmp_path / "rate0.3", ["seconds"], {}).locked.close()
        assert runs.put_aside(tmp_path / "rate0.3") == tmp_path / aside
    monkeypatch.chdir(tmp_path / "rate0.3.1")
    with pytest.raises(UserError, match="cannot be renamed; --progress-dir chooses"):
        runs.Progress(".", ["seconds"], {})


def test_how_a_run_ended_is_in_run_json(tmp_path):
    for error, how in ((None, "finished"), (KeyboardInterrupt(), "stopped"),
                       (FloatingPointError("diverged"), "stopped: diverged")):
        progress = runs.Progress(tmp_path / how[-4:], ["test_mse"], {})
        with contextlib.suppress(KeyboardInterrupt, FloatingPointError), progress.ending():
            assert runs.read_json(progress.folder / "run.json")["ended"] is None
            if error:
                raise error
        assert runs.read_json(progress.folder / "run.json")["ended"] == how


def test_a_full_disk_does_not_hide_why_a_run_ended(tmp_path):
    progress = runs.Progress(tmp_path, ["test_mse"], {})
    with pytest.raises(FloatingPointError), full_disk(0), progress.ending():
        raise FloatingPointError("diverged")
    assert runs.read_json(tmp_path / "run.json") == {"ended": None}


@pytest.mark.parametrize("scores, guess, began, warned", [
    ([0.9, 0.3], 0.5, 0, None), ([0.3, 0.5], 0.9, 0, "0.3000 that it began with"),
    ([0.9, 0.51], 0.5, 0, "0.5000 that a constant guess has"),
    ([0.9, 0.9], np.inf, 0, "it began with"), ([0.02, 0.02], 0.02, 0, "a constant guess has"),
    ([0.3], 0.5, 3800, None), ([0.51], 0.5, 3800, "a constant guess has")])  # sgd.py, one epoch
def test_a_run_that_has_learned_nothing_says_so_in_one_line(scores, guess, began, warned, tmp_path):
    progress = runs.Progress(tmp_path, ["examples", "test_mse"], {"constant_guess": guess})
    for n, score in enumerate(scores):
        progress.write(weights([2, 1]), examples=began + 3800 * n, test_mse=score)
    lines = progress.verdict()
    assert len(lines) == (warned is not None)
    assert not lines or warned in lines[0] and "try a lower --learning-rate" in lines[0]


def test_a_checkpoint_holds_weights_and_velocities_and_must_fit(tmp_path):
    layers, others = (make_layers([3, 4, 1], np.random.default_rng(seed)) for seed in (0, 1))
    for layer in layers:
        layer.w_velocity += 1.5
        layer.b_velocity -= 2.5
    checkpoint = runs.Checkpoint(tmp_path)
    assert checkpoint.resume(layers) == {}
    checkpoint.save(layers, updates=7, loss=0.5)
    assert checkpoint.resume(others) == {"updates": 7, "loss": 0.5}
    for mine, theirs in zip(layers, others, strict=True):
        for part in runs.Checkpoint.PARTS:
            np.testing.assert_array_equal(getattr(mine, part), getattr(theirs, part))
    for dims in ([3, 5, 1], [3, 4], [3, 4, 1, 1]):
        with pytest.raises(ValueError, match="other --layers"):
            checkpoint.resume(make_layers(dims, np.random.default_rng(0)))
    layers[0].w[0] = np.inf
    with pytest.raises(FloatingPointError, match="diverged"):
        checkpoint.save(layers, updates=8)
    assert checkpoint.resume(others)["updates"] == 7
    checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a whole file"):
        checkpoint.resume(layers)


@pytest.mark.parametrize("name", ["seed", "held_out", "data"])
def test_a_checkpoint_of_another_run_is_one_clear_error_and_changes_no_layer(name, tmp_path):
    layers = make_layers([3, 1], np.random.default_rng(0))
    same, checkpoint = {"seed": 0, "held_out": 200, "data": 12345}, runs.Checkpoint(tmp_path)
    checkpoint.save(make_layers([3, 1], np.random.default_rng(1)), **same, updates=7)
    before = layers[0].w.copy()
    with pytest.raises(ValueError, match=f"is of a run that differs in {name}; give the same"):
        checkpoint.resume(layers, **{**same, name: 1})
    assert (layers[0].w == before).all()
    assert checkpoint.resume(layers, **same) == {"updates": 7}


def test_checkpoints_that_were_moved_aside_are_never_overwritten(tmp_path, capsys):
    checkpoint, layers = runs.Checkpoint(tmp_path), make_layers([3, 1], np.random.default_rng(0))
    for updates in (1, 2, 3):
        checkpoint.save(layers, updates=updates)
        checkpoint.put_aside()
        checkpoint.put_aside()  # a second start by mistake: nothing is there to move
    assert not checkpoint.path.exists() and capsys.readouterr().err.count("moved to") == 3
    kept = {runs.load(path)["updates"].item() for path in tmp_path.glob("checkpoint.*.npz")}
    assert kept == {1, 2, 3}


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path):
    checkpoint, layers = runs.Checkpoint(tmp_path), make_layers([3, 4], np.random.default_rng(0))
    checkpoint.save(layers, updates=1)
    with full_disk(200), pytest.raises(OSError):
        checkpoint.save(layers, updates=2)
    assert checkpoint.resume(layers) == {"updates": 1}


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("module, name", [(np, "savez"), (os, "fsync"), (os, "replace")])
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
        module, name, tmp_path, monkeypatch):
    checkpoint, layers = runs.Checkpoint(tmp_path), make_layers([3, 4], np.random.default_rng(0))
    checkpoint.save(layers, updates=1)
    with monkeypatch.context() as failing:
        failing.setattr(module, name, no_space)
        with pytest.raises(FileError, match="No space left"):
            checkpoint.save(layers, updates=2)
    assert checkpoint.resume(layers) == {"updates": 1}
    checkpoint.save(layers, updates=3)
    assert checkpoint.resume(layers) == {"updates": 3}


def test_a_checkpoint_is_on_the_disk_before_it_replaces_the_one_before(tmp_path, monkeypatch):
    checkpoint, layers, calls = runs.Checkpoint(tmp_path), make_layers(
        [3, 4], np.random.default_rng(0)), []
    replace, fsync = os.replace, os.fsync

    def recording_fsync(file):
        calls.append((os.fstat(file).st_ino, os.fstat(file).st_size))
        fsync(file)

    def recording_replace(path, to):
        calls.append("replace")
        replace(path, to)
    monkeypatch.setattr(os, "replace", recording_replace)
    monkeypatch.setattr(os, "fsync", recording_fsync)
    checkpoint.save(layers, updates=1)
    written = checkpoint.path.stat()
    assert calls[:2] == [(written.st_ino, written.st_size), "replace"]
    assert os.name == "nt" or [number for number, _ in calls[2:]] == [tmp_path.stat().st_ino]


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path, monkeypatch):
    checkpoint, layers = runs.Checkpoint(tmp_path), make_layers([3, 4], np.random.default_rng(0))
    monkeypatch.setattr(os, "open", no_space)  # as Windows refuses to open a folder
    checkpoint.save(layers, updates=1)
    assert checkpoint.resume(layers) == {"updates": 1}


@pytest.mark.parametrize("share", [0, 0.5])
def test_a_torn_checkpoint_is_one_line_with_the_file_and_the_cure(share, tmp_path):
    checkpoint, layers = runs.Checkpoint(tmp_path), make_layers([3, 4], np.random.default_rng(0))
    for updates in (1, 2):
        checkpoint.save(layers, updates=updates)
        checkpoint.put_aside()
    checkpoint.save(layers, updates=3)
    whole, (first, second) = checkpoint.path.read_bytes(), sorted(tmp_path.glob("*.[12].npz"))
    checkpoint.path.write_bytes(whole[:int(share * len(whole))])
    os.utime(first, (1, 1))
    with pytest.raises(UserError, match="--resume: .* is not a whole file") as error:
        checkpoint.resume(layers)
    assert str(checkpoint.path) in str(error.value) and "\n" not in str(error.value)
    assert f"delete it to start afresh, or rename {second} to checkpoint.npz" in str(error.value)
    first.unlink()
    second.unlink()
    with pytest.raises(UserError, match="delete it to start afresh$"):
        checkpoint.resume(layers)


def test_json_that_is_missing_or_damaged_is_empty(tmp_path):
    path = tmp_path / "run.json"
    assert runs.read_json(path) == {}
    for text in ("", "{", "[1]", json.dumps("x")):
        path.write_text(text)
        assert runs.read_json(path) == {}
    os.remove(path)


def test_the_summary_says_what_came_out_how_it_compares_and_what_to_try_next(tmp_path):
    progress = runs.Progress(tmp_path, ["seconds", "examples", "epoch", "test_mse"],
                             {"gradients": "synthetic", "constant_guess": 0.16})
    for epoch, mse in enumerate([0.2, 0.03, 0.01, 0.005, 0.006, 0.008]):
        progress.write(weights([2, 4, 1]), seconds=10.0 * epoch, examples=190_000 * epoch,
                       epoch=float(epoch), test_mse=mse)
    first, compared, following = report.summary(tmp_path, usual=True)
    assert first == ("synthetic gradients: held-out mse 0.0060 after 5 epochs and 50 s; a constant "
                     "guess has 0.1600")
    assert f"the README has {report.README_MSE:.4f} after {report.README_EPOCHS} epochs" in compared
    assert compared.endswith("this run had 0.0060")
    assert '--gradients true --progress-dir true"' in following and "delayed, local" in following
    assert report.summary(tmp_path, usual=False) == [first, following]
    assert report.at(progress.rows, 2) == "0.0300", "the median of the rows until then"
    assert report.at(progress.rows, 9) == "not come so far"
