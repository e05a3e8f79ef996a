"""Faster R-CNN (arXiv 1506.01497) with a feature pyramid (arXiv 1612.03144) on any network of timm, by torchvision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.layers import Format, GroupNormAct, convert_sync_batchnorm, freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from awconv.convert import convert as convert_layers
from awconv.models.detection.arguments import check_arguments
from awconv.models.detection.transform import take_uint8
from awconv.models.pretrained import weights_overlay

Norm = Literal["batch", "frozen", "group", "sync"]
_GROUPS = 32  # arXiv 1803.08494, section 3.1
_USUAL_LAYERS = 3
_FINEST = 4  # pixels between the positions of the finest level, which the heads are made for


class PyramidBackbone(nn.Module):
    """The feature maps of a network of timm, as a pyramid.

    It takes the network's maps with a stride of 4 and more, and adds a coarser one by pooling.

    Args:
        network: made with ``features_only=True``.
        out_channels: of each level.
        norm_layer: of the pyramid's convolutions; None for none.

    Raises:
        ValueError: the network has no map of that stride.
    """

    def __init__(
        self, network: nn.Module, out_channels: int = 256, norm_layer: Callable[..., nn.Module] | None = None
    ) -> None:
        super().__init__()
        info: Any = network.feature_info
        self.strides: list[int] = [stride for stride in info.reduction() if stride >= _FINEST]
        if not self.strides:
            raise ValueError(f"a backbone must have a feature map of stride {_FINEST} or more, got {info.reduction()}")
        self.skipped = len(info.reduction()) - len(self.strides)
        self.body = network
        self.channels_are_last = getattr(network, "output_fmt", None) is Format.NHWC  # as in Swin
        self.fpn = FeaturePyramidNetwork(
            info.channels()[self.skipped :], out_channels, LastLevelMaxPool(), norm_layer=norm_layer
        )
        self.out_channels = out_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images, shape (N, channels, H, W), to levels by name, shape (N, out_channels, H / stride, W / stride)."""
        maps = self.body(images)[self.skipped :]
        if self.channels_are_last:
            maps = [level.permute(0, 3, 1, 2) for level in maps]
        levels: dict[str, Tensor] = self.fpn({str(index): level for index, level in enumerate(maps)})
        return levels


def faster_rcnn(
    network: str = "aw_resnet50",
    num_classes: int = 91,
    *,
    pretrained: bool | str | Path = False,
    trainable_layers: int | Literal["usual"] | None = None,
    norm: Norm | None = None,
    network_args: dict[str, Any] | None = None,
    convert: dict[str, Any] | None = None,
    out_channels: int = 256,
    **kwargs: Any,
) -> FasterRCNN:
    """torchvision's Faster R-CNN on a network of timm with a feature pyramid.

    Args:
        network: any network of timm that has ``features_only``, such as ``"aw_resnet101"`` or ``"seresnet50"``.
        num_classes: of objects and the background, which is class 0: 91 for COCO's category numbers.
        pretrained: a classifier's weights to start from: timm's own (True), or a file of them.
        trainable_layers: how many of the network's stages are trained, counted from the last; the stem counts as one.
            ``"usual"`` is 3, or all where it has fewer or its stages are not modules of their own. By default the usual
            number with pretrained weights, and all without.
        norm: of the network: ``"batch"``, ``"sync"`` (over all devices), ``"frozen"`` (constants from the pretrained
            weights) or ``"group"`` (in place of batch norms, also in the pyramid). By default frozen with pretrained
            weights and batch without.
        network_args: further arguments of the network, such as ``{"aw_args": {"reduction": 8}}``. A network for images
            of one size needs one that allows others: a Swin ``{"strict_img_size": False}``.
        convert: arguments of :func:`awconv.convert`, such as ``{"init": "identity"}``, by which the network becomes an
            AW network after its weights are loaded.
        out_channels: of each level of the pyramid.
        **kwargs: of ``torchvision.models.detection.FasterRCNN``, such as ``min_size``, ``max_size`` or
            ``box_score_thresh``.

    Returns:
        The detector. It takes a list of images, uint8 or float from 0 to 1 of shape (channels, H, W), and in training a
        list of dictionaries with ``boxes`` (x1, y1, x2, y2 in pixels) and ``labels``. In training it returns losses by
        name, in evaluation a dictionary of ``boxes``, ``labels`` and ``scores`` for each image.

    Raises:
        FileNotFoundError: the file of weights is not there.
        ValueError: the weights are those of another network, an argument is out of its range, or the stages that are to
            be trained cannot be told apart.
        TypeError: torchvision's detector has no such argument.
        RuntimeError: timm does not know the backbone, or has no weights for it.
    """
    check_arguments(FasterRCNN, kwargs)
    body = _features(network, pretrained, network_args or {})
    if norm is None:
        norm = "frozen" if pretrained else "batch"
    body = with_norm(body, norm)
    if convert is not None:  # only now: a branch must know that its norm is frozen, and has no weight to learn
        body = convert_layers(body, **convert)
    _freeze(body, "usual" if trainable_layers is None and pretrained else trainable_layers)
    pyramid = PyramidBackbone(body, out_channels, partial(nn.GroupNorm, _GROUPS) if norm == "group" else None)
    cfg: Any = timm.get_pretrained_cfg(network)
    defaults = _levels(pyramid.strides, kwargs) | dict(image_mean=cfg.mean, image_std=cfg.std)
    detector = FasterRCNN(pyramid, num_classes, **(defaults | kwargs))
    take_uint8(detector)
    return detector


def _features(network: str, pretrained: bool | str | Path, network_args: dict[str, Any]) -> nn.Module:
    overlay = None
    if isinstance(pretrained, str | Path):
        overlay = weights_overlay(network, pretrained, network_args)
    features: nn.Module = timm.create_model(
        network, features_only=True, pretrained=bool(pretrained), pretrained_cfg_overlay=overlay, **network_args
    )
    return features


def _levels(strides: list[int], given: Mapping[str, Any]) -> dict[str, Any]:
    """Anchors and pooling for the levels of a pyramid, where they are not given."""
    levels: dict[str, Any] = {}
    if "rpn_anchor_generator" not in given:
        # 32 to 512 pixels in a ResNet, as in arXiv 1612.03144
        sizes = tuple((8 * stride,) for stride in [*strides, 2 * strides[-1]])
        levels["rpn_anchor_generator"] = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    if "box_roi_pool" not in given:
        names = [str(index) for index in range(len(strides))]
        levels["box_roi_pool"] = MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2)
        _set_scales(levels["box_roi_pool"], strides)
    return levels


def _set_scales(pool: MultiScaleRoIAlign, strides: list[int]) -> None:
    """Gives a pooling the scales of its levels. It would infer them from the first images and keep them, and a long
    strip has other scales than a photograph."""
    side = 8 * max(strides)
    levels = {
        name: torch.zeros(1, 1, side // s, side // s) for name, s in zip(pool.featmap_names, strides, strict=True)
    }
    pool(levels, [torch.zeros(0, 4)], [(side, side)])


def with_norm(network: nn.Module, norm: Norm) -> nn.Module:
    """Replaces the batch norms of a network, those of its attention branches too.

    Raises:
        ValueError: there is no such norm.
    """
    if norm == "batch":
        return network
    if norm == "sync":
        synchronised: nn.Module = convert_sync_batchnorm(network)
        return synchronised
    if norm == "frozen":
        frozen: nn.Module = freeze_batch_norm_2d(network)
        return frozen
    if norm != "group":
        raise ValueError(f"norm must be 'batch', 'frozen', 'group' or 'sync', got {norm!r}")
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, _grouped(child))
    return network


def _grouped(old: nn.BatchNorm2d) -> nn.GroupNorm:
    channels = old.num_features
    # A branch's few channels are normalised together, as in awconv.convert.
    groups = _GROUPS if channels % _GROUPS == 0 and channels > _GROUPS else 1
    if not hasattr(old, "act"):  # timm's norm with an activation
        return nn.GroupNorm(groups, channels)
    new = GroupNormAct(channels, num_groups=groups)
    for name in ("drop", "act"):
        setattr(new, name, getattr(old, name))
    return new


def _freeze(network: nn.Module, trainable: int | Literal["usual"] | None) -> None:
    """Leaves only the last stages of a network trainable.

    Raises:
        ValueError: it has not so many, or they are not modules of their own.
    """
    if trainable is None:
        return
    info: Any = network.feature_info
    modules = list(network.named_modules())  # in the order in which they compute
    parts = [[i for i, (name, _) in enumerate(modules) if _is_within(name, stage)] for stage in info.module_name()]
    told_apart = all(parts)
    if trainable == "usual":
        trainable = min(_USUAL_LAYERS, len(parts)) if told_apart else len(parts)
    if not 0 <= trainable <= len(parts):
        raise ValueError(f"trainable_layers must be from 0 to the backbone's {len(parts)} stages, got {trainable}")
    if trainable == len(parts):
        return
    if not told_apart:
        raise ValueError(
            f"trainable_layers must be {len(parts)} (all), got {trainable}: the stages of this backbone "
            f"({', '.join(info.module_name())}) are no separate modules"
        )
    for _, module in modules[: max(parts[len(parts) - trainable - 1]) + 1]:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)


def _is_within(name: str, stage: str) -> bool:
    """Whether a module is a stage or a part of it, in any of timm's wrappers."""
    name = f"{name.removeprefix('model.')}."
    return name.startswith((f"{stage}.", f"{stage.replace('.', '_')}."))
