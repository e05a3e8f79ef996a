"""Classifies image files, or finds the objects in them, with a trained network or an exported file."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from awconv import terminal
from awconv.data import BrokenImageError
from awconv.data.classification import check_batch
from awconv.data.files import walk
from awconv.data.images import ENDINGS, MAX_PIXELS, read_image
from awconv.draw import drawn, is_copy, places, real, write
from awconv.export.exported import ExportedClassifier, ExportedDetector, open_exported
from awconv.models.detection.transform import NarrowImageError
from awconv.predictions import Detected, Prediction, admit, colours, most_probable, objects_in, seen
from awconv.sources import load_task
from awconv.tables import Table
from awconv.tasks import ClassificationTask, DetectionTask
from awconv.training.partial import clear_old
from awconv.usage import UsageError

Network = ClassificationTask | DetectionTask | ExportedClassifier | ExportedDetector


@dataclass(frozen=True)
class Failure:
    """An image that could not be read, or whose copy could not be drawn.

    Attributes:
        image: its path.
        error: why.
    """

    image: str
    error: str


def predict(
    images: Sequence[Path],
    ckpt: str | None = None,
    format: Literal["table", "json", "csv"] = "table",
    top_k: int = 1,
    image_size: int | None = None,
    batch_size: int = 64,
    threshold: float = 0.5,
    draw: Path | None = None,
    max_pixels: int = MAX_PIXELS,
    pretrained: Path | None = None,
    model: Path | None = None,
) -> int:
    """Prints each image's class, or the objects that a detector finds in it.

    A broken image is reported by name and skipped. Images are turned upright by their EXIF orientation.

    Args:
        images: image files, and folders to search for them. Each image is predicted once.
        ckpt: a checkpoint of ``awconv fit``, ``compare`` or ``demo``, or a training's folder; what ``publish`` wrote;
            a name with weights in timm, such as resnet50; or a network on the hub, hf-hub:OWNER/NAME.
        format: a table, CSV, or JSON with ``predictions`` and ``failures``. CSV has a row for each image, of a detector
            for each object: class, score, x1, y1, x2, y2.
        top_k: how many classes of an image are given, the most probable first.
        image_size: height and width to which a classifier's images are cropped, if not those that it was trained on.
        batch_size: images that a classifier takes at once. A detector takes one at a time.
        threshold: the lowest score of an object that is reported.
        draw: a folder for copies of the images with a detector's boxes. Copies of an earlier run are replaced; no
            other file is overwritten.
        max_pixels: the largest number of pixels of an image. A larger file is reported as broken, for it would take too
            much memory.
        pretrained: a file of weights: those that the adapter was trained on, or a name's, in the place of timm's.
        model: a file of ``awconv export``, in the place of ckpt. A .pt2 is machine code, which runs.

    Returns:
        The exit status: 0, or 1 if an image was broken.

    Raises:
        FileNotFoundError: the checkpoint, the base or an image is missing, or a folder holds no image.
        ModuleNotFoundError: the runtime of ``model`` is not installed.
        UsageError: neither ``ckpt`` nor ``model`` is given, or both.
        ValueError: ``ckpt`` or ``model`` is none of these, its base is another one, a number is out of its range, an
            option is of the other kind of network, a copy would overwrite another file, or the network's outputs are
            not finite.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be from 0 to 1, got {threshold}")
    for argument, value in (("batch_size", batch_size), ("max_pixels", max_pixels), ("top_k", top_k)):
        if value < 1:
            raise ValueError(f"{argument} must be at least 1, got {value}")
    draw = None if draw is None else Path(os.path.expanduser(draw))
    source = source_of(ckpt, model)
    files = image_files(images, draw)
    task = open_network(source, model is not None, pretrained, image_size)
    columns: tuple[str, ...]
    results: list[Prediction | Detected | Failure]
    if isinstance(task, DetectionTask | ExportedDetector):
        columns = ("image", "class", "score", "x1", "y1", "x2", "y2")
        if format == "table":
            columns = ("image", "objects", "best score")
        if top_k > 1:
            raise ValueError(f"top_k is a classifier's, and {source} is a detector")
        results = list(detect(task, files, threshold, draw, max_pixels))
    else:
        top_k = min(top_k, len(task.classes))
        numbers = [""] if top_k == 1 else [f" {number + 1}" for number in range(top_k)]
        columns = ("image", *(f"{name}{number}" for number in numbers for name in ("class", "probability")))
        if draw is not None:
            raise ValueError(f"draw draws the boxes of a detector, and {source} is a classifier")
        results = list(classify(task, files, batch_size, max_pixels, top_k))
    failures = [result for result in results if isinstance(result, Failure)]
    _print(columns, [result for result in results if not isinstance(result, Failure)], failures, format)
    return 1 if failures else 0


def source_of(ckpt: str | None, model: Path | None, option: str = "--ckpt") -> str:
    """The one of both that is given.

    Args:
        ckpt: where a trained network comes from.
        model: a file of ``awconv export``.
        option: how a command names the first.

    Raises:
        UsageError: neither is given, or both.
    """
    if (ckpt is None) == (model is None):
        raise UsageError(
            f"missing: {option}: a checkpoint of awconv fit, compare or demo, or a training's folder; what publish "
            "wrote; a name with weights in timm, such as resnet50, or on the hub, hf-hub:OWNER/NAME; or --model: a "
            "file of awconv export"
            if ckpt is None
            else f"either {option} or --model names the network, got both"
        )
    return os.path.expanduser(str(model) if ckpt is None else ckpt)


def open_network(source: str, exported: bool, pretrained: Path | None = None, image_size: int | None = None) -> Network:
    """Opens a trained network for prediction, on the accelerator if there is one, or an exported file.

    Args:
        source: as for :func:`awconv.sources.load_task`, or a file of ``awconv export``.
        exported: it is such a file.
        pretrained: a file of weights: the base of an adapter, or those of a name.
        image_size: height and width of a classifier's images, if not those that it was trained on.

    Raises:
        FileNotFoundError: there is no such file, folder or name.
        ModuleNotFoundError: the runtime of the file is not installed.
        ValueError: it is broken or something else, or an argument does not fit it.
    """
    if not exported:
        task: Any = load_task(source, pretrained, image_size).ready()
        return task  # type: ignore[no-any-return]
    if pretrained is not None:
        raise ValueError(f"pretrained is the base of an adapter or the weights of a name, and {source} has its own")
    opened = open_exported(Path(source))
    if isinstance(opened, ExportedDetector) and image_size is not None:
        raise ValueError("image_size is a classifier's; a detector resizes images by its own sizes")
    if isinstance(opened, ExportedClassifier) and image_size is not None:
        opened.resize(image_size)
    return opened


def _print(
    columns: Sequence[str], predictions: Sequence[Prediction | Detected], failures: Sequence[Failure], format: str
) -> None:
    if format == "json":
        content = {"predictions": [p.content() for p in predictions], "failures": [asdict(f) for f in failures]}
        print(json.dumps(content, indent=1, allow_nan=False))
    elif format == "csv":
        rows = csv.writer(sys.stdout, lineterminator="\n")
        rows.writerow(columns)
        rows.writerows(tuple(map(_cell, row)) for one in predictions for row in one.rows())
    else:
        Table(columns, [prediction.cells() for prediction in predictions]).print()
    predicted = {result.image for result in predictions}
    for failure in failures:
        kind = "" if failure.image in predicted else "broken image: "
        terminal.say(f"{kind}{failure.error}")


def _cell(value: Any) -> Any:
    return terminal.printable(value) if isinstance(value, str) else value


def classify(
    task: ClassificationTask | ExportedClassifier,
    files: Sequence[Path],
    batch_size: int,
    max_pixels: int = MAX_PIXELS,
    top_k: int = 1,
) -> Iterator[Prediction | Failure]:
    """One result for each file, in their order within a batch; broken ones come first.

    Args:
        task: in evaluation mode, or an exported file.
        files: image files.
        batch_size: images that go through the network at once.
        max_pixels: the most that an image may have.
        top_k: number of classes for each image.

    Raises:
        ValueError: the network's outputs are not finite, or a batch takes too much memory.
    """
    channels, size, _ = task.input_size
    check_batch(min(batch_size, len(files)), channels, size)
    for start in range(0, len(files), batch_size):
        names, batch = [], []
        for file in files[start : start + batch_size]:
            try:
                batch.append(seen(task, read_image(str(file), str(file), max_pixels=max_pixels)))
                names.append(str(file))
            except BrokenImageError as error:
                yield Failure(str(file), str(error))
        if not batch:
            continue
        with torch.inference_mode():
            logits = task(torch.stack(batch).to(task.device))
        yield from most_probable(logits, task.classes, names, top_k)


def detect(
    task: DetectionTask | ExportedDetector,
    files: Sequence[Path],
    threshold: float,
    draw: Path | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Detected | Failure]:
    """One result for each file.

    Args:
        task: in evaluation mode, or an exported file.
        files: image files.
        threshold: the least score of an object.
        draw: a folder for copies with boxes; None draws nothing.
        max_pixels: the most that an image may have.

    Raises:
        ValueError: the network's outputs are not finite, or a copy cannot be written or would overwrite another file.
    """
    copies = {} if draw is None else places(files, draw)
    clear_old([] if draw is None else [draw])
    admit(task, threshold)
    for file in files:
        try:
            image = colours(read_image(str(file), str(file), max_pixels=max_pixels))
            detections = objects_in(task, image, str(file), threshold)
        except BrokenImageError as error:
            yield Failure(str(file), str(error))
            continue
        except NarrowImageError as error:
            yield Failure(str(file), f"{file}: {error}")
            continue
        yield Detected(str(file), detections)
        if draw is not None:
            try:
                write(drawn(image, detections, threshold), copies[file])
            except OSError as error:
                yield Failure(str(file), f"{file}: its copy {copies[file]} cannot be written: {error.strerror}")


def image_files(images: Sequence[Path], draw: Path | None = None) -> list[Path]:
    """The given files and the image files in the given folders, each once, without copies in ``draw``."""
    found: dict[Path, Path] = {}
    for given in images:
        path = Path(os.path.expanduser(given))
        if path.is_dir():
            inside = sorted(file for file in map(Path, walk(path)) if file.suffix.lower() in ENDINGS and file.is_file())
            if draw is not None:
                inside = [file for file in inside if real(draw) not in real(file).parents or not is_copy(file)]
            if not inside:
                raise FileNotFoundError(f"folder {path} holds no image file ({', '.join(sorted(ENDINGS))})")
        elif path.is_file():
            inside = [path]
        else:
            raise FileNotFoundError(f"{path} is neither an image file nor a folder")
        for file in inside:
            found.setdefault(real(file.parent) / file.name, file)
    return list(found.values())
