"""What timm lacks: CIFAR's ResNets and the AW models, registered with timm by importing this package."""

from awconv.models.cifar_resnet import CifarResNet
from awconv.models.registry import in_residual_stages

__all__ = ["CifarResNet", "in_residual_stages"]
