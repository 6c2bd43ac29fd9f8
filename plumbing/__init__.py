"""What the three processes need and the idea does not. Imported before NumPy, for it sets how many threads that starts.

One thread each for linear algebra: the matrices are small, idle threads of OpenBLAS spin for work that does not come,
and the three processes share the machine's cores. No graphics card: so small a model is fastest without, and starts
sooner. TensorFlow's greetings are left out, not its errors. Set a variable yourself to choose otherwise.
"""
import os

for name, value in (("OPENBLAS_NUM_THREADS", "1"), ("MKL_NUM_THREADS", "1"), ("VECLIB_MAXIMUM_THREADS", "1"),
                    ("TF_NUM_INTRAOP_THREADS", "1"), ("TF_NUM_INTEROP_THREADS", "1"), ("CUDA_VISIBLE_DEVICES", ""),
                    ("TF_CPP_MIN_LOG_LEVEL", "2")):
    os.environ.setdefault(name, value)
