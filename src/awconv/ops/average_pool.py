"""Pooling to the size of a kernel, the first step of the attention branch: one pass over the input."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awconv.ops.build import library
from awconv.ops.problem import product

_SOURCE = Path(__file__).with_suffix(".c")
_AXES = 3
_MAX_BINS = 64  # of the C code, along an axis
_SIZES = (ctypes.c_int64 * _AXES,) * 2


def average_pool(input: Tensor, output_size: Sequence[int]) -> Tensor:
    r"""Adaptive average pooling in one pass over the input: by C code on a CPU, or as a product with a small matrix.

    Equal to ``torch.nn.functional.adaptive_avg_pool{1,2,3}d``, and unlike it deterministic in the backward on every
    device (pytorch issue 50198). A number that is not finite spoils the bins that cover it. In a product with a matrix,
    which GPUs and compiled or exported graphs use, it spoils every bin of its channel and sample: zero times infinity
    is no zero, and what would tell them apart reads the input once more for each bin, or has other sizes baked in.

    Args:
        input: shape (N, C, \*size), with as many spatial axes as ``output_size`` has numbers.
        output_size: bins along each axis. Bin i covers the positions floor(i * size / bins) to
            ceil((i + 1) * size / bins).

    Returns:
        Shape (N, C, \*output_size).
    """
    if max(output_size) <= _MAX_BINS and _has_c_code(input):
        pooled: Tensor = torch.ops.awconv.average_pool(input, list(output_size))
        return pooled
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    if input.device.type == "cpu" and not traced:
        return _by_slices(input, output_size)
    return _by_matrices(input, output_size)


def _has_c_code(input: Tensor) -> bool:
    if torch.compiler.is_compiling() or input.device.type != "cpu" or input.numel() == 0:
        return False
    if input.dtype not in (torch.float32, torch.float64):
        return False
    transformed = torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    return not transformed and not isinstance(library(_SOURCE, input.dtype), str)


_LIBRARY = torch.library.Library("awconv", "FRAGMENT")
_LIBRARY.define("average_pool(Tensor input, int[] bins) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
_LIBRARY.define("average_pool_backward(Tensor grad, int[] size) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


def _resized(input: Tensor, size: Sequence[int]) -> Tensor:
    return input.new_empty(*input.shape[:2], *size)


def _pool(input: Tensor, bins: list[int]) -> Tensor:
    return _call("forward", input, _resized(input, bins), input.shape[2:], bins)


def _pool_backward(grad: Tensor, size: list[int]) -> Tensor:
    bins = grad.shape[2:]
    return _call("backward", grad, _resized(grad, size), size, bins)


def _save(ctx: Any, inputs: tuple[Tensor, list[int]], output: Tensor) -> None:
    ctx.size = list(inputs[0].shape[2:])


for _name, _run, _reverse in (
    ("average_pool", _pool, torch.ops.awconv.average_pool_backward),
    ("average_pool_backward", _pool_backward, torch.ops.awconv.average_pool),
):
    _LIBRARY.impl(_name, _run, "CPU")
    torch.library.register_fake(f"awconv::{_name}", _resized, lib=_LIBRARY)
    # both are linear, and each is the gradient of the other
    torch.library.register_autograd(
        f"awconv::{_name}",
        lambda ctx, grad, reverse=_reverse: (reverse(grad, ctx.size), None),
        setup_context=_save,
        lib=_LIBRARY,
    )


def _call(name: str, source: Tensor, result: Tensor, size: Sequence[int], bins: Sequence[int]) -> Tensor:
    """Runs a function of the C code."""
    source, built = source.contiguous(), library(_SOURCE, source.dtype)
    if isinstance(built, str):  # a traced program can come to a machine without a compiler
        raise RuntimeError(f"awconv::average_pool cannot run here: {built}")
    run, workspace_elements = getattr(built, name), built.workspace_elements
    if run.argtypes is None:
        workspace_elements.argtypes, workspace_elements.restype = [*_SIZES, ctypes.c_int64], ctypes.c_int64
        run.argtypes, run.restype = [ctypes.c_int64, *_SIZES, ctypes.c_int64, *[ctypes.c_void_p] * 3], None
    sizes, threads = (_axes(size), _axes(bins)), torch.get_num_threads()
    workspace = source.new_empty(workspace_elements(*sizes, threads))
    run(product(source.shape[:2]), *sizes, threads, *(tensor.data_ptr() for tensor in (source, result, workspace)))
    return result


def _axes(sizes: Sequence[int]) -> Any:
    """One and two axes as the last ones of three."""
    return (ctypes.c_int64 * _AXES)(*[1] * (_AXES - len(sizes)), *sizes)


def _by_slices(input: Tensor, output_size: Sequence[int]) -> Tensor:
    """Means along one axis after another; the backward writes the input once for each bin of an axis."""
    for axis, bins in enumerate(output_size, start=2):
        size = input.shape[axis]
        edges = [(index * size // bins, -(-(index + 1) * size // bins)) for index in range(bins)]
        means = [input.narrow(axis, start, stop - start).mean(axis, keepdim=True) for start, stop in edges]
        input = torch.cat(means, axis)
    return input


def _by_matrices(input: Tensor, output_size: Sequence[int]) -> Tensor:
    matrices = [_bins(size, bins, input) for size, bins in zip(input.shape[2:], output_size, strict=True)]
    last = matrices[-1]
    if len(matrices) > 1:  # torch.kron of the last two, which torch.export cannot trace with symbolic sizes
        last = (matrices[-2][:, None, :, None] * last[None, :, None, :]).flatten(2, 3).flatten(0, 1)
    pooled = input.flatten(-2) @ last if len(matrices) > 1 else input @ last
    if len(matrices) > 2:  # the matrix for all three at once would be larger than many inputs
        pooled = matrices[0].T @ pooled
    return pooled.reshape(*input.shape[:2], *output_size)


def _bins(size: int, bins: int, like: Tensor) -> Tensor:
    """The matrix that takes means over bins along one axis: (size, bins), with the dtype and device of a tensor."""
    position = torch.arange(size, device=like.device)[:, None]
    index = torch.arange(bins, device=like.device)
    start, stop = index * size // bins, -(-(index + 1) * size // bins)
    covered = ((position >= start) & (position < stop)).to(torch.promote_types(like.dtype, torch.float32))
    return (covered / (stop - start)).to(like.dtype)
