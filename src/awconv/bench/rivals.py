"""Dynamic convolutions that others use, in the same places."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from timm.layers import CondConv2d
from torch import Tensor, nn


class RoutedCondConv2d(nn.Module):
    """timm's CondConv2d with the routing of its paper: global average pooling, a linear layer, a sigmoid.

    Input (N, C1, H, W) to output (N, C2, H', W').
    """

    def __init__(self, in_channels: int, out_channels: int, num_experts: int = 4, **arguments: Any) -> None:
        super().__init__()
        self.routing = nn.Linear(in_channels, num_experts)
        self.conv = CondConv2d(in_channels, out_channels, num_experts=num_experts, **arguments)

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.conv(input, torch.sigmoid(self.routing(input.mean((2, 3)))))
        return output


def with_condconv(plain: nn.Module, places: list[str]) -> nn.Module:
    """A copy of a network with a RoutedCondConv2d in some places."""
    network = deepcopy(plain)
    for place in places:
        conv = network.get_submodule(place)
        assert isinstance(conv, nn.Conv2d)
        rival = RoutedCondConv2d(
            conv.in_channels,
            conv.out_channels,
            kernel_size=conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=conv.bias is not None,
        )
        parent, _, name = place.rpartition(".")
        setattr(network.get_submodule(parent), name, rival.to(conv.weight))
    return network
