"""What timm lacks, registered with timm by importing this package: networks for CIFAR, attention-augmented convolution
and the AW models.

Examples:
    >>> import timm
    >>> import awconv
    >>> model = timm.create_model("aw_resnet8_cifar", num_classes=10)
    >>> type(model.layer1[0].conv1).__name__
    'AWConv2d'
    >>> awconv.models.variants("resnet8_cifar")["aw_se"]
    'aw_seresnet8_cifar'
"""

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
