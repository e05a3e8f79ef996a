# mypy: ignore-errors
"""The gradients of the attention branch, in Triton: what ``triton_branch.py`` explains."""

from __future__ import annotations

import triton
import triton.language as tl

from awconv.ops.triton_branch_tiles import load, load_weight2, normed_hidden, relu, rounded, scaled, slope, start_of


@triton.jit
def _merged_sums(source, parts, at, exists, size: tl.constexpr, block: tl.constexpr, block_parts: tl.constexpr):
    """The sums of all rows, from two sums of every part."""
    first_sum = tl.full((block,), 0, tl.float32)
    second_sum = tl.full((block,), 0, tl.float32)
    for first in range(0, parts, block_parts):
        part = first + tl.arange(0, block_parts)
        mask = (part < parts)[:, None] & exists[None, :]
        part_at = source + (part * (2 * size))[:, None] + at[None, :]
        first_sum += tl.sum(tl.load(part_at, mask=mask, other=0.0), 0)
        second_sum += tl.sum(tl.load(part_at + size, mask=mask, other=0.0), 0)
    return first_sum, second_sum


@triton.jit
def _grad_normed(grad, normed, gain, inverse, grad_sum, product_sum, row, rows, at, exists):
    """The gradient of what a norm was given, from that of what it gave."""
    count = rows.to(tl.float32)
    centred = grad - (grad_sum / count)[None, :] - normed * (product_sum / count)[None, :]
    scale = load(gain, at, exists) * inverse
    return tl.where((row < rows)[:, None], centred * scale[None, :], 0.0)


@triton.jit
def _grad_score(
    grad,
    kept,
    value,
    right,
    gain2,
    shift2,
    row,
    rows,
    column,
    hidden: tl.constexpr,
    columns: tl.constexpr,
    taps: tl.constexpr,
    activation: tl.constexpr,
    precision: tl.constexpr,
):
    """A tile of the score without mean and deviation, and of the gradient of what norm2 gave."""
    is_column = column < columns
    score = tl.dot(value, right, input_precision=precision)
    mean = load(kept + 2 * hidden, column, is_column)
    inverse = load(kept + 2 * hidden + columns, column, is_column)
    normed = (score - mean[None, :]) * inverse[None, :]
    at = start_of(row, columns, taps)[:, None] + (column * taps)[None, :]
    above = load(grad, at, (row < rows)[:, None] & is_column[None, :])
    return normed, inverse, above * slope(scaled(normed, gain2, shift2, column, is_column), activation)


@triton.jit(do_not_specialize=["rows", "sums2"])
def sum_grads(
    grad,  # of the attention
    kept,
    scratch,
    weight2,
    gain1,
    shift1,
    gain2,
    shift2,
    rows,
    sums2,  # offset in scratch: (parts, 2, columns)
    hidden: tl.constexpr,
    columns: tl.constexpr,
    taps: tl.constexpr,  # of grad
    activation: tl.constexpr,
    low: tl.constexpr,
    precision: tl.constexpr,
    block_rows: tl.constexpr,
    block_hidden: tl.constexpr,
    block_columns: tl.constexpr,
):
    """Sums over some rows that the gradient of norm2 needs."""
    column_tiles: tl.constexpr = (columns + block_columns - 1) // block_columns
    part = tl.program_id(0) // column_tiles
    row = part * block_rows + tl.arange(0, block_rows)
    column = tl.program_id(0) % column_tiles * block_columns + tl.arange(0, block_columns)
    unit = tl.arange(0, block_hidden)
    is_unit = unit < hidden
    mean, inverse = load(kept, unit, is_unit), load(kept + hidden, unit, is_unit)
    normed = normed_hidden(kept, mean, inverse, row, rows, hidden, columns, block_hidden)
    value = rounded(relu(scaled(normed, gain1, shift1, unit, is_unit)), low)
    right = load_weight2(weight2, column, hidden, columns, low, block_hidden)
    normed, inverse, above = _grad_score(
        grad, kept, value, right, gain2, shift2, row, rows, column, hidden, columns, taps, activation, precision
    )
    target = scratch + sums2 + part * (2 * columns) + column
    tl.store(target, tl.sum(above, 0), mask=column < columns)
    tl.store(target + columns, tl.sum(above * normed, 0), mask=column < columns)


@triton.jit(do_not_specialize=["rows", "sums2", "sums1", "grads", "pieces2"])
def grad_second(
    grad,
    kept,
    scratch,
    weight2,
    gain1,
    shift1,
    gain2,
    shift2,
    grad_gain2,
    grad_shift2,
    rows,
    sums2,
    sums1,  # offset in scratch: (parts, shares, 2, hidden)
    grads,  # of what norm1 gave, as each share of the columns has it: (shares, rows, hidden)
    pieces2,  # of the gradient of weight2: (parts, columns, hidden)
    hidden: tl.constexpr,
    columns: tl.constexpr,
    taps: tl.constexpr,
    activation: tl.constexpr,
    low: tl.constexpr,
    precision: tl.constexpr,
    shares: tl.constexpr,
    share: tl.constexpr,  # columns of one
    block_rows: tl.constexpr,
    block_hidden: tl.constexpr,
    block_columns: tl.constexpr,
    block_parts: tl.constexpr,
):
    """From the gradient of the attention to that of norm1, for some rows and a share of the columns."""
    part = tl.program_id(0) // shares
    row = part * block_rows + tl.arange(0, block_rows)
    unit = tl.arange(0, block_hidden)
    is_unit = unit < hidden
    mean, inverse = load(kept, unit, is_unit), load(kept + hidden, unit, is_unit)
    normed1 = normed_hidden(kept, mean, inverse, row, rows, hidden, columns, block_hidden)
    shifted = scaled(normed1, gain1, shift1, unit, is_unit)
    value = rounded(relu(shifted), low)
    total = tl.full((block_rows, block_hidden), 0, tl.float32)
    for first in range(0, share, block_columns):
        column = tl.program_id(0) % shares * share + first + tl.arange(0, block_columns)
        is_column = column < columns
        right = load_weight2(weight2, column, hidden, columns, low, block_hidden)
        normed2, inverse2, above = _grad_score(
            grad, kept, value, right, gain2, shift2, row, rows, column, hidden, columns, taps, activation, precision
        )
        grad_sum, product_sum = _merged_sums(
            scratch + sums2, tl.cdiv(rows, block_rows), column, is_column, columns, block_columns, block_parts
        )
        if part == 0:
            tl.store(grad_shift2 + column, grad_sum.to(grad_shift2.dtype.element_ty), mask=is_column)
            tl.store(grad_gain2 + column, product_sum.to(grad_gain2.dtype.element_ty), mask=is_column)
        left = _grad_normed(above, normed2, gain2, inverse2, grad_sum, product_sum, row, rows, column, is_column)
        left = rounded(left, low)
        total = tl.dot(left, tl.trans(right), total, input_precision=precision)
        piece = tl.dot(tl.trans(left), value, input_precision=precision)
        target = scratch + tl.multiple_of(pieces2, 4) + part * (columns * hidden)
        target += (column * hidden)[:, None] + unit[None, :]
        tl.store(target, piece, mask=is_column[:, None] & is_unit[None, :])
    total = tl.where(shifted <= 0, 0.0, total)
    target = scratch + tl.multiple_of(grads, 4) + tl.program_id(0) % shares * (rows * hidden)
    here = (row < rows)[:, None] & is_unit[None, :]
    tl.store(target + (row * hidden)[:, None] + unit[None, :], total, mask=here)
    target = scratch + sums1 + tl.program_id(0) * (2 * hidden) + unit
    tl.store(target, tl.sum(total, 0), mask=is_unit)
    tl.store(target + hidden, tl.sum(total * normed1, 0), mask=is_unit)


@triton.jit(do_not_specialize=["rows", "sums1", "grads", "pieces1"])
def grad_first(
    pooled,
    kept,
    scratch,
    weight1,
    gain1,
    grad_gain1,
    grad_shift1,
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
    block_rows: tl.constexpr,
    block_hidden: tl.constexpr,
    block_channels: tl.constexpr,
    block_parts: tl.constexpr,
):
    """From the gradient of norm1 to that of pooled, for some rows and channels."""
    channel_tiles: tl.constexpr = (channels + block_channels - 1) // block_channels
    part = tl.program_id(0) // channel_tiles
    row = part * block_rows + tl.arange(0, block_rows)
    channel = tl.program_id(0) % channel_tiles * block_channels + tl.arange(0, block_channels)
    is_channel = channel < channels
    unit = tl.arange(0, block_hidden)
    is_unit = unit < hidden
    mean, inverse = load(kept, unit, is_unit), load(kept + hidden, unit, is_unit)
    normed = normed_hidden(kept, mean, inverse, row, rows, hidden, columns, block_hidden)
    here = (row < rows)[:, None] & is_unit[None, :]
    source = scratch + tl.multiple_of(grads, 4) + (row * hidden)[:, None] + unit[None, :]
    above = tl.full((block_rows, block_hidden), 0, tl.float32)
    for index in range(shares):
        above += tl.load(source + index * (rows * hidden), mask=here, other=0.0)
    parts = tl.cdiv(rows, block_rows) * shares
    grad_sum, product_sum = _merged_sums(scratch + sums1, parts, unit, is_unit, hidden, block_hidden, block_parts)
    if tl.program_id(0) == 0:
        tl.store(grad_shift1 + unit, grad_sum.to(grad_shift1.dtype.element_ty), mask=is_unit)
        tl.store(grad_gain1 + unit, product_sum.to(grad_gain1.dtype.element_ty), mask=is_unit)
    left = rounded(_grad_normed(above, normed, gain1, inverse, grad_sum, product_sum, row, rows, unit, is_unit), low)
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
    block: tl.constexpr,
    block_parts: tl.constexpr,
):
    """Some elements of the gradient of one of the weights."""
    programs1: tl.constexpr = (size1 + block - 1) // block
    is_first = tl.program_id(0) < programs1
    size = tl.where(is_first, size1, size2)
    at = tl.where(is_first, tl.program_id(0), tl.program_id(0) - programs1) * block + tl.arange(0, block)
    source = scratch + tl.multiple_of(tl.where(is_first, pieces1, pieces2), 4)
    total = tl.full((block,), 0, tl.float32)
    for first in range(0, parts, block_parts):
        part = first + tl.arange(0, block_parts)
        mask = (part < parts)[:, None] & (at < size)[None, :]
        total += tl.sum(tl.load(source + (part * size)[:, None] + at[None, :], mask=mask, other=0.0), 0)
    if is_first:
        tl.store(grad_weight1 + at, total.to(grad_weight1.dtype.element_ty), mask=at < size1)
    else:
        tl.store(grad_weight2 + at, total.to(grad_weight2.dtype.element_ty), mask=at < size2)
