"""Runs an exported file like a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from awconv.export.detector import DIVISOR, fitted, resized_size
from awconv.export.metadata import Metadata
from awconv.export.onnx_format import OnnxFile
from awconv.export.openvino_format import OpenVinoFile
from awconv.export.pt2_format import Pt2File

Array = np.ndarray[Any, Any]
FORMATS: dict[str, Callable[[Path], Any]] = {".onnx": OnnxFile, ".xml": OpenVinoFile, ".pt2": Pt2File}


def network_input(metadata: Metadata, images: Tensor) -> Array:
    """What an exported classifier takes, for images as uint8, shape (N, channels, H, W)."""
    if metadata.uint8:
        return images.numpy()
    mean, std = (255 * torch.tensor(values)[:, None, None] for values in (metadata.mean, metadata.std))
    normalised: Array = ((images - mean) / std).numpy()
    return normalised


class ExportedClassifier:
    """An exported classifier, with what a prediction needs of a task.

    Args:
        runs: the file in its runtime.

    Attributes:
        classes: the names of its classes, by index.
        input_size: channels, height and width of its images.
        crop_pct: share of an image's shorter side that is seen.
        interpolation: how images are resized.
        device: of its input and output.
        nodes: the number of operations; None for a compiled network.
    """

    device = torch.device("cpu")

    def __init__(self, runs: Any) -> None:
        self._runs: Callable[[Array], list[Array]] = runs
        self.metadata: Metadata = runs.metadata
        self.nodes: int | None = runs.nodes
        self.classes = list(self.metadata.classes)
        self.input_size = list(self.metadata.input_size)
        self.crop_pct, self.interpolation = self.metadata.crop_pct, self.metadata.interpolation

    def __call__(self, images: Tensor) -> Tensor:
        """Images, uint8 of shape (N, channels, H, W), to logits, shape (N, classes).

        A network for batches of one size gets such batches; the last one is filled up.

        Raises:
            ValueError: the file gives something else than its metadata say.
        """
        size = self.metadata.batch or len(images)
        logits = [self._logits(images[start : start + size], size) for start in range(0, len(images), size)]
        return torch.cat(logits)

    def _logits(self, images: Tensor, size: int) -> Tensor:
        full = (
            images if len(images) == size else torch.cat([images, images[-1:].expand(size - len(images), -1, -1, -1)])
        )
        outputs = self._runs(network_input(self.metadata, full))
        expected = (size, len(self.classes))
        if len(outputs) != 1 or outputs[0].shape != expected:
            raise ValueError(
                f"the file's network must give logits of shape {expected}, got {[output.shape for output in outputs]}"
            )
        return torch.from_numpy(outputs[0])[: len(images)]

    def resize(self, image_size: int) -> None:
        """Takes images of another size from now on.

        Raises:
            ValueError: it was exported for one size.
        """
        if image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {image_size}")
        _, height, width = self.input_size
        if not self.metadata.dynamic_size and (height, width) != (image_size, image_size):
            raise ValueError(
                f"image_size must be {height}, got {image_size}: the network was exported for one size; awconv export "
                "--size=dynamic exports it for any"
            )
        self.input_size = [self.input_size[0], image_size, image_size]


class ExportedDetector:
    """An exported detector, with what a prediction needs of a task.

    Args:
        runs: the file in its runtime.

    Attributes:
        classes: the names of its classes, ``classes[label - 1]``.
        device: of its input and output.
        nodes: the number of operations; None for a compiled network.
    """

    device = torch.device("cpu")

    def __init__(self, runs: Any) -> None:
        self._runs: Callable[..., list[Array]] = runs
        self.metadata: Metadata = runs.metadata
        self.nodes: int | None = runs.nodes
        self.classes = list(self.metadata.classes)

    def inputs(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """What the network takes, for an image as uint8, shape (3, H, W): see :class:`DetectorGraph`.

        Raises:
            NarrowImageError: nothing would be left of the image.
        """
        known = self.metadata
        before = (image.shape[1], image.shape[2])
        canvas = known.input_size[1:]
        if known.stretched:
            size = canvas
        elif known.dynamic_size:
            size = resized_size(before, min(known.min_size / min(before), known.max_size / max(before)))
            canvas = (-(-size[0] // DIVISOR) * DIVISOR, -(-size[1] // DIVISOR) * DIVISOR)
        else:
            size = resized_size(before, min(canvas[0] / before[0], canvas[1] / before[1]))
        mean, std = (torch.tensor(values)[:, None, None] for values in (known.mean, known.std))
        normalised = image.float().div_(255).sub_(mean).div_(std)
        return fitted(normalised, size, canvas), torch.tensor(size, dtype=torch.float32)

    def __call__(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Images, uint8 of shape (3, H, W) and any sizes, to a dictionary for each: ``boxes`` (x1, y1, x2, y2 in its
        pixels), ``labels`` (from 1) and ``scores``, best first.

        Raises:
            NarrowImageError: nothing would be left of an image.
            ValueError: the file gives something else than its metadata say.
        """
        return [self._found(image) for image in images]

    def _found(self, image: Tensor) -> dict[str, Tensor]:
        batch, size = self.inputs(image)
        outputs = self._runs(batch.numpy(), size.numpy())
        if len(outputs) != 3 or outputs[0].shape != (len(outputs[1]), 4) or outputs[1].shape != outputs[2].shape:
            raise ValueError(
                f"the file's network must give boxes, scores and labels, got {[output.shape for output in outputs]}"
            )
        boxes, scores, labels = map(torch.from_numpy, outputs)
        if len(labels) and not 1 <= int(labels.min()) <= int(labels.max()) <= len(self.classes):
            raise ValueError(f"the file's network must give labels from 1 to {len(self.classes)}")
        scale = torch.tensor(image.shape[1:]) / size
        return dict(boxes=boxes * scale.flip(0).repeat(2), scores=scores, labels=labels)


def open_exported(file: Path) -> ExportedClassifier | ExportedDetector:
    """Opens a file of ``awconv export`` in its runtime, on the CPU.

    Raises:
        FileNotFoundError: it is not there.
        ModuleNotFoundError: the extra with its runtime is not installed.
        ValueError: it is broken, or something else.
    """
    file = Path(os.path.expanduser(file))
    if file.suffix not in FORMATS:
        raise ValueError(f"model must be a file of awconv export ({', '.join(FORMATS)}), got {file}")
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there: expected a file of awconv export")
    runs = FORMATS[file.suffix](file)
    return ExportedDetector(runs) if runs.metadata.kind == "detector" else ExportedClassifier(runs)
