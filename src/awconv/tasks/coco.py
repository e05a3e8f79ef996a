"""COCO's metrics of detections, and its format of results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

_COCO_FIGURES = {  # torchmetrics' names of COCO's twelve numbers, and ours
    "map": "AP",
    "map_50": "AP50",
    "map_75": "AP75",
    "map_small": "AP_small",
    "map_medium": "AP_medium",
    "map_large": "AP_large",
    "mar_1": "AR_1",
    "mar_10": "AR_10",
    "mar_100": "AR_100",
    "mar_small": "AR_small",
    "mar_medium": "AR_medium",
    "mar_large": "AR_large",
}


class Evaluated(NamedTuple):
    """An image after an evaluation.

    Attributes:
        image_id: its number in the data set.
        detections: ``boxes`` (x1, y1, x2, y2 in its pixels), ``labels`` (from 1) and ``scores``.
        target: ``boxes``, ``labels``, ``area`` and ``iscrowd``.
    """

    image_id: int
    detections: dict[str, Tensor]
    target: dict[str, Tensor]


class Figures(NamedTuple):
    """COCO's metrics.

    Attributes:
        overall: the twelve metrics; -1 for one that no object counts in.
        per_class: AP of each category that has objects, if asked for.
    """

    overall: dict[str, float]
    per_class: dict[str, float]


def coco_figures(images: Sequence[Evaluated], classes: Sequence[str], per_class: bool = True) -> Figures:
    """COCO's metrics of detections, by torchmetrics and faster-coco-eval.

    Args:
        images: all evaluated images. Their order breaks ties between equal scores.
        classes: the names of the categories, without the background.
        per_class: also compute the AP of each category.
    """
    if not images:
        return Figures(dict.fromkeys(_COCO_FIGURES.values(), -1.0), {})
    metric = MeanAveragePrecision(
        backend="faster_coco_eval",
        class_metrics=per_class,
        sync_on_compute=False,
        # torchmetrics' own are in single precision, in which a recall of exactly 0.15 does not reach 0.15.
        iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
        rec_thresholds=np.linspace(0, 1, 101).tolist(),
    )
    metric.warn_on_many_detections = False  # a detector returns as many as it was told to
    metric.update([image.detections for image in images], [image.target for image in images])
    figures = metric.compute()
    overall = {ours: float(figures[theirs]) for theirs, ours in _COCO_FIGURES.items()}
    if not per_class:
        return Figures(overall, {})
    labels, values = (figures[name].reshape(-1).tolist() for name in ("classes", "map_per_class"))
    by_name = {classes[label - 1]: value for label, value in zip(labels, values, strict=True) if value >= 0}
    return Figures(overall, by_name)


def coco_results(images: Sequence[Evaluated], category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Detections in COCO's result format: a dictionary for each, with ``bbox`` as x, y, width and height in pixels.

    Args:
        images: after an evaluation.
        category_ids: the data set's number of each category.
    """
    return [
        {
            "image_id": image.image_id,
            "category_id": category_ids[label - 1],
            "bbox": [left, top, right - left, bottom - top],
            "score": score,
        }
        for image in images
        for (left, top, right, bottom), label, score in zip(
            image.detections["boxes"].tolist(),
            image.detections["labels"].tolist(),
            image.detections["scores"].tolist(),
            strict=True,
        )
    ]
