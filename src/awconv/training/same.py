"""Callbacks that make a resumed training equal to an uninterrupted one: same settings, same threads."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn

from awconv.roles import Role
from awconv.terminal import say
from awconv.training.checkpoints import check_parts
from awconv.training.settings import Settings

_MOST_THREADS = 4096
_OF_A_BATCH = ("data.init_args.batch_size", "trainer.devices", "trainer.num_nodes")  # which may vary together


class SameThreads(pl.Callback):
    """Stores the number of threads in checkpoints and restores it: another number rounds sums differently.

    Attributes:
        threads: number of threads of this training.
    """

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()

    def state_dict(self) -> dict[str, Any]:
        return {"threads": self.threads}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Sets the checkpoint's number of threads.

        Raises:
            ValueError: the number is out of range.
        """
        there = checkpoint["callbacks"].get(self.state_key)
        if trainer.state.fn == TrainerFn.FITTING and there is not None:
            threads = there["threads"]
            if not 1 <= threads <= _MOST_THREADS:
                raise ValueError(f"the checkpoint's number of threads must be from 1 to {_MOST_THREADS}, got {threads}")
            torch.set_num_threads(threads)
            self.threads = threads


class SameSettings(pl.Callback):
    """Stores the settings in checkpoints, and refuses to resume with settings that change the steps.

    Length, logs and the way to stop may change, and the number of processes if their batches together stay as large.

    Args:
        settings: of this training.

    Attributes:
        restoring: true until the end of the first step, which is the first to use an optimizer's restored state.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.restoring = False
        self._begun = 0
        self._batch: dict[str, int] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.restoring = True
        # With max_steps, Lightning goes on from the end of an epoch as from within it, and skips the next one.
        trainer.fit_loop._iteration_based_training = lambda: False  # type: ignore[method-assign]
        images: int = trainer.datamodule.batch_size  # type: ignore[attr-defined]
        self._batch = {"processes": trainer.world_size, "images": images}

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
        return {"settings": self.settings.deciding(Role.RESULT), "batch": self._batch}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Compares the settings when a training resumes.

        Raises:
            ValueError: a setting differs that decides the steps.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        check_parts(checkpoint, trainer)
        there = checkpoint["callbacks"].get(self.state_key)
        if there is None:
            return
        before = self.settings.of_checkpoint(there["settings"], checkpoint["hyper_parameters"])
        differing = self.settings.differences(before, Role.STEPS)
        if "batch" in there:  # of a newer version
            differing = [text for text in differing if text.split(" is ")[0] not in _OF_A_BATCH]
            differing += self._other_batch(there["batch"], trainer.is_global_zero)
        if differing:
            raise ValueError(
                f"the checkpoint is of a training with other settings: {'; '.join(differing[:3])}. Give those that it "
                "was trained with, or leave out --ckpt_path to start anew"
            )

    def _other_batch(self, there: Any, first: bool) -> list[str]:
        """How the batch of all processes differs from a checkpoint's, in words. Says so if only their number does."""
        processes, images = self._batch["processes"], self._batch["images"]
        before, each = (there.get(name) if isinstance(there, dict) else None for name in ("processes", "images"))
        if not isinstance(before, int) or not isinstance(each, int) or min(before, each) < 1:
            raise ValueError(f"the checkpoint's batch must be of some processes and images, got {there}")
        if processes * images != before * each:
            fitting, rest = divmod(before * each, processes)
            mend = "take as many processes" if rest else f"--data.batch_size={fitting} keeps the batch"
            return [f"{before} processes had batches of {each} images there, {processes} have {images} now ({mend})"]
        if processes != before and first:
            go_on = "1 process goes" if processes == 1 else f"{processes} processes go"
            say(
                f"awconv fit: {go_on} on in place of {before}, with the same batches; rounding, the images that "
                "BatchNorm sees together, and what mixup, erasing and dropout draw differ from here on"
            )
        return []
