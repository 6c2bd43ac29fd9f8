"""Files that may be torn, folders that may be in use: what runs.py reads and claims."""
import contextlib
import errno
import json
from pathlib import Path

import numpy as np

from plumbing import say
from plumbing.errors import UserError, file_errors


def load(path):
    """The arrays of an .npz file. UserError if it is not a whole one."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # a damaged header raises whatever Python's tokenizer raises
        raise UserError(f"{path} is not a whole file of arrays ({error})") from None


def lock(folder):
    """Claims a folder until what this returns is closed, at most until this process ends.

    UserError if another process is writing to it (noticed where there is fcntl: not on Windows).
    Where the file system knows no locks, as some NFS does not, a warning.
    """
    with file_errors():
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = open(Path(folder) / "lock", "a")  # noqa: SIM115, it stays open
    with contextlib.suppress(ImportError):
        import fcntl
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES):
                say(f"warning: {folder} cannot be locked ({error.strerror}); make sure that no "
                    "other process writes to it")
                return file
            file.close()
            raise UserError(f"another process is writing to {folder}; --progress-dir chooses "
                             "another folder") from None
    return file


def put_aside(path):
    """Rename a file or folder: .1 comes before a file's suffix, or the next number that is free.
    Returns the new path."""
    if not path.name:
        raise UserError(f"the folder {path} cannot be renamed; --progress-dir chooses another one")
    stem, suffix = (path.name, "") if path.is_dir() else (path.stem, path.suffix)
    n = 1
    while (free := path.with_name(f"{stem}.{n}{suffix}")).exists():
        n += 1
    with file_errors():
        return path.rename(free)


def read_json(path):
    """The object in a JSON file; {} if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def whole_lines(path):
    """The bytes of a text file, without a last line that is torn; none where there is no file."""
    text = path.read_bytes() if path.exists() else b""
    return text[:text.rfind(b"\n") + 1]
