"""An image with boxes: valid annotations, the boxes to train on, and counts of what was left out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
LEAST = 1.0  # pixels; torchvision's augmentation, too, leaves out smaller boxes
_MOST = 2**31  # pixels from the image's corner: no image is that large, and products stay finite in float64
_LARGEST_ID = 2**63 - 1  # of int64, the dtype of ids


@dataclass(frozen=True)
class Annotated:
    """An image and its annotations.

    Attributes:
        path: of the image, within the data set.
        image_id: number of the image in the data set.
        width: in pixels; 0 if the annotations give none, so that the image's file has to.
        height: likewise.
        boxes: float64, shape (K, 4): x1, y1, x2, y2 in pixels.
        labels: int64, shape (K,), from 1; 0 is the background.
        areas: float64, shape (K,), of the objects, in square pixels. The evaluation sorts objects into small, medium
            and large by them.
        crowd: bool, shape (K,): regions with any number of objects (COCO), or difficult objects (VOC). Training ignores
            them, and the evaluation does not count detections in them as wrong.
        others: number of boxes left out here, because their categories are not wanted.
    """

    path: str
    image_id: int
    width: int
    height: int
    boxes: Array
    labels: Array
    areas: Array
    crowd: Array
    others: int = 0


@dataclass
class BoxSummary:
    """Counts of a training split: what it holds, what was left out, and what was changed. ``str`` makes a sentence.

    Attributes:
        images: images to train on.
        boxes: boxes to train on.
        empty_boxes: boxes left out: less than a pixel wide or high.
        outside_boxes: boxes left out: less than a pixel of them lies inside their image.
        repeated_boxes: boxes left out: their image has the same box of the same category already.
        clipped_boxes: boxes clipped to their image.
        crowd_regions: crowd regions left out.
        other_boxes: boxes left out: their category is not wanted.
        images_without_boxes: images without a box to train on.
        measured_images: images whose file gave their size: their annotations give none, or an impossible one.
        broken_images: images skipped: missing, or not readable.
        modes: number of images converted to RGB, by Pillow's mode, such as ``{"L": 3, "CMYK": 1}``.
    """

    images: int = 0
    boxes: int = 0
    empty_boxes: int = 0
    outside_boxes: int = 0
    repeated_boxes: int = 0
    clipped_boxes: int = 0
    crowd_regions: int = 0
    other_boxes: int = 0
    images_without_boxes: int = 0
    measured_images: int = 0
    broken_images: int = 0
    modes: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        notes = [
            (self.empty_boxes, "empty boxes (less than a pixel) left out"),
            (self.outside_boxes, "boxes outside their image left out"),
            (self.repeated_boxes, "boxes given twice taken once"),
            (self.clipped_boxes, "boxes clipped to their image"),
            (self.crowd_regions, "crowd regions not trained on"),
            (self.other_boxes, "boxes of other categories left out"),
            (self.images_without_boxes, "images without boxes"),
            (self.measured_images, "images whose size is that of their file, as their annotations have none"),
            (self.broken_images, "images missing or broken, and skipped"),
            *((count, f"images of mode {mode} converted to RGB") for mode, count in sorted(self.modes.items())),
        ]
        return "; ".join(
            [f"{self.images:,} images, {self.boxes:,} boxes", *(f"{count:,} {text}" for count, text in notes if count)]
        )


def clean(image: Annotated, counts: BoxSummary) -> Annotated:
    """The boxes of an image to train on, clipped to the image. Counts in ``counts`` what was left out."""
    boxes, crowd = image.boxes, image.crowd.astype(bool)
    empty = ((boxes[:, 2:] - boxes[:, :2]) < LEAST).any(1)
    limits = np.array([image.width, image.height] * 2, boxes.dtype)
    clipped = boxes.clip(0, limits)
    outside = ((clipped[:, 2:] - clipped[:, :2]) < LEAST).any(1) & ~empty
    usable = ~(empty | outside | crowd)
    kept = usable & ~_repeated(image, usable)
    counts.crowd_regions += int(crowd.sum())
    counts.empty_boxes += int((empty & ~crowd).sum())
    counts.outside_boxes += int((outside & ~crowd).sum())
    counts.repeated_boxes += int((usable & ~kept).sum())
    counts.clipped_boxes += int((kept & (clipped != boxes).any(1)).sum())
    counts.boxes += int(kept.sum())
    counts.images_without_boxes += not kept.any()
    counts.other_boxes += image.others
    return replace(image, boxes=clipped[kept], labels=image.labels[kept], areas=image.areas[kept], crowd=crowd[kept])


def _repeated(image: Annotated, among: Array) -> Array:
    """Whether each box repeats an earlier one of the same category."""
    rows = [(label, *box) for label, box in zip(image.labels.tolist(), image.boxes.tolist(), strict=True)]
    seen: set[tuple[float, ...]] = set()
    repeated = np.zeros(len(rows), bool)
    for index in np.flatnonzero(among):
        repeated[index] = rows[index] in seen
        seen.add(rows[index])
    return repeated


def is_number(value: Any) -> bool:
    """Whether a value can be a coordinate or an area: a number, no boolean, and not beyond the largest image."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= _MOST  # false for NaN


def is_id(value: Any) -> bool:
    """Whether a value can be the id of an image or a category."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST_ID


def size(width: float | None, height: float | None) -> tuple[int, int]:
    """Width and height of an image, in pixels, from its annotations; (0, 0) if one is missing or impossible."""
    if width is None or height is None:
        return 0, 0
    possible = all(is_number(side) and side >= 1 and side == int(side) for side in (width, height))
    return (int(width), int(height)) if possible else (0, 0)
