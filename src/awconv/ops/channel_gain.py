"""A tensor times a gain for each of its samples and channels. In a training on a CPU, each new tensor of the input's
size costs as much as the arithmetic: the way back makes one, where autograd makes four."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from awconv.ops.average_pool import average_pool, pool_beside, pools_beside
from awconv.ops.problem import product
from awconv.ops.tracing import eager, in_forward_mode


def differentiates(input: Tensor) -> bool:
    """Whether :func:`mean_beside` and the node of :func:`scale` are for a tensor: it trains on a CPU, eagerly."""
    needed = input.device.type == "cpu" and input.requires_grad and torch.is_grad_enabled()
    return needed and eager(input) and not in_forward_mode()


def mean_beside(input: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each channel, shape (N, C, 1, ...), and a tensor equal to the input, which :func:`scale` must take in
    its place, and nothing else: the backward adds the mean's gradient to that of the tensor in place."""
    passed, mean = _MeanBeside.apply(input)
    return passed, mean


def pooled_globally(input: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor equal to the input, which :func:`scale` must take in its place, and the mean of each channel, shape
    (N, C, 1, ...)."""
    ones = (1,) * (input.dim() - 2)
    if differentiates(input):
        return mean_beside(input)
    if pools_beside(input, ones):
        return pool_beside(input, ones)
    return input, average_pool(input, ones)


def scale(input: Tensor, gain: Tensor) -> Tensor:
    """An input, shape (N, C, \\*size), times a gain, shape (N, C, 1, ...), in the input's dtype."""
    gain = gain.to(input.dtype)
    if not differentiates(input) or not eager(gain):
        return input * gain
    scaled: Tensor = _Scale.apply(input, gain)
    return scaled


class _MeanBeside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.size = input.shape
        return input.view_as(input), input.mean(_spatial(input), keepdim=True)

    @staticmethod
    def backward(ctx: Any, grad_passed: Tensor | None, grad_mean: Tensor | None) -> Tensor | None:
        if grad_mean is None:
            return grad_passed
        share = grad_mean / product(ctx.size[2:])
        if grad_passed is None:
            return share.expand(ctx.size)
        if torch.is_grad_enabled() or not eager(grad_passed, share):
            return grad_passed + share
        return grad_passed.add_(share)  # the scaling made it, and nobody else has it


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, gain: Tensor) -> Tensor:
        ctx.save_for_backward(input, gain)
        return input * gain

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        input, gain = ctx.saved_tensors
        products = grad * input
        of_gain = products.sum(_spatial(input), keepdim=True)
        if torch.is_grad_enabled() or not eager(grad, input, gain):
            return grad * gain, of_gain
        return torch.mul(grad, gain, out=products), of_gain


def _spatial(input: Tensor) -> list[int]:
    return list(range(2, input.dim()))
