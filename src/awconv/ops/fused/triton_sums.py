# mypy: ignore-errors
"""The gradients of an AW-convolution's weight and gain, in Triton; ``cuda.py`` launches.

Images have their channels last. With rows p (output channels), columns c (input channels) and taps t,

    u[n, t, p, c]         = sum over y of       grad_output[n, y, p] input[n, seen(y, t), c]
    grad_weight[p, t, c]  = sum over n of       gain[n, p, b(c), t] u[n, t, p, c]
    grad_gain[n, p, b, t] = sum over c of b of  weight[p, t, c] u[n, t, p, c]

A segment is the columns that share a gain: those of one tap and one block. A tile of u is rows times columns of one
segment, or of several where they are narrow. A tile for one sample is an item of work; items are dealt out evenly to a
fixed number of programs, a program adds up what it has of a tile, a piece, and ``add_pieces`` adds the pieces of a tile
in their order. All programs are at about the same samples at a time, which they find in the cache. All sums are kept in
single precision, in an order that only sizes and the number of programs decide.
"""

from __future__ import annotations

import triton
import triton.language as tl

_SIZES = [
    *("samples", "height", "width", "programs"),
    *("seen_height", "seen_width", "stride_y", "stride_x", "origin_y", "origin_x", "tap_stride_y", "tap_stride_x"),
    "taps_x",
]

_AT_ONCE = tl.constexpr(8)  # pieces that a program loads


@triton.jit
def _gain_offset(segment, parts: tl.constexpr, blocks: tl.constexpr, taps: tl.constexpr, out_channels: tl.constexpr):
    """Where the gain of a segment lies in that of a sample."""
    return (segment // parts % blocks * taps + segment // (parts * blocks)) * out_channels


@triton.jit
def _programs(tile, samples, tiles: tl.constexpr, programs):
    """The first and the last program that has items of a tile: program p has those from p * items // programs on."""
    items = samples.to(tl.int64) * tiles
    first = ((tile.to(tl.int64) * samples + 1) * programs - 1) // items
    last = ((tile + 1).to(tl.int64) * samples * programs - 1) // items
    return first.to(tl.int32), last.to(tl.int32)


@triton.jit
def _sample(step, behind, between, late, early, least, at_last):
    """The sample of a program's item number ``step``. Those of a tile are numbered by the steps at which its programs
    come to them, and at one step by program: the first program begins with the tile at step ``late``, the last one
    leaves it at step ``early``, and ``between`` others have all their items in it."""
    before = between * step + tl.maximum(step - late, 0) + tl.minimum(step, early)
    beside = tl.where(step < least, behind - (step < late).to(tl.int32), at_last)
    return before + beside


@triton.jit
def _visible(origin, stride, seen, size):
    """Along one axis, the first position that sees a pixel, and how many do from there on."""
    first = (tl.maximum(-origin, 0) + stride - 1) // stride
    end = tl.minimum((tl.maximum(seen - origin, 0) + stride - 1) // stride, size)
    return first, tl.maximum(end - first, 0)


@triton.jit
def _inside(y, x, count_y, count_x):
    """Whether 0 <= y < count_y and 0 <= x < count_x."""
    below = y.to(tl.uint32, bitcast=True) < count_y.to(tl.uint32, bitcast=True)
    return below & (x.to(tl.uint32, bitcast=True) < count_x.to(tl.uint32, bitcast=True))


@triton.jit
def _finish(
    partial,  # a tile of u for one sample
    factor,
    total,
    scale,  # the gain of the rows where all columns share it
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
            if wide > 1:
                scale = tl.load(gain + at, mask=real, other=0.0)
                total += tl.where(chosen, partial * scale.to(tl.float32)[:, None], 0.0)
            else:
                total += partial * scale.to(tl.float32)[:, None]
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
    one_chunk: tl.constexpr,  # whether it holds all positions of a sample
    precision: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
    tile_segment: tl.constexpr,  # columns of one segment in a tile
    tile_positions: tl.constexpr,  # of a chunk
    tile_x: tl.constexpr,  # how many of them are side by side
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
    tile_y: tl.constexpr = tile_positions // tile_x
    local_y = tl.arange(0, tile_positions) // tile_x
    local_x = tl.arange(0, tile_positions) % tile_x
    chunks_y = tl.cdiv(height, tile_y)
    chunks_x = tl.cdiv(width, tile_x)
    items = samples.to(tl.int64) * tiles
    least = (items // programs).to(tl.int32)  # items that every program has; some have one more
    own = tl.program_id(0) * items // programs
    last = (tl.program_id(0) + 1) * items // programs
    item = own
    while item < last:
        tile = (item // samples).to(tl.int32)
        begin = tile.to(tl.int64) * samples
        count = tl.minimum(last - item, begin + samples - item).to(tl.int32)
        first_program, last_program = _programs(tile, samples, tiles, programs)
        first_start = first_program * items // programs
        behind = tl.program_id(0) - first_program
        between = last_program - first_program - 1
        late = (begin - first_start).to(tl.int32)
        early = (begin + samples - last_program * items // programs).to(tl.int32)
        at_last = (own - first_start).to(tl.int32) - behind * least
        step = (item - own).to(tl.int32)
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
        begin_y, count_y = _visible(from_y, stride_y, seen_height, height)
        begin_x, count_x = _visible(from_x, stride_x, seen_width, width)
        pixels = (from_y * seen_width + from_x) * in_channels + (group * blocks + block) * columns + column
        pixels = ((local_y * stride_y * seen_width + local_x * stride_x) * in_channels)[:, None] + pixels[None, :]
        above = out_channel[:, None] + ((local_y * width + local_x) * out_channels)[None, :]
        factor = 0.0
        if needs_gain:
            mask = row_exists[:, None] & column_exists[None, :]
            weights = out_channel[:, None] * (taps * blocks * columns) + (tap * blocks + block) * columns + column
            factor = tl.load(weight + weights, mask=mask, other=0.0)
            if is_half:  # a product with one leaves it in the layout of products, where it is met
                # The same for every tile, one would stay in shared memory during the loop, which takes all there is.
                one = (tl.arange(0, tile_columns)[:, None] + tl.minimum(count, 0) == local[None, :]).to(factor.dtype)
                factor = tl.dot(factor, one).to(factor.dtype)

        nothing = tl.minimum(samples, 0).to(tl.float32)  # which the compiler keeps in one register, and zeros in many
        total = tl.full((tile_rows, tile_columns), 0, tl.float32)
        partial = tl.full((tile_rows, tile_columns), 0, tl.float32)
        at_gain = gain + (out_channel + _gain_offset(first_segment, parts, blocks, taps, out_channels))
        chunk_y = 0
        chunk_x = 0
        sample = _sample(step, behind, between, late, early, least, at_last)
        scale = tl.load(at_gain + sample.to(tl.int64) * gains, mask=row_exists, other=0.0)
        for _ in range(count if one_chunk else count * chunks_y * chunks_x):  # loads run ahead into the next sample
            sample = _sample(step, behind, between, late, early, least, at_last)
            first_y = chunk_y * tile_y
            first_x = chunk_x * tile_x
            if wide > 1:
                exists = _inside(local_y + first_y, local_x + first_x, height, width)
                at_y = local_y[:, None] + (first_y - begin_y)[None, :]
                at_x = local_x[:, None] + (first_x - begin_x)[None, :]
                seen = _inside(at_y, at_x, count_y[None, :], count_x[None, :])
            else:  # what sees no pixel is left out of both
                exists = _inside(local_y + (first_y - begin_y), local_x + (first_x - begin_x), count_y, count_x)
                seen = exists[:, None]
            exists = exists[None, :]
            if not whole_rows:
                exists = exists & row_exists[:, None]
            if not whole_columns:
                seen = seen & column_exists[None, :]
            left = tl.load(
                grad_output
                + sample.to(tl.int64) * (height * width * out_channels)
                + (above + (first_y * width + first_x) * out_channels),
                mask=exists,
                other=0.0,
            )
            right = tl.load(
                input
                + sample.to(tl.int64) * (seen_height * seen_width * in_channels)
                + (pixels + (first_y * stride_y * seen_width + first_x * stride_x) * in_channels),
                mask=seen,
                other=0.0,
            )
            partial = tl.dot(left, right, partial, input_precision=precision)
            if not one_chunk:
                chunk_x += 1
                chunk_y += (chunk_x == chunks_x).to(tl.int32)
                chunk_x = tl.where(chunk_x == chunks_x, 0, chunk_x)
            # A branch that is always taken lets the loads of the next chunk run ahead of this one's sums.
            if sample >= 0 if one_chunk else chunk_y == chunks_y:
                # The next one's, so that nothing waits for it. After a program's last sample it is of no meaning.
                following = tl.minimum(_sample(step + 1, behind, between, late, early, least, at_last), samples - 1)
                next_scale = tl.load(at_gain + following.to(tl.int64) * gains, mask=row_exists, other=0.0)
                total = _finish(
                    *(partial, factor, total, scale, gain + sample.to(tl.int64) * gains + out_channel),
                    *(grad_gain + sample.to(tl.int64) * gains + out_channel, samples.to(tl.int64) * gains),
                    *(first_segment, local, row_exists, needs_weight, needs_gain),
                    *(wide, parts, blocks, taps, out_channels, tile_segment),
                )
                partial = tl.full((tile_rows, tile_columns), nothing, tl.float32)
                scale = next_scale
            if one_chunk:
                step += 1
            else:
                step += (chunk_y == chunks_y).to(tl.int32)
                chunk_y = tl.where(chunk_y == chunks_y, 0, chunk_y)
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
    first, last = _programs(tile, samples, tiles, programs)
    total = tl.full((tile_added, tile_columns), 0, tl.float32)
    for start in range(first, last + 1, _AT_ONCE):
        for index in tl.static_range(_AT_ONCE):  # loads that do not wait for one another
            program = start + index
            piece = pieces + (program + tile).to(tl.int64) * (tile_rows * tile_columns)
            total += tl.load(
                piece + row_of_tile[:, None] * tile_columns + local[None, :], mask=program <= last, other=0.0
            )
    row = tile // column_tiles % row_tiles * tile_rows + row_of_tile
    segment = tile % column_tiles * wide + local // tile_segment
    column = segment % parts * tile_segment + local % tile_segment
    block = segment // parts % blocks
    tap = segment // (parts * blocks)
    out_channel = tile // (row_tiles * column_tiles) * rows + row
    weights = out_channel[:, None] * (taps * blocks * columns) + ((tap * blocks + block) * columns + column)[None, :]
    exists = (row < rows)[:, None] & ((column < columns) & (tap < taps))[None, :]
    tl.store(grad_weight + weights, total.to(grad_weight.dtype.element_ty), mask=exists)
