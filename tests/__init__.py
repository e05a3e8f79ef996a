"""The tests. Several processes share the cores, and so do the libraries in each and the processes that it starts."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything reads it
