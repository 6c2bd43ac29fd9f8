"""A progress bar that does not fill the log of a batch system."""
import contextlib
import math
import sys
import time

from tqdm import tqdm

LINE_SECONDS = 30  # between two lines


class Lines(tqdm):
    """Prints a line every LINE_SECONDS, and one at the end, where a bar would move. If nobody reads
    them any more, as after `make run 2>&1 | tee log` and Ctrl-C, training goes on."""

    printed = -math.inf

    def display(self, *_, **__):
        """Called for every change. tqdm itself ends the last line, and is disabled by then."""
        if self.disable or time.monotonic() - self.printed >= LINE_SECONDS:
            self.printed = time.monotonic()
            with contextlib.suppress(OSError):
                self.fp.write(str(self) + "\n" * (not self.disable))
                self.fp.flush()

    def close(self):
        with contextlib.suppress(OSError):
            super().close()

    def clear(self, *_, **__):
        """A line that has been printed stays."""


def progress_bar(*args, **options):
    """tqdm(*args, **options), or Lines if stderr is no terminal."""
    return (tqdm if sys.stderr.isatty() else Lines)(*args, **options)
