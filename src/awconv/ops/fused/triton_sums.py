# mypy: ignore-errors
"""The gradients of an AW-convolution's weight and gain, in Triton; ``cuda.py`` launches.

Images have their channels last. With rows p (output channels), columns c (input channels) and taps t,

    u[n, t, p, c]         = sum over y of       grad_output[n, y, p] input[n, seen(y, t), c]
    grad_weight[p, t, c]  = sum over n of       gain[n, p, b(c), t] u[n, t, p, c]
    grad_gain[n, p, b, t] = sum over c of b of  weight[p, t, c] u[n, t, p, c]

A segment is the columns that share a gain: those of one tap and one block. A tile of u is rows times columns of one
segment, or of several where they are narrow. A tile for one sample is an item of work; items are dealt out evenly to a
fixed number of programs, a program adds up what it has of a tile, a piece, and ``add_pieces`` adds the pieces of a tile
in their order. All sums are kept in single precision, in an order that only sizes and the number of programs decide.
"""

from __future__ import annotations

import triton
import triton.language as tl

from awconv.ops.triton_arithmetic import divide

_SIZES = [
    *("samples", "height", "width", "multiplier", "shift", "programs"),
    *("seen_height", "seen_width", "stride_y", "stride_x", "origin_y", "origin_x", "tap_stride_y", "tap_stride_x"),
    "taps_x",
]


@triton.jit
def _gain_offset(segment, parts: tl.constexpr, blocks: tl.constexpr, taps: tl.constexpr, out_channels: tl.constexpr):
    """Where the gain of a segment lies in that of a sample."""
    return (segment // parts % blocks * taps + segment // (parts * blocks)) * out_channels


@triton.jit
def _operands(
    grad_output,  # of one sample, at the rows of a tile
    input,  # of one sample
    position,
    positions,
    width,
    multiplier,
    shift,
    stride_y,
    stride_x,
    from_y,  # of the tile's tap, or of each column's
    from_x,
    seen_height,
    seen_width,
    row_exists,
    column_exists,
    offset,
    whole_rows: tl.constexpr,
    whole_columns: tl.constexpr,
    wide: tl.constexpr,
    out_channels: tl.constexpr,
    in_channels: tl.constexpr,
):
    """Rows of grad_output, and the pixels that they see, at some positions."""
    exists = position < positions
    y = divide(position, multiplier, shift)
    seen_y = y * stride_y
    seen_x = (position - y * width) * stride_x
    if wide > 1:
        at_y = seen_y[:, None] + from_y[None, :]
        at_x = seen_x[:, None] + from_x[None, :]
        seen = exists[:, None] & column_exists[None, :]
        seen &= (at_y >= 0) & (at_y < seen_height) & (at_x >= 0) & (at_x < seen_width)
    else:
        at_y = seen_y + from_y
        at_x = seen_x + from_x
        seen = exists & (at_y >= 0) & (at_y < seen_height) & (at_x >= 0) & (at_x < seen_width)
        seen = seen[:, None]
        if not whole_columns:
            seen = seen & column_exists[None, :]
    mask = exists[None, :]
    if not whole_rows:
        mask = mask & row_exists[:, None]
    left = tl.load(grad_output + position[None, :] * out_channels, mask=mask, other=0.0)
    pixels = ((seen_y * seen_width + seen_x) * in_channels)[:, None] + offset[None, :]
    right = tl.load(input + pixels, mask=seen, other=0.0)
    return left, right


@triton.jit
def _finish(
    partial,  # a tile of u for one sample
    factor,
    total,
    gain,  # of one sample, at the rows of the tile
    grad_gain,
    part_of_gain,  # elements of a part of grad_gain
    first_segment,
    local,
    row_exists,
    needs_weight: tl.constexpr,
    needs_gain: tl.constexpr,
    wide: tl.constexpr,
    parts: tl.constexpr,
    blocks: tl.constexpr,
    taps: tl.constexpr,
    out_channels: tl.constexpr,
    tile_segment: tl.constexpr,
):
    """Scales and adds it for the weight, and reduces it for the gain."""
    if needs_gain:
        products = partial * factor.to(tl.float32)
    for index in tl.static_range(wide):
        segment = first_segment + index
        chosen = (local // tile_segment == index)[None, :]
        at = _gain_offset(segment, parts, blocks, taps, out_channels)
        real = row_exists & (segment < taps * blocks * parts)
        if needs_weight:
            scale = tl.load(gain + at, mask=real, other=0.0).to(tl.float32)[:, None]
            if wide > 1:
                total += tl.where(chosen, partial * scale, 0.0)
            else:
                total += partial * scale
        if needs_gain:
            if wide > 1:
                sums = tl.sum(tl.where(chosen, products, 0.0), 1)
            else:
                sums = tl.sum(products, 1)
            at += (segment % parts).to(tl.int64) * part_of_gain
            tl.store(grad_gain + at, sums.to(grad_gain.dtype.element_ty), mask=real)
    return total


@triton.jit(do_not_specialize=_SIZES)
def sum_products(
    grad_output,  # (samples, height, width, groups * rows)
    input,  # (samples, seen_height, seen_width, groups * blocks * columns)
    weight,  # (groups * rows, taps, blocks * columns)
    gain,  # (samples, blocks, taps, groups * rows)
    pieces,  # (programs + tiles, tile_rows, tile_columns) in single precision
    grad_gain,  # (tiles of a segment's columns, samples, blocks, taps, groups * rows)
    samples,
    height,
    width,
    multiplier,  # what divides by width
    shift,
    programs,
    seen_height,
    seen_width,
    stride_y,
    stride_x,
    origin_y,
    origin_x,
    tap_stride_y,
    tap_stride_x,
    taps_x,
    rows: tl.constexpr,
    columns: tl.constexpr,
    blocks: tl.constexpr,
    groups: tl.constexpr,
    taps: tl.constexpr,
    needs_weight: tl.constexpr,
    needs_gain: tl.constexpr,
    one_tile: tl.constexpr,  # whether a tile's positions are all of a sample
    precision: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
    tile_segment: tl.constexpr,  # columns of one segment in a tile
    tile_positions: tl.constexpr,
):
    """One program's share of the items."""
    row_tiles: tl.constexpr = (rows + tile_rows - 1) // tile_rows
    parts: tl.constexpr = (columns + tile_segment - 1) // tile_segment  # of a segment
    wide: tl.constexpr = tile_columns // tile_segment  # segments, or parts of them, in a tile
    column_tiles: tl.constexpr = (taps * blocks * parts + wide - 1) // wide
    tiles: tl.constexpr = groups * row_tiles * column_tiles
    out_channels: tl.constexpr = groups * rows
    in_channels: tl.constexpr = groups * blocks * columns
    gains: tl.constexpr = blocks * taps * out_channels
    whole_rows: tl.constexpr = rows % tile_rows == 0
    whole_columns: tl.constexpr = columns % tile_segment == 0
    is_half: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth == 16
    positions = height * width
    item = tl.program_id(0).to(tl.int64) * (samples * tiles) // programs
    last = (tl.program_id(0) + 1).to(tl.int64) * (samples * tiles) // programs
    while item < last:
        tile = (item // samples).to(tl.int32)
        first = (item % samples).to(tl.int32)
        count = tl.minimum(last - item, samples - first).to(tl.int32)
        group = tile // (row_tiles * column_tiles)
        row = tile // column_tiles % row_tiles * tile_rows + tl.arange(0, tile_rows)
        row_exists = row < rows
        out_channel = group * rows + row
        local = tl.arange(0, tile_columns)
        first_segment = tile % column_tiles * wide
        if wide > 1:
            segment = first_segment + local // tile_segment
        else:  # one for the whole tile
            segment = first_segment
        column = segment % parts * tile_segment + local % tile_segment
        block = segment // parts % blocks
        tap = segment // (parts * blocks)
        column_exists = (column < columns) & (tap < taps)
        from_y = origin_y + tap // taps_x * tap_stride_y
        from_x = origin_x + tap % taps_x * tap_stride_x
        offset = (from_y * seen_width + from_x) * in_channels + (group * blocks + block) * columns + column
        factor = 0.0
        if needs_gain:
            mask = row_exists[:, None] & column_exists[None, :]
            weights = out_channel[:, None] * (taps * blocks * columns) + (tap * blocks + block) * columns + column
            factor = tl.load(weight + weights, mask=mask, other=0.0)
            if one_tile and is_half:  # a product with one leaves it in the layout of products, where it is met
                one = (tl.arange(0, tile_columns)[:, None] == local[None, :]).to(factor.dtype)
                factor = tl.dot(factor, one).to(factor.dtype)

        total = tl.full((tile_rows, tile_columns), 0, tl.float32)
        partial = tl.full((tile_rows, tile_columns), 0, tl.float32)
        above = grad_output + out_channel[:, None]
        sample = first.to(tl.int64)
        if one_tile:
            for _ in range(count):
                left, right = _operands(
                    above + sample * positions * out_channels,
                    input + sample * seen_height * seen_width * in_channels,
                    *(tl.arange(0, tile_positions), positions, width, multiplier, shift),
                    *(stride_y, stride_x, from_y, from_x, seen_height, seen_width),
                    *(row_exists, column_exists, offset),
                    *(whole_rows, whole_columns, wide, out_channels, in_channels),
                )
                partial = tl.dot(left, right, input_precision=precision)
                total = _finish(
                    *(partial, factor, total, gain + sample * gains + out_channel),
                    *(grad_gain + sample * gains + out_channel, samples.to(tl.int64) * gains),
                    *(first_segment, local, row_exists, needs_weight, needs_gain),
                    *(wide, parts, blocks, taps, out_channels, tile_segment),
                )
                sample += 1
        else:
            for _ in range(count):
                partial = tl.full((tile_rows, tile_columns), 0, tl.float32)
                for start in range(0, positions, tile_positions):
                    left, right = _operands(
                        above + sample * positions * out_channels,
                        input + sample * seen_height * seen_width * in_channels,
                        *(start + tl.arange(0, tile_positions), positions, width, multiplier, shift),
                        *(stride_y, stride_x, from_y, from_x, seen_height, seen_width),
                        *(row_exists, column_exists, offset),
                        *(whole_rows, whole_columns, wide, out_channels, in_channels),
                    )
                    partial = tl.dot(left, right, partial, input_precision=precision)
                total = _finish(
                    *(partial, factor, total, gain + sample * gains + out_channel),
                    *(grad_gain + sample * gains + out_channel, samples.to(tl.int64) * gains),
                    *(first_segment, local, row_exists, needs_weight, needs_gain),
                    *(wide, parts, blocks, taps, out_channels, tile_segment),
                )
                sample += 1
        if needs_weight:
            piece = pieces + (tl.program_id(0) + tile).to(tl.int64) * (tile_rows * tile_columns)
            tl.store(piece + tl.arange(0, tile_rows)[:, None] * tile_columns + local[None, :], total)
        item += count


@triton.jit(do_not_specialize=["samples", "programs"])
def add_pieces(
    pieces,  # as sum_products leaves them
    grad_weight,  # (groups * rows, taps, blocks * columns)
    samples,
    programs,
    rows: tl.constexpr,
    columns: tl.constexpr,
    blocks: tl.constexpr,
    groups: tl.constexpr,
    taps: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
    tile_segment: tl.constexpr,
    tile_added: tl.constexpr,  # rows of a tile that one program adds
):
    """The gradient of the weight, from the pieces of every tile in the order of the programs that made them."""
    row_tiles: tl.constexpr = (rows + tile_rows - 1) // tile_rows
    parts: tl.constexpr = (columns + tile_segment - 1) // tile_segment
    wide: tl.constexpr = tile_columns // tile_segment
    column_tiles: tl.constexpr = (taps * blocks * parts + wide - 1) // wide
    tiles: tl.constexpr = groups * row_tiles * column_tiles
    tile = tl.program_id(0) // (tile_rows // tile_added)
    row_of_tile = tl.program_id(0) % (tile_rows // tile_added) * tile_added + tl.arange(0, tile_added)
    local = tl.arange(0, tile_columns)
    # Program p has the items from p * items // programs on.
    items = samples.to(tl.int64) * tiles
    first = ((tile.to(tl.int64) * samples + 1) * programs - 1) // items
    last = ((tile + 1).to(tl.int64) * samples * programs - 1) // items
    total = tl.full((tile_added, tile_columns), 0, tl.float32)
    for program in range(first.to(tl.int32), last.to(tl.int32) + 1):
        piece = pieces + (program + tile).to(tl.int64) * (tile_rows * tile_columns)
        total += tl.load(piece + row_of_tile[:, None] * tile_columns + local[None, :])
    row = tile // column_tiles % row_tiles * tile_rows + row_of_tile
    segment = tile % column_tiles * wide + local // tile_segment
    column = segment % parts * tile_segment + local % tile_segment
    block = segment // parts % blocks
    tap = segment // (parts * blocks)
    out_channel = tile // (row_tiles * column_tiles) * rows + row
    weights = out_channel[:, None] * (taps * blocks * columns) + ((tap * blocks + block) * columns + column)[None, :]
    exists = (row < rows)[:, None] & ((column < columns) & (tap < taps))[None, :]
    tl.store(grad_weight + weights, total.to(grad_weight.dtype.element_ty), mask=exists)
