"""Data in; metrics, snapshots and checkpoints out. Of arrays; what a layer is, this file does not know."""
import contextlib
import csv
import json
import os
import sys
import zipfile
from pathlib import Path

import numpy as np


def add_data_options(parser):
    """x, y and --held-out, which sgd.py and train_input.py take alike."""
    parser.add_argument("x", metavar="x.npy", help="inputs, (n, columns)")
    parser.add_argument("y", metavar="y.npy", help="targets, (n,): numbers, or integers 0 … k − 1 that name classes")
    parser.add_argument("--held-out", type=int, metavar="COUNT",
                        help="examples at the end of the files that are for testing only (5%% of them)")


def load_data(x_path, y_path, held_out=None):
    """Returns x (n, dim), y (n, k), x_test and y_test, float32; the last `held_out` examples are the test's.

    Numbers in y.npy make k = 1; integers are class labels, which become one-hot, k = the number of classes.
    Raises ValueError or OSError, saying what was wrong and what was expected.
    """
    arrays = []
    for path in (x_path, y_path):
        try:
            arrays.append(np.load(path, allow_pickle=False))
            if arrays[-1].dtype.kind not in "fiub":
                raise TypeError
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} not found: `python generate.py` makes x.npy and y.npy") from None
        except (ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile):
            raise ValueError(f"{path}: expected a NumPy .npy file that holds an array of numbers") from None
        if not (np.abs(arrays[-1]) <= 1e6).all():  # as synthgrad.MAX_MAGNITUDE; NaN is not, either
            raise ValueError(f"{path}: holds NaN, infinity or numbers beyond a million; expected smaller ones, near 1 at best")
    x, y = arrays
    if x.ndim != 2 or y.shape != x.shape[:1] or len(x) < 20:
        raise ValueError(f"{x_path} has shape {x.shape} and {y_path} {y.shape}; "
                         "expected (n, columns) and (n,) with the same n, at least 20")
    held_out = len(x) // 20 if held_out is None else held_out
    if not 0 < held_out < len(x):
        raise ValueError(f"--held-out must be from 1 to {len(x) - 1}, for {x_path} holds {len(x)} examples")
    if y.dtype.kind == "f":
        y = y[:, None]
    else:
        classes = np.unique(y)
        if len(classes) < 2 or not np.array_equal(classes, np.arange(len(classes))):
            raise ValueError(f"{y_path} holds integers, so class labels: expected 0 … k − 1, each at least once and "
                             f"k at least 2; got {len(classes)} different ones from {classes[0]} to {classes[-1]}")
        y = y[:, None] == classes
    split = len(x) - held_out
    x, y = x.astype(np.float32), y.astype(np.float32)
    return x[:split], y[:split], x[split:], y[split:]


def check_widths(x, y, first, last, who):
    """ValueError unless a network from `first` to `last` fits x and y; `who` names what says so."""
    if first != x.shape[1]:
        raise ValueError(f"{who} begins with {first}, but x has {x.shape[1]} columns")
    if last != y.shape[1]:
        meaning = "numbers: it must end with 1" if y.shape[1] == 1 else f"labels of {y.shape[1]} classes: it must end with that"
        raise ValueError(f"{who} ends with {last}, but y holds {meaning}")


def score_name(y):
    return "test_mse" if y.shape[1] == 1 else "test_error"


def save(path, **arrays):
    """An .npz file that appears whole or not at all."""
    with open(f"{path}.tmp", "wb") as file:
        np.savez(file, **arrays)
    os.replace(file.name, path)


def load(path):
    """The arrays of an .npz file; ValueError if it is not a whole one."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"{path} is not a whole file of arrays ({error})") from None


def lock(folder):
    """Claims a folder for as long as what this returns is kept, at most until this process ends, however it ends.

    ValueError if another process is writing to it (noticed where there is fcntl: not on Windows).
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = open(Path(folder) / "lock", "a")
    with contextlib.suppress(ImportError):
        import fcntl
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another process is writing to {folder}; --progress-dir chooses another folder") from None
    return file


class Progress:
    """Writes metrics.csv, a row per snapshot, snapshot_000042.npz, the whole network, and run.json into one folder.

    An earlier run in the folder is moved to FOLDER.1, or the next number that is free, unless `resume` is given: then
    rows are appended to it. ValueError if the folder holds anything else, or if another process is writing to it.
    """

    def __init__(self, folder, columns, options, resume=False):
        self.folder, self.columns, self.options = Path(folder), columns, options
        if self.folder.is_dir() and any(self.folder.iterdir()):
            if not (self.folder / "run.json").exists():
                raise ValueError(f"{folder} holds something other than a run; --progress-dir chooses another folder")
            self.locked = lock(self.folder)
            if not resume:
                n = 1
                while (aside := self.folder.with_name(f"{self.folder.name}.{n}")).exists():
                    n += 1
                self.folder.rename(aside)
                print(f"{folder} held an earlier run: moved to {aside}", file=sys.stderr)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.end(None)  # first, for a folder without run.json is nobody's run: one that was killed here is
        self.locked = None  # frees the folder, if it is still the same one
        self.locked = lock(self.folder)
        self.metrics = self.folder / "metrics.csv"
        self.count = 1 + max((int(path.stem[9:]) for path in snapshots(folder)), default=-1)
        if not self.metrics.exists():
            self.metrics.write_text(",".join(columns) + "\n")

    def write(self, weights, **row):
        """One row and one snapshot: weights [(w, b), ...] and numbers by column."""
        arrays = {f"{name}{n}": array for n, pair in enumerate(weights, 1) for name, array in zip("wb", pair)}
        save(self.folder / f"snapshot_{self.count:06d}.npz", **arrays, **row)
        with open(self.metrics, "a", newline="") as file:
            csv.writer(file).writerow([f"{row[column]:.6g}" if isinstance(row[column], float) else row[column]
                                       for column in self.columns])
        self.count += 1

    def end(self, how):
        """Say in run.json how the run ended: "finished", "stopped", or why; None while it goes on."""
        temporary = self.folder / "run.json.tmp"
        temporary.write_text(json.dumps({**self.options, "ended": how}, indent=1, default=str) + "\n")
        os.replace(temporary, self.folder / "run.json")


def snapshots(folder):
    """The folder's snapshots, oldest first."""
    return sorted(Path(folder).glob("snapshot_[0-9]*.npz"))


def read_snapshot(path):
    """Returns the weights [(w, b), ...] of a snapshot, and a dict of the numbers beside them; ValueError if torn."""
    arrays = load(path)
    weights = [(arrays.pop(f"w{n}"), arrays.pop(f"b{n}")) for n in range(1, 1 + len(arrays) // 2) if f"w{n}" in arrays]
    if not weights or any(array.ndim for array in arrays.values()):
        raise ValueError(f"{path} is not a snapshot")
    return weights, {name: array.item() for name, array in arrays.items()}


def read_metrics(folder):
    """metrics.csv as a dict of arrays, column -> (rows,); cells that are no numbers become NaN."""
    with open(Path(folder) / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if None not in row.values()]

    def number(cell):
        try:
            return float(cell)
        except (TypeError, ValueError):
            return np.nan
    return {column: np.array([number(row[column]) for row in rows]) for column in (rows[0] if rows else ())}


class Checkpoint:
    """A trainer's own half in a file, from which --resume goes on: weights, velocities, and some numbers."""

    PARTS = "w", "b", "w_velocity", "b_velocity"

    def __init__(self, folder):
        self.path = Path(folder) / "checkpoint.npz"

    def save(self, layers, **numbers):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        save(self.path, **{f"{part}{n}": getattr(layer, part) for n, layer in enumerate(layers) for part in self.PARTS},
             **numbers)

    def start(self, layers, resume):
        """Fills the layers and returns the numbers: {} where there is no checkpoint, or one is not to be resumed, which is
        then moved aside. ValueError if it does not fit."""
        if not (resume and self.path.exists()):
            if resume:
                print(f"no {self.path}: starting afresh", file=sys.stderr)
            elif self.path.exists():
                aside = self.path.replace(self.path.with_name("checkpoint.old.npz"))
                print(f"{self.path} is of an earlier run, and --resume was not given: moved to {aside}", file=sys.stderr)
            return {}
        arrays = load(self.path)
        parts = {(layer, part): arrays.pop(f"{part}{n}", None) for n, layer in enumerate(layers) for part in self.PARTS}
        if any(array.ndim for array in arrays.values()) or any(
                array is None or array.shape != getattr(*where).shape for where, array in parts.items()):
            raise ValueError(f"--resume: {self.path} is of a run with other --layers")
        for where, array in parts.items():
            setattr(*where, array)
        return {name: array.item() for name, array in arrays.items()}
