"""The definition of AW-convolution: "An Attention Module for Convolutional Neural Networks", 2021, arXiv 2108.08205.

Slow, and short enough to be checked line by line against the paper. Everything else in this folder computes the same
numbers faster.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from awconv.ops.algorithm import Algorithm, Machine
from awconv.ops.problem import Problem


def aw_conv(problem: Problem, I: Tensor, K: Tensor, A: Tensor) -> Tensor:
    """``O[n, p, y, x] = sum over c, i, j of  I[n, c, y + i, x + j] * AK[n, p, c, i, j]``.

    This is the paper's sum. :func:`windows` adds padding, stride and dilation, which it leaves out.

    Args:
        problem: the sizes and the arguments of the convolution.
        I: input, N x C1 x H x W.
        K: weights, C2 x C1/groups x h x w.
        A: attention map before Expand, N x C2/r_C2 x (C1/groups)/r_C1 x h/r_hw x w/r_hw.

    Returns:
        O, N x C2 x H' x W'.
    """
    A = expand(A, problem.rates)
    AK = K + A * K if problem.residual else A * K

    I = windows(problem, I).unflatten(1, (problem.geometry.groups, problem.group_in_channels))
    AK = AK.unflatten(1, (problem.geometry.groups, problem.out_channels // problem.geometry.groups))
    position, tap = "zyx"[-problem.dims :], "hij"[-problem.dims :]
    O = torch.einsum(f"n g c {position} {tap}, n g p c {tap} -> n g p {position}", I, AK)
    return O.flatten(1, 2)


def expand(A: Tensor, rates: tuple[int, ...]) -> Tensor:
    """Expand: repeats each value of A ``rates`` times along every axis but the batch."""
    for axis, rate in enumerate(rates, start=1):
        A = A.repeat_interleave(rate, dim=axis)
    return A


def windows(problem: Problem, I: Tensor) -> Tensor:
    """What the kernel sees at each output position: N x C1 x H' x W' x h x w."""
    I = F.pad(I, problem.geometry.reversed_padding())
    axes = zip(
        problem.geometry.kernel_extent(problem.kernel), problem.geometry.stride, problem.geometry.dilation, strict=True
    )
    for axis, (extent, stride, dilation) in enumerate(axes, start=2):
        I = I.unfold(axis, extent, stride)[..., ::dilation]
    return I


def _cost(problem: Problem, machine: Machine) -> float:
    return float("inf")  # never chosen where another can run


ALGORITHM = Algorithm("naive", aw_conv, lambda problem: None, _cost)
