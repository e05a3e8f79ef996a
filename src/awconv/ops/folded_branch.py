"""An attention branch whose norms are folded into its convolutions, up to its activation: by C code in one call on a
CPU, elsewhere by PyTorch's operators."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awconv.ops.algorithm import CONV
from awconv.ops.average_pool import AXES, MAX_BINS, average_pool, axes
from awconv.ops.build import library
from awconv.ops.tracing import compiling, eager, in_forward_mode

_SOURCE = Path(__file__).with_suffix(".c")
_SIZES = (ctypes.c_int64 * AXES,) * 2


def folded_branch(input: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, taps: Any) -> Tensor:
    r"""What goes into the activation: pooling, a pointwise convolution, ReLU, and another one.

    Args:
        input: shape (N, C1, \*size).
        weight1: of the first convolution, shape (hidden, C1).
        bias1: shape (hidden,).
        weight2: of the second one with the hidden channels first, shape (hidden, columns).
        bias2: shape (columns,).
        taps: the sizes (h/r_hw, w/r_hw) to pool to.

    Returns:
        Shape (N, columns, \*taps).
    """
    tensors = (input, weight1, bias1, weight2, bias2)
    if _in_c(tensors, taps):
        return _call(*tensors, list(taps))
    ones = (1,) * len(taps)
    convolve, pooled = CONV[len(taps)], average_pool(input, taps)
    hidden = torch.relu(convolve(pooled, weight1.reshape(*weight1.shape, *ones), bias1))
    return convolve(hidden, weight2.t().reshape(*weight2.t().shape, *ones), bias2)


def _in_c(tensors: Sequence[Tensor], taps: Sequence[int]) -> bool:
    input = tensors[0]
    if compiling() or input.device.type != "cpu" or input.dtype not in (torch.float32, torch.float64):
        return False
    return (
        input.dim() == len(taps) + 2
        and input.shape[1] == tensors[1].shape[1]
        and eager(*tensors)
        and not in_forward_mode()
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and input.numel() > 0
        and max(taps) <= MAX_BINS
        and all(tensor.dtype == input.dtype and tensor.is_contiguous() for tensor in tensors[1:])
        and not isinstance(library(_SOURCE, input.dtype), str)
    )


def _call(input: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, taps: list[int]) -> Tensor:
    input, built = input.contiguous(), library(_SOURCE, input.dtype)
    assert not isinstance(built, str)
    if built.branch.argtypes is None:
        built.branch_workspace.argtypes = [*[ctypes.c_int64] * 3, *_SIZES, ctypes.c_int64]
        built.branch_workspace.restype = ctypes.c_int64
        built.branch.argtypes = [*[ctypes.c_int64] * 4, *_SIZES, ctypes.c_int64, *[ctypes.c_void_p] * 7]
        built.branch.restype = None
    samples, channels, *size = input.shape
    hidden, columns = weight2.shape
    sizes, threads = _sizes(tuple(size), tuple(taps)), torch.get_num_threads()
    workspace = input.new_empty(built.branch_workspace(samples, channels, hidden, *sizes, threads))
    output = input.new_empty((samples, columns, *taps))
    pointers = (tensor.data_ptr() for tensor in (input, weight1, bias1, weight2, bias2, output, workspace))
    built.branch(samples, channels, hidden, columns, *sizes, threads, *pointers)
    return output


@functools.lru_cache(maxsize=1024)
def _sizes(size: tuple[int, ...], taps: tuple[int, ...]) -> tuple[Any, Any]:
    return axes(size), axes(taps)
