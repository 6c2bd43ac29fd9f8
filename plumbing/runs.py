"""What runs write: metrics, snapshots and checkpoints. Weights are plain arrays here."""
import contextlib
import csv
import io
import json
import os
import statistics
from pathlib import Path

import numpy as np

from plumbing import say
from plumbing.errors import Diverged, FileError, UserError, file_errors
from plumbing.files import load, lock, put_aside, read_json, whole_lines


@contextlib.contextmanager
def replacing(path, durable=False):
    """A binary file that takes the place of `path` once it is whole; durable: and on the disk."""
    with file_errors():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(f"{path}.tmp", "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(file.name, path)
        if durable:
            with contextlib.suppress(OSError):  # Windows opens no folder
                folder = os.open(Path(path).parent, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)


class Progress:
    """Writes metrics.csv, a row per snapshot, snapshot_000042.npz, the whole network, and run.json.

    An earlier run in the folder is moved to FOLDER.1, or the next free number, unless `resume` is
    given and the run is of this kind: then rows are appended to it. UserError if the folder holds
    anything else, or if another process is writing to it.
    """

    KEPT = 400  # snapshots at most, besides the newest two, however long the run is

    def __init__(self, folder, columns, options, resume=False):
        self.folder, self.columns, self.options = Path(folder), columns, dict(options)
        found = {path.name for path in self.folder.glob("*")}
        if found - {"lock", "run.json.tmp"}:  # which a start leaves behind where the disk is full
            if "run.json" not in found:
                raise UserError(f"{folder} holds something other than a run; --progress-dir "
                                 "chooses another folder")
            lock(self.folder).close()  # before the folder is renamed, which Windows asks for
            if not (resume and self.continues()):
                what = "another kind of run" if resume else "an earlier run"
                say(f"{folder} held {what}: moved to {put_aside(self.folder)}")
        self.locked, self.metrics = lock(self.folder), self.folder / "metrics.csv"
        if resume:
            self.options["resumed"] = read_json(self.folder / "run.json").get("resumed", 0) + 1
        self.end(None)
        with file_errors():
            self.metrics.touch()
            self.rows, self.whole = read_rows(self.folder), len(whole_lines(self.metrics))
        self.pending = [] if self.whole else [columns]  # lines that metrics.csv still lacks
        self.count = 1 + max(map(number_of, snapshots(folder)), default=-1)
        self.append()

    def continues(self):
        """Whether the folder's run is of this kind: the same columns, and options of the same
        names. A file that a power cut has emptied says nothing against it."""
        header = whole_lines(self.folder / "metrics.csv").decode(errors="replace").split("\n")[0]
        names = set(read_json(self.folder / "run.json")) - {"ended", "resumed"}
        return header in ("", ",".join(self.columns)) and names in (set(), set(self.options))

    def append(self):
        """Writes the pending lines where the whole ones end. What a crash tore is cut off."""
        with file_errors(), open(self.metrics, "r+", newline="", encoding="utf-8") as file:
            file.truncate(self.whole)
            file.seek(self.whole)
            csv.writer(file, lineterminator="\n").writerows(self.pending)
            self.whole = file.tell()  # which writes first, and raises where the disk is full
        self.pending = []

    def thin(self):
        """Deletes snapshots once there are too many. Those that stay are evenly spread: their
        numbers are multiples of a power of two, which doubles whenever KEPT is reached."""
        step = 1
        while (self.count - 1) // step >= self.KEPT:
            step *= 2
        for path in snapshots(self.folder)[:-2]:  # the live page may be reading the last but one
            if number_of(path) % step:
                with contextlib.suppress(OSError):  # the next call deletes it
                    path.unlink()

    def write(self, weights, probe=None, **row):
        """One row and one snapshot: weights [(w, b), ...], and numbers by column.

        probe: arrays that the snapshot holds besides, by name: of held-out examples in two columns,
        x (n, 2), and for some units of the cut g and guess, (n, units).
        """
        if self.pending and self.rows and self.rows[-1]["examples"] == row["examples"]:
            self.count -= 1  # metrics.csv could not be written, and now the same row comes again
            del self.rows[-1], self.pending[-1]
        arrays = {f"{name}{n}": array for n, pair in enumerate(weights, 1)
                  for name, array in zip("wb", pair, strict=True)}
        arrays.update({f"probe_{name}": array for name, array in (probe or {}).items()})
        with replacing(self.folder / f"snapshot_{self.count:06d}.npz") as file:
            np.savez(file, **arrays, **row)
        self.count += 1
        self.rows.append({name: f"{row[name]:.6g}" if isinstance(row[name], float) else row[name]
                          for name in self.columns})
        self.pending.append(list(self.rows[-1].values()))
        self.append()
        self.thin()

    def end(self, how):
        """Say in run.json how the run ended: "finished", "stopped", or why; None while it runs."""
        text = json.dumps({**self.options, "ended": how}, indent=1, default=str) + "\n"
        with replacing(self.folder / "run.json") as file:
            file.write(text.encode())

    @contextlib.contextmanager
    def ending(self):
        """Says how the run within this block has ended."""
        try:
            yield
        except BaseException as error:
            how = f"stopped: {error}"
            if isinstance(error, KeyboardInterrupt):
                how = "stopped"
                say(f"stopped; {self.folder} holds {len(self.rows)} rows")
            with contextlib.suppress(OSError):  # the disk may be full; `error` says so
                self.end(how)
            raise
        self.end("finished")

    def verdict(self):
        """[a line about a run that has learned nothing], or []."""
        name = score_of(self.columns)
        untrained = float(self.rows[0]["examples"]) == 0
        first, last = (float(self.rows[n][name]) if n or untrained else np.inf for n in (0, -1))
        guess = float(self.options.get("constant_guess", np.inf))
        if last < 0.99 * min(first, guess):
            return []
        best = "it began with" if first < guess else "a constant guess has"
        return [f"warning: the run ends at {last:.4f}, no better than the {min(first, guess):.4f} "
                f"that {best}; try a lower --learning-rate or more epochs" + (
                    ", or an oracle that sees y (--condition-on-labels)"
                    if "gradient_cosine" in self.columns else "")]


def score_of(columns):
    """The name of the column that holds the held-out score: test_mse, test_error, ..."""
    return next(column for column in columns if column.startswith("test_"))


def reached(rows):
    """What a run came to: the median score of its last three rows, because single ones jump."""
    name = score_of(rows[0])
    return statistics.median(float(row[name]) for row in rows[-3:])


def number_of(path):
    """The number of snapshot_000042.npz."""
    return int(path.stem[9:])


def snapshots(folder):
    """The folder's snapshots, oldest first, without copies that somebody has named otherwise."""
    found = Path(folder).glob("snapshot_*.npz")
    return sorted((path for path in found if path.stem[9:].isdecimal()), key=number_of)


def read_snapshot(path):
    """The weights [(w, b), ...] of a snapshot, a dict of its numbers, and one of the arrays of its
    probe, which may be empty. UserError if it is torn."""
    arrays = load(path)
    probe = {name[6:]: arrays.pop(name) for name in list(arrays) if name.startswith("probe_")}
    weights = [(arrays.pop(f"w{n}"), arrays.pop(f"b{n}"))
               for n in range(1, 1 + len(arrays) // 2) if f"w{n}" in arrays and f"b{n}" in arrays]
    if not weights or any(array.ndim for array in arrays.values()):
        raise UserError(f"{path} is not a snapshot")
    return weights, {name: array.item() for name, array in arrays.items()}, probe


def read_rows(folder):
    """The whole rows of metrics.csv as dicts of text; a torn row is left out."""
    text = whole_lines(Path(folder) / "metrics.csv").decode(errors="replace")
    return [row for row in csv.DictReader(io.StringIO(text, newline=""))
            if None not in row and None not in row.values()]


def read_metrics(folder):
    """metrics.csv as a dict of arrays, column -> (rows,). Cells that are no numbers become NaN."""
    rows = read_rows(folder)
    if not (Path(folder) / "metrics.csv").exists():
        raise FileError(f"{folder} holds no metrics.csv")

    def number(cell):
        try:
            return float(cell)
        except ValueError:
            return np.nan
    columns = rows[0] if rows else ()
    return {column: np.array([number(row[column]) for row in rows]) for column in columns}


class Checkpoint:
    """A trainer's own part in a file: layers, velocities, numbers. --resume continues from it."""

    PARTS = "w", "b", "w_velocity", "b_velocity"

    def __init__(self, folder):
        self.path = Path(folder) / "checkpoint.npz"

    def save(self, layers, **numbers):
        """Diverged if the layers are not finite: then the last checkpoint is kept."""
        arrays = {f"{part}{n}": getattr(layer, part) for n, layer in enumerate(layers)
                  for part in self.PARTS}
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise Diverged("this part diverged; try a lower --learning-rate")
        with replacing(self.path, durable=True) as file:
            np.savez(file, **arrays, **numbers)

    def resume(self, layers, **same):
        """Fills the layers and returns the numbers: {} where there is no checkpoint.

        UserError if the layers differ, or one of the values that must be the `same`.
        """
        if not self.path.exists():
            say(f"no {self.path}: starting afresh")
            return {}
        try:
            arrays = load(self.path)
        except UserError as error:
            aside = max(self.path.parent.glob("checkpoint.[0-9]*.npz"), default=None,
                        key=os.path.getmtime)
            raise UserError(f"--resume: {error}; delete it to start afresh" + (
                f", or rename {aside} to {self.path.name}" if aside else "")) from None
        parts = {(layer, part): arrays.pop(f"{part}{n}", None)
                 for n, layer in enumerate(layers) for part in self.PARTS}
        fits = all(array is not None and array.shape == getattr(*where).shape
                   for where, array in parts.items())
        numbers = {name: array.item() for name, array in arrays.items() if not array.ndim}
        for name, value in same.items():
            if numbers.pop(name, value) != value:
                raise UserError(f"--resume: {self.path} is of a run that differs in {name}; give "
                                "the same, or start a new run without --resume")
        if not fits or any(array.ndim for array in arrays.values()):
            raise UserError(f"--resume: {self.path} is of a run with other --layers or --head")
        for where, array in parts.items():
            setattr(*where, array)
        return numbers

    def put_aside(self):
        """Keeps an earlier run's checkpoint under another name, which no later run overwrites."""
        if self.path.exists():
            say(f"{self.path} is of an earlier run, and --resume was not given: moved to "
                f"{put_aside(self.path)}")
