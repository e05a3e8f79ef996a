"""An image with boxes: what may be in its annotations, what can be trained on, and what is counted on the way."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
LEAST = 1.0  # pixels: what torchvision's augmentation leaves out, too
_MOST = 2**31  # pixels from the image's corner; no image is as large, and float64 can still multiply it
_LARGEST_ID = 2**63 - 1  # what a tensor holds


@dataclass(frozen=True)
class Annotated:
    """An image and what is marked in it.

    Attributes:
        path: of the image, among the data set's files.
        image_id: its number in the data set.
        width: in pixels; 0 where the annotations do not say it, and the image's file has to.
        height: the same.
        boxes: float64, shape (K, 4): x1, y1, x2, y2 in pixels.
        labels: int64, shape (K,), from 1; 0 is the background.
        areas: float64, shape (K,), in square pixels, of the object, by which an evaluation calls it small or large.
        crowd: bool, shape (K,): regions that hold any number of objects (COCO), or are too difficult (VOC). They are
            not trained on, and detections in them are not counted as wrong.
        others: number of boxes of categories that were not asked for, which are not here.
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
    """What a training split holds, and what was done to it; printed, a sentence.

    Attributes:
        images: that are trained on.
        boxes: that are trained on.
        empty_boxes: left out, because they are less than a pixel wide or high.
        outside_boxes: left out, because less than a pixel of them lies inside their image.
        repeated_boxes: left out, because the same box of the same category is in the same image already.
        clipped_boxes: that were clipped to their image.
        crowd_regions: left out of the training.
        other_boxes: left out, because their category was not asked for.
        images_without_boxes: that have no box to train on.
        measured_images: whose size is that of their file, because their annotations have none, or one that cannot be.
        broken_images: that are missing or cannot be read, and are skipped.
        modes: number of images by Pillow's mode that are not RGB, and were converted, such as ``{"L": 3, "CMYK": 1}``.
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
    """The boxes of an image that can be trained on, clipped to it; what was left out is counted."""
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
    """Which boxes are, with their category, those of an earlier one."""
    rows = [(label, *box) for label, box in zip(image.labels.tolist(), image.boxes.tolist(), strict=True)]
    seen: set[tuple[float, ...]] = set()
    repeated = np.zeros(len(rows), bool)
    for index in np.flatnonzero(among):
        repeated[index] = rows[index] in seen
        seen.add(rows[index])
    return repeated


def is_number(value: Any) -> bool:
    """Whether a value can be a coordinate or an area: a finite real number that is no boolean, up to what the largest
    image could have."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= _MOST  # which NaN is not


def is_id(value: Any) -> bool:
    """Whether a value can number images or categories."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST_ID


def size(width: float | None, height: float | None) -> tuple[int, int]:
    """The width and height of an image in pixels, as its annotations have them; twice 0 if one cannot be."""
    if width is None or height is None:
        return 0, 0
    can_be = all(is_number(side) and side >= 1 and side == int(side) for side in (width, height))
    return (int(width), int(height)) if can_be else (0, 0)
