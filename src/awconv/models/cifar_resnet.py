"""The ResNets for 32x32 images: "Deep Residual Learning for Image Recognition", 2016, arXiv 1512.03385, section 4.2."""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers import get_attn
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

from awconv.models.cifar import CifarNetwork


class PadShortcut(nn.Module):
    """The paper's option A: every second position, and zeros for the new channels. It has no parameters.

    Args:
        new_channels: channels to add, half of them on each side.
    """

    def __init__(self, new_channels: int) -> None:
        super().__init__()
        self.new_channels = new_channels

    def forward(self, input: Tensor) -> Tensor:
        """Shape (N, C, H, W) to (N, C + new_channels, ceil(H/2), ceil(W/2))."""
        before = self.new_channels // 2
        return F.pad(input[:, :, ::2, ::2], (0, 0, 0, 0, before, self.new_channels - before))


class CifarResNet(CifarNetwork):
    """A 3x3 stem, three stages of basic blocks at full, half and quarter resolution, and a linear classifier.

    Args:
        depth: 6n + 2 layers with weights.
        num_classes: 0 for none, which returns the pooled features.
        in_chans: channels of the images.
        width: channels of the first stage; doubled in each following one.
        attn_layer: attention on the activations at the end of each block, as timm names it: ``"se"``, ``"cbam"``,
            ``"eca"``.
        global_pool: as in timm, ``"avg"`` by default.
        drop_rate: dropout before the classifier.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        in_chans: int = 3,
        width: int = 16,
        attn_layer: str | None = None,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, drop_rate)
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"CifarResNet: depth must be 6n + 2, such as 20, 32, 44, 56 or 110, got {depth}")
        self.conv1 = nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.layer1 = _stage(width, width, blocks, attn_layer)
        self.layer2 = _stage(width, 2 * width, blocks, attn_layer)
        self.layer3 = _stage(2 * width, 4 * width, blocks, attn_layer)
        self.complete([width, 2 * width, 4 * width], global_pool)

    def stem(self, x: Tensor) -> Tensor:
        """Shape (N, in_chans, H, W) to (N, width, H, W)."""
        stem: Tensor = self.act1(self.bn1(self.conv1(x)))
        return stem


def _stage(in_channels: int, channels: int, blocks: int, attn_layer: str | None) -> nn.Sequential:
    widens = in_channels != channels
    attention = get_attn(attn_layer)
    first = BasicBlock(
        in_channels,
        channels,
        stride=2 if widens else 1,
        downsample=PadShortcut(channels - in_channels) if widens else None,
        attn_layer=attention,
    )
    others = (BasicBlock(channels, channels, attn_layer=attention) for _ in range(blocks - 1))
    return nn.Sequential(first, *others)
