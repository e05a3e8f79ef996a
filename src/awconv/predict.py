"""Classifies image files, or finds the objects in them, with a checkpoint or an adapter."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes

from awconv import terminal
from awconv.data import BrokenImageError, to_uint8
from awconv.data.classification import check_batch
from awconv.data.files import walk
from awconv.data.images import ENDINGS, MAX_PIXELS, read_image
from awconv.models.detection.transform import NarrowImageError
from awconv.tables import Table
from awconv.tasks import ClassificationTask, DetectionTask, Task
from awconv.tasks.adapted import load_adapted
from awconv.training.checkpoints import read_checkpoint
from awconv.training.partial import clear_old, replacing


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
        return self.image, self.label, f"{self.probability:.3f}"


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
    ckpt: Path,
    format: Literal["table", "json"] = "table",
    batch_size: int = 64,
    threshold: float = 0.5,
    draw: Path | None = None,
    max_pixels: int = MAX_PIXELS,
    pretrained: Path | None = None,
) -> int:
    """Prints each image's class, or the objects that a detector finds in it.

    A broken image is reported by name and skipped. Images are turned upright by their EXIF orientation.

    Args:
        images: image files, and folders to search for them. Each image is predicted once.
        ckpt: a checkpoint of ``awconv fit``, ``compare`` or ``demo``, or an adapter (.safetensors) of ``publish``.
        format: a table, or JSON with ``predictions`` and ``failures``.
        batch_size: images that a classifier takes at once. A detector takes one at a time.
        threshold: the lowest score of an object that is reported.
        draw: a folder for copies of the images with a detector's boxes. Copies of an earlier run are replaced; no
            other file is overwritten.
        max_pixels: the largest number of pixels of an image. A larger file is reported as broken, for it would take too
            much memory.
        pretrained: a file of the weights that the adapter was trained on; by default timm's for its network.

    Returns:
        The exit status: 0, or 1 if an image was broken.

    Raises:
        FileNotFoundError: the checkpoint, the base or an image is missing, or a folder holds no image.
        ValueError: the file is no such checkpoint or adapter, its base is another one, a number is out of its range,
            ``draw`` is given for a classifier, a copy would overwrite another file, or the network's outputs are not
            finite.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be from 0 to 1, got {threshold}")
    for argument, value in (("batch_size", batch_size), ("max_pixels", max_pixels)):
        if value < 1:
            raise ValueError(f"{argument} must be at least 1, got {value}")
    draw = None if draw is None else Path(os.path.expanduser(draw))
    files = _files(images, draw)
    ckpt = Path(os.path.expanduser(ckpt))
    if ckpt.suffix != ".safetensors" and pretrained is not None:
        raise ValueError(f"pretrained is the base of an adapter (.safetensors), and {ckpt} is a checkpoint")
    task = load_adapted(ckpt, pretrained).ready() if ckpt.suffix == ".safetensors" else load_task(ckpt)
    results: list[Prediction | Detected | Failure]
    if isinstance(task, DetectionTask):
        columns = ("image", "objects", "best score")
        results = list(detect(task, files, threshold, draw, max_pixels))
    elif isinstance(task, ClassificationTask):
        columns = ("image", "class", "probability")
        if draw is not None:
            raise ValueError(f"draw draws the boxes of a detector, and {ckpt} is of a classifier")
        results = list(classify(task, files, batch_size, max_pixels))
    failures = [result for result in results if isinstance(result, Failure)]
    _print(columns, [result for result in results if not isinstance(result, Failure)], failures, format)
    return 1 if failures else 0


def _print(
    columns: Sequence[str], predictions: Sequence[Prediction | Detected], failures: Sequence[Failure], format: str
) -> None:
    if format == "json":
        content = {"predictions": [asdict(p) for p in predictions], "failures": [asdict(f) for f in failures]}
        print(json.dumps(content, indent=1, allow_nan=False))
    else:
        Table(columns, [prediction.cells() for prediction in predictions]).print()
    predicted = {result.image for result in predictions}
    for failure in failures:
        kind = "" if failure.image in predicted else "broken image: "
        terminal.say(f"{kind}{failure.error}")


def load_task(ckpt: Path) -> Task:
    """Loads a checkpoint for prediction.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is not a checkpoint of ``awconv fit``.
    """
    kind = DetectionTask if "detector" in read_checkpoint(ckpt)["hyper_parameters"] else ClassificationTask
    try:
        task: Task = kind.load_from_checkpoint(ckpt, map_location="cpu", weights_only=True)
    except Exception as error:  # a checkpoint of any other network fails in ways of its own
        raise ValueError(f"{ckpt} cannot be used, or is not a checkpoint of 'awconv fit': {error}") from error
    return task.ready()


def classify(
    task: ClassificationTask, files: Sequence[Path], batch_size: int, max_pixels: int = MAX_PIXELS
) -> Iterator[Prediction | Failure]:
    """One result for each file, in their order within a batch; broken ones come first.

    Args:
        task: in evaluation mode.
        files: image files.
        batch_size: images that go through the network at once.
        max_pixels: the most that an image may have.

    Raises:
        ValueError: the network's outputs are not finite, or a batch takes too much memory.
    """
    channels, size, _ = task.input_size
    check_batch(min(batch_size, len(files)), channels, size)
    for start in range(0, len(files), batch_size):
        names, batch = [], []
        for file in files[start : start + batch_size]:
            try:
                image = read_image(str(file), str(file), max_pixels=max_pixels)
                batch.append(to_uint8(image, channels, size, task.crop_pct))
                names.append(str(file))
            except BrokenImageError as error:
                yield Failure(str(file), str(error))
        if not batch:
            continue
        with torch.inference_mode():
            logits = task(torch.stack(batch).to(task.device))
        _check_finite(logits, names)
        probabilities, labels = logits.softmax(1).max(1)
        for name, label, probability in zip(names, labels.tolist(), probabilities.tolist(), strict=True):
            yield Prediction(name, task.classes[label], probability)


def detect(
    task: DetectionTask,
    files: Sequence[Path],
    threshold: float,
    draw: Path | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Detected | Failure]:
    """One result for each file.

    Args:
        task: in evaluation mode.
        files: image files.
        threshold: the least score of an object.
        draw: a folder for copies with boxes, as PNG; None draws nothing.
        max_pixels: the most that an image may have.

    Raises:
        ValueError: the network's outputs are not finite, or a copy cannot be written or would overwrite another file.
    """
    copies = {} if draw is None else _copies(files, draw)
    clear_old({copy.parent for copy in copies.values()})
    limited: Any = getattr(task.network, "roi_heads", task.network)  # a Faster R-CNN's last part, or an SSD
    limited.score_thresh = min(limited.score_thresh, threshold)
    for file in files:
        try:
            image = _read_colours(file, max_pixels)
            with torch.inference_mode():
                (found,) = task([image.to(task.device)])
        except BrokenImageError as error:
            yield Failure(str(file), str(error))
            continue
        except NarrowImageError as error:
            yield Failure(str(file), f"{file}: {error}")
            continue
        for name in ("boxes", "scores"):
            _check_finite(found[name], [str(file)] * len(found[name]))
        kept = found["scores"] >= threshold
        boxes, labels, scores = (found[name][kept].cpu() for name in ("boxes", "labels", "scores"))
        detections = [
            Detection(task.classes[label - 1], score, (left, top, right, bottom))
            for (left, top, right, bottom), label, score in zip(
                boxes.tolist(), labels.tolist(), scores.tolist(), strict=True
            )
        ]
        yield Detected(str(file), detections)
        if draw is not None:
            try:
                _write_copy(_drawn(image, detections), copies[file])
            except OSError as error:
                yield Failure(str(file), f"{file}: its copy {copies[file]} cannot be written: {error.strerror}")


def _read_colours(file: Path, max_pixels: int) -> Tensor:
    """An image as uint8, shape (3, H, W). Pillow's own, which is larger, is not kept."""
    image = read_image(str(file), str(file), max_pixels=max_pixels)
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


_SOFTWARE = "awconv predict --draw"  # in a copy's PNG, by which a later run knows it


def _copies(files: Sequence[Path], draw: Path) -> dict[Path, Path]:
    """The path of each file's copy. Below ``draw`` they keep the files' folders, so that no two are the same.

    Raises:
        ValueError: a copy cannot be written there, or would overwrite something else than a copy of an earlier run.
    """
    way_out = "give draw another folder"
    try:
        draw.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"draw must be a folder, and {draw} cannot be made one: {error.strerror}") from error
    if not os.access(draw, os.W_OK | os.X_OK):
        raise ValueError(f"nothing can be written into {draw}; {way_out}")
    resolved = {file: _real(file) for file in files}
    top = Path(os.path.commonpath([str(file.parent) for file in resolved.values()]))
    inputs = {file: name for name, file in resolved.items()}
    copies: dict[Path, Path] = {}
    for file, real in resolved.items():
        name = real.relative_to(top)
        copy = draw / name.with_name(f"{name.name}.png")
        if (over := inputs.get(_real(copy))) is not None:
            raise ValueError(f"the copy of {file} would be written over {over}; {way_out}")
        links = [one for one in (copy, *copy.parents) if draw in one.parents and os.path.islink(one)]
        if links:
            raise ValueError(f"the copy of {file} would be written through the link {links[0]}; {way_out}")
        if os.path.exists(copy) and not _is_copy(copy):
            raise ValueError(f"{copy} is there and no copy of a former 'awconv predict --draw'; {way_out}")
        copies[file] = copy
    return copies


def _is_copy(path: Path) -> bool:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info.get("Software") == _SOFTWARE
    except (OSError, ValueError, SyntaxError):
        return False


def _write_copy(image: Image.Image, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    notes = PngInfo()
    notes.add_text("Software", _SOFTWARE)
    with replacing(place) as file:
        image.save(file, "PNG", pnginfo=notes)


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


def _real(path: Path) -> Path:
    """The path without links. A loop of links, at which ``Path.resolve`` fails, stays as it is."""
    return Path(os.path.realpath(path))


def _files(images: Sequence[Path], draw: Path | None = None) -> list[Path]:
    """The given files and the image files in the given folders, each once, without copies in ``draw``."""
    found: dict[Path, Path] = {}
    for given in images:
        path = Path(os.path.expanduser(given))
        if path.is_dir():
            inside = sorted(file for file in map(Path, walk(path)) if file.suffix.lower() in ENDINGS and file.is_file())
            if draw is not None:
                inside = [file for file in inside if _real(draw) not in _real(file).parents or not _is_copy(file)]
            if not inside:
                raise FileNotFoundError(f"folder {path} holds no image file ({', '.join(sorted(ENDINGS))})")
        elif path.is_file():
            inside = [path]
        else:
            raise FileNotFoundError(f"{path} is neither an image file nor a folder")
        for file in inside:
            found.setdefault(_real(file.parent) / file.name, file)
    return list(found.values())
