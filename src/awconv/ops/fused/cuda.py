"""The CUDA half of the fused algorithm: lays tensors out for the Triton kernels beside this file, and launches them.

The kernels read images and weights with their channels last; others are copied. What they make has the layout of what it
stands for: the output and the input's gradient that of the input, the gradients of weight and gain those of weight and
gain. The first call of a size compiles, which a CUDA graph cannot capture: run once before the capture.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from awconv.ops import gpu
from awconv.ops.fused import tiles
from awconv.ops.geometry import Geometry
from awconv.ops.gpu import divider, empty_like_image, is_channels_last, triton_obstacle
from awconv.ops.problem import Problem

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_PLANS = 4096  # that are remembered
_INTERPRETED = 3  # programs that share the sums in Triton's interpreter: enough that a tile is in pieces


def obstacle(problem: Problem) -> str | None:
    """Why the kernels cannot run a problem."""
    if problem.dims > 2:
        return "its kernels for GPUs take one or two spatial axes"
    if problem.dtype not in _DTYPES:
        return f"its kernels for GPUs take {', '.join(map(str, _DTYPES))}, not {problem.dtype}"
    block_channels = problem.group_in_channels // problem.attention_blocks[1]
    group_out = problem.out_channels // problem.geometry.groups
    if problem.group_in_channels > 1 and min(block_channels, group_out) < tiles.LEAST:
        return (
            f"its kernels for GPUs take depthwise convolutions, and others with at least {tiles.LEAST} input "
            f"channels in a group that share their attention, here {block_channels}, and as many output channels in "
            f"a group, here {group_out}"
        )
    for name, elements in (("input", problem.in_elements), ("output", problem.out_elements)):
        if statically_known_true(elements >= 2**31):
            return f"its kernels for GPUs count in 32 bits within a sample, whose {name} has {elements:,} elements"
    reason: str | None = triton_obstacle()
    return reason


def forward(input: Tensor, weight: Tensor, gain: Tensor, geometry: Geometry) -> Tensor:
    """The output, in the layout of the input."""
    if len(geometry.stride) == 1:
        output = forward(input.unsqueeze(2), weight.unsqueeze(2), gain, _with_two_axes(geometry))
        return output.squeeze(2)
    size = geometry.output_size(input.shape[2:], weight.shape[2:])
    output = empty_like_image((input.shape[0], weight.shape[0], *size), input)
    if output.numel():
        launch = _forward_launch(
            tuple(input.shape),
            tuple(weight.shape),
            gain.shape[2],
            geometry,
            (input.dtype, _precision(), is_channels_last(output)),
        )
        depthwise = weight.shape[1] == 1
        launch.run(
            _last(input), _last(weight), _gains(gain, launch.wide_gains), output, *(() if depthwise else (None,))
        )
    return output


def backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, gain: Tensor, geometry: Geometry, needs: list[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of input, weight and gain, each in the layout of what it belongs to, None where not needed."""
    if len(geometry.stride) == 1:
        grads = backward(
            *(tensor.unsqueeze(2) for tensor in (grad_output, input, weight)), gain, _with_two_axes(geometry), needs
        )
        return tuple(grad.squeeze(2) if index < 2 and grad is not None else grad for index, grad in enumerate(grads))
    if not grad_output.numel():
        return tuple(
            torch.zeros_like(tensor) if needed else None
            for tensor, needed in zip((input, weight, gain), needs, strict=True)
        )
    above, weights, gains = _last(grad_output), _last(weight), _gains(gain, False)
    grad_input = grad_weight = grad_gain = None
    if needs[0]:
        grad_input = _grad_input(above, input, weights, gains, geometry)
    if needs[1] or needs[2]:
        products = _depthwise_products if weight.shape[1] == 1 else _products
        grad_weight, grad_gain = products(above, _last(input), weights, gains, geometry, needs[1], needs[2])
    return grad_input, _laid_out(grad_weight, weight), _laid_out(grad_gain, gain)


def _with_two_axes(geometry: Geometry) -> Geometry:
    """A convolution over one axis as one over two, of which the first has size 1."""
    stride, padding, dilation, groups = geometry
    return Geometry((1, *stride), ((0, 0), *padding), (1, *dilation), groups)


def _last(image: Tensor) -> Tensor:
    """The tensor with its channels last, copied only if they are not."""
    return image.contiguous(memory_format=torch.channels_last)


def _gains(gain: Tensor, wide: bool) -> Tensor:
    """Shape (N, C2, blocks, taps) to (N, blocks, taps, C2), in single precision or its own."""
    dtype = torch.float32 if wide else gain.dtype
    return gain.permute(0, 2, 3, 1).to(dtype, memory_format=torch.contiguous_format).contiguous()


def _laid_out(grad: Tensor | None, like: Tensor) -> Tensor | None:
    """A gradient with the strides that ``torch.empty_like`` gives it."""
    if grad is None or grad.stride() == like.stride():
        return grad
    return torch.empty_like(like).copy_(grad)


def _precision() -> str:
    """How products of float32 are rounded: as PyTorch's own convolutions do it."""
    convolutions: Any = torch.backends.cudnn
    return "tf32" if convolutions.conv.fp32_precision == "tf32" else "ieee"


class _Axis(NamedTuple):
    """What a kernel of the correlate family does along one axis: the fields are its arguments, in their order.

    Position i is pixel ``first + spread * i`` of the target; through its tap number j, which is ``tap + every * j`` of the
    weight, it sees pixel ``step * i + origin + reach * j`` of the source.
    """

    positions: int
    target: int
    first: int
    spread: int
    seen: int
    step: int
    origin: int
    reach: int
    tap: int
    every: int
    taps: int


def _output_axes(size: int, out_size: int, kernel: int, stride: int, before: int, dilation: int) -> _Axis:
    return _Axis(out_size, out_size, 0, 1, size, stride, -before, dilation, 0, 1, kernel)


def _input_phases(size: int, out_size: int, kernel: int, stride: int, before: int, dilation: int) -> list[_Axis | None]:
    """For the gradient of the input, the pixels ``first``, ``first + stride``, ... for each first: these see the same
    taps, at pixels of the output's gradient that lie side by side. None where no tap sees them."""
    every = stride // gcd(dilation, stride)
    phases: list[_Axis | None] = []
    for first in range(min(stride, size)):
        phase = None
        for tap in range(min(every, kernel)):
            origin, rest = divmod(first + before - dilation * tap, stride)
            if rest == 0:
                positions, taps = -(-(size - first) // stride), -(-(kernel - tap) // every)
                reach = -dilation * every // stride
                phase = _Axis(positions, size, first, stride, out_size, 1, origin, reach, tap, every, taps)
                break
        phases.append(phase)
    return phases


class _Launch(NamedTuple):
    """All of a launch but its tensors."""

    kernel: gpu.Kernel
    programs: int
    integers: tuple[int, ...]
    wide_gains: bool = False

    def run(self, *tensors: Tensor | None) -> None:
        self.kernel.launch(self.programs, tensors, self.integers)


def _launch(module: str, tile: tiles.Tile, constants: dict[str, Any], programs: int, *integers: int) -> _Launch:
    kernel = gpu.Kernel(f"awconv.ops.fused.{module}", tile.kernel, constants | tile.sizes, tile.warps, tile.stages)
    return _Launch(kernel, programs, integers, tile.wide_gains)


def _correlate(
    axes: tuple[_Axis, _Axis],
    kernel: tuple[int, ...],
    samples: int,
    channels: tuple[int, int, int, int, int],
    transposed: bool,
    facts: tuple[torch.dtype, str, bool],
) -> _Launch:
    """A launch of ``scaled_weights`` or ``scaled_sums``.

    Args:
        axes: along y and x.
        kernel: its size.
        samples: of the batch.
        channels: rows, blocks of rows, inner, blocks of inner, groups.
        transposed: whether it makes the gradient of the input.
        facts: of the tensors: dtype, precision of products, whether the target has its channels last.
    """
    rows, row_blocks, inner, inner_blocks, groups = channels
    dtype, precision, channels_last = facts
    positions = axes[0].positions * axes[1].positions
    tile = tiles.correlate(rows, inner, positions, dtype.itemsize, transposed)
    pixel_tiles = (
        samples * -(-positions // tile.sizes["block_pixels"])
        if tile.kernel == "scaled_weights"
        else -(-samples * positions // tile.sizes["block_pixels"])
    )
    constants = dict(
        rows=rows,
        row_blocks=row_blocks,
        inner=inner,
        inner_blocks=inner_blocks,
        groups=groups,
        kernel_taps=kernel[0] * kernel[1],
        transposed=transposed,
        channels_last=channels_last,
        precision=precision,
    )
    programs = pixel_tiles * groups * row_blocks * -(-rows // tile.sizes["block_rows"])
    return _launch("triton_correlate", tile, constants, programs, samples, *_of_axes(axes), kernel[1])


def _depthwise_correlate(
    axes: tuple[_Axis, _Axis],
    kernel: tuple[int, ...],
    samples: int,
    channels: int,
    multiplier: int,
    transposed: bool,
    channels_last: bool,
) -> _Launch:
    positions = axes[0].positions * axes[1].positions
    tile = tiles.depthwise("depthwise_correlate", channels, positions)
    constants = dict(
        channels=channels,
        multiplier=multiplier,
        kernel_taps=kernel[0] * kernel[1],
        transposed=transposed,
        channels_last=channels_last,
    )
    programs = samples * -(-positions // tile.sizes["block_pixels"]) * -(-channels // tile.sizes["block_channels"])
    return _launch("triton_depthwise", tile, constants, programs, samples, *_of_axes(axes), kernel[1])


def _of_axes(axes: Sequence[Sequence[int]]) -> Iterator[int]:
    """The numbers of two axes in turn."""
    return itertools.chain(*zip(*axes, strict=True))


def _along_axes(make: Any, size: tuple[int, ...], kernel: tuple[int, ...], geometry: Geometry) -> list[Any]:
    out_size = geometry.output_size(size, kernel)
    before = [pair[0] for pair in geometry.padding]
    return list(map(make, size, out_size, kernel, geometry.stride, before, geometry.dilation))


@functools.lru_cache(maxsize=_PLANS)
def _forward_launch(
    input_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    blocks: int,
    geometry: Geometry,
    facts: tuple[torch.dtype, str, bool],
) -> _Launch:
    samples, in_channels, *size = input_shape
    out_channels, group_in, *kernel = weight_shape
    axes = tuple(_along_axes(_output_axes, tuple(size), tuple(kernel), geometry))
    if group_in == 1:
        multiplier = out_channels // in_channels
        return _depthwise_correlate(axes, tuple(kernel), samples, out_channels, multiplier, False, facts[2])
    channels = (out_channels // geometry.groups, 1, group_in // blocks, blocks, geometry.groups)
    return _correlate(axes, tuple(kernel), samples, channels, False, facts)


@functools.lru_cache(maxsize=_PLANS)
def _grad_input_launches(
    input_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    blocks: int,
    geometry: Geometry,
    facts: tuple[torch.dtype, str, bool],
) -> tuple[list[_Launch], bool]:
    """The launches, one for each phase of the stride, and whether they make every pixel."""
    samples, in_channels, *size = input_shape
    out_channels, group_in, *kernel = weight_shape
    phases_y, phases_x = _along_axes(_input_phases, tuple(size), tuple(kernel), geometry)
    launches = []
    for axes in itertools.product(filter(None, phases_y), filter(None, phases_x)):
        if group_in == 1:
            multiplier = out_channels // in_channels
            launch = _depthwise_correlate(axes, tuple(kernel), samples, in_channels, multiplier, True, facts[2])
        else:
            channels = (group_in // blocks, blocks, out_channels // geometry.groups, 1, geometry.groups)
            launch = _correlate(axes, tuple(kernel), samples, channels, True, facts)
        launches.append(launch)
    return launches, None not in phases_y and None not in phases_x


def _grad_input(above: Tensor, input: Tensor, weights: Tensor, gains: Tensor, geometry: Geometry) -> Tensor:
    grad = empty_like_image(tuple(input.shape), input)
    facts = (input.dtype, _precision(), is_channels_last(grad))
    launches, whole = _grad_input_launches(tuple(input.shape), tuple(weights.shape), gains.shape[1], geometry, facts)
    if not whole:
        grad.zero_()
    unit = None
    if input.dtype == torch.float16 and any(launch.kernel.name == "scaled_sums" for launch in launches):
        largest = gains.abs().nan_to_num(nan=0, posinf=0).amax().float()  # one sample's infinity is not another's
        unit = torch.ldexp(torch.ones_like(largest), -torch.frexp(largest.clamp(min=1)).exponent)
    if any(launch.wide_gains for launch in launches):
        gains = gains.float()
    depthwise = weights.shape[1] == 1
    for launch in launches:
        launch.run(above, weights, gains, grad, *(() if depthwise else (unit,)))
    return grad


class _Sums(NamedTuple):
    """How the gradients of weight and gain are summed."""

    products: _Launch
    add: _Launch
    pieces: tuple[int, ...]
    parts: int  # sums that each element of the gain's gradient is made of


@functools.lru_cache(maxsize=_PLANS)
def _sums(
    input_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    blocks: int,
    geometry: Geometry,
    facts: tuple[torch.dtype, str, int],
    needs: tuple[bool, bool],
) -> _Sums:
    samples, _, *size = input_shape
    out_channels, group_in, *kernel = weight_shape
    dtype, precision, processors = facts
    axes = _along_axes(_output_axes, tuple(size), tuple(kernel), geometry)
    rows, columns, taps = out_channels // geometry.groups, group_in // blocks, kernel[0] * kernel[1]
    tile = tiles.sum_products(rows, columns, axes[0].positions * axes[1].positions, dtype.itemsize)
    parts = -(-columns // tile.sizes["block_segment"])
    wide = tile.sizes["block_columns"] // tile.sizes["block_segment"]
    count = geometry.groups * -(-rows // tile.sizes["block_rows"]) * -(-taps * blocks * parts // wide)
    programs = min(processors * (2 if tile.warps == 4 else 1), count * samples)
    structure = dict(rows=rows, columns=columns, blocks=blocks, groups=geometry.groups, taps=taps)
    one_step = axes[0].positions * axes[1].positions <= tile.sizes["block_positions"]
    constants = dict(**structure, needs_weight=needs[0], needs_gain=needs[1], one_step=one_step, precision=precision)
    height, width = (axis.positions for axis in axes)
    looks = _of_axes([(axis.seen, axis.step, axis.origin, axis.reach) for axis in axes])
    integers = (samples, height, width, *divider(width), programs, *looks, kernel[1])
    added = min(tile.sizes["block_rows"], tiles.LEAST)
    added_sizes = {name: size for name, size in tile.sizes.items() if name != "block_positions"}
    add = tiles.Tile("add_pieces", added_sizes | dict(block_added=added), 4, 1)
    add_programs = count * (tile.sizes["block_rows"] // added)
    return _Sums(
        _launch("triton_sums", tile, constants, programs, *integers),
        _launch("triton_sums", add, structure, add_programs, samples, programs),
        (programs + count, tile.sizes["block_rows"], tile.sizes["block_columns"]),
        parts,
    )


def _products(
    above: Tensor, input: Tensor, weights: Tensor, gains: Tensor, geometry: Geometry, for_weight: bool, for_gain: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the weight, with its channels last, and of the gain."""
    processors = _INTERPRETED
    if input.is_cuda:
        processors = torch.cuda.get_device_properties(input.device).multi_processor_count
    facts = (input.dtype, _precision(), processors)
    shapes = tuple(input.shape), tuple(weights.shape)
    sums = _sums(*shapes, gains.shape[1], geometry, facts, (for_weight, for_gain))
    dtype = input.dtype if sums.parts == 1 else torch.float32
    grad_gains = gains.new_empty(sums.parts if for_gain else 0, *gains.shape, dtype=dtype)
    pieces = gains.new_empty(sums.pieces if for_weight else 0, dtype=torch.float32)
    sums.products.run(above, input, weights, gains, pieces, grad_gains)
    grad_weight = None
    if for_weight:
        grad_weight = torch.empty_like(weights)
        sums.add.run(pieces, grad_weight)
    if not for_gain:
        return grad_weight, None
    grad_gain = grad_gains[0] if sums.parts == 1 else grad_gains.sum(0).to(input.dtype)
    return grad_weight, grad_gain.permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=_PLANS)
def _depthwise_sums(input_shape: tuple[int, ...], weight_shape: tuple[int, ...], geometry: Geometry) -> _Launch:
    samples, in_channels, *size = input_shape
    channels, _, *kernel = weight_shape
    axes = _along_axes(_output_axes, tuple(size), tuple(kernel), geometry)
    integers = _of_axes([(axis.positions, axis.seen, axis.step, axis.origin, axis.reach) for axis in axes])
    tile = tiles.depthwise("depthwise_sum_products", channels, axes[0].positions * axes[1].positions)
    taps = kernel[0] * kernel[1]
    constants = dict(channels=channels, multiplier=channels // in_channels, taps=taps)
    programs = samples * taps * -(-channels // tile.sizes["block_channels"])
    return _launch("triton_depthwise", tile, constants, programs, samples, *integers, kernel[1])


def _depthwise_products(
    above: Tensor, input: Tensor, weights: Tensor, gains: Tensor, geometry: Geometry, for_weight: bool, for_gain: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The same where a group has one input channel."""
    gains = gains.squeeze(1)
    sums = torch.empty_like(gains, dtype=torch.float32)
    _depthwise_sums(tuple(input.shape), tuple(weights.shape), geometry).run(above, input, sums)
    grad_weight = grad_gain = None
    if for_weight:
        summed = (sums * gains).sum(0).T.reshape(weights.shape)
        grad_weight = torch.empty_like(weights).copy_(summed)
    if for_gain:
        scaled = sums * weights.reshape(weights.shape[0], -1).T
        grad_gain = scaled.to(weights.dtype).transpose(1, 2).unsqueeze(2)
    return grad_weight, grad_gain
