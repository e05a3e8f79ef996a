# mypy: ignore-errors
"""Arithmetic that the Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def divide(number, multiplier, shift):
    """``number // divisor`` for numbers from 0 to 2**31 - 1 and what :func:`awconv.ops.gpu.divider` made of a divisor:
    three instructions where a division by a number that the compiler does not know has thirty."""
    high = tl.umulhi((2 * number).to(tl.uint32), multiplier.to(tl.uint32))
    return (high >> shift.to(tl.uint32)).to(tl.int32)
