# mypy: ignore-errors
"""Adaptive average pooling over two axes and its gradient, in Triton; ``average_pool.py`` launches.

Bin i of an axis covers the positions from i * size // bins to (i + 1) * size / bins, rounded up. Sums are kept in
single precision at least, in an order that only sizes decide, and rounded once. Images have their channels last or are
contiguous; a sample stays within 32 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from awconv.ops.triton_arithmetic import divide


@triton.jit
def _strides(channels: tl.constexpr, height, width, channels_last: tl.constexpr):
    """Along channels, y and x."""
    if channels_last:
        return 1, width * channels, channels
    else:
        return height * width, width, 1


@triton.jit
def _crossed(positions, channels, channels_last: tl.constexpr):
    """Numbers of positions and of channels along the axes of a tile."""
    if channels_last:
        return positions[:, None], channels[None, :]
    else:
        return positions[None, :], channels[:, None]


@triton.jit
def _zeros(positions: tl.constexpr, channels: tl.constexpr, channels_last: tl.constexpr, dtype: tl.constexpr):
    if channels_last:
        return tl.full((positions, channels), 0, dtype)
    else:
        return tl.full((channels, positions), 0, dtype)


@triton.jit
def _bin(index, size, bins, by_bins, by_bins_shift):
    """The first position that a bin covers, and how many it covers."""
    first = divide(index * size, by_bins, by_bins_shift)
    return first, divide((index + 1) * size + bins - 1, by_bins, by_bins_shift) - first


@triton.jit(
    do_not_specialize=[
        *("height", "width", "bins_y", "bins_x"),
        *("by_bins_y", "by_bins_y_shift", "by_bins_x", "by_bins_x_shift"),
    ]
)
def pool(
    input,  # (samples, channels, height, width)
    target,  # (samples, channels, bins_y, bins_x)
    height,
    width,
    bins_y,
    bins_x,
    by_bins_y,
    by_bins_y_shift,
    by_bins_x,
    by_bins_x_shift,
    channels: tl.constexpr,
    channels_last: tl.constexpr,
    each: tl.constexpr,  # bins of a program
    tiles_y: tl.constexpr,  # that hold the largest bin
    tiles_x: tl.constexpr,
    tile_channels: tl.constexpr,
    tile_y: tl.constexpr,
    tile_x: tl.constexpr,
    stages: tl.constexpr,
):
    """The means of some bins of one sample, for some channels."""
    dtype: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    channel_tiles: tl.constexpr = (channels + tile_channels - 1) // tile_channels
    tiles: tl.constexpr = tiles_y * tiles_x
    bins = bins_y * bins_x
    shares = tl.cdiv(bins, each)
    sample = (tl.program_id(0) // (channel_tiles * shares)).to(tl.int64)
    channel = tl.program_id(0) // shares % channel_tiles * tile_channels + tl.arange(0, tile_channels)
    channel_exists = channel < channels
    input_c, input_y, input_x = _strides(channels, height, width, channels_last)
    target_c, target_y, target_x = _strides(channels, bins_y, bins_x, channels_last)
    input += sample * channels * height * width
    target += sample * channels * bins
    y = tl.arange(0, tile_y * tile_x) // tile_x
    x = tl.arange(0, tile_y * tile_x) % tile_x
    of_positions, of_channels = _crossed(y * input_y + x * input_x, channel * input_c, channels_last)
    offsets = of_positions + of_channels
    first = tl.program_id(0) % shares * each
    total = _zeros(tile_y * tile_x, tile_channels, channels_last, dtype)
    for step in tl.range(0, each * tiles, num_stages=stages):  # one loop, so that loads run ahead into the next bin
        bin = first if each == 1 else first + step // tiles
        bin_y = bin // bins_x
        bin_x = bin % bins_x
        first_y, rows = _bin(bin_y, height, bins_y, by_bins_y, by_bins_y_shift)
        first_x, columns = _bin(bin_x, width, bins_x, by_bins_x, by_bins_x_shift)
        start_y = step % tiles // tiles_x * tile_y
        start_x = step % tiles_x * tile_x
        exists = (start_y + y < rows) & (start_x + x < columns) & (bin < bins)
        position_mask, channel_mask = _crossed(exists, channel_exists, channels_last)
        start = (first_y + start_y) * input_y + (first_x + start_x) * input_x
        total += tl.load(input + start + offsets, mask=position_mask & channel_mask, other=0.0).to(dtype)
        if step % tiles == tiles - 1:
            mean = tl.sum(total, 0 if channels_last else 1) / (rows * columns).to(dtype)
            at = bin_y * target_y + bin_x * target_x + channel * target_c
            tl.store(target + at, mean.to(target.dtype.element_ty), mask=channel_exists & (bin < bins))
            total = _zeros(tile_y * tile_x, tile_channels, channels_last, dtype)


@triton.jit(
    do_not_specialize=[
        *("height", "width", "bins_y", "bins_x", "by_height", "by_height_shift", "by_width"),
        *("by_width_shift", "by_bins_y", "by_bins_y_shift", "by_bins_x", "by_bins_x_shift"),
    ]
)
def spread(
    grad,  # (samples, channels, bins_y, bins_x), of what pool made
    target,  # (samples, channels, height, width): the gradient of its input
    height,
    width,
    bins_y,
    bins_x,
    by_height,
    by_height_shift,
    by_width,
    by_width_shift,
    by_bins_y,
    by_bins_y_shift,
    by_bins_x,
    by_bins_x_shift,
    added: tl.constexpr,  # to what is in target
    cover_y: tl.constexpr,  # bins that cover a position, at most
    cover_x: tl.constexpr,
    channels: tl.constexpr,
    channels_last: tl.constexpr,
    each: tl.constexpr,  # rows of positions of a program
    tile_channels: tl.constexpr,
    tile_x: tl.constexpr,
    stages: tl.constexpr,
):
    """The gradient of the input at positions of some rows of one sample, for some channels."""
    dtype: tl.constexpr = tl.float64 if target.dtype.element_ty == tl.float64 else tl.float32
    channel_tiles: tl.constexpr = (channels + tile_channels - 1) // tile_channels
    tiles_x = tl.cdiv(width, tile_x)
    shares = tl.cdiv(height, each)
    program = tl.program_id(0)
    x = program % tiles_x * tile_x + tl.arange(0, tile_x)
    first = program // tiles_x % shares * each
    channel = program // (tiles_x * shares) % channel_tiles * tile_channels + tl.arange(0, tile_channels)
    sample = (program // (tiles_x * shares * channel_tiles)).to(tl.int64)
    channel_exists = channel < channels
    x_exists = x < width
    target_c, target_y, target_x = _strides(channels, height, width, channels_last)
    of_positions, of_channels = _crossed(x * target_x, channel * target_c, channels_last)
    position_mask, channel_mask = _crossed(x_exists, channel_exists, channels_last)
    mask = position_mask & channel_mask
    target += sample * channels * height * width
    grad_c, grad_y, grad_x = _strides(channels, bins_y, bins_x, channels_last)
    grad += sample * channels * bins_y * bins_x
    lowest_x = divide(x * bins_x, by_width, by_width_shift)  # the first bin that covers a position
    for y in tl.range(first, tl.minimum(first + each, height), num_stages=stages):
        row = target + y * target_y + (of_positions + of_channels)
        if added:
            total = tl.load(row, mask=mask, other=0.0).to(dtype)
        else:
            total = _zeros(tile_x, tile_channels, channels_last, dtype)
        lowest_y = divide(y * bins_y, by_height, by_height_shift)
        for beyond_y in tl.static_range(cover_y):
            bin_y = lowest_y + beyond_y
            first_y, rows = _bin(bin_y, height, bins_y, by_bins_y, by_bins_y_shift)
            if (bin_y < bins_y) & (first_y <= y):
                share_y = 1 / rows.to(dtype)
                for beyond_x in tl.static_range(cover_x):
                    bin_x = lowest_x + beyond_x
                    first_x, columns = _bin(bin_x, width, bins_x, by_bins_x, by_bins_x_shift)
                    covered = x_exists & (bin_x < bins_x) & (first_x <= x)
                    position_mask, channel_mask = _crossed(covered, channel_exists, channels_last)
                    of_bins, of_its_channels = _crossed(bin_x * grad_x, channel * grad_c, channels_last)
                    share, _ = _crossed(1 / columns.to(dtype), channel, channels_last)
                    value = tl.load(
                        grad + bin_y * grad_y + of_bins + of_its_channels, mask=position_mask & channel_mask, other=0.0
                    )
                    total += value.to(dtype) * (share * share_y)
        tl.store(row, total.to(target.dtype.element_ty), mask=mask)
