"""The ResNets for 32x32 images: "Deep Residual Learning for Image Recognition", 2016, arXiv 1512.03385, section 4.2."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models import checkpoint_seq
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

# Of the channels over CIFAR-10's 50,000 training images, as recipes for these networks use them.
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


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


class CifarResNet(nn.Module):
    """A 3x3 stem, three stages of basic blocks at full, half and quarter resolution, and a linear classifier.

    Args:
        depth: 6n + 2 layers with weights.
        num_classes: 0 for none, which returns the pooled features.
        in_chans: channels of the images.
        width: channels of the first stage; doubled in each following one.
        global_pool: as in timm, ``"avg"`` by default.
        drop_rate: dropout before the classifier.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        in_chans: int = 3,
        width: int = 16,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"CifarResNet: depth must be 6n + 2, such as 20, 32, 44, 56 or 110, got {depth}")
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.conv1 = nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.layer1 = _stage(width, width, blocks)
        self.layer2 = _stage(width, 2 * width, blocks)
        self.layer3 = _stage(2 * width, 4 * width, blocks)
        self.num_features = self.head_hidden_size = 4 * width
        self.feature_info = [
            dict(num_chs=width * 2**stage, reduction=2**stage, module=f"layer{stage + 1}") for stage in range(3)
        ]
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Tensor) -> Tensor:
        """Shape (N, in_chans, H, W) to (N, 4 * width, ceil(H/4), ceil(W/4))."""
        x = self.act1(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3):
            x = checkpoint_seq(stage, x) if self.grad_checkpointing and self.training else stage(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools the features; classifies them unless ``pre_logits``."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images, shape (N, in_chans, H, W), to logits, shape (N, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The last layer (timm's interface)."""
        classifier: nn.Module = self.fc
        return classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a new one (timm's interface)."""
        self.num_classes = num_classes
        pool = global_pool or self.global_pool.pool_type
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=pool)
        self.fc.to(self.conv1.weight)  # its device and dtype

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the activations of blocks in the backward (timm's interface)."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth, for layer-wise learning rates (timm's interface)."""
        return dict(stem=r"^conv1|bn1", blocks=r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)")


def _stage(in_channels: int, channels: int, blocks: int) -> nn.Sequential:
    widens = in_channels != channels
    first = BasicBlock(
        in_channels,
        channels,
        stride=2 if widens else 1,
        downsample=PadShortcut(channels - in_channels) if widens else None,
    )
    return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(blocks - 1)))
