"""What the operators of awconv cost, for ``torch.utils.flop_counter``: two operations for each multiply-add.

A convolution counts as a plain one, plus the multiplications by the attention; norms, activations and pooling are not
counted, as PyTorch does not count its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from awconv.ops import fused, layer_operators  # noqa: F401 - they define the operators
from awconv.ops.problem import product

Shape = Sequence[int]


def convolution(weight: Shape, output: Shape) -> int:
    """Multiply-adds of a plain convolution.

    Args:
        weight: shape (C2, C1/groups, \\*kernel).
        output: shape (N, C2, \\*out_size).
    """
    return output[0] * product(output[2:]) * product(weight)


def scaling(weight: Shape, output: Shape, values: int) -> int:
    """Multiplications by the attention: of each sample's weights or of each partial product, whichever are fewer.

    Args:
        weight: shape (C2, C1/groups, \\*kernel).
        output: shape (N, C2, \\*out_size).
        values: of the attention, for one output channel.
    """
    return output[0] * min(product(weight), weight[0] * values * product(output[2:]))


def pointwise_layers(pooled: Shape, weight1: Shape, weight2: Shape) -> int:
    """Multiply-adds of the two convolutions of a branch.

    Args:
        pooled: what comes into them, shape (N, C1, \\*kernel).
        weight1: of the first one, shape (hidden, C1, 1, ...).
        weight2: of the second one.
    """
    return pooled[0] * product(pooled[2:]) * (product(weight1) + product(weight2))


def forward(weight: Shape, gain: Shape, output: Shape) -> int:
    """Multiply-adds of ``awconv::fused``, with a gain of shape (N, C2, blocks of input channels, taps)."""
    return convolution(weight, output) + scaling(weight, output, product(gain[2:]))


def backward(weight: Shape, values: int, grad_output: Shape, needs: Sequence[bool]) -> int:
    """Multiply-adds of its backward. The gradients of weight and attention are sums of the same products; for each of
    the three gradients, weights or products are multiplied by the attention or, for that of the attention, by the
    weights."""
    of_input, of_weight, of_gain = needs
    convolutions = int(of_input) + int(of_weight or of_gain)
    return convolutions * convolution(weight, grad_output) + sum(needs) * scaling(weight, grad_output, values)


operators = torch.ops.awconv


@register_flop_formula(operators.fused)  # type: ignore[untyped-decorator]
def _fused(input: Shape, weight: Shape, gain: Shape, *arguments: Any, out_shape: Shape, **_: Any) -> int:
    return 2 * forward(weight, gain, out_shape)


@register_flop_formula(operators.fused_backward)  # type: ignore[untyped-decorator]
def _fused_backward(grad: Shape, input: Shape, weight: Shape, gain: Shape, *arguments: Any, **_: Any) -> int:
    return 2 * backward(weight, product(gain[2:]), grad, arguments[-1])


@register_flop_formula([operators.branch, operators.branch_inference])  # type: ignore[untyped-decorator]
def _branch(pooled: Shape, *arguments: Any, **_: Any) -> int:
    return 2 * pointwise_layers(pooled, arguments[0], arguments[3])


@register_flop_formula(operators.branch_backward)  # type: ignore[untyped-decorator]
def _branch_backward(grad: Shape, pooled: Shape, *arguments: Any, **_: Any) -> int:
    return 4 * pointwise_layers(pooled, arguments[0], arguments[3])  # of what comes in, and of the weights


@register_flop_formula([operators.layer, operators.layer_inference])  # type: ignore[untyped-decorator]
def _layer(image: Shape, weight: Shape, *arguments: Any, out_shape: Any, **_: Any) -> int:
    output = out_shape if isinstance(out_shape[0], int) else out_shape[0]
    pooled, taps = (*image[:2], *weight[2:]), product(weight[2:])
    branch = pointwise_layers(pooled, arguments[0], arguments[3])
    return 2 * (branch + convolution(weight, output) + scaling(weight, output, taps))


@register_flop_formula(operators.layer_backward)  # type: ignore[untyped-decorator]
def _layer_backward(grad: Shape, image: Shape, weight: Shape, *arguments: Any, **_: Any) -> int:
    needs = arguments[-1]
    pooled, for_gain = (*image[:2], *weight[2:]), needs[0] or needs[2]
    branch = 2 * pointwise_layers(pooled, arguments[0], arguments[3]) if for_gain else 0
    return 2 * (branch + backward(weight, product(weight[2:]), grad, (*needs[:2], for_gain)))


@register_flop_formula([operators.average_pool, operators.average_pool_backward])  # type: ignore[untyped-decorator]
def _average_pool(*arguments: Any, **_: Any) -> int:
    return 0
