"""Multiply-adds of a layer with attention, from what goes into it and what comes out."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from awconv.branch import AttentionBranch
from awconv.layers import AWConv1d, AWConv2d, AWConv3d
from awconv.odconv import ODConv2d
from awconv.ops.flops import convolution, pointwise_layers, scaling
from awconv.ops.problem import product
from awconv.relative import BaseBranch

Layer = AWConv1d | AWConv2d | AWConv3d | ODConv2d


def whole(layer: Layer, input: Tensor, output: Tensor) -> int:
    """Multiply-adds of a layer: of its convolution, and what its attention adds.

    Args:
        layer: an AW-convolution, or an ODConv.
        input: what it gets, shape (N, C1, \\*size); the batch axis may be missing.
        output: what it gives.
    """
    batch = output if output.dim() == layer.weight.dim() else output[None]
    return convolution(layer.weight.shape, batch.shape) + added(layer, input, output)[0]


def added(layer: Layer, input: Tensor, output: Tensor) -> tuple[int, int]:
    """Multiply-adds that the attention of a layer adds: those of its branches, and the multiplications by what they
    give.

    A branch or a pool of a user's own is run, to count what it does.

    Returns:
        The number, and the part of it that a counter around this call has seen of these.
    """
    if input.dim() < layer.weight.dim():
        input, output = input[None], output[None]
    weight, samples = layer.weight.shape, input.shape[0]
    if isinstance(layer, ODConv2d):
        attention = layer.attention
        convolutions = sum(part.weight.numel() for part in attention.modules() if isinstance(part, nn.Conv2d))
        of_taps = attention.spatial_head is not None
        values = product(layer.kernel_size) if of_taps else int(attention.filter_head is not None)
        return samples * (convolutions + product(input.shape[1:])) + scaling(weight, output.shape, values), 0
    of_attention = [_branch(branch, input) for branch in layer.branches()]
    count = sum(number for number, _ in of_attention)
    count += scaling(weight, output.shape, product(layer.attention.attention_size[1:]))
    if layer.input_gain:
        count += product(input.shape)
    return count, sum(seen for _, seen in of_attention)


def _branch(branch: BaseBranch, input: Tensor) -> tuple[int, int]:
    if type(branch) is not AttentionBranch:
        seen = _counted(branch, input)
        return seen, seen
    pooled = (*input.shape[:2], *branch.attention_size[2:])
    seen = 0 if branch.pool is None else _counted(branch.pool, input)
    return pointwise_layers(pooled, branch.conv1.weight.shape, branch.conv2.weight.shape) + seen, seen


def _counted(run: Callable[[Tensor], Tensor], input: Tensor) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        run(input)
    return counter.get_total_flops() // 2
