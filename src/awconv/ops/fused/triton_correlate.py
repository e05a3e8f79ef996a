# mypy: ignore-errors
"""The output of an AW-convolution and the gradient of its input, in Triton; ``cuda.py`` launches.

Images have their channels last. With ``rows`` the channels that are made, ``inner`` those that are summed over, and
seen(y, t) = stride y + origin + tap_stride t,

    target[n, y, r] = sum over taps t and k of  gain[n, t, .] weight[t, r, k] source[n, seen(y, t), k]

where the gain belongs to output channels: to the rows of the output, to the inner channels of the gradient of the input
(``transposed``), which for one phase of the stride is such a sum too. The kernels differ in what the gain meets:
``scaled_weights`` the weights of one sample, ``scaled_sums`` the sum of a tap, or pixels, of several samples. Sums are
kept in single precision, in an order that only sizes and tiles decide, and rounded once.

What decides the code are channels; sizes of images, the batch, strides and taps are ordinary arguments.
"""

from __future__ import annotations

import triton
import triton.language as tl

_SIZES = [
    *("samples", "height", "width"),
    *("target_height", "target_width", "first_y", "first_x", "spread_y", "spread_x"),
    *("seen_height", "seen_width", "stride_y", "stride_x", "origin_y", "origin_x", "tap_stride_y", "tap_stride_x"),
    *("tap_y", "tap_x", "every_y", "every_x", "taps_y", "taps_x", "kernel_x"),
]


@triton.jit
def _seen_taps(exists, seen_y, seen_x, seen_height, seen_width, tap_stride_y, tap_stride_x, taps_y, taps_x):
    """For each position, one bit for each tap: whether it sees a pixel, and no padding."""
    sees = tl.where(exists, 0, 0)
    at_y = seen_y
    at_x = seen_x
    index_x = 0
    for index in range(taps_y * taps_x):
        seen = exists & (at_y >= 0) & (at_y < seen_height) & (at_x >= 0) & (at_x < seen_width)
        sees |= seen.to(tl.int32) << index
        index_x += 1
        at_x += tap_stride_x
        if index_x == taps_x:
            index_x = 0
            at_x = seen_x
            at_y += tap_stride_y
    return sees


@triton.jit
def _next(part, index_y, index_x, parts: tl.constexpr, taps_x):
    """The next part of the inner channels, and after the last one the next tap."""
    part += 1
    index_x += (part == parts).to(tl.int32)
    part = tl.where(part == parts, 0, part)
    index_y += (index_x == taps_x).to(tl.int32)
    index_x = tl.where(index_x == taps_x, 0, index_x)
    return part, index_y, index_x


@triton.jit(do_not_specialize=_SIZES)
def scaled_weights(
    source,  # (samples, seen_height, seen_width, groups * inner_blocks * inner)
    weight,  # (output channels, taps, input channels of a group)
    gain,  # (samples, blocks, taps, output channels); loads of less than 32 bits are not pipelined
    target,  # (samples, target_height, target_width, groups * row_blocks * rows)
    unit,  # None: for scaled_sums
    samples,
    height,  # positions along each axis: first + spread * position in target
    width,
    target_height,
    target_width,
    first_y,
    first_x,
    spread_y,
    spread_x,
    seen_height,
    seen_width,
    stride_y,
    stride_x,
    origin_y,
    origin_x,
    tap_stride_y,
    tap_stride_x,
    tap_y,  # taps along each axis: tap + every * index, a number of taps_y and taps_x
    tap_x,
    every_y,
    every_x,
    taps_y,
    taps_x,
    kernel_x,
    rows: tl.constexpr,
    row_blocks: tl.constexpr,
    inner: tl.constexpr,
    inner_blocks: tl.constexpr,
    groups: tl.constexpr,
    kernel_taps: tl.constexpr,
    transposed: tl.constexpr,
    channels_last: tl.constexpr,  # of target; the image is contiguous otherwise
    precision: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_pixels: tl.constexpr,
    tile_inner: tl.constexpr,
):
    """A tile of channels times positions of one sample. The weights are scaled in registers, and rounded as the weights
    of every sample would be."""
    row_tiles: tl.constexpr = (rows + tile_rows - 1) // tile_rows
    tiles: tl.constexpr = groups * row_blocks * row_tiles
    tile = tl.program_id(0) % tiles  # those of the same pixels run at a time, and find them in the cache
    group = tile // (row_blocks * row_tiles)
    row_block = tile // row_tiles % row_blocks
    row = tile % row_tiles * tile_rows + tl.arange(0, tile_rows)
    row_exists = row < rows

    positions = height * width
    pixel_tiles = tl.cdiv(positions, tile_pixels)
    sample = (tl.program_id(0) // tiles // pixel_tiles).to(tl.int64)
    position = tl.program_id(0) // tiles % pixel_tiles * tile_pixels + tl.arange(0, tile_pixels)
    exists = position < positions
    y = position // width
    x = position % width
    seen_y = y * stride_y + origin_y
    seen_x = x * stride_x + origin_x

    source_channels: tl.constexpr = groups * inner_blocks * inner
    source += sample * seen_height * seen_width * source_channels + group * (inner_blocks * inner)
    pixel = (seen_y * seen_width + seen_x) * source_channels
    if transposed:  # weight (k, tap, row): the columns of a block, of the output channels of a group
        columns: tl.constexpr = row_blocks * rows
        weight += group * inner * (kernel_taps * columns) + row_block * rows
        gain += (sample * row_blocks + row_block) * (kernel_taps * groups * inner) + group * inner
    else:
        columns: tl.constexpr = inner_blocks * inner
        weight += group * rows * (kernel_taps * columns)
        gain += sample * (inner_blocks * kernel_taps * groups * rows) + group * rows

    inner_tiles: tl.constexpr = (inner + tile_inner - 1) // tile_inner
    total = tl.full((tile_rows, tile_pixels), 0, tl.float32)
    few_taps: tl.constexpr = kernel_taps < 32
    if few_taps:  # bit t: whether a position sees the image through tap t
        sees = _seen_taps(exists, seen_y, seen_x, seen_height, seen_width, tap_stride_y, tap_stride_x, taps_y, taps_x)[
            None, :
        ]
    part = 0  # of the inner channels
    index_y = 0
    index_x = 0
    for _ in range(taps_y * taps_x * (inner_blocks * inner_tiles)):
        channel = part % inner_tiles * tile_inner + tl.arange(0, tile_inner)
        block = part // inner_tiles
        tap = (tap_y + every_y * index_y) * kernel_x + tap_x + every_x * index_x
        if transposed:  # before the other loads, for which it waits less
            gains = gain + tap * (groups * inner) + channel
            if inner % tile_inner == 0:
                scale = tl.load(gains)
            else:
                scale = tl.load(gains, mask=channel < inner, other=0.0)
        else:
            gains = gain + (block * kernel_taps + tap) * (groups * rows) + row
            if rows % tile_rows == 0:
                scale = tl.load(gains)
            else:
                scale = tl.load(gains, mask=row_exists, other=0.0)
        if few_taps:
            seen = ((sees >> (index_y * taps_x + index_x)) & 1) != 0
        else:
            at_y = seen_y + index_y * tap_stride_y
            at_x = seen_x + index_x * tap_stride_x
            seen = (exists & (at_y >= 0) & (at_y < seen_height) & (at_x >= 0) & (at_x < seen_width))[None, :]
        shift = (index_y * tap_stride_y * seen_width + index_x * tap_stride_x) * source_channels + block * inner
        if transposed:
            weights = channel[None, :] * (kernel_taps * columns) + row[:, None]
        else:
            weights = row[:, None] * (kernel_taps * columns) + block * inner + channel[None, :]
        weights += tap * columns
        pixels = shift + pixel[None, :] + channel[:, None]
        if inner % tile_inner == 0:
            right = tl.load(source + pixels, mask=seen, other=0.0)
            if rows % tile_rows == 0:
                left = tl.load(weight + weights)
            else:
                left = tl.load(weight + weights, mask=row_exists[:, None], other=0.0)
        else:
            right = tl.load(source + pixels, mask=seen & (channel < inner)[:, None], other=0.0)
            left = tl.load(weight + weights, mask=row_exists[:, None] & (channel < inner)[None, :], other=0.0)
        if transposed:
            left = left * scale.to(left.dtype)[None, :]
        else:
            left = left * scale.to(left.dtype)[:, None]
        total = tl.dot(left, right, total, input_precision=precision)
        part, index_y, index_x = _next(part, index_y, index_x, inner_blocks * inner_tiles, taps_x)
    target_channels: tl.constexpr = groups * row_blocks * rows
    target += sample * target_height * target_width * target_channels
    pixel = (first_y + spread_y * y) * target_width + first_x + spread_x * x
    row += (group * row_blocks + row_block) * rows
    if channels_last:
        pixel *= target_channels
    else:
        row *= target_height * target_width
    tl.store(
        target + pixel[None, :] + row[:, None],
        total.to(target.dtype.element_ty),
        mask=row_exists[:, None] & exists[None, :],
    )


@triton.jit(do_not_specialize=_SIZES)
def scaled_sums(
    source,  # as scaled_weights takes them
    weight,
    gain,
    target,
    unit,  # (samples,), powers of two, or None
    samples,
    height,
    width,
    target_height,
    target_width,
    first_y,
    first_x,
    spread_y,
    spread_x,
    seen_height,
    seen_width,
    stride_y,
    stride_x,
    origin_y,
    origin_x,
    tap_stride_y,
    tap_stride_x,
    tap_y,
    tap_x,
    every_y,
    every_x,
    taps_y,
    taps_x,
    kernel_x,
    rows: tl.constexpr,
    row_blocks: tl.constexpr,
    inner: tl.constexpr,
    inner_blocks: tl.constexpr,
    groups: tl.constexpr,
    kernel_taps: tl.constexpr,
    transposed: tl.constexpr,
    channels_last: tl.constexpr,  # of target; the image is contiguous otherwise
    precision: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_pixels: tl.constexpr,
    tile_inner: tl.constexpr,
):
    """A tile of positions, of several samples where they are small, times channels.

    For the output, each tap's sum is scaled in single precision. For the gradient of the input, the pixels are scaled
    and rounded; times their sample's ``unit`` they cannot overflow, which is undone in the end.
    """
    row_tiles: tl.constexpr = (rows + tile_rows - 1) // tile_rows
    tiles: tl.constexpr = groups * row_blocks * row_tiles
    tile = tl.program_id(0) % tiles  # those of the same pixels run at a time, and find them in the cache
    group = tile // (row_blocks * row_tiles)
    row_block = tile // row_tiles % row_blocks
    row = tile % row_tiles * tile_rows + tl.arange(0, tile_rows)
    row_exists = row < rows

    positions = height * width
    start = (tl.program_id(0) // tiles).to(tl.int64) * tile_pixels
    position = (start % positions).to(tl.int32) + tl.arange(0, tile_pixels)
    sample = start // positions + position // positions
    position = position % positions
    exists = sample < samples
    y = position // width
    x = position % width
    seen_y = y * stride_y + origin_y
    seen_x = x * stride_x + origin_x

    source_channels: tl.constexpr = groups * inner_blocks * inner
    source += group * (inner_blocks * inner)
    pixel = (sample * seen_height * seen_width + seen_y * seen_width + seen_x) * source_channels
    if transposed:
        columns: tl.constexpr = row_blocks * rows
        weight += group * inner * (kernel_taps * columns) + row_block * rows
        gains = gain + (sample * row_blocks + row_block) * (kernel_taps * groups * inner) + group * inner
    else:
        columns: tl.constexpr = inner_blocks * inner
        weight += group * rows * (kernel_taps * columns)
        gains = gain + sample * (inner_blocks * kernel_taps * groups * rows) + group * rows

    if unit is not None:
        units = tl.load(unit + sample, mask=exists, other=1.0)
    inner_tiles: tl.constexpr = (inner + tile_inner - 1) // tile_inner
    total = tl.full((tile_pixels, tile_rows), 0, tl.float32)
    partial = tl.full((tile_pixels, tile_rows), 0, tl.float32)
    few_taps: tl.constexpr = kernel_taps < 32
    if few_taps:  # bit t: whether a position sees the image through tap t
        sees = _seen_taps(exists, seen_y, seen_x, seen_height, seen_width, tap_stride_y, tap_stride_x, taps_y, taps_x)[
            :, None
        ]
    part = 0
    index_y = 0
    index_x = 0
    for _ in range(taps_y * taps_x * (inner_blocks * inner_tiles)):
        channel = part % inner_tiles * tile_inner + tl.arange(0, tile_inner)
        block = part // inner_tiles
        tap = (tap_y + every_y * index_y) * kernel_x + tap_x + every_x * index_x
        if few_taps:
            seen = ((sees >> (index_y * taps_x + index_x)) & 1) != 0
        else:
            at_y = seen_y + index_y * tap_stride_y
            at_x = seen_x + index_x * tap_stride_x
            seen = (exists & (at_y >= 0) & (at_y < seen_height) & (at_x >= 0) & (at_x < seen_width))[:, None]
        rows_down = (index_y * tap_stride_y).to(tl.int64)
        shift = (rows_down * seen_width + index_x * tap_stride_x) * source_channels + block * inner
        if transposed:
            weights = channel[:, None] * (kernel_taps * columns) + row[None, :]
        else:
            weights = row[None, :] * (kernel_taps * columns) + block * inner + channel[:, None]
        weights += tap * columns
        pixels = shift + pixel[:, None] + channel[None, :]
        if inner % tile_inner == 0:
            left = tl.load(source + pixels, mask=seen, other=0.0)
            if rows % tile_rows == 0:
                right = tl.load(weight + weights)
            else:
                right = tl.load(weight + weights, mask=row_exists[None, :], other=0.0)
        else:
            left = tl.load(source + pixels, mask=seen & (channel < inner)[None, :], other=0.0)
            right = tl.load(weight + weights, mask=row_exists[None, :] & (channel < inner)[:, None], other=0.0)
        if transposed:
            here = exists[:, None] & (channel < inner)[None, :]
            scale = tl.load(gains[:, None] + (tap * (groups * inner) + channel)[None, :], mask=here, other=0.0)
            scale = scale.to(tl.float32)
            if unit is not None:
                scale = scale * units[:, None]
            left = (left.to(tl.float32) * scale).to(source.dtype.element_ty)
            total = tl.dot(left, right, total, input_precision=precision)
        else:
            partial = tl.dot(left, right, partial, input_precision=precision)
            if part % inner_tiles == inner_tiles - 1:
                here = exists[:, None] & row_exists[None, :]
                scaled = gains[:, None] + ((block * kernel_taps + tap) * (groups * rows) + row)[None, :]
                total += partial * tl.load(scaled, mask=here, other=0.0).to(tl.float32)
                partial = tl.full((tile_pixels, tile_rows), 0, tl.float32)
        part, index_y, index_x = _next(part, index_y, index_x, inner_blocks * inner_tiles, taps_x)
    if unit is not None:
        total = total / units[:, None]
    target_channels: tl.constexpr = groups * row_blocks * rows
    pixel = (first_y + spread_y * y) * target_width + first_x + spread_x * x
    row += (group * row_blocks + row_block) * rows
    if channels_last:
        pixel *= target_channels
    else:
        row *= target_height * target_width
    tl.store(
        target + (sample * target_height * target_width * target_channels + pixel)[:, None] + row[None, :],
        total.to(target.dtype.element_ty),
        mask=exists[:, None] & row_exists[None, :],
    )
