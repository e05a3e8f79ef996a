"""What the page shows of a classifier's insides for one image."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from awconv.explain import attention_maps, grad_cam
from awconv.explain.cam import NoFeatureMapError
from awconv.explain.maps import aw_layers
from awconv.tasks import ClassificationTask


@dataclass(frozen=True)
class Gains:
    """What a layer's weights are multiplied by for an image, by its map.

    Attributes:
        layer: its name.
        values: 1 + A, or A in the form without residual, shape (out blocks, in blocks, \\*kernel).
        out_expansion: output channels that share a value.
        neutral: the gain to compare with: 1, what the plain network has, where the map is relative to its start; else
            the mean of the layer's gains.
        is_relative: whether the map is relative to its start.
        input_gain: whether the layer also has a gain over input channels, which the values leave out.
    """

    layer: str
    values: Tensor
    out_expansion: int
    neutral: float
    is_relative: bool
    input_gain: bool = False

    @property
    def reach(self) -> float:
        """The largest distance of a gain from the neutral one."""
        return float((self.values - self.neutral).abs().max())

    def rows(self) -> Tensor:
        """Shape (in blocks * taps, out blocks): a row for each tap of the kernel, by rows of the kernel."""
        return self.values.flatten(1).T

    def moved(self, count: int) -> list[int]:
        """The output blocks whose gains are farthest from the neutral one in the mean, the farthest first."""
        distances = (self.values - self.neutral).abs().flatten(1).mean(1)
        return [int(block) for block in distances.topk(min(count, len(distances))).indices]


@dataclass(frozen=True)
class Looks:
    """What was found inside a network.

    Attributes:
        heat: Grad-CAM of the class, shape (H, W) from 0 to 1; None if the network has no feature map for it.
        gains: of the chosen layers.
    """

    heat: Tensor | None
    gains: list[Gains]


def look(task: ClassificationTask, image: Tensor, label: str, layers: Collection[str]) -> Looks:
    """Looks into a network while it classifies an image. No other thread may run it meanwhile.

    Args:
        task: in evaluation mode.
        image: uint8, shape (channels, H, W), as the network sees it.
        label: the class that Grad-CAM explains.
        layers: names of AW-convolutions.
    """
    network = task.evaluated
    normalised = task.normalised(torch.stack([image]).to(task.device))
    try:
        heat = grad_cam(network, normalised, [task.classes.index(label)])[0]
    except NoFeatureMapError:
        heat = None
    found = aw_layers(network)
    maps = attention_maps(network, normalised) if any(name in found for name in layers) else {}
    gains = []
    for name, attention in maps.items():
        if name in layers:
            layer = found[name]
            relative = bool(layer.attention.relative)
            values = attention[0].detach().float().cpu() + (1 if layer.residual or relative else 0)
            neutral = 1.0 if relative else float(values.mean())
            gains.append(Gains(name, values, layer.out_expansion, neutral, relative, layer.input_gain))
    return Looks(heat, gains)


def usual_layers(task: ClassificationTask) -> tuple[list[str], list[str]]:
    """The names of all AW-convolutions, and of those that the page shows first: the first and the last one."""
    names = list(aw_layers(task.evaluated))
    return names, list(dict.fromkeys(names[:1] + names[-1:]))
