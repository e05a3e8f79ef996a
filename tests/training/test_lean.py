"""What is left out of a step."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.profilers import SimpleProfiler

from awconv.training import TrainingCLI
from awconv.training.watch import Bar

HOOKS = ("on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward")


def built(root: Path, *arguments: str) -> TrainingCLI:
    return TrainingCLI(
        [
            "--model.network=resnet8_cifar",
            "--trainer.max_steps=7",
            "--trainer.accelerator=cpu",
            "--trainer.logger=false",
            "--trainer.limit_val_batches=0",
            f"--trainer.default_root_dir={root}",
            *arguments,
        ],
        run=False,
        save_config=False,
    )


class Counting(pl.Callback):
    """Overrides one hook, and gets another one for itself."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.on_after_backward = lambda *_: self.calls.append("after")  # type: ignore[method-assign]

    def on_before_zero_grad(self, *_: Any) -> None:
        self.calls.append("zero")


def test_hooks_are_called_where_there_are_some_and_skipped_where_there_are_none(tmp_path: Path) -> None:
    cli, counting = built(tmp_path, "--trainer.enable_progress_bar=false"), Counting()
    cli.trainer.callbacks.append(counting)  # type: ignore[attr-defined]
    cli.model.on_before_backward = lambda *_: counting.calls.append("module")  # type: ignore[method-assign]
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert counting.calls == ["zero", "module", "after"] * 7
    assert [hook for hook in HOOKS if getattr(counting, hook) is None] == ["on_train_batch_start", "on_before_backward"]
    cli.trainer.fit_loop.epoch_loop.max_steps = 9
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)  # again, by the same objects
    assert counting.calls == ["zero", "module", "after"] * 9


def test_the_bar_is_brought_up_to_date_some_times_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    updates: list[int] = []
    monkeypatch.setattr(RichProgressBar, "on_train_batch_end", lambda *arguments: updates.append(arguments[-1]))
    now = iter(range(100))
    clock = SimpleNamespace(monotonic=lambda: 0.11 * next(now), perf_counter=time.perf_counter)
    monkeypatch.setattr("awconv.training.watch.time", clock)
    cli = built(tmp_path, "--trainer.limit_train_batches=6")
    assert any(isinstance(callback, Bar) for callback in cli.trainer.callbacks)  # type: ignore[attr-defined]
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert updates == [0, 2, 4, 5]  # every second step, after 0.22 seconds; and the epoch's last


def test_a_bar_and_a_profiler_of_the_users_are_kept(tmp_path: Path) -> None:
    cli = built(
        tmp_path, "--trainer.callbacks+=TQDMProgressBar", "--trainer.profiler=simple", "--trainer.limit_train_batches=2"
    )
    assert type(cli.trainer.progress_bar_callback) is TQDMProgressBar
    assert isinstance(cli.trainer.profiler, SimpleProfiler)  # type: ignore[attr-defined]


class Losses(pl.Callback):
    """Reads the epoch's loss as users do."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.read: list[tuple[float, float]] = []

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.steps.append(arguments[2]["loss"].item())

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.read.append((trainer.callback_metrics["train/loss"].item(), sum(self.steps) / len(self.steps)))
        self.steps = []


def test_callbacks_of_users_find_the_loss_of_the_epoch_that_ends(tmp_path: Path) -> None:
    cli = built(
        tmp_path,
        "--trainer.enable_progress_bar=false",
        "--trainer.limit_train_batches=3",
        "--trainer.callbacks+=tests.training.test_lean.Losses",
    )
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    (losses,) = (one for one in cli.trainer.callbacks if isinstance(one, Losses))  # type: ignore[attr-defined]
    assert [found for found, _ in losses.read] == pytest.approx([mean for _, mean in losses.read], rel=1e-6)
    assert len(losses.read) == 3  # of 3, 3 and 1 steps
