"""Infrastructure: all that is not the algorithm. Imported before NumPy, because it sets threads.

Linear algebra gets one thread per process: the matrices are small, idle OpenBLAS threads spin, and
the processes share the machine's cores. No graphics card is used: so small a model is fastest
without, and starts sooner. TensorFlow's messages at its start are hidden, its errors are not. Set a
variable yourself to choose otherwise; only KERAS_BACKEND is fixed, since oracle.py is written for
TensorFlow.
"""
import os
import sys

for name, value in (("OPENBLAS_NUM_THREADS", "1"), ("MKL_NUM_THREADS", "1"),
                    ("VECLIB_MAXIMUM_THREADS", "1"), ("TF_NUM_INTRAOP_THREADS", "1"),
                    ("TF_NUM_INTEROP_THREADS", "1"), ("CUDA_VISIBLE_DEVICES", ""),
                    ("TF_CPP_MIN_LOG_LEVEL", "2")):
    os.environ.setdefault(name, value)
os.environ["KERAS_BACKEND"] = "tensorflow"
MAX_MAGNITUDE = 1e6  # of data, activations and gradients; larger ones would only overflow later


def say(text):
    """A line on stderr, above a progress bar if there is one."""
    from tqdm import tqdm
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()
