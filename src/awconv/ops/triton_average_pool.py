# mypy: ignore-errors
"""Adaptive average pooling over two axes and its gradient, in Triton; ``average_pool.py`` launches.

Bin i of an axis covers the positions from i * size // bins to (i + 1) * size / bins, rounded up. Sums are kept in single
precision at least, in an order that only sizes decide, and rounded once. Images may have any strides; ``channels_last``
says which axis lies side by side.
"""

from __future__ import annotations

import triton
import triton.language as tl

_SIZES = ["height", "width", "bins_y", "bins_x", "channels"]


@triton.jit(do_not_specialize=_SIZES)
def pool(
    input,  # (samples, channels, height, width)
    target,  # (samples, channels, bins_y, bins_x)
    input_n,
    input_c,
    input_y,
    input_x,
    target_n,
    target_c,
    target_y,
    target_x,
    channels,
    height,
    width,
    bins_y,
    bins_x,
    channels_last: tl.constexpr,
    block_channels: tl.constexpr,
    block_positions: tl.constexpr,
):
    """The mean of one bin of one sample, for some channels."""
    dtype: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    tiles = tl.cdiv(channels, block_channels)
    bins = bins_y * bins_x
    sample = (tl.program_id(0) // (tiles * bins)).to(tl.int64)
    channel = tl.program_id(0) // bins % tiles * block_channels + tl.arange(0, block_channels)
    bin_y = tl.program_id(0) % bins // bins_x
    bin_x = tl.program_id(0) % bins_x
    first_y = bin_y * height // bins_y
    first_x = bin_x * width // bins_x
    rows = ((bin_y + 1) * height + bins_y - 1) // bins_y - first_y
    columns = ((bin_x + 1) * width + bins_x - 1) // bins_x - first_x
    channel_exists = channel < channels
    input += sample * input_n + first_y.to(tl.int64) * input_y + first_x * input_x
    if channels_last:
        total = tl.full((block_positions, block_channels), 0, dtype)
    else:
        total = tl.full((block_channels, block_positions), 0, dtype)
    for start in range(0, rows * columns, block_positions):
        position = start + tl.arange(0, block_positions)
        exists = position < rows * columns
        at = (position // columns).to(tl.int64) * input_y + position % columns * input_x
        if channels_last:
            offsets = at[:, None] + channel.to(tl.int64)[None, :] * input_c
            mask = exists[:, None] & channel_exists[None, :]
        else:
            offsets = at[None, :] + channel.to(tl.int64)[:, None] * input_c
            mask = exists[None, :] & channel_exists[:, None]
        total += tl.load(input + offsets, mask=mask, other=0.0).to(dtype)
    mean = tl.sum(total, 0 if channels_last else 1) / (rows * columns).to(dtype)
    target += sample * target_n + bin_y * target_y + bin_x * target_x
    tl.store(target + channel.to(tl.int64) * target_c, mean.to(target.dtype.element_ty), mask=channel_exists)


@triton.jit(do_not_specialize=_SIZES)
def spread(
    grad,  # (samples, channels, bins_y, bins_x), of what pool made
    target,  # (samples, channels, height, width): the gradient of its input
    grad_n,
    grad_c,
    grad_y,
    grad_x,
    target_n,
    target_c,
    target_y,
    target_x,
    channels,
    height,
    width,
    bins_y,
    bins_x,
    added: tl.constexpr,  # to what is in target
    channels_last: tl.constexpr,
    block_channels: tl.constexpr,
    block_positions: tl.constexpr,
):
    """The gradient of the input at some positions of one sample, for some channels."""
    dtype: tl.constexpr = tl.float64 if target.dtype.element_ty == tl.float64 else tl.float32
    tiles = tl.cdiv(channels, block_channels)
    position_tiles = tl.cdiv(height * width, block_positions)
    sample = (tl.program_id(0) // (tiles * position_tiles)).to(tl.int64)
    channel = tl.program_id(0) // position_tiles % tiles * block_channels + tl.arange(0, block_channels)
    position = tl.program_id(0) % position_tiles * block_positions + tl.arange(0, block_positions)
    channel_exists = channel < channels
    exists = position < height * width
    y = position // width
    x = position % width
    at = y.to(tl.int64) * target_y + x * target_x
    if channels_last:
        offsets = at[:, None] + channel.to(tl.int64)[None, :] * target_c
        mask = exists[:, None] & channel_exists[None, :]
    else:
        offsets = at[None, :] + channel.to(tl.int64)[:, None] * target_c
        mask = exists[None, :] & channel_exists[:, None]
    target += sample * target_n + offsets
    if added:
        total = tl.load(target, mask=mask, other=0.0).to(dtype)
    elif channels_last:
        total = tl.full((block_positions, block_channels), 0, dtype)
    else:
        total = tl.full((block_channels, block_positions), 0, dtype)
    grad += sample * grad_n + channel.to(tl.int64) * grad_c
    for bin in range(bins_y * bins_x):
        bin_y = bin // bins_x
        bin_x = bin % bins_x
        first_y = bin_y * height // bins_y
        first_x = bin_x * width // bins_x
        last_y = ((bin_y + 1) * height + bins_y - 1) // bins_y
        last_x = ((bin_x + 1) * width + bins_x - 1) // bins_x
        value = tl.load(grad + bin_y * grad_y + bin_x * grad_x, mask=channel_exists, other=0.0).to(dtype)
        value = value / ((last_y - first_y) * (last_x - first_x)).to(dtype)
        covers = (y >= first_y) & (y < last_y) & (x >= first_x) & (x < last_x)
        if channels_last:
            total += tl.where(covers[:, None], value[None, :], 0.0)
        else:
            total += tl.where(covers[None, :], value[:, None], 0.0)
    tl.store(target, total.to(target.dtype.element_ty), mask=mask)
