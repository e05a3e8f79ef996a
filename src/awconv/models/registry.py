"""Our models under timm's names: after ``import awconv``, ``timm.create_model("aw_resnet50")``.

An AW model is its plain twin after :func:`awconv.convert`, whose arguments it takes in ``aw_args``, a dictionary:
``timm.create_model("aw_resnet50", aw_args=dict(reduction=8))``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from awconv.convert import convert
from awconv.models.cifar_resnet import CIFAR10_MEAN, CIFAR10_STD, CifarResNet

_IMAGENET = dict(
    num_classes=1000,
    input_size=(3, 224, 224),
    pool_size=(7, 7),
    crop_pct=0.875,
    interpolation="bilinear",
    mean=IMAGENET_DEFAULT_MEAN,
    std=IMAGENET_DEFAULT_STD,
    first_conv="conv1",
    classifier="fc",
    license="apache-2.0",
)
_CIFAR = _IMAGENET | dict(
    num_classes=10, input_size=(3, 32, 32), pool_size=(8, 8), crop_pct=1.0, mean=CIFAR10_MEAN, std=CIFAR10_STD
)

_AW_PAPER = dict(paper_ids="arXiv:2108.08205")

_RESNETS: dict[str, dict[str, Any]] = {
    "resnet18": dict(block=BasicBlock, layers=(2, 2, 2, 2)),
    "resnet34": dict(block=BasicBlock, layers=(3, 4, 6, 3)),
    "resnet50": dict(block=Bottleneck, layers=(3, 4, 6, 3)),
    "resnet101": dict(block=Bottleneck, layers=(3, 4, 23, 3)),
    "resnet152": dict(block=Bottleneck, layers=(3, 8, 36, 3)),
}
_CIFAR_DEPTHS = (8, 20, 32, 44, 56, 110)


def in_residual_stages(name: str, module: nn.Module) -> bool:
    """Selects the 3x3 convolutions of a ResNet's blocks, and so leaves its stem and its shortcuts."""
    return name.startswith("layer") and getattr(module, "kernel_size", None) == (3, 3)


def _aw(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def build_aw(*args: Any, aw_args: dict[str, Any] | None = None, **kwargs: Any) -> nn.Module:
        return convert(build(*args, **kwargs), in_residual_stages, **(aw_args or {}))

    return build_aw


def _register(name: str, build: Callable[..., nn.Module], cfg: dict[str, Any], **defaults: Any) -> None:
    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        model: nn.Module = build_model_with_cfg(build, name, pretrained, **(defaults | kwargs))
        return model

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"{name}; keyword arguments go to the network's constructor."
    module = sys.modules[__name__]
    entry.__module__ = __name__
    setattr(module, name, entry)
    module.__dict__.setdefault("default_cfgs", {}).update(generate_default_cfgs({name: cfg}))
    register_model(entry)


for _name, _arguments in _RESNETS.items():
    _register("aw_" + _name, _aw(ResNet), _IMAGENET | _AW_PAPER, **_arguments)
for _depth in _CIFAR_DEPTHS:
    _out_indices = dict(feature_cfg=dict(out_indices=(0, 1, 2)))
    _register(
        f"resnet{_depth}_cifar", CifarResNet, _CIFAR | dict(paper_ids="arXiv:1512.03385"), depth=_depth, **_out_indices
    )
    _register(f"aw_resnet{_depth}_cifar", _aw(CifarResNet), _CIFAR | _AW_PAPER, depth=_depth, **_out_indices)
