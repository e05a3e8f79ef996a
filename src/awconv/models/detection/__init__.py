"""Detectors of torchvision on backbones with attention."""

from awconv.models.detection.faster_rcnn import PyramidBackbone, faster_rcnn
from awconv.models.detection.ssd import ssd300

__all__ = ["PyramidBackbone", "faster_rcnn", "ssd300"]
