"""Which tiles the kernels for GPUs take: by the sizes of a problem alone, never by timing and never by the batch size,
so that results are the same bits each time and a first call waits for nothing but the compiler.

Measured on an H100 and an H200 with ``benchmarks/tiles.py``.
"""

from __future__ import annotations

from typing import NamedTuple

from awconv.ops.gpu import power_of_two

LEAST = 16  # rows, columns and depth of the smallest matrix product


class Tile(NamedTuple):
    """A kernel, the sizes of its tiles and how it runs.

    Attributes:
        kernel: its name.
        sizes: its constants ``tile_...``.
        warps: of a program.
        stages: of the pipeline of its loop.
        wide_gains: whether it reads gains in single precision, whose loads are pipelined, for the price of a copy.
    """

    kernel: str
    sizes: dict[str, int]
    warps: int
    stages: int
    wide_gains: bool = False


def ceiling(size: int, most: int) -> int:
    """What a tile has of a number of channels or positions."""
    return power_of_two(size, most, LEAST)


def correlate(rows: int, inner: int, positions: int, bytes: int, transposed: bool) -> Tile:
    """Tiles of ``scaled_weights`` or ``scaled_sums``.

    Args:
        rows: channels that are made, of a group and block.
        inner: channels that are summed over, of a group and block.
        positions: of one sample.
        bytes: of one element.
        transposed: whether the gradient of the input is made.
    """
    tile_rows, tile_inner = ceiling(rows, 128), ceiling(inner, 64)
    if bytes == 4:
        tile_rows, tile_inner = min(tile_rows, 64), min(tile_inner, 32)
        return _weights(tile_rows, ceiling(positions, 64), tile_inner, 4)
    if tile_rows < 64:
        return _weights(tile_rows, ceiling(positions, 256), tile_inner, 4)
    if positions <= 64 and inner >= 256:  # scaled weights for so few positions are not worth it
        tile_pixels, warps = (128, 8) if transposed else (64, 4)
        sizes = dict(tile_rows=tile_rows, tile_pixels=tile_pixels, tile_inner=tile_inner)
        return Tile("scaled_sums", sizes, warps, 4)
    if positions * inner < 20_000:
        return _weights(tile_rows, ceiling(positions, 64), tile_inner, 4)
    if tile_rows == 64:
        return _weights(64, ceiling(positions, 256), tile_inner, 4, wide_gains=inner <= 64)
    if transposed or inner < 256:
        return _weights(128, ceiling(positions, 128), tile_inner, 4)
    return _weights(128, ceiling(positions, 256), tile_inner, 8)


def _weights(tile_rows: int, tile_pixels: int, tile_inner: int, warps: int, wide_gains: bool = False) -> Tile:
    sizes = dict(tile_rows=tile_rows, tile_pixels=tile_pixels, tile_inner=tile_inner)
    return Tile("scaled_weights", sizes, warps, 3, wide_gains)


def sum_products(rows: int, columns: int, positions: int, bytes: int) -> Tile:
    """Tiles of ``sum_products``: rows times columns of a segment, or of several where it has few."""
    most = 64 if bytes == 4 else 128
    tile_rows, tile_segment = ceiling(rows, most), ceiling(columns, most)
    tile_columns = 32 if tile_segment == 16 else max(tile_segment, 64)
    if bytes == 2 and positions > 64 and tile_rows == tile_segment == 64:
        tile_columns = 128  # of two taps, for which the rows are read once
    sizes = dict(
        tile_rows=tile_rows,
        tile_columns=tile_columns,
        tile_segment=tile_segment,
        tile_positions=32 if bytes == 4 else 128 if tile_rows == 16 else 64,
    )
    if tile_rows * tile_columns >= 128 * 128:
        return Tile("sum_products", sizes, 8, 3)
    return Tile("sum_products", sizes, 4, 4 if tile_rows == tile_columns == 64 else 3)


def side_by_side(height: int, width: int, positions: int) -> int:
    """How many of a chunk's positions should be side by side, so that an image has the fewest chunks."""
    widths = [1 << power for power in range(positions.bit_length())]
    return min(reversed(widths), key=lambda side: -(-height // (positions // side)) * -(-width // side))


def depthwise(kernel: str, channels: int, positions: int) -> Tile:
    """Tiles of ``depthwise_correlate`` and ``depthwise_sum_products``."""
    return Tile(kernel, dict(tile_channels=ceiling(channels, 64), tile_pixels=ceiling(positions, 32)), 4, 3)
