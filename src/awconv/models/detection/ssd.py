"""SSD300 (arXiv 1512.02325) on VGG-16, by torchvision."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torchvision.models import VGG16_Weights
from torchvision.models.detection import ssd300_vgg16
from torchvision.models.detection.ssd import SSD

from awconv.convert import convert as convert_layers
from awconv.models.detection.arguments import check_arguments
from awconv.models.detection.transform import take_uint8
from awconv.models.pretrained import read_weights

_STAGES = (2, 2, 3, 3, 3)  # convolutions of VGG-16
_USUAL_LAYERS = 4
_IMAGENET: dict[str, Any] = dict(image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD)
TORCHVISIONS_INPUT: dict[str, Any] = dict(image_mean=[0.48235, 0.45882, 0.40784], image_std=[1 / 255] * 3)
"""What the images of torchvision's own VGG-16 features are normalised by."""


def ssd300(
    network: str = "aw_vgg16",
    num_classes: int = 91,
    *,
    pretrained: bool | str | Path = False,
    trainable_layers: int | Literal["usual"] | None = None,
    network_args: dict[str, Any] | None = None,
    convert: dict[str, Any] | None = None,
    **kwargs: Any,
) -> SSD:
    """torchvision's SSD300, whose AW-convolutions start by identity, as in the classifier ``aw_vgg16``.

    Args:
        network: ``"vgg16"``, or ``"aw_vgg16"`` with AW-convolutions in place of VGG's but the first.
        num_classes: of objects and the background, which is class 0: 21 for VOC.
        pretrained: weights of VGG's convolutions to start from: torchvision's (True), or a VGG-16's in a file
            (safetensors, or a state dict of torch), trained with ImageNet's usual mean and deviation.
        trainable_layers: how many of VGG's 5 stages are trained, counted from the last; ``"usual"`` is 4. By default
            the usual number with pretrained weights, and all without.
        network_args: ``{"aw_args": {"reduction": 8}}`` is all that ``"aw_vgg16"`` takes, and ``"vgg16"`` takes none.
        convert: arguments of :func:`awconv.convert`, such as ``{"reduction": 8}``, which also make ``"vgg16"`` an AW
            network.
        **kwargs: of ``torchvision.models.detection.SSD``, such as ``score_thresh``.

    Returns:
        The detector. It takes and returns what :func:`faster_rcnn` does.

    Raises:
        FileNotFoundError: the file of weights is not there.
        TypeError: torchvision's detector, or the network, has no such argument.
        ValueError: it is another network, the file holds another network's weights, or an argument is out of range.
    """
    check_arguments(SSD, kwargs)
    network_args = network_args or {}
    _check(network, network_args)
    file = None if isinstance(pretrained, bool) else Path(pretrained)
    if file is not None and not file.is_file():
        raise FileNotFoundError(f"pretrained must be true, false or a file of weights, got {str(file)!r}")
    trained = _trained_stages(trainable_layers, bool(pretrained))
    torchvisions = pretrained is True  # they have a normalisation of their own
    detector = ssd300_vgg16(
        weights=None,
        weights_backbone=VGG16_Weights.IMAGENET1K_FEATURES if torchvisions else None,
        num_classes=num_classes,
        trainable_backbone_layers=len(_STAGES) if torchvisions else None,
        **((TORCHVISIONS_INPUT if torchvisions else _IMAGENET) | kwargs),
    )
    modules = detector.backbone.modules()
    vgg = [module for module in modules if isinstance(module, nn.Conv2d)][: sum(_STAGES)]
    take_uint8(detector)
    if file is not None:
        _load(vgg, file)
    if network == "aw_vgg16" or convert is not None:
        chosen = set(vgg[1:])
        arguments: dict[str, Any] = {"init": "identity", "select": lambda name, layer: layer in chosen}
        convert_layers(detector.backbone, **(arguments | (network_args.get("aw_args") or {}) | (convert or {})))
    for convolution in vgg[: sum(_STAGES[: len(_STAGES) - trained])]:
        convolution.weight.requires_grad_(False)
        convolution.bias.requires_grad_(False)  # type: ignore[union-attr]  # VGG's have one
    return detector


def _check(network: str, network_args: dict[str, Any]) -> None:
    if network not in ("vgg16", "aw_vgg16"):
        raise ValueError(f"network of ssd300 must be 'vgg16' or 'aw_vgg16', got {network!r}")
    unknown = [name for name in network_args if (network, name) != ("aw_vgg16", "aw_args")]
    if unknown:
        raise TypeError(f"{network} takes no {', '.join(unknown)}; aw_vgg16 takes aw_args")


def _trained_stages(trainable: int | Literal["usual"] | None, pretrained: bool) -> int:
    if trainable is None:
        trainable = "usual" if pretrained else len(_STAGES)
    if trainable == "usual":
        trainable = _USUAL_LAYERS
    if not 0 <= trainable <= len(_STAGES):
        raise ValueError(f"trainable_layers must be from 0 to VGG's {len(_STAGES)} stages, got {trainable}")
    return trainable


def _load(convolutions: list[nn.Conv2d], file: Path) -> None:
    state = read_weights(file)
    names = [name for name in state if re.fullmatch(r"features\.\d+\.weight", name)]
    names.sort(key=lambda name: int(name.split(".")[1]))  # safetensors has an order of its own
    shapes = [tuple(state[name].shape) for name in names]
    if shapes != [tuple(convolution.weight.shape) for convolution in convolutions]:
        raise ValueError(f"{file} does not hold the weights of a VGG-16: its convolutions are {shapes}")
    for convolution, name in zip(convolutions, names, strict=True):
        convolution.load_state_dict({"weight": state[name], "bias": state[f"{name.removesuffix('.weight')}.bias"]})
