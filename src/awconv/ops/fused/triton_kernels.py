# mypy: ignore-errors
"""AW-convolutions in Triton, over two spatial axes; ``cuda.py`` prepares the tensors and launches.

Every tensor has its channels last and side by side. With gain = 1 + a, blocks b of input channels that share one, and
seen(y, t) = stride y + dilation t - padding,

    output[n, y, p]       = sum over t, c of    gain[n, b(c), t, p] weight[t, c, p] input[n, seen(y, t), c]
    u[n, t, p, c]         = sum over y of       grad_output[n, y, p] input[n, seen(y, t), c]
    grad_weight[t, p, c]  = sum over n of       gain[n, b(c), t, p] u[n, t, p, c]
    grad_gain[n, b, t, p] = sum over c of b of  weight[t, p, c] u[n, t, p, c]

``correlate`` makes the output, and the gradient of the input too, which for one phase of the stride is such a sum over
pixels of grad_output one step apart. ``sum_products`` makes a tile of u for one sample after another, and uses it for
both gradients. Sums are kept in single precision, in an order that only sizes and tiles decide, and rounded once.

What decides the code are channels and taps. The sizes of images and the batch are ordinary arguments; their powers of
two (``samples_key``, ``positions_key``), which no kernel reads, decide when tiles are timed again.
"""

from __future__ import annotations

import triton
import triton.language as tl

LEAST = 16  # rows, columns and depth of the smallest matrix product
_SHARED_BYTES = 112 * 1024  # of a tile's operands: two tiles on a multiprocessor of the large chips
_SIZES = ["samples", "height", "width", "seen_height", "seen_width", "origin_y", "origin_x", "reach_y", "reach_x"]
_KEYS = ["samples_key", "positions_key"]


def ceiling(size, most):
    """The power of two that holds a number of channels, within what a tile may have."""
    return min(max(triton.next_power_of_2(size), LEAST), most)


def _one_sample(arguments):
    """Whether tiles of positions keep to one sample, and so have one vector of gains: where less than an eighth of
    their rows stays empty."""
    positions, rows = arguments["height"] * arguments["width"], arguments["block_rows"]
    return 8 * triton.cdiv(positions, rows) * rows <= 9 * positions


def _configs(names, *rows):
    return [
        triton.Config(dict(zip(names, tile, strict=True)), num_warps=warps, num_stages=stages)
        for *tile, warps, stages in rows
    ]


def _prune_correlate(configs, nargs, **kwargs):
    """Tiles no larger than the channels, whose operands fit."""
    arguments = {**nargs, **kwargs}

    def suits(columns, inner):
        return columns <= ceiling(arguments["columns"], 128) and inner <= ceiling(arguments["inner"], 64)

    def fits(config):
        tile = config.kwargs
        operands = (tile["block_rows"] + tile["block_columns"]) * tile["block_inner"]
        return operands * config.num_stages * arguments["source"].element_size() <= _SHARED_BYTES

    kept = [c for c in configs if suits(c.kwargs["block_columns"], c.kwargs["block_inner"]) and fits(c)]
    return kept or configs[-1:]


@triton.autotune(
    _configs(
        ("block_rows", "block_columns", "block_inner"),
        (128, 128, 64, 8, 3),
        (128, 128, 32, 8, 4),
        (256, 64, 64, 8, 2),
        (128, 64, 64, 4, 3),
        (64, 128, 64, 4, 3),
        (128, 64, 32, 4, 4),
        (64, 64, 64, 4, 4),
        (64, 64, 32, 4, 4),
        (128, 32, 32, 4, 4),
        (64, 16, 16, 4, 4),
    ),
    key=[
        *_KEYS,
        *("columns", "column_blocks", "inner", "inner_blocks", "groups"),
        *("taps_y", "taps_x", "transposed", "precision"),
    ],
    prune_configs_by={"early_config_prune": _prune_correlate},
    cache_results=True,
)
@triton.heuristics({"one_sample": _one_sample})
@triton.jit(do_not_specialize=[*_SIZES, *_KEYS])
def correlate(
    source,  # (samples, seen_height, seen_width, groups * inner_blocks * inner)
    weight,  # (taps_y, taps_x, ..., inner_blocks * inner, column_blocks * columns), groups at weight_group
    gain,  # (samples, blocks, taps_y, taps_x, output channels)
    unit,  # one number, or None
    target,  # (samples, height, width, groups * column_blocks * columns)
    source_n,
    source_y,
    source_x,
    weight_group,
    weight_y,
    weight_x,
    weight_inner,
    gain_n,
    gain_b,
    gain_y,
    gain_x,
    target_n,
    target_y,
    target_x,
    samples,
    height,
    width,
    seen_height,
    seen_width,
    step_y,
    step_x,
    origin_y,
    origin_x,
    reach_y,
    reach_x,
    samples_key,
    positions_key,
    columns: tl.constexpr,
    column_blocks: tl.constexpr,
    inner: tl.constexpr,
    inner_blocks: tl.constexpr,
    groups: tl.constexpr,
    taps_y: tl.constexpr,
    taps_x: tl.constexpr,
    transposed: tl.constexpr,
    precision: tl.constexpr,
    one_sample: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
    block_inner: tl.constexpr,
):
    """A tile of positions (rows) times channels of one group and block (columns), over taps and the inner channels.

    The gain belongs to output channels. Those are the columns of the output, so that each tap's product is scaled in
    single precision. They are the inner channels of the gradient of the input (transposed), so that the operand is
    scaled and rounded; times ``unit``, a power of two, it cannot overflow, which is undone in the end.
    """
    column_tiles: tl.constexpr = (columns + block_columns - 1) // block_columns
    tiles: tl.constexpr = groups * column_blocks * column_tiles
    tile = tl.program_id(0) % tiles  # those of the same rows run at a time, and find them in the cache
    row_tile = tl.program_id(0) // tiles
    group = tile // (column_blocks * column_tiles)
    column_block = tile // column_tiles % column_blocks
    column = tile % column_tiles * block_columns + tl.arange(0, block_columns)
    column_exists = column < columns

    positions = height * width
    if one_sample:
        row_tiles = tl.cdiv(positions, block_rows)
        sample = (row_tile // row_tiles).to(tl.int64)
        position = row_tile % row_tiles * block_rows + tl.arange(0, block_rows)
        row_exists = position < positions
    else:
        first = row_tile.to(tl.int64) * block_rows
        row = (first % positions).to(tl.int32) + tl.arange(0, block_rows)
        sample = first // positions + row // positions
        position = row % positions
        row_exists = sample < samples
    y = position // width
    x = position % width
    seen_y = y * step_y + origin_y
    seen_x = x * step_x + origin_x
    rows = sample * source_n + seen_y.to(tl.int64) * source_y + seen_x * source_x + group * (inner_blocks * inner)
    gains = gain + sample * gain_n
    gains_block = column_block * gain_b

    inner_steps: tl.constexpr = (inner + block_inner - 1) // block_inner
    total = tl.full((block_rows, block_columns), 0, tl.float32)
    partial = tl.full((block_rows, block_columns), 0, tl.float32)
    # One loop over all, so that it is pipelined where a tap has few channels.
    for step in range(taps_y * taps_x * inner_blocks * inner_steps):
        channel = step % inner_steps * block_inner + tl.arange(0, block_inner)
        inner_block = step // inner_steps % inner_blocks
        tap = step // (inner_steps * inner_blocks)
        tap_y = tap // taps_x
        tap_x = tap % taps_x
        tap_row = seen_y + tap_y * reach_y
        tap_column = seen_x + tap_x * reach_x
        seen = row_exists & (tap_row >= 0) & (tap_row < seen_height) & (tap_column >= 0) & (tap_column < seen_width)
        at = tap_y.to(tl.int64) * reach_y * source_y + tap_x * reach_x * source_x + inner_block * inner
        here = seen[:, None]
        weight_here = column_exists[None, :]
        if inner % block_inner:
            here = here & (channel < inner)[None, :]
            weight_here = weight_here & (channel < inner)[:, None]
        left = tl.load(source + at + (rows[:, None] + channel[None, :]), mask=here, other=0.0)
        at = group * weight_group + tap_y * weight_y + tap_x * weight_x + inner_block * inner * weight_inner
        right = tl.load(
            weight + at + column_block * columns + (channel[:, None] * weight_inner + column[None, :]),
            mask=weight_here,
            other=0.0,
        )
        gains_tap = gains + (tap_y * gain_y + tap_x * gain_x)
        if transposed:
            gain_channel = gains_block + group * inner + channel
            if one_sample:
                scale = tl.load(gains_tap + gain_channel, mask=channel < inner, other=0.0)[None, :]
            else:
                scale = tl.load(gains_tap[:, None] + gain_channel[None, :], mask=here, other=0.0)
            scale = scale.to(tl.float32)
            if unit is not None:
                scale = scale * tl.load(unit)
            left = (left.to(tl.float32) * scale).to(source.dtype.element_ty)
            total = tl.dot(left, right, total, input_precision=precision)
        else:
            partial = tl.dot(left, right, partial, input_precision=precision)
            if step % inner_steps == inner_steps - 1:
                gain_channel = inner_block * gain_b + group * columns + column
                if one_sample:
                    scale = tl.load(gains_tap + gain_channel, mask=column_exists, other=0.0)[None, :]
                else:
                    exists = row_exists[:, None] & column_exists[None, :]
                    scale = tl.load(gains_tap[:, None] + gain_channel[None, :], mask=exists, other=0.0)
                total += partial * scale.to(tl.float32)
                partial = tl.full((block_rows, block_columns), 0, tl.float32)
    if unit is not None:
        total = total / tl.load(unit)
    rows = sample * target_n + y.to(tl.int64) * target_y + x * target_x
    tl.store(
        target + (rows[:, None] + (group * column_blocks + column_block) * columns + column[None, :]),
        total.to(target.dtype.element_ty),
        mask=row_exists[:, None] & column_exists[None, :],
    )


def _prune_sum_products(configs, nargs, **kwargs):
    """Tiles no larger than the channels, whose operands fit."""
    arguments = {**nargs, **kwargs}

    def fits(config):
        tile = config.kwargs
        operands = (tile["block_rows"] + arguments["block_columns"]) * tile["block_positions"]
        return operands * config.num_stages * arguments["input"].element_size() <= _SHARED_BYTES

    return [c for c in configs if c.kwargs["block_rows"] <= ceiling(arguments["rows"], 128) and fits(c)] or configs[-1:]


@triton.autotune(
    _configs(
        ("block_rows", "block_positions"),
        (128, 64, 8, 3),
        (128, 32, 8, 4),
        (64, 64, 8, 3),
        (64, 64, 4, 3),
        (64, 32, 4, 4),
        (32, 32, 4, 4),
        (16, 32, 4, 3),
    ),
    key=[
        *_KEYS,
        *("rows", "columns", "blocks", "groups", "taps_y", "taps_x", "block_columns"),
        *("needs_weight", "needs_gain", "precision"),
    ],
    prune_configs_by={"early_config_prune": _prune_sum_products},
    cache_results=True,
)
@triton.jit(do_not_specialize=["chunk", *_SIZES, *_KEYS])
def sum_products(
    grad_output,  # (samples, height, width, groups * rows)
    input,  # (samples, seen_height, seen_width, groups * blocks * columns)
    weight,  # (taps_y, taps_x, groups * rows, blocks * columns)
    gain,  # (samples, blocks, taps_y, taps_x, groups * rows)
    grad_weight,  # (chunks, taps_y, taps_x, groups * rows, blocks * columns) in single precision
    grad_gain,  # (column tiles, samples, blocks, taps_y, taps_x, groups * rows) in single precision
    source_n,
    source_y,
    source_x,
    samples,
    chunk,  # samples that one program adds up
    height,
    width,
    seen_height,
    seen_width,
    step_y,
    step_x,
    origin_y,
    origin_x,
    reach_y,
    reach_x,
    samples_key,
    positions_key,
    rows: tl.constexpr,
    columns: tl.constexpr,
    blocks: tl.constexpr,
    groups: tl.constexpr,
    taps_y: tl.constexpr,
    taps_x: tl.constexpr,
    needs_weight: tl.constexpr,
    needs_gain: tl.constexpr,
    precision: tl.constexpr,
    block_columns: tl.constexpr,
    block_rows: tl.constexpr,
    block_positions: tl.constexpr,
):
    """A tile of u, output channels (rows) times input channels of one block (columns), for one tap, over a chunk of the
    samples: after each, it is scaled and added up for the weight, and reduced for the gain."""
    row_tiles: tl.constexpr = (rows + block_rows - 1) // block_rows
    column_tiles: tl.constexpr = (columns + block_columns - 1) // block_columns
    taps: tl.constexpr = taps_y * taps_x
    out_channels: tl.constexpr = groups * rows
    tiles: tl.constexpr = taps * groups * blocks * row_tiles * column_tiles
    tile = tl.program_id(0) % tiles  # those of the same samples run at a time, and find them in the cache
    chunk_index = tl.program_id(0) // tiles
    column_tile = tile % column_tiles
    row_tile = tile // column_tiles % row_tiles
    tap = tile // (column_tiles * row_tiles) % taps
    block = tile // (column_tiles * row_tiles * taps) % blocks
    group = tile // (column_tiles * row_tiles * taps * blocks)
    row = row_tile * block_rows + tl.arange(0, block_rows)
    column = column_tile * block_columns + tl.arange(0, block_columns)
    row_exists = row < rows
    column_exists = column < columns
    out_channel = group * rows + row
    in_channel = block * columns + column
    weights = (tap * out_channels + out_channel)[:, None].to(tl.int64) * (blocks * columns) + in_channel[None, :]

    tap_y = tap // taps_x * reach_y + origin_y
    tap_x = tap % taps_x * reach_x + origin_x
    positions = height * width
    position_steps = tl.cdiv(positions, block_positions)
    first = chunk_index * chunk
    total = tl.full((block_rows, block_columns), 0, tl.float32)
    partial = tl.full((block_rows, block_columns), 0, tl.float32)
    # One loop over all, so that it is pipelined where a sample has few positions.
    for step in range(tl.minimum(chunk, samples - first) * position_steps):
        sample = (first + step // position_steps).to(tl.int64)
        position = step % position_steps * block_positions + tl.arange(0, block_positions)
        exists = position < positions
        seen_y = position // width * step_y + tap_y
        seen_x = position % width * step_x + tap_x
        seen = exists & (seen_y >= 0) & (seen_y < seen_height) & (seen_x >= 0) & (seen_x < seen_width)
        left = tl.load(
            grad_output + sample * positions * out_channels + (position[None, :] * out_channels + out_channel[:, None]),
            mask=row_exists[:, None] & exists[None, :],
            other=0.0,
        )
        pixel = sample * source_n + seen_y.to(tl.int64) * source_y + seen_x * source_x
        right = tl.load(
            input + group * (blocks * columns) + (pixel[:, None] + in_channel[None, :]),
            mask=seen[:, None] & column_exists[None, :],
            other=0.0,
        )
        partial = tl.dot(left, right, partial, input_precision=precision)
        if step % position_steps == position_steps - 1:
            gains = ((sample * blocks + block) * taps + tap) * out_channels + out_channel
            if needs_weight:
                scale = tl.load(gain + gains, mask=row_exists, other=0.0)
                total += partial * scale.to(tl.float32)[:, None]
            if needs_gain:
                factor = tl.load(weight + weights, mask=row_exists[:, None] & column_exists[None, :], other=0.0)
                at = column_tile.to(tl.int64) * samples * (blocks * taps * out_channels)
                tl.store(grad_gain + at + gains, tl.sum(partial * factor.to(tl.float32), 1), mask=row_exists)
            partial = tl.full((block_rows, block_columns), 0, tl.float32)
    if needs_weight:
        at = chunk_index.to(tl.int64) * (taps * out_channels * blocks * columns)
        tl.store(grad_weight + at + weights, total, mask=row_exists[:, None] & column_exists[None, :])


_DEPTHWISE = _configs(("block_rows", "block_columns"), (32, 64, 4, 2), (64, 32, 4, 2), (16, 128, 4, 2), (64, 64, 4, 2))


def _prune_depthwise(configs, nargs, **kwargs):
    """Tiles no wider than the channels."""
    widest = ceiling({**nargs, **kwargs}["channels"], 128)
    return [c for c in configs if c.kwargs["block_columns"] <= widest] or configs[1:2]


@triton.autotune(
    _DEPTHWISE,
    key=[*_KEYS, "channels", "multiplier", "taps_y", "taps_x", "transposed"],
    prune_configs_by={"early_config_prune": _prune_depthwise},
    cache_results=True,
)
@triton.heuristics({"one_sample": _one_sample})
@triton.jit(do_not_specialize=[*_SIZES, *_KEYS])
def depthwise_correlate(
    source,  # (samples, seen_height, seen_width, input channels; output channels if transposed)
    weight,  # (taps_y, taps_x, output channels)
    gain,  # (samples, 1, taps_y, taps_x, output channels)
    target,  # (samples, height, width, channels)
    source_n,
    source_y,
    source_x,
    weight_y,
    weight_x,
    gain_n,
    gain_y,
    gain_x,
    target_n,
    target_y,
    target_x,
    samples,
    height,
    width,
    seen_height,
    seen_width,
    step_y,
    step_x,
    origin_y,
    origin_x,
    reach_y,
    reach_x,
    samples_key,
    positions_key,
    channels: tl.constexpr,
    multiplier: tl.constexpr,  # output channels of an input channel
    taps_y: tl.constexpr,
    taps_x: tl.constexpr,
    transposed: tl.constexpr,
    one_sample: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """``correlate`` where a group has one input channel: nothing to multiply as matrices."""
    column_tiles: tl.constexpr = (channels + block_columns - 1) // block_columns
    column = tl.program_id(0) % column_tiles * block_columns + tl.arange(0, block_columns)
    row_tile = tl.program_id(0) // column_tiles
    column_exists = column < channels

    positions = height * width
    if one_sample:
        row_tiles = tl.cdiv(positions, block_rows)
        sample = (row_tile // row_tiles).to(tl.int64)
        position = row_tile % row_tiles * block_rows + tl.arange(0, block_rows)
        row_exists = position < positions
    else:
        first = row_tile.to(tl.int64) * block_rows
        row = (first % positions).to(tl.int32) + tl.arange(0, block_rows)
        sample = first // positions + row // positions
        position = row % positions
        row_exists = sample < samples
    y = position // width
    x = position % width
    seen_y = y * step_y + origin_y
    seen_x = x * step_x + origin_x
    rows = sample * source_n + seen_y.to(tl.int64) * source_y + seen_x * source_x
    exists = row_exists[:, None] & column_exists[None, :]

    terms: tl.constexpr = multiplier if transposed else 1  # output channels that a column sums over
    total = tl.full((block_rows, block_columns), 0, tl.float32)
    for step in range(taps_y * taps_x * terms):
        tap_y = step // terms // taps_x
        tap_x = step // terms % taps_x
        if transposed:
            out_channel = column * multiplier + step % terms
            source_channel = out_channel
        else:
            out_channel = column
            source_channel = column // multiplier
        tap_row = seen_y + tap_y * reach_y
        tap_column = seen_x + tap_x * reach_x
        seen = (tap_row >= 0) & (tap_row < seen_height) & (tap_column >= 0) & (tap_column < seen_width)
        at = tap_y.to(tl.int64) * reach_y * source_y + tap_x * reach_x * source_x
        value = tl.load(source + at + (rows[:, None] + source_channel[None, :]), mask=exists & seen[:, None], other=0.0)
        factor = tl.load(weight + tap_y * weight_y + tap_x * weight_x + out_channel, mask=column_exists, other=0.0)
        gains = gain + sample * gain_n + (tap_y * gain_y + tap_x * gain_x)
        if one_sample:
            scale = tl.load(gains + out_channel, mask=column_exists, other=0.0)[None, :]
        else:
            scale = tl.load(gains[:, None] + out_channel[None, :], mask=exists, other=0.0)
        total += value.to(tl.float32) * (scale.to(tl.float32) * factor.to(tl.float32)[None, :])
    rows = sample * target_n + y.to(tl.int64) * target_y + x * target_x
    tl.store(target + (rows[:, None] + column[None, :]), total.to(target.dtype.element_ty), mask=exists)


@triton.autotune(
    _DEPTHWISE,
    key=[*_KEYS, "channels", "multiplier", "taps_y", "taps_x"],
    prune_configs_by={"early_config_prune": _prune_depthwise},
    cache_results=True,
)
@triton.jit(do_not_specialize=[*_SIZES, *_KEYS])
def depthwise_sum_products(
    grad_output,  # (samples, height, width, channels)
    input,  # (samples, seen_height, seen_width, channels // multiplier)
    sums,  # u, (samples, taps_y, taps_x, channels) in single precision
    source_n,
    source_y,
    source_x,
    samples,
    height,
    width,
    seen_height,
    seen_width,
    step_y,
    step_x,
    origin_y,
    origin_x,
    reach_y,
    reach_x,
    samples_key,
    positions_key,
    channels: tl.constexpr,
    multiplier: tl.constexpr,
    taps_y: tl.constexpr,
    taps_x: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """``u`` where a group has one input channel: so small that it is stored, for some channels, one tap, one sample."""
    column_tiles: tl.constexpr = (channels + block_columns - 1) // block_columns
    taps: tl.constexpr = taps_y * taps_x
    tap = tl.program_id(0) % taps  # those of the same channels run at a time, and find them in the cache
    column = tl.program_id(0) // taps % column_tiles * block_columns + tl.arange(0, block_columns)
    sample = (tl.program_id(0) // (taps * column_tiles)).to(tl.int64)
    column_exists = column < channels
    tap_y = tap // taps_x * reach_y + origin_y
    tap_x = tap % taps_x * reach_x + origin_x
    positions = height * width
    total = tl.full((block_rows, block_columns), 0, tl.float32)
    for start in range(0, positions, block_rows):
        position = start + tl.arange(0, block_rows)
        exists = (position < positions)[:, None] & column_exists[None, :]
        seen_y = position // width * step_y + tap_y
        seen_x = position % width * step_x + tap_x
        seen = (seen_y >= 0) & (seen_y < seen_height) & (seen_x >= 0) & (seen_x < seen_width)
        left = tl.load(
            grad_output + sample * positions * channels + (position[:, None] * channels + column[None, :]),
            mask=exists,
            other=0.0,
        )
        pixel = sample * source_n + seen_y.to(tl.int64) * source_y + seen_x * source_x
        right = tl.load(
            input + (pixel[:, None] + (column // multiplier)[None, :]), mask=exists & seen[:, None], other=0.0
        )
        total += left.to(tl.float32) * right.to(tl.float32)
    tl.store(sums + (sample * taps + tap) * channels + column, tl.sum(total, 0), mask=column_exists)


# For each kernel, tiles that run on every chip, for results that do not depend on timings, and the smallest ones.
FIXED = {
    correlate: dict(block_rows=64, block_columns=64, block_inner=32, num_warps=4, num_stages=3),
    sum_products: dict(block_rows=64, block_positions=32, num_warps=4, num_stages=3),
    depthwise_correlate: dict(block_rows=64, block_columns=32),
    depthwise_sum_products: dict(block_rows=64, block_columns=32),
}
SMALLEST = {
    correlate: dict(block_rows=LEAST, block_columns=LEAST, block_inner=LEAST),
    sum_products: dict(block_rows=LEAST, block_positions=LEAST),
    depthwise_correlate: dict(block_rows=LEAST, block_columns=LEAST),
    depthwise_sum_products: dict(block_rows=LEAST, block_columns=LEAST),
}
