"""Squeeze-and-excitation that a pretrained network can be given: "Squeeze-and-Excitation Networks", 2018, arXiv
1709.01507."""

from __future__ import annotations

from timm.layers import SqueezeExcite
from torch import Tensor, nn


class DoubledSigmoid(nn.Module):
    """``2 * sigmoid(x)``, which is 1 at 0."""

    def forward(self, input: Tensor) -> Tensor:
        """Keeps the shape."""
        return 2 * input.sigmoid()


class IdentitySqueezeExcite(SqueezeExcite):
    """timm's squeeze-and-excitation that starts as the identity: every channel is multiplied by exactly 1.

    The weight and the bias of the last convolution start at zero, and the factors are ``2 * sigmoid(scores)``.

    Args:
        channels: of input and output.
        hidden_channels: between the two convolutions.
        act_layer: the activation between them.
    """

    def __init__(self, channels: int, hidden_channels: int, act_layer: type[nn.Module] = nn.ReLU) -> None:
        super().__init__(channels, rd_channels=hidden_channels, act_layer=act_layer, gate_layer=DoubledSigmoid)
        for parameter in self.fc2.parameters():
            nn.init.zeros_(parameter)

    def is_identity(self) -> bool:
        """Whether the output is the input, whatever that is."""
        return not any(parameter.any() for parameter in self.fc2.parameters())
