"""Detections of an evaluation as a file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from awconv.tasks.detection import coco_results
from awconv.training.lock import PARTIAL


class DetectionFile(Callback):
    """Writes the detections of an evaluation in COCO's result format.

    Args:
        file: where to; None writes nothing.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = None if file is None else file.expanduser()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Makes the folder, before an evaluation that could not be kept."""
        if self.file is not None and trainer.is_global_zero:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            if self.file.is_dir():
                raise ValueError(f"detections.file must be a file to write, and {self.file} is a folder")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, pl_module)

    def _write(self, trainer: pl.Trainer, task: Any) -> None:
        if self.file is not None and trainer.is_global_zero and not trainer.sanity_checking:
            partial = self.file.with_name(f"{self.file.name}{PARTIAL}")
            partial.write_text(json.dumps(coco_results(task.evaluation, task.category_ids), allow_nan=False) + "\n")
            os.replace(partial, self.file)
