"""Records the learning curve of a run while it is trained."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from awconv.compare.record import EpochRecord

Progress = Callable[[float, int], None]


def recorded(checkpoint: dict[str, Any]) -> list[EpochRecord]:
    """The learning curve in a checkpoint."""
    return [EpochRecord(**epoch) for epoch in checkpoint["callbacks"].get(Recorder.state_key, {}).get("epochs", [])]


class Recorder(pl.Callback):
    """Records the learning curve, also in checkpoints, and the duration of each epoch.

    Args:
        on_progress: called after each batch with the epochs done so far and the number of all epochs.

    Attributes:
        epochs: the learning curve.
        device: type of the device, such as ``"cuda"``.
        seconds: that all of the run has taken, before interruptions too.
    """

    state_key = "_Recorder"  # in checkpoints

    def __init__(self, on_progress: Progress) -> None:
        self.epochs: list[EpochRecord] = []
        self.device = "cpu"
        self._on_progress = on_progress
        self._made = time.perf_counter()
        self._before = 0.0  # seconds until the checkpoint that the run goes on from
        self._begun = 0.0
        self._seconds = 0.0  # in this epoch, and before an interruption of it
        self._losses: list[Tensor] = []
        self._score: float | None = None  # of an evaluation in this epoch

    @property
    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._made

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seconds, self._losses, self._score = 0.0, [], None
        self._begin(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.device = pl_module.device.type
        self._begin(pl_module)  # for the rest of an interrupted epoch, which does not start again

    def _begin(self, module: pl.LightningModule) -> None:
        _synchronize(module)
        self._begun = time.perf_counter() - self._seconds

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._losses.append(outputs["loss"].detach())
        batches = trainer.num_training_batches
        if batch_idx + 1 == batches:
            _synchronize(pl_module)
        self._seconds = time.perf_counter() - self._begun
        self._on_progress(trainer.current_epoch + (batch_idx + 1) / batches, trainer.max_epochs or 0)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        score = trainer.callback_metrics.get(f"val/{pl_module.score}")
        self._score = None if score is None else score.item()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        losses = torch.stack(self._losses).double()
        self.epochs.append(
            EpochRecord(
                train_loss=losses.mean().item() * trainer.accumulate_grad_batches,  # which Lightning divides by
                val_score=self._score,
                seconds=self._seconds,
            )
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "seconds": self._seconds,
            "all_seconds": self.seconds,
            "losses": [loss.item() for loss in self._losses],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs = [EpochRecord(**epoch) for epoch in state_dict["epochs"]]
        self._seconds = state_dict["seconds"]
        self._before = state_dict.get("all_seconds", 0.0)  # versions before did not measure it
        self._losses = [torch.tensor(loss) for loss in state_dict["losses"]]


def _synchronize(module: pl.LightningModule) -> None:
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
