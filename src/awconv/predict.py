"""Classifying image files with a checkpoint."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from awconv import terminal
from awconv.data import BrokenImageError, to_uint8
from awconv.data.images import read_image
from awconv.tasks import ClassificationTask


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
    images: Sequence[Path], ckpt: Path, format: Literal["table", "json"] = "table", batch_size: int = 64
) -> int:
    """Prints the class and its probability for each image.

    A broken image is reported by name, and the rest goes on.

    Args:
        images: image files, and folders that are searched for them.
        ckpt: a checkpoint of ``awconv fit``, ``compare`` or ``demo``.
        format: a table, or JSON with ``predictions`` and ``failures``.
        batch_size: images that go through the network at once.

    Returns:
        The exit status: 0, or 1 if an image was broken.

    Raises:
        FileNotFoundError: the checkpoint or an image is not there, or a folder holds no image.
        ValueError: the file is no such checkpoint.
    """
    files = [file for path in images for file in _files(path)]
    results = list(classify(load_task(ckpt), files, batch_size))
    predictions = [result for result in results if isinstance(result, Prediction)]
    failures = [result for result in results if isinstance(result, Failure)]
    if format == "json":
        print(
            json.dumps(
                {"predictions": [asdict(p) for p in predictions], "failures": [asdict(f) for f in failures]}, indent=1
            )
        )
    else:
        table = Table("image", "class", box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("probability", justify="right")
        for prediction in predictions:
            table.add_row(escape(prediction.image), escape(prediction.label), f"{prediction.probability:.3f}")
        terminal.console().print(table)
    for failure in failures:
        print(f"broken image: {failure.error}", file=sys.stderr)
    return 1 if failures else 0


def load_task(ckpt: Path) -> ClassificationTask:
    """Loads a checkpoint of a classification for prediction.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is none.
    """
    if not ckpt.is_file():
        raise FileNotFoundError(f"checkpoint {ckpt} is not a file")
    try:
        task = ClassificationTask.load_from_checkpoint(ckpt, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of any other kind fails in ways of its own
        raise ValueError(f"{ckpt} is not a checkpoint of a classification by 'awconv fit': {error}") from error
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
                batch.append(to_uint8(read_image(str(file), str(file)), channels, size, task.crop_pct))
                names.append(str(file))
            except BrokenImageError as error:
                yield Failure(str(file), str(error))
        if not batch:
            continue
        with torch.inference_mode():
            probabilities, labels = task(torch.stack(batch).to(task.device)).softmax(1).max(1)
        for name, label, probability in zip(names, labels.tolist(), probabilities.tolist(), strict=True):
            yield Prediction(name, task.classes[label], probability)


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
