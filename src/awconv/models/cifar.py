"""What the networks for 32x32 images share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models import checkpoint_seq
from torch import Tensor, nn

# Of the channels over CIFAR-10's 50,000 training images, as recipes for these networks use them.
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class CifarNetwork(nn.Module):
    """Three stages at full, half and quarter resolution between a stem and a tail, with a linear classifier.

    A subclass makes its layers, ``conv1``, ``layer1``, ``layer2`` and ``layer3`` among them, and then calls
    :meth:`complete`.

    Args:
        num_classes: 0 for none, which returns the pooled features.
        drop_rate: dropout before the classifier.
    """

    conv1: nn.Conv2d
    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(self, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

    def complete(self, widths: Sequence[int], global_pool: str) -> None:
        """Adds the classifier and initialises the convolutions.

        Args:
            widths: channels of the stages.
            global_pool: as in timm, ``"avg"`` for one.
        """
        self.num_features = self.head_hidden_size = widths[-1]
        self.feature_info = [
            dict(num_chs=width, reduction=2**stage, module=f"layer{stage + 1}") for stage, width in enumerate(widths)
        ]
        self.global_pool, self.fc = create_classifier(self.num_features, self.num_classes, pool_type=global_pool)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def in_chans(self) -> int:
        """Channels of the images (timm's interface)."""
        return self.conv1.in_channels

    def stem(self, x: Tensor) -> Tensor:
        """What comes before the stages."""
        raise NotImplementedError

    def tail(self, x: Tensor) -> Tensor:
        """What comes between the stages and the classifier."""
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """Shape (N, in_chans, H, W) to (N, num_features, ceil(H/4), ceil(W/4))."""
        x = self.stem(x)
        for stage in (self.layer1, self.layer2, self.layer3):
            x = checkpoint_seq(stage, x) if self.grad_checkpointing and self.training else stage(x)
        return self.tail(x)

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
