"""Where a convolution looks: the arguments that it shares with every other, as one value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch.fx.experimental.symbolic_shapes import statically_known_true


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

    def padding_before(self) -> tuple[int, ...]:
        """Zeros before each axis."""
        return tuple(before for before, _ in self.padding)

    def reversed_padding(self) -> list[int]:
        """The padding in the order that ``torch.nn.functional.pad`` takes: last axis first."""
        return [amount for pair in reversed(self.padding) for amount in pair]

    def split_padding(self) -> tuple[list[int], list[int]]:
        """Splits the padding into what a convolution takes itself and never writes, and what is left for one side.

        Returns:
            Zeros on both sides of each axis, and the rest in the order that ``torch.nn.functional.pad`` takes.
        """
        both = [min(pair) for pair in self.padding]
        pairs = zip(reversed(self.padding), reversed(both), strict=True)
        return both, [amount - least for pair, least in pairs for amount in pair]

    def kernel_extent(self, kernel: Sequence[int]) -> tuple[int, ...]:
        """How many pixels of each axis a dilated kernel spans, from its first tap to its last."""
        return tuple(dilation * (taps - 1) + 1 for taps, dilation in zip(kernel, self.dilation, strict=True))

    def seen_size(self, positions: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """How many pixels of each axis, padding among them, some positions see together."""
        axes = zip(positions, self.stride, self.kernel_extent(kernel), strict=True)
        return tuple(stride * (count - 1) + extent for count, stride, extent in axes)

    def output_size(self, size: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """The size of the output along each axis, from those of the input and the kernel."""
        axes = zip(size, self.padding, self.kernel_extent(kernel), self.stride, strict=True)
        return tuple(
            (length + before + after - extent) // stride + 1 for length, (before, after), extent, stride in axes
        )

    def seeing(self, size: Sequence[int], kernel: Sequence[int]) -> tuple[Geometry, tuple[tuple[int, int], ...]]:
        """The geometry without the positions that see nothing but padding. Absurd strides and paddings can make these
        nearly all positions. Computing them takes minutes; PyTorch's own backward takes as long, or crashes.

        Returns:
            The geometry of the positions that see something, and the positions ``(before, after)`` these along each
            axis that do not.
        """
        strides, paddings, unseeing = [], [], []
        axes = zip(
            size, self.kernel_extent(kernel), self.stride, self.padding, self.output_size(size, kernel), strict=True
        )
        for length, extent, stride, padding, positions in axes:
            skipped, padding = _without_unseeing(length, extent, stride, *padding)
            longest = length + sum(padding) - extent + 1
            unseeing.append((skipped, positions - skipped - (longest - 1) // stride - 1))
            strides.append(longest if statically_known_true(stride > longest) else stride)
            paddings.append(padding)
        return Geometry(tuple(strides), tuple(paddings), self.dilation, self.groups), tuple(unseeing)


def _without_unseeing(size: int, extent: int, stride: int, before: int, after: int) -> tuple[int, tuple[int, int]]:
    """How many positions before those that see something are left out along one axis, and the padding that stays."""
    if min(before, after) < extent or statically_known_true(size == 0):
        return 0, (before, after)
    skipped = (before - extent + 1) // stride
    # One more, where as much padding on both sides still covers all that see something.
    tight = min(-(-(before - extent + 1) // stride), before // stride)
    left, needed = before - tight * stride, -(-(size + before) // stride) - tight
    if statically_known_true(size + 2 * left >= extent) and statically_known_true(
        (size + 2 * left - extent) // stride + 1 >= needed
    ):
        skipped = tight
    before -= skipped * stride
    return skipped, (before, min(after, before))
