"""The paper's sum as plain loops in float64 NumPy, written without looking at the package."""

from __future__ import annotations

from itertools import product

import numpy as np


def aw_convolution(image, kernel, attention, bias, stride, padding, dilation, groups, residual):
    """``padding`` is (before, after) for each spatial axis; the other numbers are one for each."""
    image = np.pad(image, [(0, 0), (0, 0), *padding])
    batch, _, *size = image.shape
    out_channels, group_in, *taps = kernel.shape
    rates = [whole // part for whole, part in zip(kernel.shape, attention.shape[1:], strict=True)]
    out_size = [
        (extent - d * (k - 1) - 1) // s + 1 for extent, k, s, d in zip(size, taps, stride, dilation, strict=True)
    ]
    output = np.zeros((batch, out_channels, *out_size))
    for n, p in product(range(batch), range(out_channels)):
        first_channel = p // (out_channels // groups) * group_in
        for position in product(*map(range, out_size)):
            total = 0.0 if bias is None else bias[p]
            for c, *tap in product(range(group_in), *map(range, taps)):
                a = attention[(n, *(i // r for i, r in zip((p, c, *tap), rates, strict=True)))]
                k = kernel[(p, c, *tap)]
                pixel = tuple(y * s + i * d for y, s, i, d in zip(position, stride, tap, dilation, strict=True))
                total += image[(n, first_channel + c, *pixel)] * (k + a * k if residual else a * k)
            output[(n, p, *position)] = total
    return output
