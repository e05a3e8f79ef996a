"""Where a convolution looks: the arguments that it shares with every other, as one value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Geometry(NamedTuple):
    """Stride, padding, dilation and groups of a convolution, one entry for each spatial axis.

    Attributes:
        stride: distance between two positions of the window.
        padding: zeros ``(before, after)`` each axis.
        dilation: distance between two taps of the kernel.
        groups: number of groups of channels.
    """

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> Geometry:
        """From what an operator's schema can hold: the padding is one list, (before, after) of each axis in turn."""
        pairs = zip(padding[::2], padding[1::2], strict=True)
        return cls(tuple(stride), tuple(pairs), tuple(dilation), groups)

    def arguments(self) -> tuple[list[int], list[int], list[int], int]:
        """What :meth:`of` reads."""
        padding = [amount for pair in self.padding for amount in pair]
        return list(self.stride), padding, list(self.dilation), self.groups

    def output_size(self, size: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """The size of the output along each axis, from those of the input and the kernel."""
        return tuple(
            (extent + before + after - dilation * (taps - 1) - 1) // stride + 1
            for extent, taps, stride, (before, after), dilation in zip(
                size, kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )
