"""Fills uninitialised memory with NaN or the largest number, so that a result that depends on it shows.

PyTorch's own setting (``torch.utils.deterministic.fill_uninitialized_memory``) needs
``torch.use_deterministic_algorithms``, which selects other algorithms than users run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

FUNCTIONS = ("empty", "empty_like", "empty_strided", "empty_permuted")
METHODS = ("new_empty", "new_empty_strided")


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, new memory of PyTorch and NumPy is filled: NaN, the largest integer, True.

    Fills what is allocated from Python, as all of ours is, the workspace of the C code too. Graphs that are being
    traced stay as they are.
    """
    with torch.device("meta"):
        torch.empty(0)  # now PyTorch has looked up the functions that such a context gives its device, once and for all
    with pytest.MonkeyPatch.context() as patch:
        for name in FUNCTIONS:
            patch.setattr(torch, name, _filling(getattr(torch, name), _fill))
        for name in METHODS:
            patch.setattr(Tensor, name, _filling(getattr(Tensor, name), _fill))
        for name in ("empty", "empty_like"):
            patch.setattr(np, name, _filling(getattr(np, name), _fill_array))
        yield


def _filling(allocate: Callable[..., Any], fill: Callable[[Any], None]) -> Callable[..., Any]:
    @functools.wraps(allocate)
    def filled(*args: Any, **kwargs: Any) -> Any:
        memory = allocate(*args, **kwargs)
        fill(memory)
        return memory

    return filled


def _fill(memory: Tensor) -> None:
    traced = type(memory) is not Tensor or torch.compiler.is_compiling()
    if traced or memory.device.type == "meta" or memory.is_quantized:
        return
    with torch.no_grad():
        if memory.dtype.is_floating_point or memory.dtype.is_complex:
            memory.fill_(float("nan"))
        else:
            memory.fill_(True if memory.dtype == torch.bool else torch.iinfo(memory.dtype).max)


def _fill_array(memory: Any) -> None:
    if memory.dtype.kind in "fc":
        memory.fill(np.nan)
    elif memory.dtype.kind in "iu":
        memory.fill(np.iinfo(memory.dtype).max)
    elif memory.dtype.kind == "b":
        memory.fill(True)
