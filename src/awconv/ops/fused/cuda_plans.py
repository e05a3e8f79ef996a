"""What the CUDA half of the fused algorithm launches: kernels, tiles and numbers, which follow from shapes alone and
are remembered by them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from math import gcd
from typing import Any, NamedTuple

import torch

from awconv.ops.fused import tiles
from awconv.ops.geometry import Geometry
from awconv.ops.gpu import Kernel, Launch

_PLANS = 4096  # that are remembered
_ADDERS = 128  # programs that add pieces, about as many as a GPU has processors


class Axis(NamedTuple):
    """What a kernel of the correlate family does along one axis: the fields are its arguments, in their order.

    Position i is pixel ``first + spread * i`` of the target; through its tap number j, which is ``tap + every * j`` of
    the weight, it sees pixel ``stride * i + origin + tap_stride * j`` of the source.
    """

    positions: int
    target: int
    first: int
    spread: int
    seen: int
    stride: int
    origin: int
    tap_stride: int
    tap: int
    every: int
    taps: int


def _output_axes(size: int, out_size: int, kernel: int, stride: int, before: int, dilation: int) -> Axis:
    return Axis(out_size, out_size, 0, 1, size, stride, -before, dilation, 0, 1, kernel)


def _input_phases(size: int, out_size: int, kernel: int, stride: int, before: int, dilation: int) -> list[Axis | None]:
    """For the gradient of the input, the pixels ``first``, ``first + stride``, ... for each first: these see the same
    taps, at pixels of the output's gradient that lie side by side. None where no tap sees them."""
    every = stride // gcd(dilation, stride)
    phases: list[Axis | None] = []
    for first in range(min(stride, size)):
        phase = None
        for tap in range(min(every, kernel)):
            origin, rest = divmod(first + before - dilation * tap, stride)
            if rest == 0:
                positions, taps = -(-(size - first) // stride), -(-(kernel - tap) // every)
                tap_stride = -dilation * every // stride
                phase = Axis(positions, size, first, stride, out_size, 1, origin, tap_stride, tap, every, taps)
                break
        phases.append(phase)
    return phases


class Correlation(NamedTuple):
    """A launch of the correlate family, and whether it reads gains in single precision."""

    launch: Launch
    wide_gains: bool


def _launch(module: str, tile: tiles.Tile, constants: dict[str, Any], programs: int, *integers: int) -> Launch:
    kernel = Kernel(f"awconv.ops.fused.{module}", tile.kernel, constants | tile.sizes, tile.warps, tile.stages)
    return Launch(kernel, programs, integers)


def _correlate(
    axes: tuple[Axis, Axis],
    kernel: tuple[int, ...],
    samples: int,
    channels: tuple[int, int, int, int, int],
    transposed: bool,
    facts: tuple[torch.dtype, str, bool],
) -> Correlation:
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
        samples * -(-positions // tile.sizes["tile_pixels"])
        if tile.kernel == "scaled_weights"
        else -(-samples * positions // tile.sizes["tile_pixels"])
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
    programs = pixel_tiles * groups * row_blocks * -(-rows // tile.sizes["tile_rows"])
    return Correlation(
        _launch("triton_correlate", tile, constants, programs, samples, *_of_axes(axes), kernel[1]), tile.wide_gains
    )


def _depthwise_correlate(
    axes: tuple[Axis, Axis],
    kernel: tuple[int, ...],
    samples: int,
    channels: int,
    multiplier: int,
    transposed: bool,
    channels_last: bool,
) -> Correlation:
    positions = axes[0].positions * axes[1].positions
    tile = tiles.depthwise("depthwise_correlate", channels, positions)
    constants = dict(
        channels=channels,
        multiplier=multiplier,
        kernel_taps=kernel[0] * kernel[1],
        transposed=transposed,
        channels_last=channels_last,
    )
    programs = samples * -(-positions // tile.sizes["tile_pixels"]) * -(-channels // tile.sizes["tile_channels"])
    return Correlation(
        _launch("triton_depthwise", tile, constants, programs, samples, *_of_axes(axes), kernel[1]), tile.wide_gains
    )


def _of_axes(axes: Sequence[Sequence[int]]) -> Iterator[int]:
    """The numbers of two axes in turn."""
    return itertools.chain(*zip(*axes, strict=True))


def _along_axes(make: Any, size: tuple[int, ...], kernel: tuple[int, ...], geometry: Geometry) -> list[Any]:
    out_size = geometry.output_size(size, kernel)
    before = [pair[0] for pair in geometry.padding]
    return list(map(make, size, out_size, kernel, geometry.stride, before, geometry.dilation))


@functools.lru_cache(maxsize=_PLANS)
def forward(
    input_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    blocks: int,
    geometry: Geometry,
    facts: tuple[torch.dtype, str, bool],
) -> Correlation:
    samples, in_channels, *size = input_shape
    out_channels, group_in, *kernel = weight_shape
    axes = tuple(_along_axes(_output_axes, tuple(size), tuple(kernel), geometry))
    if group_in == 1:
        multiplier = out_channels // in_channels
        return _depthwise_correlate(axes, tuple(kernel), samples, out_channels, multiplier, False, facts[2])
    channels = (out_channels // geometry.groups, 1, group_in // blocks, blocks, geometry.groups)
    return _correlate(axes, tuple(kernel), samples, channels, False, facts)


@functools.lru_cache(maxsize=_PLANS)
def grad_input(
    input_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    blocks: int,
    geometry: Geometry,
    facts: tuple[torch.dtype, str, bool],
) -> tuple[list[Correlation], bool]:
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


class Sums(NamedTuple):
    """How the gradients of weight and gain are summed."""

    products: Launch
    add: Launch
    pieces: tuple[int, ...]
    parts: int  # sums that each element of the gain's gradient is made of


@functools.lru_cache(maxsize=_PLANS)
def sums(
    input_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    blocks: int,
    geometry: Geometry,
    facts: tuple[torch.dtype, str, int],
    needs: tuple[bool, bool],
) -> Sums:
    samples, _, *size = input_shape
    out_channels, group_in, *kernel = weight_shape
    dtype, precision, processors = facts
    axes = _along_axes(_output_axes, tuple(size), tuple(kernel), geometry)
    rows, columns, taps = out_channels // geometry.groups, group_in // blocks, kernel[0] * kernel[1]
    height, width = (axis.positions for axis in axes)
    tile = tiles.sum_products(rows, columns, height * width, dtype.itemsize)
    parts = -(-columns // tile.sizes["tile_segment"])
    wide = tile.sizes["tile_columns"] // tile.sizes["tile_segment"]
    count = geometry.groups * -(-rows // tile.sizes["tile_rows"]) * -(-taps * blocks * parts // wide)
    programs = min(processors * (2 if tile.warps == 4 else 1), count * samples)
    structure = dict(rows=rows, columns=columns, blocks=blocks, groups=geometry.groups, taps=taps)
    tile_x = tiles.side_by_side(height, width, tile.sizes["tile_positions"])
    one_chunk = width <= tile_x and height <= tile.sizes["tile_positions"] // tile_x
    constants = dict(**structure, needs_weight=needs[0], needs_gain=needs[1], one_chunk=one_chunk, precision=precision)
    constants["tile_x"] = tile_x
    looks = _of_axes([(axis.seen, axis.stride, axis.origin, axis.tap_stride) for axis in axes])
    integers = (samples, height, width, programs, *looks, kernel[1])
    added = min(tile.sizes["tile_rows"], tiles.LEAST)
    while added > 1 and count * (tile.sizes["tile_rows"] // added) < _ADDERS:
        added //= 2
    added_sizes = {name: tile.sizes[name] for name in ("tile_rows", "tile_columns", "tile_segment")}
    add = tiles.Tile("add_pieces", added_sizes | dict(tile_added=added), 4, 1)
    add_programs = count * (tile.sizes["tile_rows"] // added)
    return Sums(
        _launch("triton_sums", tile, constants, programs, *integers),
        _launch("triton_sums", add, structure, add_programs, samples, programs),
        (programs + count, tile.sizes["tile_rows"], tile.sizes["tile_columns"]),
        parts,
    )


@functools.lru_cache(maxsize=_PLANS)
def depthwise_sums(input_shape: tuple[int, ...], weight_shape: tuple[int, ...], geometry: Geometry) -> Launch:
    samples, in_channels, *size = input_shape
    channels, _, *kernel = weight_shape
    axes = _along_axes(_output_axes, tuple(size), tuple(kernel), geometry)
    integers = _of_axes([(axis.positions, axis.seen, axis.stride, axis.origin, axis.tap_stride) for axis in axes])
    tile = tiles.depthwise("depthwise_sum_products", channels, axes[0].positions * axes[1].positions)
    taps = kernel[0] * kernel[1]
    constants = dict(channels=channels, multiplier=channels // in_channels, taps=taps)
    programs = samples * taps * -(-channels // tile.sizes["tile_channels"])
    return _launch("triton_depthwise", tile, constants, programs, samples, *integers, kernel[1])
