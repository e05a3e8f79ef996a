# mypy: ignore-errors
"""The gradients of the attention branch, in Triton: what ``triton_branch.py`` explains."""

from __future__ import annotations

import triton
import triton.language as tl

from awconv.ops.triton_branch_tiles import load, load_weight2, normed_hidden, relu, rounded, scaled, slope, start_of


@triton.jit
def _merged_sums(source, parts, at, exists, size: tl.constexpr, tile_columns: tl.constexpr, tile_parts: tl.constexpr):
    """The sums of all rows, from two sums of every part."""
    first_sum = tl.full((tile_columns,), 0, tl.float32)
    second_sum = tl.full((tile_columns,), 0, tl.float32)
    for first in range(0, parts, tile_parts):
        part = first + tl.arange(0, tile_parts)
        mask = (part < parts)[:, None] & exists[None, :]
        part_at = source + (part * (2 * size))[:, None] + at[None, :]
        first_sum += tl.sum(tl.load(part_at, mask=mask, other=0.0), 0)
        second_sum += tl.sum(tl.load(part_at + size, mask=mask, other=0.0), 0)
    return first_sum, second_sum


@triton.jit
def _store_norm_grads(grad_weight, grad_bias, grad_sum, product_sum, at, exists):
    """The gradients of a norm's weight and bias."""
    tl.store(grad_bias + at, grad_sum.to(grad_bias.dtype.element_ty), mask=exists)
    tl.store(grad_weight + at, product_sum.to(grad_weight.dtype.element_ty), mask=exists)


@triton.jit
def _store_sums(target, grad, normed, size: tl.constexpr, exists):
    """Two sums over the rows of a part, which the gradient of a norm needs."""
    tl.store(target, tl.sum(grad, 0), mask=exists)
    tl.store(target + size, tl.sum(grad * normed, 0), mask=exists)


@triton.jit
def _store_tile(target, tile, row, row_exists, width: tl.constexpr, column, column_exists):
    """A tile of a matrix whose rows have some width, in single precision."""
    at = (row * width)[:, None] + column[None, :]
    tl.store(target + at, tile, mask=row_exists[:, None] & column_exists[None, :])


@triton.jit
def _grad_normed(grad, normed, norm_weight, inverse, grad_sum, product_sum, row, rows, at, exists):
    """The gradient of what a norm was given, from that of what it gave."""
    count = rows.to(tl.float32)
    centred = grad - (grad_sum / count)[None, :] - normed * (product_sum / count)[None, :]
    scale = load(norm_weight, at, exists) * inverse
    return tl.where((row < rows)[:, None], centred * scale[None, :], 0.0)


@triton.jit
def _grad_score(
    grad,
    kept,
    value,
    right,
    norm_weight2,
    norm_bias2,
    row,
    rows,
    column,
    hidden: tl.constexpr,
    columns: tl.constexpr,
    taps: tl.constexpr,
    grad_parts: tl.constexpr,
    activation: tl.constexpr,
    gain: tl.constexpr,
    precision: tl.constexpr,
):
    """A tile of the score without mean and deviation, and of the gradient of what norm2 gave."""
    is_column = column < columns
    score = tl.dot(value, right, input_precision=precision)
    mean = load(kept + 2 * hidden, column, is_column)
    inverse = load(kept + 2 * hidden + columns, column, is_column)
    normed = (score - mean[None, :]) * inverse[None, :]
    at = start_of(row, columns, taps)[:, None] + (column * taps)[None, :]
    here = (row < rows)[:, None] & is_column[None, :]
    above = load(grad, at, here)
    for part in tl.static_range(1, grad_parts):
        above += load(grad + part * rows.to(tl.int64) * columns, at, here)
    shifted = scaled(normed, norm_weight2, norm_bias2, column, is_column)
    return normed, inverse, above * slope(shifted, activation, gain)


@triton.jit(do_not_specialize=["rows", "sums2"])
def sum_grads(
    grad,  # of the attention
    kept,
    scratch,
    weight2,
    norm_weight1,
    norm_bias1,
    norm_weight2,
    norm_bias2,
    rows,
    sums2,  # offset in scratch: (parts, 2, columns)
    hidden: tl.constexpr,
    columns: tl.constexpr,
    taps: tl.constexpr,  # of grad
    grad_parts: tl.constexpr,  # whose sum grad is, one after another
    activation: tl.constexpr,
    gain: tl.constexpr,
    low: tl.constexpr,
    precision: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_hidden: tl.constexpr,
    tile_columns: tl.constexpr,
):
    """Sums over some rows that the gradient of norm2 needs."""
    column_tiles: tl.constexpr = (columns + tile_columns - 1) // tile_columns
    part = tl.program_id(0) // column_tiles
    row = part * tile_rows + tl.arange(0, tile_rows)
    column = tl.program_id(0) % column_tiles * tile_columns + tl.arange(0, tile_columns)
    unit = tl.arange(0, tile_hidden)
    is_unit = unit < hidden
    mean, inverse = load(kept, unit, is_unit), load(kept + hidden, unit, is_unit)
    normed = normed_hidden(kept, mean, inverse, row, rows, hidden, columns, tile_hidden)
    value = rounded(relu(scaled(normed, norm_weight1, norm_bias1, unit, is_unit)), low)
    right = load_weight2(weight2, column, hidden, columns, low, tile_hidden)
    normed, inverse, above = _grad_score(
        grad,
        kept,
        value,
        right,
        norm_weight2,
        norm_bias2,
        row,
        rows,
        column,
        hidden,
        columns,
        taps,
        grad_parts,
        activation,
        gain,
        precision,
    )
    target = scratch + sums2 + part * (2 * columns) + column
    _store_sums(target, above, normed, columns, column < columns)


@triton.jit(do_not_specialize=["rows", "sums2", "sums1", "grads", "pieces2"])
def grad_second(
    grad,
    kept,
    scratch,
    weight2,
    norm_weight1,
    norm_bias1,
    norm_weight2,
    norm_bias2,
    grad_norm_weight2,
    grad_norm_bias2,
    rows,
    sums2,
    sums1,  # offset in scratch: (parts, shares, 2, hidden)
    grads,  # of what norm1 gave, as each share of the columns has it: (shares, rows, hidden)
    pieces2,  # of the gradient of weight2: (parts, columns, hidden)
    hidden: tl.constexpr,
    columns: tl.constexpr,
    taps: tl.constexpr,
    grad_parts: tl.constexpr,
    activation: tl.constexpr,
    gain: tl.constexpr,
    low: tl.constexpr,
    precision: tl.constexpr,
    shares: tl.constexpr,
    share: tl.constexpr,  # columns of one
    tile_rows: tl.constexpr,
    tile_hidden: tl.constexpr,
    tile_columns: tl.constexpr,
    tile_parts: tl.constexpr,
):
    """From the gradient of the attention to that of norm1, for some rows and a share of the columns."""
    parts, part = tl.cdiv(rows, tile_rows), tl.program_id(0) // shares
    row = part * tile_rows + tl.arange(0, tile_rows)
    unit = tl.arange(0, tile_hidden)
    is_unit = unit < hidden
    mean, inverse = load(kept, unit, is_unit), load(kept + hidden, unit, is_unit)
    normed1 = normed_hidden(kept, mean, inverse, row, rows, hidden, columns, tile_hidden)
    shifted = scaled(normed1, norm_weight1, norm_bias1, unit, is_unit)
    value = rounded(relu(shifted), low)
    total = tl.full((tile_rows, tile_hidden), 0, tl.float32)
    for first in range(0, share, tile_columns):
        column = tl.program_id(0) % shares * share + first + tl.arange(0, tile_columns)
        is_column = column < columns
        right = load_weight2(weight2, column, hidden, columns, low, tile_hidden)
        normed2, inverse2, above = _grad_score(
            *(grad, kept, value, right, norm_weight2, norm_bias2, row, rows),
            *(column, hidden, columns, taps, grad_parts, activation, gain, precision),
        )
        sums = _merged_sums(scratch + sums2, parts, column, is_column, columns, tile_columns, tile_parts)
        if part == 0:
            _store_norm_grads(grad_norm_weight2, grad_norm_bias2, *sums, column, is_column)
        left = _grad_normed(above, normed2, norm_weight2, inverse2, *sums, row, rows, column, is_column)
        left = rounded(left, low)
        total = tl.dot(left, tl.trans(right), total, input_precision=precision)
        piece = tl.dot(tl.trans(left), value, input_precision=precision)
        target = scratch + tl.multiple_of(pieces2, 4) + part * (columns * hidden)
        _store_tile(target, piece, column, is_column, hidden, unit, is_unit)
    total = tl.where(shifted <= 0, 0.0, total)
    target = scratch + tl.multiple_of(grads, 4) + tl.program_id(0) % shares * (rows * hidden)
    _store_tile(target, total, row, row < rows, hidden, unit, is_unit)
    _store_sums(scratch + sums1 + tl.program_id(0) * (2 * hidden) + unit, total, normed1, hidden, is_unit)


@triton.jit(do_not_specialize=["rows", "sums1", "grads", "pieces1"])
def grad_first(
    pooled,
    kept,
    scratch,
    weight1,
    norm_weight1,
    grad_norm_weight1,
    grad_norm_bias1,
    grad_pooled,  # laid out as pooled
    rows,
    sums1,
    grads,
    pieces1,  # of the gradient of weight1: (parts, hidden, channels)
    channels: tl.constexpr,
    hidden: tl.constexpr,
    columns: tl.constexpr,
    taps: tl.constexpr,
    low: tl.constexpr,
    precision: tl.constexpr,
    shares: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_hidden: tl.constexpr,
    tile_channels: tl.constexpr,
    tile_parts: tl.constexpr,
):
    """From the gradient of norm1 to that of pooled, for some rows and channels."""
    channel_tiles: tl.constexpr = (channels + tile_channels - 1) // tile_channels
    part = tl.program_id(0) // channel_tiles
    row = part * tile_rows + tl.arange(0, tile_rows)
    channel = tl.program_id(0) % channel_tiles * tile_channels + tl.arange(0, tile_channels)
    is_channel = channel < channels
    unit = tl.arange(0, tile_hidden)
    is_unit = unit < hidden
    mean, inverse = load(kept, unit, is_unit), load(kept + hidden, unit, is_unit)
    normed = normed_hidden(kept, mean, inverse, row, rows, hidden, columns, tile_hidden)
    here = (row < rows)[:, None] & is_unit[None, :]
    source = scratch + tl.multiple_of(grads, 4) + (row * hidden)[:, None] + unit[None, :]
    above = tl.full((tile_rows, tile_hidden), 0, tl.float32)
    for index in range(shares):
        above += tl.load(source + index * (rows * hidden), mask=here, other=0.0)
    parts = tl.cdiv(rows, tile_rows) * shares
    grad_sum, product_sum = _merged_sums(scratch + sums1, parts, unit, is_unit, hidden, tile_hidden, tile_parts)
    if tl.program_id(0) == 0:
        _store_norm_grads(grad_norm_weight1, grad_norm_bias1, grad_sum, product_sum, unit, is_unit)
    left = rounded(
        _grad_normed(above, normed, norm_weight1, inverse, grad_sum, product_sum, row, rows, unit, is_unit), low
    )
    at = (unit * channels)[:, None] + channel[None, :]
    mask = is_unit[:, None] & is_channel[None, :]
    right = rounded(tl.load(weight1 + at, mask=mask, other=0.0), low)
    result = tl.dot(left, right, input_precision=precision)
    from_row = start_of(row, channels, taps)[:, None] + (channel * taps)[None, :]
    here = (row < rows)[:, None] & is_channel[None, :]
    tl.store(grad_pooled + from_row, result.to(grad_pooled.dtype.element_ty), mask=here)
    tile = rounded(tl.load(pooled + from_row, mask=here, other=0.0), low)
    piece = tl.dot(tl.trans(left), tile, input_precision=precision)
    tl.store(scratch + tl.multiple_of(pieces1, 4) + part * (hidden * channels) + at, piece, mask=mask)


@triton.jit(do_not_specialize=["parts", "pieces1", "pieces2"])
def add_pieces(
    scratch,
    grad_weight1,
    grad_weight2,
    parts,
    pieces1,
    pieces2,
    size1: tl.constexpr,  # elements of weight1
    size2: tl.constexpr,
    tile_added: tl.constexpr,
    tile_parts: tl.constexpr,
):
    """Some elements of the gradient of one of the weights."""
    programs1: tl.constexpr = (size1 + tile_added - 1) // tile_added
    is_first = tl.program_id(0) < programs1
    size = tl.where(is_first, size1, size2)
    at = tl.where(is_first, tl.program_id(0), tl.program_id(0) - programs1) * tile_added + tl.arange(0, tile_added)
    source = scratch + tl.multiple_of(tl.where(is_first, pieces1, pieces2), 4)
    total = tl.full((tile_added,), 0, tl.float32)
    for first in range(0, parts, tile_parts):
        part = first + tl.arange(0, tile_parts)
        mask = (part < parts)[:, None] & (at < size)[None, :]
        total += tl.sum(tl.load(source + (part * size)[:, None] + at[None, :], mask=mask, other=0.0), 0)
    if is_first:
        tl.store(grad_weight1 + at, total.to(grad_weight1.dtype.element_ty), mask=at < size1)
    else:
        tl.store(grad_weight2 + at, total.to(grad_weight2.dtype.element_ty), mask=at < size2)
