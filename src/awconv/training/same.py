"""What keeps a training that goes on the same: its settings, and the number of its threads."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn

from awconv.roles import Role
from awconv.training.checkpoints import check_parts
from awconv.training.settings import Settings

_MOST_THREADS = 4096


class SameThreads(pl.Callback):
    """Keeps the number of threads in checkpoints, and goes on with as many: sums of more parts round otherwise.

    Attributes:
        threads: that this training computes with.
    """

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()

    def state_dict(self) -> dict[str, Any]:
        return {"threads": self.threads}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Takes the number of the training that goes on.

        Raises:
            ValueError: no machine has as many.
        """
        there = checkpoint["callbacks"].get(self.state_key)
        if trainer.state.fn == TrainerFn.FITTING and there is not None:
            threads = there["threads"]
            if not 1 <= threads <= _MOST_THREADS:
                raise ValueError(f"the checkpoint's number of threads must be from 1 to {_MOST_THREADS}, got {threads}")
            torch.set_num_threads(threads)
            self.threads = threads


class SameSettings(pl.Callback):
    """Keeps the settings in checkpoints, and refuses to go on from one of other settings.

    A training may become longer or shorter, and be logged or stopped in another way.

    Args:
        settings: of this training.

    Attributes:
        restoring: the training or evaluation is being set up, from a checkpoint where there is one, or makes its first
            step, which is the first to look into the state of an optimizer.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.restoring = False
        self._begun = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.restoring = True

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.restoring &= bool(trainer.sanity_checking)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.restoring = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begun = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self._begun:
            self.restoring = False

    def state_dict(self) -> dict[str, Any]:
        return {"settings": self.settings.deciding(Role.RESULT)}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Compares, where a training goes on.

        Raises:
            ValueError: a setting differs that the weights or the rest of the steps depend on.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        check_parts(checkpoint, trainer)
        there = checkpoint["callbacks"].get(self.state_key)
        if there is None:
            return
        differing = self.settings.differences(there["settings"], Role.STEPS)
        if differing:
            raise ValueError(
                f"the checkpoint is of a training with other settings: {'; '.join(differing[:3])}. Give those that it "
                "was trained with, or leave out --ckpt_path to start anew"
            )
