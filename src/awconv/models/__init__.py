"""What timm lacks, registered with timm by importing this package: networks for CIFAR, attention-augmented convolution
and the AW models."""

from awconv.models.attention_augmented import AugmentedConv2d
from awconv.models.cifar_resnet import CifarResNet
from awconv.models.registry import BASELINES, in_residual_stages, is_depthwise, variants
from awconv.models.wide_resnet import WideResNet

__all__ = [
    "BASELINES",
    "AugmentedConv2d",
    "CifarResNet",
    "WideResNet",
    "in_residual_stages",
    "is_depthwise",
    "variants",
]
