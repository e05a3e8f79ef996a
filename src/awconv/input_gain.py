"""A gain for each input channel of a sample, in front of an AW-convolution: ``AWConv2d(..., input_gain=True)``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.fx
from torch import Tensor

from awconv.branch import AttentionBranch, takes_pooled
from awconv.branch_spec import BranchSpec
from awconv.ops.channel_gain import pooled_globally, scale
from awconv.relative import BaseBranch


def gain_branch(spec: BranchSpec) -> AttentionBranch:
    """The branch of the gain: that of the layer, pooled globally, with one value for each input channel.

    Args:
        spec: of the layer's own branch.

    Raises:
        ValueError: the activation takes other channels than those of the input.
    """
    ones = (1,) * len(spec.kernel_size)
    try:
        return AttentionBranch.of(replace(spec, attention_size=(1, spec.in_channels, *ones), pool=None))
    except RuntimeError as error:  # of the activation, which is tried
        raise ValueError(
            f"{spec.describe_layer()}: with input_gain, activation must take the gain's {spec.in_channels} channels as "
            f"well as the map's; {spec.activation} does not ({error}). Give one without parameters for channels"
        ) from error


def scaled(input: Tensor, branch: BaseBranch) -> Tensor:
    """An input times its gain, with the input's dtype and memory format.

    Args:
        input: shape (N, C1, \\*size).
        branch: gives the map g, shape (N, 1, C1, 1, ...); the gain is 1 + g, or g without the residual form.
    """
    unit = unit_of(branch)
    if not takes_pooled(branch, input):
        return _times(input, branch(input), unit)
    passed, pooled = pooled_globally(input)
    return _times(passed, branch(passed, pooled), unit)


def _times(input: Tensor, attention: Tensor, unit: int) -> Tensor:
    gain = attention.squeeze(1).to(torch.promote_types(attention.dtype, input.dtype))  # autocast's maps are coarse
    return scale(input, gain + unit if unit else gain)


torch.fx.wrap("_times")  # it depends on dtypes, which torch.fx does not know


def weight_gain(layer: Any, attention: Tensor, input_attention: Tensor | None = None) -> Tensor:
    """The factor of a layer's weights: of its map alone, or of its map and its gain over input channels.

    Args:
        layer: an AW-convolution.
        attention: its map before Expand, shape (N, C2/r_C2, (C1/groups)/r_C1, h/r_hw, w/r_hw).
        input_attention: the map of ``input_attention``, shape (N, 1, C1, 1, 1), if it is to count.

    Returns:
        1 + A or A, in the map's shape and in float64 on the CPU. With ``input_attention`` it is multiplied by 1 + g or
        g, shape (N, C2, C1/groups, h/r_hw, w/r_hw): one value for each pair of channels.
    """
    gain = attention.detach().cpu().double() + unit_of(layer.attention)
    if input_attention is None:
        return gain
    out_channels, group_channels = layer.weight.shape[:2]
    of_input = input_attention.detach().cpu().double() + unit_of(layer.input_attention)
    of_input = of_input.reshape(len(gain), layer.groups, 1, group_channels)
    of_input = of_input.expand(-1, -1, out_channels // layer.groups, -1)
    of_input = of_input.reshape(len(gain), out_channels, group_channels, *(1,) * (gain.dim() - 3))
    for axis, size in ((1, out_channels), (2, group_channels)):
        gain = gain.repeat_interleave(size // gain.shape[axis], dim=axis)
    return gain * of_input


def unit_of(branch: BaseBranch) -> int:
    """What is added to a branch's map to get a gain."""
    return 1 if branch.residual or branch.relative else 0
