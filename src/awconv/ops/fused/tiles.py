"""Which tiles the kernels for GPUs take: by the sizes of a problem alone, never by timing and never by the batch size, so
that results are the same bits each time and a first call waits for nothing but the compiler.

Measured on an H100 with ``benchmarks/tiles.py``.
"""

from __future__ import annotations

from typing import NamedTuple

from awconv.ops.gpu import power_of_two

LEAST = 16  # rows, columns and depth of the smallest matrix product


class Tile(NamedTuple):
    """A kernel, the sizes of its tiles and how it runs."""

    kernel: str
    sizes: dict[str, int]
    warps: int
    stages: int


def ceiling(size: int, most: int) -> int:
    """What a tile has of a number of channels or positions."""
    return power_of_two(size, most, LEAST)


def _filled(positions: int, block: int) -> float:
    """Which share of the tiles of a sample is positions."""
    return positions / (-(-positions // block) * block)


def correlate(rows: int, inner: int, positions: int, bytes: int) -> Tile:
    """Tiles of ``scaled_weights`` or ``scaled_sums``.

    Args:
        rows: channels that are made, of a group and block.
        inner: channels that are summed over, of a group and block.
        positions: of one sample.
        bytes: of one element.
    """
    block_rows, block_inner = ceiling(rows, 128), ceiling(inner, 64)
    if bytes == 4:
        sizes = dict(
            block_rows=min(block_rows, 64), block_pixels=ceiling(positions, 64), block_inner=min(block_inner, 32)
        )
        return Tile("scaled_weights", sizes, 4, 3)
    if _filled(positions, ceiling(positions, 128)) < 0.75:
        return Tile(
            "scaled_sums", dict(block_rows=min(block_rows, 64), block_pixels=128, block_inner=block_inner), 4, 3
        )
    block_pixels = 128 if block_rows == 128 else 256
    warps = 8 if block_rows * block_pixels >= 128 * 128 else 4
    sizes = dict(block_rows=block_rows, block_pixels=ceiling(positions, block_pixels), block_inner=block_inner)
    return Tile("scaled_weights", sizes, warps, 3)


def sum_products(rows: int, columns: int, positions: int, bytes: int) -> Tile:
    """Tiles of ``sum_products``: rows times columns of a segment, or of several where it has few."""
    block_rows, block_segment = ceiling(rows, 128), ceiling(columns, 128)
    block_columns = max(block_segment, 64 if bytes == 4 else 128)
    if bytes == 4:
        block_rows, block_segment = min(block_rows, 64), min(block_segment, 64)
        block_columns = 64
    sizes = dict(
        block_rows=block_rows,
        block_columns=block_columns,
        block_segment=block_segment,
        block_positions=32 if bytes == 4 else 64,
    )
    return Tile("sum_products", sizes, 8 if block_rows * block_columns >= 128 * 128 else 4, 3)


def depthwise(kernel: str, channels: int, positions: int) -> Tile:
    """Tiles of ``depthwise_correlate`` and ``depthwise_sum_products``."""
    return Tile(kernel, dict(block_channels=ceiling(channels, 64), block_pixels=ceiling(positions, 32)), 4, 3)
