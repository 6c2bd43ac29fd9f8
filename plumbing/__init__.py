"""Infrastructure: all that is not the algorithm. Imported before NumPy, because it sets threads.

Linear algebra gets one thread per process: the matrices are small, idle OpenBLAS threads spin, and
the processes share the machine's cores. No graphics card is used: so small a model is fastest
without, and starts sooner. TensorFlow's messages at its start are hidden, its errors are not. Set a
variable yourself to choose otherwise; only KERAS_BACKEND is fixed, since oracle.py is written for
TensorFlow.

A character that a terminal or pipe cannot show is printed as "?".
"""
import contextlib
import os
import sys
import threading

for name, value in (("OPENBLAS_NUM_THREADS", "1"), ("MKL_NUM_THREADS", "1"),
                    ("VECLIB_MAXIMUM_THREADS", "1"), ("TF_NUM_INTRAOP_THREADS", "1"),
                    ("TF_NUM_INTEROP_THREADS", "1"), ("CUDA_VISIBLE_DEVICES", ""),
                    ("TF_CPP_MIN_LOG_LEVEL", "2")):
    os.environ.setdefault(name, value)
os.environ["KERAS_BACKEND"] = "tensorflow"
for stream in sys.stdout, sys.stderr:
    if hasattr(stream, "reconfigure"):  # not in a notebook
        stream.reconfigure(errors="replace")
MAX_MAGNITUDE = 1e6  # of data, activations and gradients; larger ones would only overflow later


def end_with_parent():
    """Waits until the parent, which holds the other end of stdin, has ended. Then ends, too."""
    os.read(0, 1)
    os._exit(1)


if os.environ.pop("END_WITH_PARENT", None):  # see plumbing.launch.start()
    threading.Thread(target=end_with_parent, daemon=True).start()


def say(text):
    """A line on stderr, above a progress bar if there is one. Lost if the terminal has gone."""
    from tqdm import tqdm
    with contextlib.suppress(OSError):
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()


def new_figure(size):
    """An empty Matplotlib figure of `size` inches, for a file. No backend of a notebook is loaded,
    and no style or font from a matplotlibrc."""
    os.environ["MPLBACKEND"] = "agg"
    import matplotlib  # here, because it takes a second
    from matplotlib.figure import Figure
    matplotlib.rcdefaults()
    return Figure(size, layout="constrained")
