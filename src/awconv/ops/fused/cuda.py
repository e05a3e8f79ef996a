"""The CUDA half of the fused algorithm: lays tensors out for the kernels of triton_kernels.py, and launches them.

Everything has its channels last: other inputs are copied, outputs and gradients of inputs come out so.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Sequence
from math import gcd
from typing import Any

import torch
from torch import Tensor

from awconv.ops.problem import Problem

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LEAST_CHANNELS = 16  # of a matrix product: with fewer, most of it would multiply zeros
_PROGRAMS = 1024  # that keep a large chip busy, some eight on each multiprocessor
_LARGEST = 128  # output and input channels of a tile of the weight's gradient


def obstacle(problem: Problem) -> str | None:
    """Why the kernels cannot run a problem."""
    if problem.dims > 2:
        return "its kernels for GPUs take one or two spatial axes"
    if problem.dtype not in _DTYPES:
        return f"its kernels for GPUs take {', '.join(map(str, _DTYPES))}, not {problem.dtype}"
    block_channels = problem.group_in_channels // problem.attention_blocks[1]
    group_out = problem.out_channels // problem.groups
    if problem.group_in_channels > 1 and min(block_channels, group_out) < _LEAST_CHANNELS:
        return (
            f"its kernels for GPUs take depthwise convolutions, and others with at least {_LEAST_CHANNELS} input "
            f"channels in a group that share their attention, here {block_channels}, and as many output channels in "
            f"a group, here {group_out}"
        )
    reason: str | None = _why_not_compiled()
    return reason


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _why_not_compiled() -> str | None:
    """What is missing to compile the kernels, a constant to torch.compile."""
    if importlib.util.find_spec("triton") is None:
        return "its kernels for GPUs need Triton, which is not installed"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "its kernels for GPUs need compute capability 8.0"
    return None


def forward(
    input: Tensor,
    weight: Tensor,
    gain: Tensor,
    output_size: tuple[int, ...],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """The output, of shape (N, C2, \\*output_size), with its channels last."""
    if len(stride) == 1:
        input, weight, stride, padding, dilation = _with_two_axes(input, weight, stride, padding, dilation)
        return forward(input, weight, gain, (1, *output_size), stride, padding, dilation, groups).squeeze(2)
    output = input.new_empty(input.shape[0], *output_size, weight.shape[0])
    if output.numel():
        origin = [-before for before in padding[::2]]
        weights = weight.permute(2, 3, 1, 0).contiguous()
        tensors = _channels_last(input), weights, _gains_of_taps(gain, weight), output
        if weight.shape[1] == 1:
            _depthwise_correlate(*tensors, stride, origin, dilation)
        else:
            _correlate(*tensors, stride, origin, dilation, groups)
    return output.permute(0, 3, 1, 2)


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    gain: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of input, weight and gain, None where not needed. That of the input has its channels last."""
    if len(stride) == 1:
        input, weight, stride, padding, dilation = _with_two_axes(input, weight, stride, padding, dilation)
        grads = backward(grad_output.unsqueeze(2), input, weight, gain, stride, padding, dilation, groups, needs)
        return tuple(grad.squeeze(2) if index < 2 and grad is not None else grad for index, grad in enumerate(grads))
    if not grad_output.numel():
        return tuple(
            torch.zeros_like(tensor) if needed else None
            for tensor, needed in zip((input, weight, gain), needs, strict=True)
        )
    source, gains = _channels_last(grad_output), _gains_of_taps(gain, weight)
    origin = [-before for before in padding[::2]]
    grad_input = _grad_input(source, input, weight, gains, stride, origin, dilation, groups) if needs[0] else None
    if not (needs[1] or needs[2]):
        return grad_input, None, None
    tensors = source, _channels_last(input), weight, gains
    if weight.shape[1] == 1:
        return grad_input, *_depthwise_sum_products(*tensors, stride, origin, dilation, needs[1:])
    return grad_input, *_sum_products(*tensors, stride, origin, dilation, groups, needs[1:])


def _with_two_axes(
    input: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> tuple[Tensor, Tensor, list[int], list[int], list[int]]:
    """A convolution over one axis as one over two, of which the first has size 1."""
    return input.unsqueeze(2), weight.unsqueeze(2), [1, *stride], [0, 0, *padding], [1, *dilation]


def _channels_last(tensor: Tensor) -> Tensor:
    """Shape (N, C, H, W) to (N, H, W, C), copied only if the channels do not lie last already."""
    return tensor.permute(0, 2, 3, 1).contiguous()


def _gains_of_taps(gain: Tensor, weight: Tensor) -> Tensor:
    """Shape (N, C2, blocks, taps) to (N, blocks, h, w, C2)."""
    gains: Tensor = gain.permute(0, 2, 3, 1).contiguous()
    return gains.reshape(*gains.shape[:2], *weight.shape[2:], gains.shape[3])


def _grad_input(
    source: Tensor,
    input: Tensor,
    weight: Tensor,
    gains: Tensor,
    stride: list[int],
    origin: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """The gradient of the input, one phase of the stride at a time: its pixels see the same taps, at pixels of the
    output's gradient that lie side by side."""
    batch, channels, *size = input.shape
    phases_y, phases_x = (
        [_phase(first, kernel, start, reach, step) for first in range(min(step, extent))]
        for extent, kernel, start, reach, step in zip(size, weight.shape[2:], origin, dilation, stride, strict=True)
    )
    unseen = None in phases_y or None in phases_x
    grad = (source.new_zeros if unseen else source.new_empty)(batch, *size, channels)
    depthwise = weight.shape[1] == 1
    weights = weight.permute((2, 3, 1, 0) if depthwise else (2, 3, 0, 1)).contiguous()
    unit = None
    if source.dtype == torch.float16 and not depthwise:
        largest = gains.abs().nan_to_num(nan=0, posinf=0).amax()  # one sample's infinity is not another's
        unit = largest.float().clamp(min=1).reciprocal()  # brings the gains within one
    for phase_y, phase_x in itertools.product(filter(None, phases_y), filter(None, phases_x)):
        (pixels_y, taps_y, *from_y), (pixels_x, taps_x, *from_x) = phase_y, phase_x
        start, reach = zip(from_y, from_x, strict=True)
        tensors = source, weights[taps_y, taps_x], gains[:, :, taps_y, taps_x], grad[:, pixels_y, pixels_x]
        if depthwise:
            _depthwise_correlate(*tensors, (1, 1), start, reach, transposed=True)
        else:
            _correlate(*tensors, (1, 1), start, reach, groups, unit, transposed=True)
    return grad.permute(0, 3, 1, 2)


def _phase(first: int, kernel: int, origin: int, dilation: int, stride: int) -> tuple[slice, slice, int, int] | None:
    """What the pixels ``first``, ``first + stride``, ... of the input along one axis see of the output's gradient.

    Returns:
        These pixels, the taps that they are seen through, the pixel of the output that ``first`` is seen from through
        the first of them, and how far from it the next tap's lies. None if no tap sees them.
    """
    every = stride // gcd(dilation, stride)
    for tap in range(min(every, kernel)):
        seen_from, rest = divmod(first - origin - dilation * tap, stride)
        if rest == 0:
            return slice(first, None, stride), slice(tap, None, every), seen_from, -dilation * every // stride
    return None


def _correlate(
    source: Tensor,
    weights: Tensor,
    gains: Tensor,
    target: Tensor,
    step: Sequence[int],
    origin: Sequence[int],
    reach: Sequence[int],
    groups: int,
    unit: Tensor | None = None,
    transposed: bool = False,
) -> None:
    """Launches ``correlate``: weights (h, w, C1/groups, C2), or (h, w, C2, C1/groups) if transposed."""
    blocks = gains.shape[1]
    inner_blocks, column_blocks = (1, blocks) if transposed else (blocks, 1)
    inner = source.shape[3] // groups // inner_blocks
    columns = target.shape[3] // groups // column_blocks
    taps_y, taps_x = weights.shape[:2]

    def grid(tile: dict[str, Any]) -> tuple[int]:
        column_tiles = groups * column_blocks * -(-columns // tile["block_columns"])
        return (_row_tiles(target, tile) * column_tiles,)

    _launch(
        "correlate",
        grid,
        source=source,
        weight=weights,
        gain=gains,
        unit=unit,
        target=target,
        **_strides("source", source),
        weight_group=inner * weights.stride(2) if transposed else columns,
        weight_y=weights.stride(0),
        weight_x=weights.stride(1),
        weight_inner=weights.stride(2),
        gain_n=gains.stride(0),
        gain_b=gains.stride(1),
        gain_y=gains.stride(2),
        gain_x=gains.stride(3),
        **_strides("target", target),
        **_geometry(source, target, step, origin, reach),
        columns=columns,
        column_blocks=column_blocks,
        inner=inner,
        inner_blocks=inner_blocks,
        groups=groups,
        taps_y=taps_y,
        taps_x=taps_x,
        transposed=transposed,
        precision=_precision(),
    )


def _depthwise_correlate(
    source: Tensor,
    weights: Tensor,
    gains: Tensor,
    target: Tensor,
    step: Sequence[int],
    origin: Sequence[int],
    reach: Sequence[int],
    transposed: bool = False,
) -> None:
    """Launches ``depthwise_correlate``: weights (h, w, 1, C2)."""
    taps_y, taps_x, _, out_channels = weights.shape
    channels = target.shape[3]
    _launch(
        "depthwise_correlate",
        lambda tile: (_row_tiles(target, tile) * -(-channels // tile["block_columns"]),),
        source=source,
        weight=weights,
        gain=gains,
        target=target,
        **_strides("source", source),
        weight_y=weights.stride(0),
        weight_x=weights.stride(1),
        gain_n=gains.stride(0),
        gain_y=gains.stride(2),
        gain_x=gains.stride(3),
        **_strides("target", target),
        **_geometry(source, target, step, origin, reach),
        channels=channels,
        multiplier=out_channels // (channels if transposed else source.shape[3]),
        taps_y=taps_y,
        taps_x=taps_x,
        transposed=transposed,
    )


def _sum_products(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    gains: Tensor,
    step: Sequence[int],
    origin: Sequence[int],
    reach: Sequence[int],
    groups: int,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the weight and the gain."""
    out_channels, group_in, taps_y, taps_x = weight.shape
    batch, blocks = gains.shape[:2]
    rows, columns = out_channels // groups, group_in // blocks
    block_columns = min(_LARGEST, max(_LEAST_CHANNELS, 1 << (columns - 1).bit_length()))
    column_tiles = -(-columns // block_columns)

    def tiles(block_rows: int) -> int:
        return taps_y * taps_x * groups * blocks * column_tiles * -(-rows // block_rows)

    # The samples in chunks, as many as give work to all multiprocessors. Each chunk has a sum of its own, and these are
    # added up in the end, in the same order every time.
    chunk = -(-batch // max(1, _PROGRAMS // tiles(_LARGEST)))
    chunks = -(-batch // chunk)
    none = gains.new_empty(0, dtype=torch.float32)
    sums_of_chunks = none.new_empty(chunks, taps_y, taps_x, out_channels, group_in) if needs[0] else none
    sums_of_columns = none.new_empty(column_tiles, *gains.shape) if needs[1] else none
    _launch(
        "sum_products",
        lambda tile: (chunks * tiles(tile["block_rows"]),),
        grad_output=grad_output,
        input=input,
        weight=weight.permute(2, 3, 0, 1).contiguous(),
        gain=gains,
        grad_weight=sums_of_chunks,
        grad_gain=sums_of_columns,
        **_strides("source", input),
        chunk=chunk,
        **_geometry(input, grad_output, step, origin, reach),
        rows=rows,
        columns=columns,
        blocks=blocks,
        groups=groups,
        taps_y=taps_y,
        taps_x=taps_x,
        needs_weight=needs[0],
        needs_gain=needs[1],
        precision=_precision(),
        block_columns=block_columns,
    )
    return (
        sums_of_chunks.sum(0).permute(2, 3, 0, 1).to(weight.dtype).contiguous() if needs[0] else None,
        _gain_gradient(sums_of_columns.sum(0), gains) if needs[1] else None,
    )


def _depthwise_sum_products(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    gains: Tensor,
    step: Sequence[int],
    origin: Sequence[int],
    reach: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the weight and the gain where a group has one input channel."""
    channels, _, taps_y, taps_x = weight.shape
    batch = gains.shape[0]
    sums = gains.new_empty(batch, taps_y, taps_x, channels, dtype=torch.float32)
    _launch(
        "depthwise_sum_products",
        lambda tile: (batch * taps_y * taps_x * -(-channels // tile["block_columns"]),),
        grad_output=grad_output,
        input=input,
        sums=sums,
        **_strides("source", input),
        **_geometry(input, grad_output, step, origin, reach),
        channels=channels,
        multiplier=channels // input.shape[3],
        taps_y=taps_y,
        taps_x=taps_x,
    )
    grad_weight = grad_gain = None
    if needs[0]:
        grad_weight = (sums * gains.squeeze(1)).sum(0).permute(2, 0, 1).unsqueeze(1).to(weight.dtype).contiguous()
    if needs[1]:
        grad_gain = _gain_gradient((sums * weight.permute(1, 2, 3, 0)).unsqueeze(1), gains)
    return grad_weight, grad_gain


def _gain_gradient(sums: Tensor, gains: Tensor) -> Tensor:
    """Shape (N, blocks, h, w, C2) to (N, C2, blocks, h * w), in the dtype of the gains."""
    return sums.flatten(2, 3).permute(0, 3, 1, 2).to(gains.dtype).contiguous()


def _strides(name: str, tensor: Tensor) -> dict[str, int]:
    return {f"{name}_{axis}": tensor.stride(index) for index, axis in enumerate("nyx")}


def _geometry(
    source: Tensor, positions: Tensor, step: Sequence[int], origin: Sequence[int], reach: Sequence[int]
) -> dict[str, int]:
    """Which pixel a position sees through a tap: step * position + origin + reach * tap, along each axis."""
    batch, height, width, _ = positions.shape
    return dict(
        samples=batch,
        height=height,
        width=width,
        seen_height=source.shape[1],
        seen_width=source.shape[2],
        step_y=step[0],
        step_x=step[1],
        origin_y=origin[0],
        origin_x=origin[1],
        reach_y=reach[0],
        reach_x=reach[1],
        samples_key=batch.bit_length(),
        positions_key=(height * width).bit_length(),
    )


def _row_tiles(positions: Tensor, tile: dict[str, Any]) -> int:
    """Tiles of positions: of each sample, or of all together."""
    batch, height, width, _ = positions.shape
    rows: int = tile["block_rows"]
    return batch * -(-height * width // rows) if tile["one_sample"] else -(-batch * height * width // rows)


def _precision() -> str:
    """How products of float32 are rounded: as PyTorch's own convolutions do it."""
    convolutions: Any = torch.backends.cudnn
    return "tf32" if convolutions.conv.fp32_precision == "tf32" else "ieee"


def _launch(kernel: str, grid: Callable[[dict[str, Any]], tuple[int]], **arguments: Any) -> None:
    """Runs a kernel on the device of its first tensor, with tiles that were timed, or fixed ones where results must not
    depend on timings."""
    from awconv.ops.fused import triton_kernels

    run = getattr(triton_kernels, kernel)
    first = next(iter(arguments.values()))
    if not first.is_cuda:  # Triton's interpreter
        run.fn[grid](**arguments, **triton_kernels.SMALLEST[run])
        return
    with torch.cuda.device(first.device):
        if torch.are_deterministic_algorithms_enabled():
            run.fn[grid](**arguments, **triton_kernels.FIXED[run])
        else:
            run[grid](**arguments)
