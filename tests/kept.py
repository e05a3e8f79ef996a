"""What libraries of users change for the whole process, and the tests put back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def kept_settings() -> Iterator[None]:
    """Puts back how many threads PyTorch has and how numbers are printed, which Ultralytics changes at its import."""
    threads, of_numpy, of_torch = torch.get_num_threads(), np.get_printoptions(), torch._tensor_str.PRINT_OPTS
    of_torch = dataclasses.asdict(of_torch)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        np.set_printoptions(**of_numpy)
        torch.set_printoptions(**of_torch)
