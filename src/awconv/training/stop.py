"""Stops on SIGTERM, or on SLURM's notice: soon, in all processes at the same step, with a checkpoint and without a
traceback."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import distributed

from awconv.training.notice import NoticeError, on_notice
from awconv.training.processes import Processes

STATUS = 128 + signal.SIGTERM
_SECONDS = 8.0  # within which all ends well; schedulers kill after 10 seconds and more
_ASKED, _NOTICED, _RECEIVED = 1, 2, 3  # what processes tell each other
_WRITING_SECONDS = 60.0  # more, for a checkpoint that is being written


def ends_step(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether the optimizer made a step after this training batch."""
    last: bool = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
    return last or (batch_idx + 1) % trainer.accumulate_grad_batches == 0


class StopOnSigterm(pl.Callback):
    """On SIGTERM, ends a training after the current step, and an evaluation at once.

    Several processes agree on a step. Whatever takes longer than 8 seconds is cut off; the last checkpoint remains. In
    a job of SLURM, the notice that its time is nearly over ends a training likewise, without haste.

    Args:
        processes: those that train together.

    Attributes:
        agreed: whether all processes know that this is their last step.
        asked: whether somebody else than a signal has asked for the end, in any process.
        noticed: whether a notice came, in any process.
        received: whether SIGTERM came.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self.agreed = False
        self.asked = False
        self.noticed = False
        self.received = False
        self._reason = 0
        self._over = threading.Event()
        self._trainer: pl.Trainer | None = None
        self._group: Any = None

    def ask(self) -> None:
        """Ends the training after the current step, as SIGTERM does, but lets it take its time."""
        self.asked = True

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment):
            environment.auto_requeue = False  # Lightning's own checkpoint would win over all later ones
        if stage == TrainerFn.FITTING:
            on_notice(self._notice)

    def _notice(self) -> None:
        self.noticed = True

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._listen(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._listen(trainer)
        if trainer.world_size > 1:  # on CPUs: a device need not be waited for
            self._group = self._processes.new_group()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._listen(trainer)
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:  # else the epoch's checkpoint comes after it
            self._end_if_agreed()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._listen(trainer)

    def on_test_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self._end_if_noticed()

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.state.fn != TrainerFn.FITTING:  # else the epoch's checkpoint comes after it
            self._end_if_noticed()

    def _end_if_noticed(self) -> None:
        """Ends an evaluation that follows a training."""
        if self.noticed:
            raise NoticeError

    def _listen(self, trainer: pl.Trainer) -> None:
        """Replaces Lightning's handler of SIGTERM, which waits for other processes."""
        self._trainer = trainer
        if threading.current_thread() is threading.main_thread():  # which alone may handle signals
            signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            return
        self.received = True
        assert self._trainer is not None
        launcher = self._trainer.strategy.launcher
        if launcher is not None and hasattr(launcher, "kill"):
            launcher.kill(number)  # hands it on to the processes that this one has started
        threading.Thread(target=self._end_in_time, daemon=True).start()
        if self._trainer.sanity_checking or self._trainer.state.fn != TrainerFn.FITTING:
            raise SIGTERMException  # there is nothing to keep

    def _end_in_time(self) -> None:
        if self._over.wait(_SECONDS):
            return
        assert self._trainer is not None
        until = time.monotonic() + _WRITING_SECONDS
        while getattr(self._trainer.strategy.checkpoint_io, "writing", False) and time.monotonic() < until:
            time.sleep(0.1)
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            print("awconv: stopped by SIGTERM within a step; the last checkpoint remains", file=sys.stderr, flush=True)
        os._exit(STATUS)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not ends_step(trainer, batch_idx):
            return  # only a step of the optimizer brings all processes to the same place
        reason = _RECEIVED if self.received else _NOTICED if self.noticed else int(self.asked)
        if trainer.world_size > 1:
            reasons = torch.tensor(reason)
            distributed.all_reduce(reasons, distributed.ReduceOp.MAX, group=self._group)
            reason = int(reasons)
        self.agreed, self._reason = reason > 0, reason
        self.asked |= reason == _ASKED
        self.noticed |= reason == _NOTICED

    # The callbacks that write checkpoints are called after this one, and so the training ends in the next hook.
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._end_if_agreed()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end_if_agreed()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end_if_agreed()

    def _end_if_agreed(self) -> None:
        if self.agreed:
            raise NoticeError if self._reason == _NOTICED else SIGTERMException

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._over.set()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._over.set()
