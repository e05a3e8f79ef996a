"""Our models under timm's names: after ``import awconv``, ``timm.create_model("aw_resnet50")``.

An AW model is its plain twin after :func:`awconv.convert`, whose arguments it takes in ``aw_args``, a dictionary:
``timm.create_model("aw_resnet50", aw_args=dict(reduction=8))``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, Literal

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import get_attn
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import nn

from awconv.convert import convert
from awconv.models.cifar import CIFAR10_MEAN, CIFAR10_STD
from awconv.models.cifar_resnet import CifarResNet
from awconv.models.published import published, verify
from awconv.models.wide_resnet import WideResNet

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
_VGG = _IMAGENET | dict(first_conv="features.0", classifier="head.fc")
_MOBILENET = _IMAGENET | dict(first_conv="conv_stem", classifier="classifier", interpolation="bicubic")
_CIFAR = _IMAGENET | dict(
    num_classes=10, input_size=(3, 32, 32), pool_size=(8, 8), crop_pct=1.0, mean=CIFAR10_MEAN, std=CIFAR10_STD
)
_CIFAR_FEATURES: dict[str, Any] = dict(feature_cfg=dict(out_indices=(0, 1, 2)))
_MOBILENET_FEATURES: dict[str, Any] = dict(
    feature_cfg=dict(feature_cls="getter")
)  # stages are not modules of their own there

_NARROW_REDUCTION = 2  # of networks of 16 to 64 channels, chosen on held-out images: docs/experiments.md

BASELINES: dict[str, str] = {}
"""Each network with attention and its twin without: ``aw_seresnet50`` has ``seresnet50``, and that ``resnet50``."""


def in_residual_stages(name: str, module: nn.Module) -> bool:
    """Selects the 3x3 convolutions of a ResNet's blocks, and so leaves its stem and its shortcuts."""
    return name.startswith("layer") and getattr(module, "kernel_size", None) == (3, 3)


def is_depthwise(name: str, module: nn.Module) -> bool:
    """Selects the depthwise convolutions, in which a MobileNet looks at more than one position."""
    return getattr(module, "groups", 1) > 1


def behind_the_first(name: str, module: nn.Module) -> bool:
    """Selects the 3x3 convolutions of a VGG but the first."""
    return name.startswith("features.") and name != "features.0" and getattr(module, "kernel_size", None) == (3, 3)


def _register(name: str, build: Callable[..., nn.Module], cfg: dict[str, Any], *, paper: str, **defaults: Any) -> None:
    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if pretrained:
            given = {key: kwargs.get(key) for key in ("pretrained_cfg", "pretrained_cfg_overlay")}
            file = resolve_pretrained_cfg(name, **given).file
            if file:
                verify(Path(file))
        model: nn.Module = build_model_with_cfg(build, name, pretrained, **(deepcopy(defaults) | kwargs))
        return model

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"{name} (arXiv {paper}); keyword arguments go to the network's constructor."
    module = sys.modules[__name__]
    entry.__module__ = __name__
    setattr(module, name, entry)
    cfg = cfg | dict(paper_ids=f"arXiv:{paper}")
    tagged: dict[str, Any] = {f"{name}.{tag}": cfg | own for tag, own in published(name).items()}
    # Last, and with a star, the network without a tag is the default, though it has no weights.
    cfgs = generate_default_cfgs(tagged | {f"{name}.*" if tagged else name: cfg})
    module.__dict__.setdefault("default_cfgs", {}).update(cfgs)
    register_model(entry)


def _register_aw(
    plain: str,
    cfg: dict[str, Any],
    select: Callable[[str, nn.Module], bool],
    reduction: int = 16,
    init: Literal["fresh", "identity"] = "fresh",
    **defaults: Any,
) -> None:
    own: dict[str, Any] = dict(select=select, reduction=reduction, init=init)

    def build(*args: Any, aw_args: dict[str, Any] | None = None, **kwargs: Any) -> nn.Module:
        return convert(timm.create_model(plain, *args, **kwargs), **(own | (aw_args or {})))

    BASELINES["aw_" + plain] = plain
    _register("aw_" + plain, build, cfg, paper="2108.08205", **defaults)


_SCHEMES = {"se": "1709.01507", "cbam": "1807.06521", "eca": "1910.03151"}  # attention on activations, by timm's layers


def _with_attention(plain: str, scheme: str, *args: Any, **kwargs: Any) -> nn.Module:
    """A MobileNet with attention on the activations of its depthwise convolutions, where MobileNet v3 has it."""
    model = timm.create_model(plain, *args, **kwargs)
    for module in model.modules():
        if hasattr(module, "conv_dw") and hasattr(module, "se"):
            module.se = get_attn(scheme)(module.conv_dw.out_channels)  # type: ignore[union-attr]
    return model


_build: Callable[..., nn.Module]
for _plain in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"):
    _register_aw(_plain, _IMAGENET, in_residual_stages)
for _plain in ("resnet18", "resnet50", "resnet101"):
    for _scheme, _paper in _SCHEMES.items():
        _name = _scheme + _plain
        BASELINES[_name] = _plain
        if not timm.is_model(_name):  # timm has those with SE
            _build = partial(timm.create_model, _plain, block_args=dict(attn_layer=_scheme))
            _register(_name, _build, _IMAGENET, paper=_paper)
        _register_aw(_name, _IMAGENET, in_residual_stages)
# VGG has no norms, and attention that starts at random would enlarge its activations in each layer.
_VGG_FEATURES: dict[str, Any] = dict(feature_cfg=dict(flatten_sequential=True, out_indices=tuple(range(6))))
_register_aw("vgg16", _VGG, behind_the_first, init="identity", **_VGG_FEATURES)
for _plain in ("mobilenetv1_100", "mobilenetv2_100"):
    _register_aw(_plain, _MOBILENET, is_depthwise, **_MOBILENET_FEATURES)
    for _scheme in ("se", "cbam"):
        _name = f"{_scheme}_{_plain}"
        BASELINES[_name] = _plain
        _build = partial(_with_attention, _plain, _scheme)
        _register(_name, _build, _MOBILENET, paper=_SCHEMES[_scheme], **_MOBILENET_FEATURES)
        _register_aw(_name, _MOBILENET, is_depthwise, **_MOBILENET_FEATURES)
for _depth in (8, 20, 32, 44, 56, 110):
    _plain = f"resnet{_depth}_cifar"
    _register(_plain, partial(CifarResNet, _depth), _CIFAR, paper="1512.03385", **_CIFAR_FEATURES)
    _register_aw(_plain, _CIFAR, in_residual_stages, _NARROW_REDUCTION, **_CIFAR_FEATURES)
    for _scheme in ("se", "cbam"):
        if _depth in (8, 20, 56):
            _name, _build = _scheme + _plain, partial(CifarResNet, _depth, attn_layer=_scheme)
            BASELINES[_name] = _plain
            _register(_name, _build, _CIFAR, paper=_SCHEMES[_scheme], **_CIFAR_FEATURES)
            _register_aw(_name, _CIFAR, in_residual_stages, _NARROW_REDUCTION, **_CIFAR_FEATURES)
for _prefix, _options, _paper in (
    ("", {}, "1605.07146"),
    ("aa_", dict(augmented=True), "1904.09925"),
    ("se_", dict(attn_layer="se"), _SCHEMES["se"]),
    ("cbam_", dict(attn_layer="cbam"), _SCHEMES["cbam"]),
):
    _plain = f"{_prefix}wide_resnet28_10_cifar"
    if _prefix:
        BASELINES[_plain] = _plain.removeprefix(_prefix)
    _register(_plain, partial(WideResNet, 28, 10, **_options), _CIFAR, paper=_paper, **_CIFAR_FEATURES)
    _register_aw(_plain, _CIFAR, in_residual_stages, **_CIFAR_FEATURES)
