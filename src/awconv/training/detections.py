"""Detections of an evaluation as a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from awconv.tasks.detection import coco_results


class DetectionFile(Callback):
    """Writes the detections of an evaluation in COCO's result format.

    Args:
        file: where to; None writes nothing.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, pl_module)

    def _write(self, trainer: pl.Trainer, task: Any) -> None:
        if self.file is not None and trainer.is_global_zero and not trainer.sanity_checking:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(coco_results(task.evaluation, task.category_ids)) + "\n")
