"""x.npy and y.npy: read, checked, described."""
import math
import os
import zlib
from typing import NamedTuple

import numpy as np
from numpy.lib import format as npy

from plumbing import MAX_MAGNITUDE
from plumbing.errors import FileError, UserError

WIDE = 20              # inputs or targets beyond ± this train badly
MAX_CLASSES = 10_000   # more different integers are numbers by mistake
MAX_ONE_HOT = 4 << 30  # bytes of one-hot targets, (n, k) float32
READ_HEADER = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


class Data(NamedTuple):
    """x (n, dim), y (n, k), and the held-out x_test and y_test, float32."""
    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray

    @property
    def digest(self):
        """A number that tells one set of data from another."""
        return zlib.crc32(self.y, zlib.crc32(self.x)) + len(self.x_test)


def add_options(parser):
    parser.add_argument("x", metavar="x.npy", help="inputs, (n, columns)")
    parser.add_argument("y", metavar="y.npy",
                        help="targets, (n,): numbers, or integers 0 … k − 1 that name classes")
    parser.add_argument("--held-out", type=int, metavar="COUNT",
                        help="examples at the end of the files, only tested on (5%% of them)")


def load(x_path, y_path, held_out=None):
    """The Data in two files. Integers in y.npy are class labels and become one-hot.

    Raises UserError that says what was wrong, what was expected, and how to get there.
    """
    x, y = read(x_path), read(y_path)
    if y.shape == (len(y), 1):
        y = y[:, 0]  # what many tools write
    if x.ndim != 2 and len(x) == len(y):
        cure = "x[:, None]" if x.ndim == 1 else "x.reshape(len(x), -1)"
        raise UserError(f"{x_path} has shape {x.shape}; expected (n, columns): save {cure}")
    if x.ndim != 2 or y.shape != x.shape[:1] or len(x) < 20:
        raise UserError(f"{x_path} has shape {x.shape} and {y_path} {y.shape}; expected "
                         "(n, columns) and (n,) with the same n, at least 20")
    held_out = len(x) // 20 if held_out is None else held_out
    if not 0 < held_out < len(x):
        raise UserError(f"--held-out must be from 1 to {len(x) - 1}, because {x_path} holds "
                         f"{len(x)} examples")
    x = x.astype(np.float32, order="C")  # a file may hold its columns one after the other
    y, split = targets(y, y_path).astype(np.float32), len(x) - held_out
    return Data(x[:split], y[:split], x[split:], y[split:])


def read(path):
    """An array of finite numbers from an .npy file. What its header promises is checked first."""
    array = None
    try:
        with open(path, "rb") as file:
            shape, _, dtype = READ_HEADER[npy.read_magic(file)](file)
            promised, held = math.prod(shape) * dtype.itemsize, os.path.getsize(path) - file.tell()
            if dtype.kind in "fiubUS" and promised <= held:
                file.seek(0)
                array = npy.read_array(file, allow_pickle=False)
    except FileNotFoundError:
        raise FileError(f"{path} not found: `python generate.py` makes x.npy and y.npy") from None
    except OSError as error:
        raise FileError(str(error)) from None
    except MemoryError:
        raise UserError(f"{path}: {promised:,} bytes do not fit into memory; save fewer examples"
                        ) from None
    except Exception:  # a damaged header raises whatever Python's tokenizer raises
        dtype = None
    if array is None and dtype is not None and dtype.kind in "fiubUS":
        raise UserError(f"{path}: expected a NumPy .npy file with {promised:,} bytes of data, "
                        f"which its header promises; it holds {held:,}: save or copy it again")
    if array is None:
        raise UserError(f"{path}: expected a NumPy .npy file that holds an array of numbers")
    if array.dtype.kind in "US":
        raise UserError(f"{path} holds strings; expected numbers: save array.astype(float), or of "
                         "class names np.unique(array, return_inverse=True)[1]")
    if not array.ndim or not array.size:
        raise UserError(f"{path} has shape {array.shape}; expected at least 20 examples")
    # min and max as Python numbers: |−2⁶³| overflows an int64, and a million overflows a float16
    if not -MAX_MAGNITUDE <= array.min().item() <= array.max().item() <= MAX_MAGNITUDE:
        raise UserError(f"{path}: holds NaN, infinity or numbers beyond a million; expected "
                         "smaller ones, near 1 at best")
    return array


def targets(y, path):
    """y (n,) -> (n, 1) numbers, or (n, k) one-hot booleans where y holds integers."""
    if y.dtype.kind == "f":
        return y[:, None]
    classes = np.unique(y)
    k, size = len(classes), 4 * len(y) * len(classes)
    if k > MAX_CLASSES or size > MAX_ONE_HOT:
        raise UserError(
            f"{path} holds {k:,} different integers. Integers are class labels: one-hot they would "
            f"take {size / 2**30:.1f} GiB; expected at most {MAX_CLASSES:,} classes and "
            f"{MAX_ONE_HOT / 2**30:.0f} GiB. If they are numbers, save y.astype(float)")
    if k < 2 or not np.array_equal(classes, np.arange(k)):
        raise UserError(
            f"{path} holds integers from {classes[0]} to {classes[-1]}. Integers are class labels: "
            "expected 0 … k − 1, each at least once, k ≥ 2. If they are labels, save "
            "np.unique(y, return_inverse=True)[1]; if they are numbers, y.astype(float)")
    return y[:, None] == classes


def constant_guess(data, task_of):
    """The score of always guessing the mean, or the commonest class. task_of(k): sgd.task_of."""
    task, mean = task_of(data.y.shape[1]), data.y.mean(axis=0)
    return task.test(np.broadcast_to(mean, data.y_test.shape), data.y_test)


def check_columns(data, layers):
    """UserError unless the --layers of the lowest part fit x."""
    columns = data.x.shape[1]
    if layers[0] != columns:
        cure = " ".join(map(str, [columns, *layers[1:]]))
        raise UserError(
            f"--layers begins with {layers[0]}, but x has {columns} columns: --layers {cure}")


def check_targets(data, width, who, task_of):
    """UserError unless an output of this width fits y. `who` names the option or the network."""
    k, labels = data.y.shape[1], np.arange(width)
    whole = np.isin(data.y, labels).all() and np.isin(data.y_test, labels).all()
    if k == 1 and width > 1 and whole:
        raise UserError(f"{who} ends with {width}, but y holds numbers. If they are class labels, "
                        "save y.astype(int); if they are numbers, it must end with 1")
    if width != k:
        raise UserError(f"{who} ends with {width}, but y holds {task_of(k).y_is}: it must end with "
                        f"{k}")


def describe(data, task_of):
    """What a person should know before a run, as lines of text."""
    task, constant = task_of(data.y.shape[1]), constant_guess(data, task_of)
    lines = [f"{len(data.x):,} examples to train on, {len(data.x_test):,} held out; always "
             f"guessing {task.constant} would have a {task.label} of {constant:.4f}"]
    highest = np.abs(data.x).max(axis=0)
    if highest.max() > WIDE:
        column = int(highest.argmax())
        low, high = data.x[:, column].min(), data.x[:, column].max()
        lines.append(f"warning: column {column} of x goes from {low:g} to {high:g}, and sigmoids "
                     "saturate beyond a few units; save (x - x.mean(0)) / (x.std(0) + 1e-9)")
    if np.abs(data.y).max() > WIDE:
        lines.append(f"warning: y goes from {data.y.min():g} to {data.y.max():g}, which makes "
                     "gradients large; save (y - y.mean()) / y.std()")
    k, found = data.y.shape[1], data.y_test.any(axis=0)
    common = data.y.mean(axis=0) * len(data.y_test) > 5  # such classes should be there
    if k > 1 and (common[~found].any() or found.sum() < min(k, len(data.y_test)) / 2):
        lines.append(f"warning: the held-out rows hold only {found.sum()} of {k} classes; shuffle "
                     "the rows of x and y together first, with i = np.random.default_rng(0)"
                     ".permutation(len(x)): save x[i] and y[i]")
    return "\n".join(lines)
