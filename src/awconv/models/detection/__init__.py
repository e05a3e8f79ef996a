"""Detectors of torchvision on backbones with attention."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from awconv.models.detection.faster_rcnn import PyramidBackbone, faster_rcnn
from awconv.models.detection.ssd import TORCHVISIONS_INPUT, ssd300

__all__ = ["DETECTORS", "TORCHVISIONS_INPUT", "PyramidBackbone", "faster_rcnn", "ssd300"]

DETECTORS: dict[str, Callable[..., nn.Module]] = {"faster_rcnn": faster_rcnn, "ssd300": ssd300}
"""What makes a detector, by the name that the command line knows it by."""
