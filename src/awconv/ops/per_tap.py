"""Attention that does not depend on the input channel: one plain convolution for each tap, scaled as it is added.

With ``s = 1 + a``, ``O[p] = sum over taps of s[p, tap] * (K[p, :, tap] . I shifted by tap)``. Neither the forward nor
the backward holds anything of the size of N sets of weights: the weights stay constant, and one tap's partial product
is alive at a time. Taps that share their attention (a rate above 1 along the kernel) form one small convolution.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product as cartesian
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from awconv.ops.algorithm import CONV, Algorithm, Machine
from awconv.ops.problem import Problem, product


def _obstacle(problem: Problem) -> str | None:
    if problem.attention_blocks[1] == 1:
        return None
    return "the attention must have size 1 along the input channels"


def _per_tap(problem: Problem, input: Tensor, weight: Tensor, attention: Tensor) -> Tensor:
    gain = problem.gain(attention).flatten(2).repeat_interleave(problem.rates[0], dim=1)  # N, C2, blocks
    output: Tensor = _PerTap.apply(input, weight, gain, problem)
    return output


class _PerTap(torch.autograd.Function):
    """Saves its inputs only; the backward is made of differentiable operations, which gives the double backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, weight: Tensor, gain: Tensor, problem: Problem) -> Tensor:
        padded = F.pad(input, problem.flat_padding)
        output = None
        for block, kernel in enumerate(_kernel_blocks(problem)):
            partial = _partial(problem, padded, weight, kernel).to(_sum_dtype(input))
            scale = _per_channel(problem, gain, block).to(partial.dtype)
            output = partial.mul_(scale) if output is None else output.addcmul_(partial, scale)
        assert output is not None
        return output.to(input.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Problem], output: Tensor) -> None:
        input, weight, gain, ctx.problem = inputs
        ctx.save_for_backward(input, weight, gain)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (grad_output,) = grads
        input, weight, gain = ctx.saved_tensors
        problem: Problem = ctx.problem
        need_input, need_weight, need_gain, _ = ctx.needs_input_grad
        padded = F.pad(input, problem.flat_padding)
        grad_padded = torch.zeros_like(padded, dtype=_sum_dtype(input)) if need_input else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        grad_gain = []
        for block, kernel in enumerate(_kernel_blocks(problem)):
            window = _window(problem, padded, kernel)
            weight_block = _taps(weight, kernel)
            if need_input or need_weight:
                grad_window, grad_weight_block, _ = torch.ops.aten.convolution_backward(
                    grad_output * _per_channel(problem, gain, block),
                    window,
                    weight_block,
                    None,
                    problem.stride,
                    (0,) * problem.dims,
                    problem.dilation,
                    False,
                    (0,) * problem.dims,
                    problem.groups,
                    (need_input, need_weight, False),
                )
                if grad_padded is not None:
                    _window(problem, grad_padded, kernel).add_(grad_window)
                if grad_weight is not None:
                    _taps(grad_weight, kernel).copy_(grad_weight_block)
            if need_gain:
                partial = _partial(problem, padded, weight, kernel)
                grad_gain.append((grad_output * partial).flatten(2).sum(2, dtype=_sum_dtype(input)))
        grad_input = None
        if grad_padded is not None:
            grad_input = F.pad(grad_padded, [-amount for amount in problem.flat_padding]).to(input.dtype)
        return grad_input, grad_weight, torch.stack(grad_gain, 2).to(gain.dtype) if need_gain else None, None


def _kernel_blocks(problem: Problem) -> Iterator[tuple[slice, ...]]:
    """The parts of the kernel that share their attention, in the order of the flattened attention map."""
    rates = problem.rates[2:]
    for index in cartesian(*(range(blocks) for blocks in problem.attention_blocks[2:])):
        yield tuple(slice(i * rate, (i + 1) * rate) for i, rate in zip(index, rates, strict=True))


def _window(problem: Problem, padded: Tensor, kernel: tuple[slice, ...]) -> Tensor:
    """The part of the padded input that a part of the kernel sees (a view)."""
    for axis, taps in enumerate(kernel):
        dilation = problem.dilation[axis]
        length = problem.stride[axis] * (problem.out_size[axis] - 1) + dilation * (taps.stop - taps.start - 1) + 1
        padded = padded.narrow(2 + axis, taps.start * dilation, length)
    return padded


def _partial(problem: Problem, padded: Tensor, weight: Tensor, kernel: tuple[slice, ...]) -> Tensor:
    """The partial product of a part of the kernel: N, C2, H', W'."""
    window = _window(problem, padded, kernel)
    return CONV[problem.dims](window, _taps(weight, kernel), None, problem.stride, 0, problem.dilation, problem.groups)


def _taps(weight: Tensor, kernel: tuple[slice, ...]) -> Tensor:
    """A part of the kernel, with all channels (a view)."""
    for axis, taps in enumerate(kernel):
        weight = weight.narrow(2 + axis, taps.start, taps.stop - taps.start)
    return weight


def _per_channel(problem: Problem, gain: Tensor, block: int) -> Tensor:
    return gain[:, :, block].reshape(-1, problem.out_channels, *(1,) * problem.dims)


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    """Sums over taps are kept in single precision at least, as a plain convolution keeps them."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _cost(problem: Problem, machine: Machine) -> float:
    blocks = product(problem.attention_blocks[2:])
    # Each block copies the window that it sees, and writes, reads and adds its partial product.
    moved = 2 * problem.in_channels * product(problem.out_size) + 4 * problem.out_elements
    return problem.multiply_adds + machine.element * blocks * moved


ALGORITHM = Algorithm("per_tap", _per_tap, _obstacle, _cost, constant_weights=True)
