# mypy: ignore-errors
"""AW-convolutions whose groups have one input channel, in Triton: nothing to multiply as matrices. The symbols are
those of ``triton_correlate.py`` and ``triton_sums.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from awconv.ops.fused.triton_correlate import _SIZES


@triton.jit(do_not_specialize=_SIZES)
def depthwise_correlate(
    source,  # (samples, seen_height, seen_width, input channels; output channels if transposed)
    weight,  # (output channels, taps)
    gain,  # (samples, 1, taps, output channels)
    target,  # (samples, target_height, target_width, channels)
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
    channels: tl.constexpr,
    multiplier: tl.constexpr,  # output channels of an input channel
    kernel_taps: tl.constexpr,
    transposed: tl.constexpr,
    channels_last: tl.constexpr,  # of target; the image is contiguous otherwise
    tile_channels: tl.constexpr,
    tile_pixels: tl.constexpr,
):
    """The output, or the gradient of the input: a tile of positions of one sample times channels."""
    tiles: tl.constexpr = (channels + tile_channels - 1) // tile_channels
    channel = tl.program_id(0) % tiles * tile_channels + tl.arange(0, tile_channels)
    channel_exists = channel < channels
    positions = height * width
    pixel_tiles = tl.cdiv(positions, tile_pixels)
    sample = (tl.program_id(0) // tiles // pixel_tiles).to(tl.int64)
    position = tl.program_id(0) // tiles % pixel_tiles * tile_pixels + tl.arange(0, tile_pixels)
    exists = position < positions
    y = position // width
    x = position % width
    seen_y = y * stride_y + origin_y
    seen_x = x * stride_x + origin_x

    terms: tl.constexpr = multiplier if transposed else 1  # output channels that a channel sums over
    source_channels: tl.constexpr = channels * multiplier if transposed else channels // multiplier
    source += sample * seen_height * seen_width * source_channels
    pixel = (seen_y * seen_width + seen_x) * source_channels
    out_channels: tl.constexpr = channels * terms
    total = tl.full((tile_pixels, tile_channels), 0, tl.float32)
    for term in range(taps_y * taps_x * terms):
        index_y = term // terms // taps_x
        index_x = term // terms % taps_x
        if transposed:
            out_channel = channel * multiplier + term % terms
            source_channel = out_channel
        else:
            out_channel = channel
            source_channel = channel // multiplier
        tap = (tap_y + every_y * index_y) * kernel_x + tap_x + every_x * index_x
        at_y = seen_y + index_y * tap_stride_y
        at_x = seen_x + index_x * tap_stride_x
        seen = exists & (at_y >= 0) & (at_y < seen_height) & (at_x >= 0) & (at_x < seen_width)
        pixels = (index_y * tap_stride_y * seen_width + index_x * tap_stride_x) * source_channels + pixel
        value = tl.load(
            source + pixels[:, None] + source_channel[None, :], mask=seen[:, None] & channel_exists[None, :], other=0.0
        )
        factor = tl.load(weight + out_channel * kernel_taps + tap, mask=channel_exists, other=0.0)
        gains = gain + (sample * kernel_taps + tap) * out_channels + out_channel
        scale = tl.load(gains, mask=channel_exists, other=0.0)
        total += value.to(tl.float32) * (scale.to(tl.float32) * factor.to(tl.float32))[None, :]
    target += sample * target_height * target_width * channels
    pixel = (first_y + spread_y * y) * target_width + first_x + spread_x * x
    if channels_last:
        pixel *= channels
    else:
        channel *= target_height * target_width
    tl.store(
        target + pixel[:, None] + channel[None, :],
        total.to(target.dtype.element_ty),
        mask=exists[:, None] & channel_exists[None, :],
    )


@triton.jit(
    do_not_specialize=[
        *("samples", "height", "width", "seen_height", "seen_width", "stride_y", "stride_x"),
        *("origin_y", "origin_x", "tap_stride_y", "tap_stride_x", "taps_x"),
    ]
)
def depthwise_sum_products(
    grad_output,  # (samples, height, width, channels)
    input,  # (samples, seen_height, seen_width, channels // multiplier)
    sums,  # u, (samples, taps, channels) in single precision
    samples,
    height,
    width,
    seen_height,
    seen_width,
    stride_y,
    stride_x,
    origin_y,
    origin_x,
    tap_stride_y,
    tap_stride_x,
    taps_x,
    channels: tl.constexpr,
    multiplier: tl.constexpr,
    taps: tl.constexpr,
    tile_channels: tl.constexpr,
    tile_pixels: tl.constexpr,
):
    """``u``, so small that it is stored: for some channels, one tap, one sample."""
    tiles: tl.constexpr = (channels + tile_channels - 1) // tile_channels
    tap = tl.program_id(0) % taps  # those of the same channels run at a time, and find them in the cache
    channel = tl.program_id(0) // taps % tiles * tile_channels + tl.arange(0, tile_channels)
    sample = (tl.program_id(0) // (taps * tiles)).to(tl.int64)
    channel_exists = channel < channels
    from_y = tap // taps_x * tap_stride_y + origin_y
    from_x = tap % taps_x * tap_stride_x + origin_x
    positions = height * width
    in_channels: tl.constexpr = channels // multiplier
    grad_output += sample * positions * channels
    input += sample * seen_height * seen_width * in_channels
    total = tl.full((tile_pixels, tile_channels), 0, tl.float32)
    for start in range(0, positions, tile_pixels):
        position = start + tl.arange(0, tile_pixels)
        exists = position < positions
        at_y = position // width * stride_y + from_y
        at_x = position % width * stride_x + from_x
        seen = exists & (at_y >= 0) & (at_y < seen_height) & (at_x >= 0) & (at_x < seen_width)
        left = tl.load(
            grad_output + position[:, None] * channels + channel[None, :],
            mask=exists[:, None] & channel_exists[None, :],
            other=0.0,
        )
        right = tl.load(
            input + ((at_y * seen_width + at_x) * in_channels)[:, None] + (channel // multiplier)[None, :],
            mask=seen[:, None] & channel_exists[None, :],
            other=0.0,
        )
        total += left.to(tl.float32) * right.to(tl.float32)
    tl.store(sums + (sample * taps + tap) * channels + channel, tl.sum(total, 0), mask=channel_exists)
