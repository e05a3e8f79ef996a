"""The definition of AW-convolution: "An Attention Module for Convolutional Neural Networks", 2021, arXiv 2108.08205.

:func:`attention_map` is F1, and :func:`aw_conv` is the rest. Slow, and short enough to be checked line by line against
the paper. Everything else in this folder computes the same numbers faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from awconv.ops.algorithm import Algorithm, Machine
from awconv.ops.problem import Problem

Function = Callable[[Tensor], Tensor]


def attention_map(
    I: Tensor,
    W1: Tensor,
    W2: Tensor,
    norm1: Function,
    norm2: Function,
    size: Sequence[int],
    f: Function = torch.sigmoid,
) -> Tensor:
    """``A = f(norm2(W2 ReLU(norm1(W1 pool(I)))))``, F1: the attention map of each sample from that sample.

    Args:
        I: input, N x C1 x H x W.
        W1: weights of the first pointwise convolution, (C1/r) x C1.
        W2: weights of the second one, (C2/r_C2 * (C1/groups)/r_C1) x (C1/r).
        norm1: the first norm, of N x (C1/r) x h/r_hw x w/r_hw; :func:`batch_norm` is the paper's.
        norm2: the second norm.
        size: C2/r_C2 x (C1/groups)/r_C1 x h/r_hw x w/r_hw.
        f: the activation; the paper's is the sigmoid.

    Returns:
        A before Expand, N x C2/r_C2 x (C1/groups)/r_C1 x h/r_hw x w/r_hw.
    """
    A0 = pool(I, size[2:])
    A1 = torch.relu(norm1(torch.einsum("d c, n c ... -> n d ...", W1, A0)))
    A2 = f(norm2(torch.einsum("e d, n d ... -> n e ...", W2, A1)))
    A: Tensor = A2.unflatten(1, tuple(size[:2]))
    return A


def pool(I: Tensor, size: Sequence[int]) -> Tensor:
    """The mean of each of h x w parts of the image, which overlap where the sizes do not divide: N x C1 x h x w."""
    for axis, bins in enumerate(size, start=2):
        length = I.shape[axis]
        ends = [(i * length // bins, -(-(i + 1) * length // bins)) for i in range(bins)]
        I = torch.stack([I.narrow(axis, a, b - a).mean(axis) for a, b in ends], axis)
    return I


def batch_norm(X: Tensor, weight: float | Tensor = 1, bias: float | Tensor = 0, epsilon: float = 1e-5) -> Tensor:
    """Each channel of a batch to mean 0 and variance 1, then ``weight`` and ``bias``, of shape C x 1 x 1."""
    axes = [axis for axis in range(X.dim()) if axis != 1]
    variance, mean = torch.var_mean(X, axes, correction=0, keepdim=True)
    return weight * (X - mean) / torch.sqrt(variance + epsilon) + bias


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
