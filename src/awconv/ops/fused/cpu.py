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
from awconv.ops.gpu import is_channels_last
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
        ("last", ctypes.c_int64 * 2),
    )


# Of cpu.c: name, types of the arguments, type of the result.
_FUNCTIONS: tuple[tuple[str, list[Any], Any], ...] = (
    ("workspace_elements", [ctypes.POINTER(_Sizes), ctypes.c_int], ctypes.c_int64),
    ("takes_last", [ctypes.POINTER(_Sizes), ctypes.c_int], ctypes.c_int),
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
    last: bool,
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
        (input_size[1], weight_size[0]) if last else (0, 0),
    )
    return ctypes.byref(sizes)


def forward(input: Tensor, weight: Tensor, gain: Tensor, geometry: Geometry) -> Tensor:
    """The output, of shape (N, C2, \\*output_size), in single precision at least, in the layout of the input."""
    output_size = geometry.output_size(input.shape[2:], weight.shape[2:])
    call = _Call((input, weight, gain), (input,), output_size, geometry, backward=False)
    output = call.image((input.shape[0], weight.shape[0], *output_size))
    call("forward", call.images[0], call.weight, call.gain, output)
    return call.laid_out(output)


def backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, gain: Tensor, geometry: Geometry, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of input, weight and gain, None where not needed, in single precision at least."""
    call = _Call((input, weight, gain), (input, grad_output), tuple(grad_output.shape[2:]), geometry, backward=True)
    grad_input = call.image(input.shape) if needs[0] else None
    sums = needs[1] or needs[2]  # both gradients are made of the same sums
    grad_weight, grad_gain = (torch.empty_like(tensor) if sums else None for tensor in (call.weight, call.gain))
    call("backward", call.images[1], call.images[0], call.weight, call.gain, grad_input, grad_weight, grad_gain)
    grads = (None if grad_input is None else call.laid_out(grad_input), grad_weight, grad_gain)
    return tuple(grad if needed else None for grad, needed in zip(grads, needs, strict=True))


class _Call:
    """A call of the C code: its tensors, in a precision and a layout that it takes.

    Args:
        tensors: input, weight and gain.
        images: to be read.
        output_size: of the convolution.
        geometry: of the convolution.
        backward: whether it makes gradients.
    """

    def __init__(
        self,
        tensors: tuple[Tensor, Tensor, Tensor],
        images: tuple[Tensor, ...],
        output_size: tuple[int, ...],
        geometry: Geometry,
        backward: bool,
    ) -> None:
        input, weight, gain = tensors
        self._dtype = _computed_in(input.dtype)
        self._library, self._backward = _loaded(self._dtype), int(backward)
        last = is_channels_last(input)
        self._wanted = self._format = torch.channels_last if last else torch.contiguous_format
        shapes = (input.shape, weight.shape, gain.shape[2], output_size, geometry, torch.get_num_threads())
        self._sizes = _sizes(*shapes, last)
        if last and not self._library.takes_last(self._sizes, self._backward):
            self._format, self._sizes = torch.contiguous_format, _sizes(*shapes, False)
        self.images = tuple(image.to(self._dtype).contiguous(memory_format=self._format) for image in images)
        self.weight, self.gain = (tensor.to(self._dtype).contiguous() for tensor in (weight, gain))

    def __call__(self, function: str, *tensors: Tensor | None) -> None:
        workspace = self.weight.new_empty(self._library.workspace_elements(self._sizes, self._backward))
        getattr(self._library, function)(self._sizes, *map(_pointer, (*tensors, workspace)))

    def image(self, shape: Sequence[int]) -> Tensor:
        """An image to be written."""
        return torch.empty(shape, dtype=self._dtype, memory_format=self._format)

    def laid_out(self, image: Tensor) -> Tensor:
        """An image that was written, with its channels where the input has them."""
        return image.contiguous(memory_format=self._wanted)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
