"""The CPU half of the fused algorithm: calls cpu.c."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awconv.ops.build import library
from awconv.ops.geometry import Geometry
from awconv.ops.problem import Problem

_SOURCE = Path(__file__).with_name("cpu.c")
_MAX_TAPS = 512  # of cpu.c
_AXES = 3  # one and two spatial axes are the last ones of three


class _Sizes(ctypes.Structure):
    """``problem_t`` of cpu.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "groups", "group_out", "group_in", "blocks")),
        *((name, ctypes.c_int64 * _AXES) for name in ("size", "out_size", "kernel", "stride", "dilation", "padding")),
        ("threads", ctypes.c_int64),
    )


# Of cpu.c: name, types of the arguments, type of the result.
_FUNCTIONS: tuple[tuple[str, list[Any], Any], ...] = (
    ("workspace_elements", [ctypes.POINTER(_Sizes), ctypes.c_int], ctypes.c_int64),
    ("forward", [ctypes.POINTER(_Sizes), *[ctypes.c_void_p] * 5], None),
    ("backward", [ctypes.POINTER(_Sizes), *[ctypes.c_void_p] * 8], None),
)


def obstacle(problem: Problem) -> str | None:
    """Why the C code cannot run a problem; building it is tried at the first call."""
    if problem.taps > _MAX_TAPS:
        return f"its C code takes kernels of {_MAX_TAPS} taps at the most"
    if problem.padding_obstacle is not None:
        return f"its C code copies the input with its padding, {problem.padding_obstacle}"
    found: str | None = _build_obstacle(_computed_in(problem.dtype))
    return found


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    """Lower precisions are computed in single precision, and rounded once."""
    return torch.promote_types(dtype, torch.float32)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _build_obstacle(dtype: torch.dtype) -> str | None:
    """Why there is no library, a constant to torch.compile."""
    built = library(_SOURCE, dtype)
    return built if isinstance(built, str) else None


def _loaded(dtype: torch.dtype) -> ctypes.CDLL:
    built = library(_SOURCE, dtype)
    if isinstance(built, str):  # an exported program can come to a machine without a compiler
        raise RuntimeError(f"awconv::fused cannot run here: {built}")
    if built.forward.argtypes is None:
        for name, arguments, result in _FUNCTIONS:
            function = getattr(built, name)
            function.argtypes, function.restype = arguments, result
    return built


def _axes(values: Iterable[int], absent: int) -> ctypes.Array[ctypes.c_int64]:
    sizes = list(values)
    return (ctypes.c_int64 * _AXES)(*[absent] * (_AXES - len(sizes)), *sizes)


@functools.lru_cache(maxsize=4096)
def _sizes(
    input_size: tuple[int, ...],
    weight_size: tuple[int, ...],
    blocks: int,
    output_size: tuple[int, ...],
    geometry: Geometry,
    threads: int,
) -> Any:
    """A pointer to ``problem_t``."""
    sizes = _Sizes(
        input_size[0],
        geometry.groups,
        weight_size[0] // geometry.groups,
        weight_size[1],
        blocks,
        _axes(input_size[2:], 1),
        _axes(output_size, 1),
        _axes(weight_size[2:], 1),
        _axes(geometry.stride, 1),
        _axes(geometry.dilation, 1),
        _axes(geometry.padding_before(), 0),  # what comes after follows from the output's size
        threads,
    )
    return ctypes.byref(sizes)


def forward(input: Tensor, weight: Tensor, gain: Tensor, geometry: Geometry) -> Tensor:
    """The output, of shape (N, C2, \\*output_size), in single precision at least."""
    input, weight, gain = _prepared(input, weight, gain)
    loaded = _loaded(input.dtype)
    output_size = geometry.output_size(input.shape[2:], weight.shape[2:])
    sizes = _sizes(input.shape, weight.shape, gain.shape[2], output_size, geometry, torch.get_num_threads())
    output = input.new_empty(input.shape[0], weight.shape[0], *output_size)
    workspace = input.new_empty(loaded.workspace_elements(sizes, 0))
    loaded.forward(sizes, *map(_pointer, (input, weight, gain, output, workspace)))
    return output


def backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, gain: Tensor, geometry: Geometry, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of input, weight and gain, None where not needed, in single precision at least."""
    grad_output, input, weight, gain = _prepared(grad_output, input, weight, gain)
    loaded = _loaded(input.dtype)
    output_size = tuple(grad_output.shape[2:])
    sizes = _sizes(input.shape, weight.shape, gain.shape[2], output_size, geometry, torch.get_num_threads())
    sums = needs[1] or needs[2]  # both gradients are made of the same sums
    grads = [
        torch.empty_like(tensor) if made else None
        for tensor, made in zip((input, weight, gain), (needs[0], sums, sums), strict=True)
    ]
    workspace = input.new_empty(loaded.workspace_elements(sizes, 1))
    loaded.backward(sizes, *map(_pointer, (grad_output, input, weight, gain, *grads, workspace)))
    return tuple(grad if needed else None for grad, needed in zip(grads, needs, strict=True))


def _prepared(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = _computed_in(tensors[0].dtype)
    return tuple(tensor.to(dtype).contiguous() for tensor in tensors)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
