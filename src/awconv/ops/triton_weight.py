# mypy: ignore-errors
"""The kernel that gives a convolution its weight in the dtype and order in which the others read it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["size"])
def lay_out(
    weight,  # (outputs, channels, taps)
    target,  # (outputs, taps, channels)
    size,  # elements
    channels: tl.constexpr,
    taps: tl.constexpr,
    block: tl.constexpr,
):
    """With one channel and one tap, the order stays."""
    index = tl.program_id(0) * block + tl.arange(0, block)
    exists = index < size
    source = index
    if channels > 1:  # its order changes, too
        source = (index // (channels * taps) * channels + index % channels) * taps + index // channels % taps
    value = tl.load(weight + source, mask=exists)
    tl.store(target + index, value.to(target.dtype.element_ty), mask=exists)
