"""How the kernels of the attention branch are launched: their tiles, buffers and constants, by sizes alone."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

from awconv.ops.gpu import Kernel, Launch, power_of_two

LEAST = 16  # that a product of matrices takes, of each size
MOST_HIDDEN = 128  # channels, of which a program has all
PLANS = 4096  # that are remembered
_SHARES = 8  # that the columns are in, at most, where each program of the backward adds up its share
_ROWS = 32  # of a tile for inference: of any batch size, on which what a network says of a sample does not depend then
_MERGED = 32  # parts that are loaded at once
_ADDED = 128  # elements of a weight's gradient that a program adds


class Facts(NamedTuple):
    """All that decides the launches. Rows are samples times taps, columns the output channels of the branch.

    It has methods where properties would do: Dynamo of torch 2.9 cannot read those of a named tuple of symbols.
    """

    rows: int
    channels: int
    hidden: int
    columns: int
    taps: int = 1  # elements between two channels of a row, in memory
    activation: str = "sigmoid"
    constant: float = 0.0  # to which the attention is relative: (activation - constant) / gain
    gain: float = 1.0
    low: str = "float32"  # dtype of products
    precision: str = "ieee"  # of products of float32
    residual: bool = False  # whether 1 is added to the attention: the convolution's gain

    def tile(self) -> int:
        """Rows of a tile, and columns or channels at most: as many as a program has registers for."""
        return 32 if self._is_heavy() else 64

    def _is_heavy(self) -> bool:
        return self.precision == "ieee" or self.hidden > 64

    def parts(self) -> int:
        """Of the rows: a tile of them each."""
        return -(-self.rows // self.tile())

    def width(self, size: int) -> int:
        """Columns or channels of a tile."""
        return power_of_two(size, self.tile(), LEAST)

    def tiles(self, size: int) -> int:
        return -(-size // self.width(size))

    def share(self) -> int:
        """Columns of a share."""
        return -(-self.tiles(self.columns) // _SHARES) * self.width(self.columns)

    def shares(self) -> int:
        return -(-self.columns // self.share())

    def scratch(self) -> tuple[int, ...]:
        """Where the backward's kernels put what they hand on: sums2, sums1, grads, pieces2, pieces1; and the end."""
        elements = (
            self.parts() * 2 * self.columns,
            self.parts() * self.shares() * 2 * self.hidden,
            self.shares() * self.rows * self.hidden,
            self.parts() * self.columns * self.hidden,
            self.parts() * self.hidden * self.channels,
        )
        return tuple(itertools.accumulate((-(-number // 4) * 4 for number in elements), initial=0))

    def largest(self) -> int:
        """Elements of the largest tensor."""
        return max(self.rows * max(self.channels, self.columns), self.scratch()[-1])

    def launch(self, kernel: str, constants: str, programs: int, *integers: int, **other: int) -> Launch:
        """A launch of a kernel, by module and name, whose constants have these names."""
        known = dict(
            **self._asdict(),
            shares=self.shares(),
            share=self.share(),
            tile_rows=self.tile(),
            tile_hidden=power_of_two(self.hidden, MOST_HIDDEN, LEAST),
            tile_columns=self.width(self.columns),
            tile_channels=self.width(self.channels),
            tile_parts=_MERGED,
            size1=self.hidden * self.channels,
            size2=self.columns * self.hidden,
            tile_added=_ADDED,
        )
        chosen = {name: known[name] for name in constants.split()} | other
        module, _, name = kernel.rpartition(".")
        warps = 8 if self._is_heavy() or self.hidden > 32 else 4
        return Launch(Kernel(f"awconv.ops.{module}", name, chosen, warps), programs, integers)


def kept_elements(rows: int, hidden: int, columns: int) -> int:
    """Of what is kept for the backward: the mean and the inverse deviation of each norm, then hidden."""
    return -(-2 * (hidden + columns) // 4) * 4 + rows * hidden


@functools.lru_cache(maxsize=PLANS)
def inference(facts: Facts) -> Launch:
    names = (
        "channels hidden columns taps activation constant gain residual low precision "
        "tile_rows tile_hidden tile_columns tile_channels"
    )
    programs = -(-facts.rows // _ROWS) * facts.tiles(facts.columns)
    return facts.launch("triton_branch.infer", names, programs, facts.rows, tile_rows=_ROWS)


@functools.lru_cache(maxsize=PLANS)
def forward(facts: Facts) -> tuple[tuple[Launch, ...], int, int]:
    """The launches, and the elements of two buffers: what is kept for the backward, and what they hand on."""
    rows, hidden, columns, parts = facts.rows, facts.hidden, facts.columns, facts.parts()
    statistics2 = parts * 2 * hidden  # after those of norm1
    programs = parts * facts.tiles(columns)
    project = "channels hidden columns taps low precision tile_rows tile_hidden tile_channels"
    second = "low precision tile_rows tile_hidden tile_columns tile_parts"
    made = (
        facts.launch("triton_branch.project", project, parts, rows, 0),
        facts.launch("triton_branch.measure", f"hidden columns {second}", programs, rows, 0, statistics2),
        facts.launch(
            "triton_branch.finish",
            f"hidden columns activation constant gain residual {second}",
            *(programs, rows, statistics2),
        ),
    )
    return made, kept_elements(rows, hidden, columns), statistics2 + parts * 2 * columns


@functools.lru_cache(maxsize=PLANS)
def backward(facts: Facts, grad_taps: int, grad_parts: int = 1) -> tuple[tuple[Launch, ...], int]:
    """The launches, and the elements of the buffer that they hand on; with the taps of the attention's gradient, and of
    how many tensors one after another it is the sum."""
    rows, parts, above = facts.rows, facts.parts(), facts._replace(taps=grad_taps)
    sums2, sums1, grads, pieces2, pieces1, end = facts.scratch()
    second, of_parts = "hidden columns taps activation gain low precision", dict(grad_parts=grad_parts)
    tiles = "tile_rows tile_hidden tile_columns"
    first = "channels hidden columns taps low precision shares tile_rows tile_hidden tile_channels tile_parts"
    added = sum(-(-size * facts.hidden // _ADDED) for size in (facts.channels, facts.columns))
    made = (
        above.launch(
            "triton_branch_grads.sum_grads",
            f"{second} {tiles}",
            parts * facts.tiles(facts.columns),
            *(rows, sums2),
            **of_parts,
        ),
        above.launch(
            "triton_branch_grads.grad_second",
            f"{second} shares share {tiles} tile_parts",
            parts * facts.shares(),
            *(rows, sums2, sums1, grads, pieces2),
            **of_parts,
        ),
        facts.launch(
            "triton_branch_grads.grad_first",
            first,
            parts * facts.tiles(facts.channels),
            *(rows, sums1, grads, pieces1),
        ),
        facts.launch(
            "triton_branch_grads.add_pieces", "size1 size2 tile_added tile_parts", added, parts, pieces1, pieces2
        ),
    )
    return made, end
