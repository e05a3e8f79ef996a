# mypy: ignore-errors
"""The attention branch and its gradients, in Triton; ``branch.py`` launches.

Rows are the samples times the taps of the pooled input. With ``norm`` over the rows,

    hidden = pooled weight1^T               (rows, hidden)
    value  = ReLU(norm1(hidden))            (rows, hidden)
    score  = value weight2^T                (rows, columns)
    attention = (activation(norm2(score)) - constant) / gain    (rows, columns)

Training needs the statistics of all rows twice, and so three kernels forward (``project``, ``measure``, ``finish``) and
four backward (``sum_grads``, ``grad_second``, ``grad_first``, ``add_pieces``); inference needs one (``infer``). Scores
are cheaper made again than stored. Products are taken in the dtype ``low`` and summed in single precision; all else is
in single precision. What a program knows of its rows, a part, is merged by who needs it, in the order of the parts.

Tensors of rows are (samples, channels, taps) where ``taps`` is not 1, and (rows, channels) where it is. Two buffers of
single precision hold what is passed on:

- kept: mean and inverse deviation of norm1, the same of norm2, and from a multiple of four elements on ``hidden``;
- scratch, of which every kernel gets the offsets that it uses.
"""

from __future__ import annotations

import triton
import triton.language as tl

from awconv.ops.triton_branch_tiles import (
    attended,
    kept_hidden,
    load,
    load_weight2,
    normed_hidden,
    relu,
    rounded,
    scaled,
    start_of,
)


@triton.jit
def _project(
    pooled,
    weight1,
    row,
    rows,
    channels: tl.constexpr,
    hidden: tl.constexpr,
    taps: tl.constexpr,
    low: tl.constexpr,
    precision: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_hidden: tl.constexpr,
    tile_channels: tl.constexpr,
):
    """A tile of hidden."""
    unit = tl.arange(0, tile_hidden)
    start = start_of(row, channels, taps)
    total = tl.full((tile_rows, tile_hidden), 0, tl.float32)
    for first in range(0, channels, tile_channels):
        channel = first + tl.arange(0, tile_channels)
        exists = channel < channels
        left = tl.load(
            pooled + start[:, None] + (channel * taps)[None, :],
            mask=(row < rows)[:, None] & exists[None, :],
            other=0.0,
        )
        right = tl.load(
            weight1 + (unit * channels)[None, :] + channel[:, None],
            mask=(unit < hidden)[None, :] & exists[:, None],
            other=0.0,
        )
        total = tl.dot(rounded(left, low), rounded(right, low), total, input_precision=precision)
    return total


@triton.jit
def _store_statistics(target, tile, row, rows, at, exists, part, size: tl.constexpr, tile_rows: tl.constexpr):
    """Mean and sum of squared differences of the rows of a part."""
    count = tl.minimum(rows - part * tile_rows, tile_rows).to(tl.float32)
    here = (row < rows)[:, None]
    mean = tl.sum(tl.where(here, tile, 0.0), 0) / count
    difference = tl.where(here, tile - mean[None, :], 0.0)
    target += part * (2 * size) + at
    tl.store(target, mean, mask=exists)
    tl.store(target + size, tl.sum(difference * difference, 0), mask=exists)


@triton.jit
def _merged_statistics(
    source,
    rows,
    at,
    exists,
    size: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
    tile_parts: tl.constexpr,
):
    """Mean and variance of all rows."""
    parts = tl.cdiv(rows, tile_rows)
    total = tl.full((tile_columns,), 0, tl.float32)
    squares = tl.full((tile_columns,), 0, tl.float32)
    for first in range(0, parts, tile_parts):
        part = first + tl.arange(0, tile_parts)
        count = tl.minimum(rows - part * tile_rows, tile_rows).to(tl.float32)
        mask = (part < parts)[:, None] & exists[None, :]
        mean_of_part = tl.load(source + (part * (2 * size))[:, None] + at[None, :], mask=mask, other=0.0)
        total += tl.sum(mean_of_part * count[:, None], 0)
    mean = total / rows.to(tl.float32)
    for first in range(0, parts, tile_parts):
        part = first + tl.arange(0, tile_parts)
        count = tl.minimum(rows - part * tile_rows, tile_rows).to(tl.float32)
        mask = (part < parts)[:, None] & exists[None, :]
        part_at = source + (part * (2 * size))[:, None] + at[None, :]
        difference = tl.load(part_at, mask=mask, other=0.0) - mean[None, :]
        within = tl.load(part_at + size, mask=mask, other=0.0)
        squares += tl.sum(tl.where(mask, within + count[:, None] * difference * difference, 0.0), 0)
    return mean, squares / rows.to(tl.float32)


@triton.jit
def _store_norm(
    kept,
    running_mean,
    running_variance,
    mean,
    variance,
    inverse,
    momentum,
    rows,
    at,
    exists,
    size: tl.constexpr,
):
    """What the backward needs of a norm, and its running statistics, of the unbiased variance."""
    tl.store(kept + at, mean, mask=exists)
    tl.store(kept + size + at, inverse, mask=exists)
    count = rows.to(tl.float32)
    dtype = running_mean.dtype.element_ty
    running = load(running_mean, at, exists)
    tl.store(running_mean + at, (running + momentum * (mean - running)).to(dtype), mask=exists)
    running = load(running_variance, at, exists)
    unbiased = variance * (count / (count - 1))
    tl.store(running_variance + at, (running + momentum * (unbiased - running)).to(dtype), mask=exists)


@triton.jit
def _store_attention(
    attention, wide, result, row, rows, column, is_column, columns: tl.constexpr, residual: tl.constexpr
):
    """A tile of the attention or, with the residual, of the gain."""
    here = (row < rows)[:, None] & is_column[None, :]
    at = (row * columns)[:, None] + column[None, :]
    result = result.to(attention.dtype.element_ty)
    if residual:
        result = (result.to(tl.float32) + 1).to(attention.dtype.element_ty)
    tl.store(attention + at, result, mask=here)
    if wide is not None:
        tl.store(wide + at, result.to(tl.float32), mask=here)


@triton.jit(do_not_specialize=["rows", "epsilon1", "epsilon2"])
def infer(
    pooled,
    weight1,  # (hidden, channels)
    norm_weight1,
    norm_bias1,
    mean1,
    variance1,
    weight2,  # (columns, hidden)
    norm_weight2,
    norm_bias2,
    mean2,
    variance2,
    attention,
    wide,  # the same in single precision, or None
    rows,
    epsilon1,
    epsilon2,
    channels: tl.constexpr,
    hidden: tl.constexpr,
    columns: tl.constexpr,
    taps: tl.constexpr,  # of pooled
    activation: tl.constexpr,
    constant: tl.constexpr,  # to which the attention is relative
    gain: tl.constexpr,
    residual: tl.constexpr,  # whether 1 is added, to what was rounded: the convolution's gain
    low: tl.constexpr,
    precision: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_hidden: tl.constexpr,
    tile_columns: tl.constexpr,
    tile_channels: tl.constexpr,
):
    """A tile of the attention from running statistics."""
    column_tiles: tl.constexpr = (columns + tile_columns - 1) // tile_columns
    row = tl.program_id(0) // column_tiles * tile_rows + tl.arange(0, tile_rows)
    column = tl.program_id(0) % column_tiles * tile_columns + tl.arange(0, tile_columns)
    unit = tl.arange(0, tile_hidden)
    is_unit = unit < hidden
    is_column = column < columns
    tile = _project(
        pooled, weight1, row, rows, channels, hidden, taps, low, precision, tile_rows, tile_hidden, tile_channels
    )
    inverse = 1 / tl.sqrt(load(variance1, unit, is_unit) + epsilon1)
    normed = (tile - load(mean1, unit, is_unit)[None, :]) * inverse[None, :]
    value = rounded(relu(scaled(normed, norm_weight1, norm_bias1, unit, is_unit)), low)
    score = tl.dot(value, load_weight2(weight2, column, hidden, columns, low, tile_hidden), input_precision=precision)
    inverse = 1 / tl.sqrt(load(variance2, column, is_column) + epsilon2)
    normed = (score - load(mean2, column, is_column)[None, :]) * inverse[None, :]
    result = attended(scaled(normed, norm_weight2, norm_bias2, column, is_column), activation, constant, gain)
    _store_attention(attention, wide, result, row, rows, column, is_column, columns, residual)


@triton.jit(do_not_specialize=["rows", "statistics1"])
def project(
    pooled,
    weight1,
    kept,
    scratch,
    rows,
    statistics1,  # offset of norm1's parts in scratch: (parts, 2, hidden)
    channels: tl.constexpr,
    hidden: tl.constexpr,
    columns: tl.constexpr,
    taps: tl.constexpr,
    low: tl.constexpr,
    precision: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_hidden: tl.constexpr,
    tile_channels: tl.constexpr,
):
    """Hidden of some rows, and their statistics."""
    part = tl.program_id(0)
    row = part * tile_rows + tl.arange(0, tile_rows)
    unit = tl.arange(0, tile_hidden)
    is_unit = unit < hidden
    tile = _project(
        pooled, weight1, row, rows, channels, hidden, taps, low, precision, tile_rows, tile_hidden, tile_channels
    )
    target = kept_hidden(kept, hidden, columns) + (row * hidden)[:, None] + unit[None, :]
    tl.store(target, tile, mask=(row < rows)[:, None] & is_unit[None, :])
    _store_statistics(scratch + statistics1, tile, row, rows, unit, is_unit, part, hidden, tile_rows)


@triton.jit(do_not_specialize=["rows", "statistics1", "statistics2", "epsilon1", "momentum1"])
def measure(
    kept,
    scratch,
    weight2,
    norm_weight1,
    norm_bias1,
    running_mean1,
    running_variance1,
    batches1,  # that running statistics saw
    rows,
    statistics1,
    statistics2,  # offset of norm2's parts in scratch: (parts, 2, columns)
    epsilon1,
    momentum1,
    hidden: tl.constexpr,
    columns: tl.constexpr,
    low: tl.constexpr,
    precision: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_hidden: tl.constexpr,
    tile_columns: tl.constexpr,
    tile_parts: tl.constexpr,
):
    """The statistics of some columns of the score in some rows; the first program closes norm1."""
    column_tiles: tl.constexpr = (columns + tile_columns - 1) // tile_columns
    part = tl.program_id(0) // column_tiles
    row = part * tile_rows + tl.arange(0, tile_rows)
    column = tl.program_id(0) % column_tiles * tile_columns + tl.arange(0, tile_columns)
    unit = tl.arange(0, tile_hidden)
    is_unit = unit < hidden
    mean, variance = _merged_statistics(
        scratch + statistics1, rows, unit, is_unit, hidden, tile_rows, tile_hidden, tile_parts
    )
    inverse = 1 / tl.sqrt(variance + epsilon1)
    normed = normed_hidden(kept, mean, inverse, row, rows, hidden, columns, tile_hidden)
    value = rounded(relu(scaled(normed, norm_weight1, norm_bias1, unit, is_unit)), low)
    score = tl.dot(value, load_weight2(weight2, column, hidden, columns, low, tile_hidden), input_precision=precision)
    _store_statistics(scratch + statistics2, score, row, rows, column, column < columns, part, columns, tile_rows)
    if tl.program_id(0) == 0:
        _store_norm(
            kept, running_mean1, running_variance1, mean, variance, inverse, momentum1, rows, unit, is_unit, hidden
        )
        tl.store(batches1, tl.load(batches1) + 1)


@triton.jit(do_not_specialize=["rows", "statistics2", "epsilon2", "momentum2"])
def finish(
    kept,
    scratch,
    weight2,
    norm_weight1,
    norm_bias1,
    norm_weight2,
    norm_bias2,
    running_mean2,
    running_variance2,
    batches2,
    attention,
    wide,  # the same in single precision, or None
    rows,
    statistics2,
    epsilon2,
    momentum2,
    hidden: tl.constexpr,
    columns: tl.constexpr,
    activation: tl.constexpr,
    constant: tl.constexpr,  # to which the attention is relative
    gain: tl.constexpr,
    residual: tl.constexpr,  # whether 1 is added, to what was rounded: the convolution's gain
    low: tl.constexpr,
    precision: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_hidden: tl.constexpr,
    tile_columns: tl.constexpr,
    tile_parts: tl.constexpr,
):
    """A tile of the attention; the programs of the first rows close norm2."""
    column_tiles: tl.constexpr = (columns + tile_columns - 1) // tile_columns
    part = tl.program_id(0) // column_tiles
    row = part * tile_rows + tl.arange(0, tile_rows)
    column = tl.program_id(0) % column_tiles * tile_columns + tl.arange(0, tile_columns)
    unit = tl.arange(0, tile_hidden)
    is_unit = unit < hidden
    is_column = column < columns
    mean, inverse = load(kept, unit, is_unit), load(kept + hidden, unit, is_unit)
    normed = normed_hidden(kept, mean, inverse, row, rows, hidden, columns, tile_hidden)
    value = rounded(relu(scaled(normed, norm_weight1, norm_bias1, unit, is_unit)), low)
    score = tl.dot(value, load_weight2(weight2, column, hidden, columns, low, tile_hidden), input_precision=precision)
    mean, variance = _merged_statistics(
        scratch + statistics2, rows, column, is_column, columns, tile_rows, tile_columns, tile_parts
    )
    inverse = 1 / tl.sqrt(variance + epsilon2)
    normed = (score - mean[None, :]) * inverse[None, :]
    result = attended(scaled(normed, norm_weight2, norm_bias2, column, is_column), activation, constant, gain)
    _store_attention(attention, wide, result, row, rows, column, is_column, columns, residual)
    if part == 0:
        kept2 = kept + 2 * hidden
        _store_norm(
            *(kept2, running_mean2, running_variance2, mean, variance, inverse),
            *(momentum2, rows, column, is_column, columns),
        )
    if tl.program_id(0) == 0:
        tl.store(batches2, tl.load(batches2) + 1)
