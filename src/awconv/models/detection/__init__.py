"""Detectors of torchvision on backbones with attention."""

from awconv.models.detection.faster_rcnn import PyramidBackbone, faster_rcnn
from awconv.models.detection.ssd import TORCHVISIONS_INPUT, ssd300

__all__ = ["TORCHVISIONS_INPUT", "PyramidBackbone", "faster_rcnn", "ssd300"]
