"""Errors that people can mend. They end a program with one line; all others keep their traceback.
"""
import contextlib


class UserError(ValueError):
    """What was wrong, what would be right, and what to do about it. Exit code 2."""


class Diverged(UserError, FloatingPointError):
    """Numbers that are not finite, or beyond sane magnitudes. Exit code 1."""


class FileError(UserError, OSError):
    """A file or folder that cannot be read or written, such as on a disk that is full."""


class Refused(UserError):
    """A server raises it to answer with `status`, 4xx or 503; a client when answered 4xx."""

    def __init__(self, message, status):
        super().__init__(message)
        self.status = status


class NoAnswer(UserError, ConnectionError):
    """No answer came in time, or one that is rubbish or too old. Asking again may help."""


@contextlib.contextmanager
def file_errors():
    """Turns what the operating system says of a file into a FileError."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise FileError(str(error)) from None
