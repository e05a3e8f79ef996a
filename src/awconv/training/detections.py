"""Detections of an evaluation as a file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from awconv.tasks.coco import coco_results
from awconv.training.partial import clear_old, replacing

_KEYS = {"image_id", "category_id", "bbox", "score"}
_HEAD = 4096  # bytes, of which the first detection takes a few hundred


class DetectionFile(Callback):
    """Writes the detections of an evaluation in COCO's result format.

    Args:
        file: the JSON file; None writes nothing. An existing file is replaced only if it holds detections.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = None if file is None else file.expanduser()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Makes the folder before the evaluation starts.

        Raises:
            ValueError: the path is a folder, or a file that does not hold detections.
        """
        if self.file is not None and trainer.is_global_zero:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            if self.file.is_dir():
                raise ValueError(f"detections.file must be a file to write, and {self.file} is a folder")
            if self.file.exists() and not _holds_detections(self.file):
                raise ValueError(
                    f"detections.file would be written over {self.file}, which holds no detections; name another file, "
                    "or remove this one"
                )
            clear_old([self.file.parent])

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, pl_module)

    def _write(self, trainer: pl.Trainer, task: Any) -> None:
        if self.file is not None and trainer.is_global_zero and not trainer.sanity_checking:
            content = json.dumps(coco_results(task.evaluation, task.category_ids), allow_nan=False)
            with replacing(self.file) as file:
                file.write(content.encode() + b"\n")


def _holds_detections(path: Path) -> bool:
    """Whether a file starts like a list of detections in COCO's format, or is an empty list."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD).decode(errors="replace").strip()
        if re.fullmatch(r"\[\s*\]", head):
            return True
        first, _ = json.JSONDecoder().raw_decode(head.removeprefix("[").lstrip())
    except (OSError, ValueError, RecursionError):
        return False
    return head.startswith("[") and isinstance(first, dict) and first.keys() >= _KEYS
