"""A detector's graph: from an image that fits it to boxes, scores and labels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from awconv.models.detection.transform import NarrowImageError

DIVISOR = 32  # torchvision's: of the sides of what Faster R-CNN takes
_APART = 2.0**14  # pixels between the classes' boxes, more than any image has


class DetectorGraph(nn.Module):
    """torchvision's Faster R-CNN or SSD without its preprocessing, for one image.

    Args:
        detector: the network, in evaluation mode.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Finds the objects.

        Args:
            images: normalised, and padded by zeros to the right and at the bottom, shape (1, 3, H, W).
            size: height and width without the padding, float32 of shape (2,).

        Returns:
            Boxes (x1, y1, x2, y2 in pixels of the input), shape (n, 4), scores and labels (from 1), shape (n,), best
            first.
        """
        found = found_objects(self.detector, images, (size[0], size[1]))
        return found["boxes"], found["scores"], found["labels"]


def found_objects(detector: nn.Module, images: Tensor, size: Any) -> dict[str, Tensor]:
    """What one of torchvision's detectors finds in an image that fits it, of which ``size`` is no padding."""
    network: Any = detector
    features = network.backbone(images)
    if hasattr(network, "rpn"):
        proposals, _ = network.rpn(ImageList(images, [size]), features)
        (found,), _ = network.roi_heads(features, proposals, [size])
    else:
        levels = list(features.values())
        anchors = network.anchor_generator(ImageList(images, [size]), levels)
        (found,) = network.postprocess_detections(network.head(levels), anchors, [size])
    objects: dict[str, Tensor] = found
    return objects


@contextmanager
def exportable_operations() -> Iterator[None]:
    """Inside, torchvision's detectors call four functions in a form that takes any number of boxes.

    torchvision's own look at the number of boxes, which an exported graph does not know, and clip to numbers.
    """
    with (
        mock.patch("torchvision.ops.boxes.batched_nms", _batched_nms),
        mock.patch("torchvision.ops.boxes.clip_boxes_to_image", _clipped),
        mock.patch("torchvision.models.detection._utils._topk_min", _at_most),
        mock.patch("torchvision.models.detection._utils.BoxCoder.decode", _decoded),
    ):
        yield


def _batched_nms(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float) -> Tensor:
    """Non-maximum suppression within each class: the classes' boxes are moved apart."""
    moved = boxes + (_APART * classes.to(boxes))[:, None]
    kept: Tensor = torch.ops.torchvision.nms(moved, scores, threshold)
    return kept


def _at_most(values: Tensor, count: int, axis: int) -> Any:
    """The lesser of a count and of the length of an axis."""
    return torch.sym_min(count, values.shape[axis])


def _decoded(coder: Any, codes: Tensor, boxes: list[Tensor]) -> Tensor:
    """Boxes, shape (n, classes, 4), from what a network says of how they differ from others, shape (n, classes * 4)."""
    decoded: Tensor = coder.decode_single(codes, torch.cat(boxes)).unflatten(1, (-1, 4))
    return decoded


def _clipped(boxes: Tensor, size: tuple[Tensor, Tensor]) -> Tensor:
    """Boxes, shape (..., 4), clipped to an image of a height and width."""
    height, width = size
    limits = torch.stack([width, height, width, height]).to(boxes)
    return torch.minimum(boxes.clamp(min=0), limits)


def fitted(image: Tensor, size: tuple[int, int], canvas: tuple[int, int]) -> Tensor:
    """A normalised image resized and padded, as torchvision's detectors do it.

    Args:
        image: shape (3, H, W).
        size: height and width of the resized image.
        canvas: height and width with the padding.

    Returns:
        Shape (1, 3, \\*canvas).
    """
    resized = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)
    return F.pad(resized, (0, canvas[1] - size[1], 0, canvas[0] - size[0]))


def resized_size(image: tuple[int, int], scale: float) -> tuple[int, int]:
    """Height and width of an image after scaling.

    Raises:
        NarrowImageError: nothing would be left of it.
    """
    height, width = (int(side * scale) for side in image)
    if min(height, width) < 1:
        raise NarrowImageError(
            f"{image[1]}x{image[0]} pixels shrink to less than one in width or height when they fit the network; cut "
            "the image into parts"
        )
    return height, width
