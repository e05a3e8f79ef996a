# mypy: ignore-errors
"""Tiles that the kernels of the attention branch share: what ``triton_branch.py`` explains."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded(value, low: tl.constexpr):
    if low == "float16":
        return value.to(tl.float16)
    elif low == "bfloat16":
        return value.to(tl.bfloat16)
    else:
        return value.to(tl.float32)


@triton.jit
def start_of(row, channels: tl.constexpr, taps: tl.constexpr):
    """Where a row starts; its channels are ``taps`` elements apart."""
    if taps == 1:
        return row * channels
    else:
        return row // taps * (channels * taps) + row % taps


@triton.jit
def load(source, at, exists):
    return tl.load(source + at, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def kept_hidden(kept, hidden: tl.constexpr, columns: tl.constexpr):
    return kept + (2 * (hidden + columns) + 3) // 4 * 4


@triton.jit
def load_weight2(
    weight2,
    column,
    hidden: tl.constexpr,
    columns: tl.constexpr,
    low: tl.constexpr,
    tile_hidden: tl.constexpr,
):
    """A tile of the second weight, (hidden, columns)."""
    unit = tl.arange(0, tile_hidden)
    at = (column * hidden)[None, :] + unit[:, None]
    exists = (unit < hidden)[:, None] & (column < columns)[None, :]
    return rounded(tl.load(weight2 + at, mask=exists, other=0.0), low)


@triton.jit
def normed_hidden(
    kept,
    mean,
    inverse,
    row,
    rows,
    hidden: tl.constexpr,
    columns: tl.constexpr,
    tile_hidden: tl.constexpr,
):
    """A tile of hidden without mean and deviation."""
    unit = tl.arange(0, tile_hidden)
    source = kept_hidden(kept, hidden, columns) + (row * hidden)[:, None] + unit[None, :]
    tile = tl.load(source, mask=(row < rows)[:, None] & (unit < hidden)[None, :], other=0.0)
    return (tile - mean[None, :]) * inverse[None, :]


@triton.jit
def scaled(normed, weight, bias, at, exists):
    return normed * load(weight, at, exists)[None, :] + load(bias, at, exists)[None, :]


@triton.jit
def relu(value):
    return tl.where(value <= 0, 0.0, value)  # which keeps what is not a number


@triton.jit
def tanh(value):
    square = value * value
    series = value * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))  # where the other form cancels
    return tl.where(square < 0.01, series, 2 * tl.sigmoid(2 * value) - 1)


@triton.jit
def attended(value, activation: tl.constexpr, constant: tl.constexpr, gain: tl.constexpr):
    """The activation, relative to a constant that is not (0, 1)."""
    if activation == "sigmoid":
        result = tl.sigmoid(value)
    elif activation == "tanh":
        result = tanh(value)
    else:
        result = relu(value)
    if constant != 0 or gain != 1:
        result = (result - constant) / gain
    return result


@triton.jit
def slope(value, activation: tl.constexpr, gain: tl.constexpr):
    """The derivative of ``attended``."""
    if activation == "sigmoid":
        result = tl.sigmoid(value)
        result = result * (1 - result)
    elif activation == "tanh":
        result = tanh(value)
        result = 1 - result * result
    else:
        result = tl.where(value <= 0, 0.0, 1.0)
    if gain != 1:
        result = result / gain
    return result
