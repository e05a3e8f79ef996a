"""Callbacks that watch a training: finite numbers, speed."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from awconv.models.pretrained import not_finite


class DivergedError(ValueError):
    """The loss or the weights became infinite or NaN."""


class FiniteTraining(pl.Callback):
    """Stops a training whose loss or weights became infinite or NaN, before they are written to a checkpoint.

    Losses on a GPU are read every ``log_every_n_steps`` steps, so that no step waits for it, and nothing more runs
    there. Weights and averaged weights are checked when they are written. A validation loss causes a warning only.
    """

    def __init__(self) -> None:
        self._unread: list[tuple[int, float, Tensor]] = []  # steps, their learning rates and losses
        self._infinite: set[str] = set()  # in the new network, such as a mask

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._infinite = set(not_finite(pl_module.state_dict(), {}))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss, step = outputs["loss"].detach(), trainer.fit_loop.epoch_loop.total_batch_idx
        self._unread.append((step, trainer.optimizers[0].param_groups[0]["lr"], loss))
        if loss.device.type == "cpu" or (step + 1) % _interval(trainer) == 0:
            self._look(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._look(trainer)
        broken = [name for name in not_finite(checkpoint["state_dict"], {}) if name not in self._infinite]
        if broken:
            raise DivergedError(
                f"weights became infinite or not a number by step {trainer.global_step}: {', '.join(broken[:3])}; "
                f"{_last_good(trainer)}. {_MEND}"
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loss = trainer.callback_metrics.get("val/loss")
        if loss is not None and not loss.isfinite():
            rank_zero_warn(f"the validation loss of epoch {trainer.current_epoch} is {loss.item()}")

    def _look(self, trainer: pl.Trainer) -> None:
        losses = torch.stack([loss for _, _, loss in self._unread]).tolist() if self._unread else []
        for (step, rate, _), loss in zip(self._unread, losses, strict=True):
            if not math.isfinite(loss):
                raise DivergedError(
                    f"the loss became infinite or not a number in step {step} (epoch {trainer.current_epoch}), at a "
                    f"learning rate of {rate:.6g}; {_last_good(trainer)}. {_MEND}"
                )
        self._unread.clear()


_MEND = "A lower model.lr, a longer model.warmup_epochs or trainer.gradient_clip_val=1 may help"


def newest_checkpoint(trainer: pl.Trainer) -> Path | None:
    """The newest checkpoint in the folders that a trainer writes to; None if there is none yet."""
    folders = {Path(path).parent for c in trainer.checkpoint_callbacks if (path := _path(c))}
    written = [path for folder in folders if folder.is_dir() for path in folder.glob("*.ckpt")]
    return max(written, key=lambda path: path.stat().st_mtime_ns, default=None)


def _last_good(trainer: pl.Trainer) -> str:
    last = newest_checkpoint(trainer)
    return f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"


def _interval(trainer: pl.Trainer) -> int:
    steps: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it from outside
    return max(1, steps)


def _path(callback: Any) -> Any:
    return getattr(callback, "path", None) or getattr(callback, "best_model_path", None)


class EpochLosses(pl.Callback):
    """Logs the losses of an epoch, for the callbacks that come after this one."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.log_losses()


class Bar(RichProgressBar):
    """Lightning's bar, brought up to date a few times a second, not after each step and a hundred times a second."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=_LOOKS_A_SECOND)
        self._next = 0.0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        if now >= self._next or batch_idx + 1 == trainer.num_training_batches:
            self._next = now + 1 / _LOOKS_A_SECOND
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


_LOOKS_A_SECOND = 5


class Pace(pl.Callback):
    """Logs training images per second, over all processes, and shows the loss and the time left in the bar.

    The loss is that of one step. This happens every ``log_every_n_steps`` steps, or at the end of a shorter epoch: no
    other step waits for a GPU.

    Attributes:
        batches: trained by this call of ``fit``.
    """

    def __init__(self) -> None:
        self.batches = 0
        self._start = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start, self.batches = time.perf_counter(), 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches += 1
        interval, in_epoch = _interval(trainer), trainer.num_training_batches
        due = (batch_idx + 1) % interval == 0
        if trainer.progress_bar_callback is not None and (due or batch_idx + 1 == in_epoch < interval):
            loss = outputs["loss"].detach().cpu()  # on the CPU, where the bar reads it each step
            pl_module.log("loss", loss, prog_bar=True, logger=False)
        if not due:
            return
        seconds = time.perf_counter() - self._start  # with evaluation and checkpoints
        images = self.batches * len(batch[0]) * trainer.world_size
        pl_module.log("images_per_second", torch.tensor(images / seconds), prog_bar=True)
        batches = in_epoch * (trainer.max_epochs or 0)
        if trainer.max_steps > 0:
            batches = min(batches, trainer.max_steps * trainer.accumulate_grad_batches)
        left = (batches - trainer.fit_loop.epoch_loop.total_batch_idx - 1) * seconds / self.batches
        pl_module.log("minutes_left", torch.tensor(left / 60), prog_bar=True, logger=False)
