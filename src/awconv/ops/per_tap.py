"""Attention that does not depend on the input channel: one matrix product for each tap, scaled as it is added.

With ``s = 1 + a``, ``O[p] = sum over taps of s[p, tap] * (K[p, :, tap] . I shifted by tap)``. Neither the forward nor
the backward makes weights for each sample: the weights stay constant, and the partial products of a few taps are alive
at a time. All samples share one wide matrix product, with the channels first.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from awconv.ops import tracing
from awconv.ops.algorithm import CONV, Algorithm, Machine
from awconv.ops.problem import Problem, product

_CHUNK_ELEMENTS = 2**24  # 64 MiB in single precision


def _obstacle(problem: Problem) -> str | None:
    if problem.function_obstacle is not None:
        return problem.function_obstacle
    if problem.attention_blocks[1] != 1:
        return "the attention must have size 1 along the input channels"
    if problem.padding_obstacle is not None:
        return f"it copies the input with its padding, {problem.padding_obstacle}"
    return None


def _per_tap(problem: Problem, input: Tensor, weight: Tensor, attention: Tensor) -> Tensor:
    if problem.dtype == torch.float16:  # a tap's product alone may overflow where the sum over the taps does not
        return _per_tap(replace(problem, dtype=torch.float32), input.float(), weight.float(), attention.float()).half()
    gain = problem.gain_of_taps(attention).squeeze(2)
    if tracing.exporting():
        return _by_convolutions(problem, input, weight, gain)
    gain = gain.flatten(2).permute(2, 1, 0).unsqueeze(3)  # taps, C2, N, 1
    weights = weight.flatten(2).permute(2, 0, 1)  # taps, C2, C1/groups
    output: Tensor = _PerTap.apply(input, weights, gain, problem)
    return output.reshape(problem.out_channels, input.shape[0], *problem.out_size).transpose(0, 1).contiguous()


def _by_convolutions(problem: Problem, input: Tensor, weight: Tensor, gain: Tensor) -> Tensor:
    """The same for an exported graph, whose runtimes know pointwise convolutions of constant weights best."""
    padded = F.pad(input, problem.geometry.reversed_padding())
    if problem.depthwise:
        gain = weight.flatten(1, 2) * gain
    pointwise, scales = (
        tensor.reshape(*tensor.shape[:2], problem.taps, *(1,) * (problem.dims - 1)).split(1, dim=2)
        for tensor in (weight, gain)
    )
    output: Tensor | None = None
    for tap in range(problem.taps):
        partial = _window(problem, padded, tap)
        if not problem.depthwise:
            partial = CONV[problem.dims](partial, pointwise[tap], groups=problem.geometry.groups)
        scaled = partial.to(_sum_dtype(input)) * scales[tap]
        output = scaled if output is None else output + scaled
    assert output is not None
    return output.to(input.dtype)


class _PerTap(torch.autograd.Function):
    """Saves its inputs only; the backward is made of differentiable operations, which gives the double backward.
    It has no forward-mode derivative: torch.compile takes no Function that has one.

    Input (N, C1, \\*size), weights (taps, C2, C1/groups) and gain (taps, C2, N, 1) to output (C2, N, H'W').
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, weights: Tensor, gain: Tensor, problem: Problem) -> Tensor:
        padded = _channels_first(problem, input)
        output: Tensor | None = None
        for taps in _taps_at_once(problem, input):
            partials = _partials(problem, weights[taps], _columns(problem, padded, taps)).to(_sum_dtype(input))
            for partial, scale in zip(partials, gain[taps].to(partials.dtype), strict=True):
                if output is None:
                    output = partial * scale
                elif tracing.is_batched(output):  # vmap runs addcmul_ for one problem after another
                    output.add_(partial * scale)
                else:
                    output.addcmul_(partial, scale)
        assert output is not None
        # A copy, since torch 2.11 compiles a forward that returns what it added to in place to a gradient of zeros
        # (pytorch/pytorch#180642).
        return output.to(input.dtype, copy=tracing.compiling())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Problem], output: Tensor) -> None:
        input, weights, gain, ctx.problem = inputs
        ctx.save_for_backward(input, weights, gain)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        with tracing.without_autocast(ctx.problem.device):
            return _backward(ctx.problem, ctx.saved_tensors, grads[0], ctx.needs_input_grad)


def _backward(
    problem: Problem, saved: tuple[Tensor, ...], grad_output: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    input, weights, gain = saved
    need_input, need_weights, need_gain, _ = needs
    padded = _channels_first(problem, input)
    grad_padded: Tensor | None = None
    grad_weights, grad_gain = [], []
    for taps in _taps_at_once(problem, input):
        columns = _columns(problem, padded, taps)
        grad_partials = _by_group(problem, grad_output * gain[taps])
        if need_input:
            grad_columns = _by_group(problem, weights[taps]).transpose(1, 2) @ grad_partials
            grad_columns = grad_columns.reshape(
                taps.stop - taps.start, problem.in_channels, input.shape[0], *problem.out_size
            )
            if grad_padded is None:  # made from what is added to it, and so batched under vmap where that is
                grad_padded = grad_columns.new_zeros(padded.shape, dtype=_sum_dtype(input))
            for tap, columns_of_tap in zip(range(taps.start, taps.stop), grad_columns, strict=True):
                _window(problem, grad_padded, tap).add_(columns_of_tap)
        if need_weights:
            grad_weights.append((grad_partials @ columns.transpose(1, 2)).reshape(weights[taps].shape))
        if need_gain:
            inner = grad_output.to(_sum_dtype(input)) * _partials(problem, weights[taps], columns)
            grad_gain.append(inner.sum(3, keepdim=True).to(gain.dtype))
    grad_input = None
    if grad_padded is not None:
        unpadded = F.pad(grad_padded, [-amount for amount in problem.geometry.reversed_padding()])
        grad_input = unpadded.transpose(0, 1).to(input.dtype)
    return (
        grad_input,
        torch.cat(grad_weights) if need_weights else None,
        torch.cat(grad_gain) if need_gain else None,
        None,
    )


def _taps_at_once(problem: Problem, input: Tensor) -> list[slice]:
    """Taps that are multiplied at once: as many as keep what they see and give within a fixed number of elements."""
    at_once = 1
    if not tracing.compiling():  # where the batch size may be symbolic
        seen = input.shape[0] * (problem.in_channels + problem.out_channels) * product(problem.out_size)
        at_once = max(1, _CHUNK_ELEMENTS // max(1, seen))
    starts = range(0, problem.taps, at_once)
    return [slice(start, min(start + at_once, problem.taps)) for start in starts]


def _channels_first(problem: Problem, input: Tensor) -> Tensor:
    """The padded input with the channels before the samples, so that the samples of a channel lie side by side."""
    return F.pad(input.transpose(0, 1), problem.geometry.reversed_padding()).contiguous()


def _window(problem: Problem, padded: Tensor, tap: int) -> Tensor:
    """What a tap of the flattened kernel sees, as a view of shape (C1, N, H', W')."""
    for axis in reversed(range(problem.dims)):
        position, tap = tap % problem.kernel[axis], tap // problem.kernel[axis]
        stride = problem.geometry.stride[axis]
        length = stride * (problem.out_size[axis] - 1) + 1
        padded = padded.narrow(2 + axis, position * problem.geometry.dilation[axis], length)
        if stride > 1:
            padded = padded[(slice(None),) * (2 + axis) + (slice(None, None, stride),)]
    return padded


def _columns(problem: Problem, padded: Tensor, taps: slice) -> Tensor:
    """The right side of the matrix products of some taps: (taps * groups, C1/groups, N*H'W')."""
    windows = torch.stack([_window(problem, padded, tap) for tap in range(taps.start, taps.stop)])
    return _by_group(problem, windows)


def _by_group(problem: Problem, tensor: Tensor) -> Tensor:
    """Shape (taps, channels, \\*rest) to (taps * groups, channels/groups, product of rest)."""
    taps, channels, *rest = tensor.shape
    return tensor.reshape(taps * problem.geometry.groups, channels // problem.geometry.groups, product(rest))


def _partials(problem: Problem, weights: Tensor, columns: Tensor) -> Tensor:
    """The partial products of some taps: (taps, C2, N, H'W')."""
    positions = product(problem.out_size)
    products = _by_group(problem, weights) @ columns
    return products.reshape(weights.shape[0], problem.out_channels, columns.shape[2] // positions, positions)


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    """Sums over taps are kept in single precision at least, as a plain convolution keeps them."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _cost(problem: Problem, machine: Machine) -> float:
    # Each tap copies the window that it sees, and writes, reads and adds its partial product.
    moved = 2 * problem.in_channels * product(problem.out_size) + 4 * problem.out_elements
    padding = problem.padded_elements - problem.in_elements
    return problem.multiply_adds + problem.taps * (machine.element * moved + machine.call) + machine.element * padding


ALGORITHM = Algorithm("per_tap", _per_tap, _obstacle, _cost)
