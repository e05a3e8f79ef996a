"""What is in image files, by a checkpoint of a classifier or a detector."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, ImageDraw, ImageFont
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes

from awconv import terminal
from awconv.data import BrokenImageError, to_uint8
from awconv.data.images import read_image
from awconv.tasks import ClassificationTask, DetectionTask, Task
from awconv.training.checkpoints import read_checkpoint


@dataclass(frozen=True)
class Prediction:
    """The most probable class of an image.

    Attributes:
        image: its path.
        label: the name of the class.
        probability: of that class, from 0 to 1.
    """

    image: str
    label: str
    probability: float

    def cells(self) -> tuple[str, ...]:
        """For the table."""
        return escape(self.image), escape(self.label), f"{self.probability:.3f}"


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
    """The objects in an image, the surest first.

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
        return escape(self.image), escape(objects), "" if best is None else f"{best:.3f}"


@dataclass(frozen=True)
class Failure:
    """An image that could not be read.

    Attributes:
        image: its path.
        error: why.
    """

    image: str
    error: str


def predict(
    images: Sequence[Path],
    ckpt: Path,
    format: Literal["table", "json"] = "table",
    batch_size: int = 64,
    threshold: float = 0.5,
    draw: Path | None = None,
) -> int:
    """Prints what is in each image: its class, or the objects that a detector finds.

    A broken image is reported by name, and the rest goes on. Images with an EXIF orientation are turned upright first.

    Args:
        images: image files, and folders that are searched for them.
        ckpt: a checkpoint of ``awconv fit``, ``compare`` or ``demo``.
        format: a table, or JSON with ``predictions`` and ``failures``.
        batch_size: images that go through a classifier at once; a detector takes one at a time.
        threshold: the least score of an object.
        draw: a folder for copies of the images in which a detector's boxes are drawn.

    Returns:
        The exit status: 0, or 1 if an image was broken.

    Raises:
        FileNotFoundError: the checkpoint or an image is not there, or a folder holds no image.
        ValueError: the file is no such checkpoint, the threshold is not from 0 to 1, or there are no boxes to draw.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be from 0 to 1, got {threshold}")
    files = [file for path in images for file in _files(path)]
    task = load_task(ckpt)
    results: list[Prediction | Detected | Failure]
    if isinstance(task, DetectionTask):
        columns = ("image", "objects", "best score")
        results = list(detect(task, files, threshold, draw))
    elif isinstance(task, ClassificationTask):
        columns = ("image", "class", "probability")
        if draw is not None:
            raise ValueError(f"draw draws the boxes of a detector, and {ckpt} is of a classifier")
        results = list(classify(task, files, batch_size))
    failures = [result for result in results if isinstance(result, Failure)]
    predictions = [result for result in results if not isinstance(result, Failure)]
    if format == "json":
        print(
            json.dumps(
                {"predictions": [asdict(p) for p in predictions], "failures": [asdict(f) for f in failures]}, indent=1
            )
        )
    else:
        table = Table(*columns[:2], box=SIMPLE_HEAD, pad_edge=False)
        table.add_column(columns[2], justify="right")
        for prediction in predictions:
            table.add_row(*prediction.cells())
        terminal.console().print(table)
    for failure in failures:
        print(f"broken image: {failure.error}", file=sys.stderr)
    return 1 if failures else 0


def load_task(ckpt: Path) -> Task:
    """Loads a checkpoint for prediction.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is none.
    """
    kind = DetectionTask if "detector" in read_checkpoint(ckpt)["hyper_parameters"] else ClassificationTask
    try:
        task: Task = kind.load_from_checkpoint(ckpt, map_location="cpu", weights_only=True)
    except Exception as error:  # a checkpoint of any other network fails in ways of its own
        raise ValueError(f"{ckpt} cannot be used, or is not a checkpoint of 'awconv fit': {error}") from error
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return task.eval().to(device or "cpu")


def classify(task: ClassificationTask, files: Sequence[Path], batch_size: int) -> Iterator[Prediction | Failure]:
    """One result for each file, in their order within a batch; broken ones come first.

    Args:
        task: in evaluation mode.
        files: image files.
        batch_size: images that go through the network at once.
    """
    channels, size, _ = task.input_size
    for start in range(0, len(files), batch_size):
        names, batch = [], []
        for file in files[start : start + batch_size]:
            try:
                batch.append(to_uint8(read_image(str(file), str(file), upright=True), channels, size, task.crop_pct))
                names.append(str(file))
            except BrokenImageError as error:
                yield Failure(str(file), str(error))
        if not batch:
            continue
        with torch.inference_mode():
            probabilities, labels = task(torch.stack(batch).to(task.device)).softmax(1).max(1)
        for name, label, probability in zip(names, labels.tolist(), probabilities.tolist(), strict=True):
            yield Prediction(name, task.classes[label], probability)


def detect(
    task: DetectionTask, files: Sequence[Path], threshold: float, draw: Path | None = None
) -> Iterator[Detected | Failure]:
    """One result for each file.

    Args:
        task: in evaluation mode.
        files: image files.
        threshold: the least score of an object.
        draw: a folder for copies with boxes, as PNG; None draws nothing.
    """
    copies = _copies(files)
    limited: Any = getattr(task.network, "roi_heads", task.network)  # a Faster R-CNN's last part, or an SSD
    limited.score_thresh = min(limited.score_thresh, threshold)
    for file in files:
        try:
            image = pil_to_tensor(read_image(str(file), str(file), upright=True).convert("RGB"))
        except BrokenImageError as error:
            yield Failure(str(file), str(error))
            continue
        with torch.inference_mode():
            (found,) = task([image.to(task.device)])
        kept = found["scores"] >= threshold
        boxes, labels, scores = (found[name][kept].cpu() for name in ("boxes", "labels", "scores"))
        detections = [
            Detection(task.classes[label - 1], score, (left, top, right, bottom))
            for (left, top, right, bottom), label, score in zip(
                boxes.tolist(), labels.tolist(), scores.tolist(), strict=True
            )
        ]
        if draw is not None:
            place = draw / copies[file]
            place.parent.mkdir(parents=True, exist_ok=True)
            _drawn(image, detections).save(place)
        yield Detected(str(file), detections)


def _copies(files: Sequence[Path]) -> dict[Path, Path]:
    """Names for copies: those of the files, below the folder that all are in, so that none is written over another."""
    parents = [str(file.resolve().parent) for file in files]
    top = Path(os.path.commonpath(parents)) if parents else Path()
    names = {file: file.resolve().relative_to(top) for file in files}
    return {file: name.with_name(f"{name.name}.png") for file, name in names.items()}


def _drawn(image: Tensor, detections: Sequence[Detection]) -> Image.Image:
    if not detections:
        plain: Image.Image = to_pil_image(image)
        return plain
    size = max(image.shape[1:])
    colours = {label: _COLOURS[index % len(_COLOURS)] for index, label in enumerate({d.label: 0 for d in detections})}
    drawn: Image.Image = to_pil_image(
        draw_bounding_boxes(
            image,
            torch.tensor([detection.box for detection in detections]),
            colors=[colours[detection.label] for detection in detections],
            width=max(2, size // 250),
        )
    )
    pen, font = ImageDraw.Draw(drawn), ImageFont.load_default(max(10, size // 45))
    for detection in detections:
        text = f"{detection.label} {detection.score:.2f}"
        _, _, width, height = pen.textbbox((0, 0), text, font=font)
        corner = (  # of the box, or as near as the whole label fits on the image
            max(0, min(detection.box[0], drawn.width - width - 1)),
            max(0, min(detection.box[1], drawn.height - height - 1)),
        )
        ink = pen.textbbox(corner, text, font=font)
        pen.rectangle((ink[0] - 1, ink[1] - 1, ink[2] + 1, ink[3] + 1), fill=colours[detection.label])
        pen.text(corner, text, fill="white", font=font)
    return drawn


_COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#ff7f0e")


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        endings = Image.registered_extensions()
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in endings and file.is_file())
        if not found:
            raise FileNotFoundError(f"folder {path} holds no image file")
        return found
    if not path.exists():
        raise FileNotFoundError(f"{path} is neither an image file nor a folder")
    return [path]
