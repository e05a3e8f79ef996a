"""What networks find in images: the most probable classes, or objects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from awconv.data import to_uint8
from awconv.export.exported import ExportedClassifier, ExportedDetector
from awconv.tasks import ClassificationTask, DetectionTask


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image.

    Attributes:
        image: its path.
        top: names of classes with their probabilities, from 0 to 1, the most probable first.
    """

    image: str
    top: list[tuple[str, float]]

    def cells(self) -> tuple[str, ...]:
        """For the table."""
        return self.image, *(cell for label, probability in self.top for cell in (label, f"{probability:.3f}"))

    def rows(self) -> list[tuple[Any, ...]]:
        """For CSV."""
        return [(self.image, *(cell for pair in self.top for cell in pair))]

    def content(self) -> dict[str, Any]:
        """For JSON."""
        (label, probability), *others = self.top
        further = [dict(label=label, probability=probability) for label, probability in others]
        return dict(image=self.image, label=label, probability=probability) | (dict(others=further) if others else {})


@dataclass(frozen=True)
class Detection:
    """An object in an image.

    Attributes:
        label: the name of its category.
        score: from 0 to 1.
        box: x1, y1, x2, y2 in pixels of the image, as it stands upright.
    """

    label: str
    score: float
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Detected:
    """The objects in an image, by falling score.

    Attributes:
        image: its path.
        detections: the objects.
    """

    image: str
    detections: list[Detection]

    def cells(self) -> tuple[str, ...]:
        """For the table."""
        counts = Counter(detection.label for detection in self.detections)
        objects = ", ".join(f"{count} {label}" for label, count in counts.most_common())
        best = max((detection.score for detection in self.detections), default=None)
        return self.image, objects, "" if best is None else f"{best:.3f}"

    def rows(self) -> list[tuple[Any, ...]]:
        """For CSV."""
        return [(self.image, one.label, one.score, *one.box) for one in self.detections]

    def content(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def seen(task: ClassificationTask | ExportedClassifier, image: Image.Image) -> Tensor:
    """What a classifier sees of an image: uint8, of shape ``task.input_size``."""
    channels, size, _ = task.input_size
    return to_uint8(image, channels, size, task.crop_pct, task.interpolation)


def most_probable(logits: Tensor, classes: Sequence[str], names: Sequence[str], top_k: int) -> Iterator[Prediction]:
    """The most probable classes of the images of a batch.

    Args:
        logits: shape (N, classes).
        classes: the names of the classes, by index.
        names: of the N images.
        top_k: number of classes for each image.

    Raises:
        ValueError: logits are not finite.
    """
    _check_finite(logits, names)
    probabilities, labels = (each.tolist() for each in logits.softmax(1).topk(top_k))
    for name, its_labels, its_probabilities in zip(names, labels, probabilities, strict=True):
        known = (classes[label] for label in its_labels)
        yield Prediction(name, list(zip(known, its_probabilities, strict=True)))


def objects_in(task: DetectionTask | ExportedDetector, image: Tensor, name: str, threshold: float) -> list[Detection]:
    """The objects that a detector finds in an image, by falling score.

    Args:
        task: in evaluation mode, or an exported file.
        image: uint8, shape (3, H, W).
        name: of the image in errors.
        threshold: the least score of an object, for which the detector was prepared by :func:`admit`.

    Raises:
        NarrowImageError: nothing would be left of the image.
        ValueError: the network's outputs are not finite.
    """
    with torch.inference_mode():
        (found,) = task([image.to(task.device)])
    for part in ("boxes", "scores"):
        _check_finite(found[part], [name] * len(found[part]))
    kept = found["scores"] >= threshold
    boxes, labels, scores = (found[part][kept].cpu() for part in ("boxes", "labels", "scores"))
    return [
        Detection(task.classes[label - 1], score, (left, top, right, bottom))
        for (left, top, right, bottom), label, score in zip(
            boxes.tolist(), labels.tolist(), scores.tolist(), strict=True
        )
    ]


def admit(task: DetectionTask | ExportedDetector, threshold: float) -> None:
    """Lets a detector give objects of a score, which one in a file cannot learn any more.

    Raises:
        ValueError: the file gives none of so low a score.
    """
    if isinstance(task, ExportedDetector):
        least = task.metadata.score_threshold
        if threshold < least:
            raise ValueError(
                f"threshold must be at least {least:g}, below which the file gives nothing, got {threshold}"
            )
        return
    limited: Any = getattr(task.network, "roi_heads", task.network)  # a Faster R-CNN's last part, or an SSD
    limited.score_thresh = min(limited.score_thresh, threshold)


def colours(image: Image.Image) -> Tensor:
    """An image as uint8, shape (3, H, W)."""
    tensor: Tensor = pil_to_tensor(image if image.mode == "RGB" else image.convert("RGB"))
    return tensor


def _check_finite(outputs: Tensor, names: Sequence[str]) -> None:
    """Raises a ValueError that names the first image of a batch for which an output is NaN or infinite."""
    finite = outputs.isfinite().flatten(1).all(1) if outputs.dim() > 1 else outputs.isfinite()
    if not finite.all():
        first = names[int((~finite).nonzero()[0])]
        raise ValueError(
            f"the network's outputs for {first} are not finite; the checkpoint is damaged, or its training diverged"
        )
