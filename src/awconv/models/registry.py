"""Our models under timm's names: after ``import awconv``, ``timm.create_model("aw_resnet50")``.

``ODCONV`` names those that also come with a peer of AW in its layers: ``timm.create_model("od_resnet18")``.
``SPECS`` is the table of what there is. Each network in it has an AW version, called ``aw_`` and its name: the network
after :func:`awconv.convert`, whose arguments it takes in ``aw_args``, a dictionary:
``timm.create_model("aw_resnet50", aw_args=dict(reduction=8))``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import get_attn
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import nn

from awconv.convert import replace_convolutions
from awconv.models.cifar import CIFAR10_MEAN, CIFAR10_STD
from awconv.models.cifar_resnet import CifarResNet
from awconv.models.pretrained import completed_by_identity
from awconv.models.published import published, verify
from awconv.models.squeeze_excite import IdentitySqueezeExcite
from awconv.models.wide_resnet import WideResNet
from awconv.rebuild import CONVERTED


def in_residual_stages(name: str, module: nn.Module) -> bool:
    """Selects the 3x3 convolutions of a ResNet's blocks, and so leaves its stem and its shortcuts."""
    return name.startswith("layer") and getattr(module, "kernel_size", None) == (3, 3)


def is_depthwise(name: str, module: nn.Module) -> bool:
    """Selects the depthwise convolutions, in which a MobileNet looks at more than one position."""
    return getattr(module, "groups", 1) > 1


def behind_the_first(name: str, module: nn.Module) -> bool:
    """Selects the 3x3 convolutions of a VGG but the first."""
    return name.startswith("features.") and name != "features.0" and getattr(module, "kernel_size", None) == (3, 3)


def _by_layer(scheme: str) -> dict[str, Any]:
    return dict(augmented=True) if scheme == "aa" else dict(attn_layer=scheme)


def _by_block(scheme: str) -> dict[str, Any]:
    return dict(block_args=dict(attn_layer=scheme))


@dataclass(frozen=True)
class Family:
    """What networks of one kind share.

    Attributes:
        cfg: timm's configuration of a network: its images, its classifier and so on.
        select: the convolutions that become AW-convolutions.
        features: by which timm extracts features.
        aw_args: other arguments of :func:`awconv.convert` whose defaults are not right here.
        attend: the constructor's arguments for a scheme of attention.
        paper: of a network without attention, its number at arXiv; not needed where timm has the network.
    """

    cfg: dict[str, Any]
    select: Callable[[str, nn.Module], bool]
    features: dict[str, Any] = field(default_factory=dict)
    aw_args: dict[str, Any] = field(default_factory=dict)
    attend: Callable[[str], dict[str, Any]] = _by_layer
    paper: str = ""


@dataclass(frozen=True)
class Spec:
    """A network, which has an AW version.

    Attributes:
        name: of the network. Where timm has none of this name, it is registered.
        family: its kind.
        build: its constructor, for a network without attention.
        baseline: for a network with attention, the one without, which stands before it in the table.
        scheme: the attention, such as ``"se"``.
    """

    name: str
    family: Family
    build: Callable[..., nn.Module] | None = None
    baseline: str = ""
    scheme: str = ""


def _mobilenet(name: str, *args: Any, attn_layer: str | None = None, **kwargs: Any) -> nn.Module:
    """A MobileNet of timm, with attention on the activations of its depthwise convolutions, where v3 has it."""
    model = timm.create_model(name, *args, **kwargs)
    for module in model.modules() if attn_layer else ():
        if hasattr(module, "conv_dw") and hasattr(module, "se"):
            module.se = get_attn(attn_layer)(module.conv_dw.out_channels)  # type: ignore[union-attr]
    return model


def _efficientnet_lite(name: str, *args: Any, attn_layer: str | None = None, **kwargs: Any) -> nn.Module:
    """An EfficientNet-Lite of timm; with squeeze-and-excitation, it has that of EfficientNet, starting as identity.

    Its hidden channels are a quarter of those that come into the block.
    """
    model = timm.create_model(name, *args, **kwargs)
    for module in model.modules() if attn_layer else ():
        if hasattr(module, "conv_dw") and hasattr(module, "se"):
            block: Any = module
            channels = block.conv_dw.out_channels
            incoming = (block.conv_pw if hasattr(block, "conv_pwl") else block.conv_dw).in_channels
            block.se = IdentitySqueezeExcite(channels, round(incoming / 4), nn.ReLU6)
    return model


_SCHEMES = {"se": "1709.01507", "cbam": "1807.06521", "eca": "1910.03151", "aa": "1904.09925"}  # and their papers
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
_IMAGENET_RESNET = Family(_IMAGENET, in_residual_stages, attend=_by_block)
_VGG = Family(
    _IMAGENET | dict(first_conv="features.0", classifier="head.fc"),
    behind_the_first,
    features=dict(feature_cfg=dict(flatten_sequential=True, out_indices=tuple(range(6)))),
    aw_args=dict(init="identity"),  # it has no norms, and attention that starts at random would enlarge its activations
)
_MOBILENET = Family(
    _IMAGENET | dict(first_conv="conv_stem", classifier="classifier", interpolation="bicubic"),
    is_depthwise,
    features=dict(feature_cfg=dict(feature_cls="getter")),  # stages are not modules of their own there
)
_EFFICIENTNET_LITE = Family(
    _MOBILENET.cfg | dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    is_depthwise,
    features=_MOBILENET.features,
    aw_args=dict(init="identity"),  # for pretrained weights, as its squeeze-and-excitation
)
_CIFAR: dict[str, Any] = dict(
    cfg=_IMAGENET
    | dict(num_classes=10, input_size=(3, 32, 32), pool_size=(8, 8), crop_pct=1.0, mean=CIFAR10_MEAN, std=CIFAR10_STD),
    select=in_residual_stages,
    features=dict(feature_cfg=dict(out_indices=(0, 1, 2))),
)
_CIFAR_RESNET = Family(
    **_CIFAR,
    paper="1512.03385",
    aw_args=dict(reduction=2),  # of 16 to 64 channels, chosen on held-out images: docs/experiments.md
)
_WIDE_RESNET = Family(**_CIFAR, paper="1605.07146")

SPECS = (
    Spec("resnet18", _IMAGENET_RESNET),
    Spec("resnet34", _IMAGENET_RESNET),
    Spec("resnet50", _IMAGENET_RESNET),
    Spec("resnet101", _IMAGENET_RESNET),
    Spec("resnet152", _IMAGENET_RESNET),
    Spec("seresnet18", _IMAGENET_RESNET, baseline="resnet18", scheme="se"),
    Spec("cbamresnet18", _IMAGENET_RESNET, baseline="resnet18", scheme="cbam"),
    Spec("ecaresnet18", _IMAGENET_RESNET, baseline="resnet18", scheme="eca"),
    Spec("seresnet34", _IMAGENET_RESNET, baseline="resnet34", scheme="se"),
    Spec("seresnet50", _IMAGENET_RESNET, baseline="resnet50", scheme="se"),
    Spec("cbamresnet50", _IMAGENET_RESNET, baseline="resnet50", scheme="cbam"),
    Spec("ecaresnet50", _IMAGENET_RESNET, baseline="resnet50", scheme="eca"),
    Spec("seresnet101", _IMAGENET_RESNET, baseline="resnet101", scheme="se"),
    Spec("cbamresnet101", _IMAGENET_RESNET, baseline="resnet101", scheme="cbam"),
    Spec("ecaresnet101", _IMAGENET_RESNET, baseline="resnet101", scheme="eca"),
    Spec("seresnet152", _IMAGENET_RESNET, baseline="resnet152", scheme="se"),
    Spec("vgg16", _VGG),
    Spec("mobilenetv1_100", _MOBILENET, partial(_mobilenet, "mobilenetv1_100")),
    Spec("se_mobilenetv1_100", _MOBILENET, baseline="mobilenetv1_100", scheme="se"),
    Spec("cbam_mobilenetv1_100", _MOBILENET, baseline="mobilenetv1_100", scheme="cbam"),
    Spec("mobilenetv2_100", _MOBILENET, partial(_mobilenet, "mobilenetv2_100")),
    Spec("se_mobilenetv2_100", _MOBILENET, baseline="mobilenetv2_100", scheme="se"),
    Spec("cbam_mobilenetv2_100", _MOBILENET, baseline="mobilenetv2_100", scheme="cbam"),
    Spec("tf_efficientnet_lite0", _EFFICIENTNET_LITE, partial(_efficientnet_lite, "tf_efficientnet_lite0")),
    Spec("se_tf_efficientnet_lite0", _EFFICIENTNET_LITE, baseline="tf_efficientnet_lite0", scheme="se"),
    Spec("resnet8_cifar", _CIFAR_RESNET, partial(CifarResNet, 8)),
    Spec("seresnet8_cifar", _CIFAR_RESNET, baseline="resnet8_cifar", scheme="se"),
    Spec("cbamresnet8_cifar", _CIFAR_RESNET, baseline="resnet8_cifar", scheme="cbam"),
    Spec("resnet20_cifar", _CIFAR_RESNET, partial(CifarResNet, 20)),
    Spec("seresnet20_cifar", _CIFAR_RESNET, baseline="resnet20_cifar", scheme="se"),
    Spec("cbamresnet20_cifar", _CIFAR_RESNET, baseline="resnet20_cifar", scheme="cbam"),
    Spec("resnet32_cifar", _CIFAR_RESNET, partial(CifarResNet, 32)),
    Spec("resnet44_cifar", _CIFAR_RESNET, partial(CifarResNet, 44)),
    Spec("resnet56_cifar", _CIFAR_RESNET, partial(CifarResNet, 56)),
    Spec("seresnet56_cifar", _CIFAR_RESNET, baseline="resnet56_cifar", scheme="se"),
    Spec("cbamresnet56_cifar", _CIFAR_RESNET, baseline="resnet56_cifar", scheme="cbam"),
    Spec("resnet110_cifar", _CIFAR_RESNET, partial(CifarResNet, 110)),
    Spec("wide_resnet28_10_cifar", _WIDE_RESNET, partial(WideResNet, 28, 10)),
    Spec("aa_wide_resnet28_10_cifar", _WIDE_RESNET, baseline="wide_resnet28_10_cifar", scheme="aa"),
    Spec("se_wide_resnet28_10_cifar", _WIDE_RESNET, baseline="wide_resnet28_10_cifar", scheme="se"),
    Spec("cbam_wide_resnet28_10_cifar", _WIDE_RESNET, baseline="wide_resnet28_10_cifar", scheme="cbam"),
)

ODCONV = ("resnet18", "resnet50", "resnet8_cifar", "resnet20_cifar", "resnet56_cifar")

BASELINES: dict[str, str] = {}
"""Each network with attention and the same without: ``aw_seresnet50`` has ``seresnet50``, and that ``resnet50``."""
_VARIANTS: dict[str, dict[str, str]] = {}


def variants(baseline: str) -> dict[str, str]:
    """The networks that are another one with attention, by the scheme of the attention.

    Args:
        baseline: the name of a network.

    Returns:
        Names by scheme, such as ``"aw"``, ``"se"`` and ``"aw_se"``; nothing for a network that has no variants.

    Examples:
        >>> from awconv.models import variants
        >>> variants("resnet34")
        {'aw': 'aw_resnet34', 'se': 'seresnet34', 'aw_se': 'aw_seresnet34'}
    """
    return dict(_VARIANTS.get(baseline, {}))


def _register(name: str, build: Callable[..., nn.Module], cfg: dict[str, Any], *, paper: str, **defaults: Any) -> None:
    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if pretrained:
            given = {key: kwargs.get(key) for key in ("pretrained_cfg", "pretrained_cfg_overlay")}
            file = resolve_pretrained_cfg(name, **given).file
            if file:
                verify(Path(file))
        arguments = deepcopy(defaults) | dict(pretrained_filter_fn=completed_by_identity) | kwargs
        model: nn.Module = build_model_with_cfg(build, name, pretrained, **arguments)
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


def _register_spec(spec: Spec, builds: Mapping[str, Callable[..., nn.Module]]) -> Callable[..., nn.Module]:
    """Registers a network, where timm lacks it, and its AW version.

    Args:
        spec: the network.
        builds: what the constructors of those before it in the table are.

    Returns:
        The network's constructor.
    """
    family, aw = spec.family, f"aw_{spec.name}"
    build = spec.build or partial(timm.create_model, spec.name)
    _VARIANTS[spec.name] = {"aw": aw}
    if spec.baseline:
        build = partial(builds[spec.baseline], **family.attend(spec.scheme))
        BASELINES[spec.name] = spec.baseline
        _VARIANTS[spec.baseline] |= {spec.scheme: spec.name, f"aw_{spec.scheme}": aw}
    BASELINES[aw] = spec.name
    if not timm.is_model(spec.name):
        paper = _SCHEMES[spec.scheme] if spec.scheme else family.paper
        _register(spec.name, build, family.cfg, paper=paper, **family.features)

    def build_aw(*args: Any, aw_args: dict[str, Any] | None = None, **kwargs: Any) -> nn.Module:
        plain = timm.create_model(spec.name, *args, **kwargs)
        arguments: dict[str, Any] = {"select": family.select} | family.aw_args | (aw_args or {})
        return replace_convolutions(plain, **arguments)[0]

    _register(aw, build_aw, family.cfg, paper="2108.08205", **family.features)
    if spec.name in ODCONV:
        _register_odconv(spec)
    return build


def _register_odconv(spec: Spec) -> None:
    """Registers a network with ODConv in the layers that AW takes; ``od_args`` are arguments of ``convert``."""
    name, select = f"od_{spec.name}", spec.family.select
    _VARIANTS[spec.name]["od"] = name
    BASELINES[name] = spec.name

    def build(*args: Any, od_args: dict[str, Any] | None = None, **kwargs: Any) -> nn.Module:
        plain = timm.create_model(spec.name, *args, **kwargs)
        arguments: dict[str, Any] = {"select": select, "layer": "odconv"} | (od_args or {})
        return replace_convolutions(plain, **arguments)[0]

    _register(name, build, spec.family.cfg, paper="2209.07947", **spec.family.features)


def _converted(
    *args: Any, network: str, network_args: dict[str, Any] | None = None, convert: dict[str, Any], **kwargs: Any
) -> nn.Module:
    arguments: dict[str, Any] = {**(network_args or {}), **kwargs}
    return replace_convolutions(timm.create_model(network, *args, **arguments), **convert)[0]


_register(CONVERTED, _converted, _IMAGENET, paper="2108.08205")
_builds: dict[str, Callable[..., nn.Module]] = {}
for _spec in SPECS:
    _builds[_spec.name] = _register_spec(_spec, _builds)
