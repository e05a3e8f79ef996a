"""Checks while a network trains."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from awconv.training import TrainingCLI
from awconv.training.checkpoints import read_checkpoint
from awconv.training.watch import DivergedError

QUIET = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")


def fit(root: Path, *arguments: str) -> None:
    TrainingCLI(["fit", "--model.network=resnet8_cifar", f"--trainer.default_root_dir={root}", *QUIET, *arguments])


def test_a_diverged_training_stops_and_names_its_last_good_checkpoint(tmp_path: Path) -> None:
    # Without a warm-up the rate is 1e18 in the first step, and sums of squares of such weights overflow soon after.
    fit(tmp_path, "--trainer.max_epochs=1")
    (good,) = tmp_path.rglob("*.ckpt")
    with pytest.raises(
        DivergedError, match=r"in step [1-3] \(epoch 0\), at a learning rate of 1e\+18; there is no checkp"
    ):
        fit(
            tmp_path,
            "--model.lr=1e18",
            "--model.warmup_epochs=0",
            "--model.weight_decay=0",
            "--trainer.max_epochs=1000",
        )
    assert list(tmp_path.rglob("*.ckpt")) == [good]  # nothing was written of the broken weights
    message = r"in step 1[0-9] \(epoch 1\), at a learning rate of 1e\+18; the last good checkpoint is .*epoch=0-step=10"
    with pytest.raises(DivergedError, match=message):
        fit(
            tmp_path / "later",
            "--model.warmup_epochs=0",
            "--model.lr=0.01",
            "--model.decay_epochs=[1]",
            "--model.decay_rate=1e20",
        )
    (last,) = (tmp_path / "later").rglob("*.ckpt")
    assert all(tensor.isfinite().all() for tensor in read_checkpoint(last)["state_dict"].values())


def test_throughput_and_curves_are_logged(tmp_path: Path) -> None:
    fit(tmp_path, "--trainer.max_epochs=2", "--trainer.log_every_n_steps=5", "--recent_checkpoint.every_n_steps=4")
    (log,) = tmp_path.rglob("metrics.csv")
    rows = list(csv.DictReader(log.open()))
    rates = [float(row["images_per_second"]) for row in rows if row["images_per_second"]]
    assert len(rates) == 4
    assert all(rate > 0 for rate in rates)
    assert len([row for row in rows if row["val/accuracy"]]) == 2
    assert list(tmp_path.rglob("events.out.tfevents.*"))
    names = sorted(path.name for path in tmp_path.rglob("*.ckpt"))
    assert names == ["epoch=0-step=10.ckpt", "epoch=1-step=20.ckpt", "recent.ckpt"]


def test_the_schedules(tmp_path: Path) -> None:
    def rates(*arguments: str) -> list[float]:
        cli = TrainingCLI(
            ["--model.network=resnet8_cifar", "--model.lr=1", "--trainer.logger=false", *QUIET, *arguments]
            + [f"--trainer.default_root_dir={tmp_path}", "--trainer.limit_train_batches=4"],
            run=False,
            save_config=False,
        )
        cli.trainer.limit_val_batches = 0
        cli.trainer.strategy.connect(cli.model)
        cli.model.trainer = cli.trainer
        cli.trainer._data_connector.attach_data(cli.model, datamodule=cli.datamodule)
        schedule = cli.model.configure_optimizers()["lr_scheduler"]["scheduler"]
        found = []
        for _ in range(12):
            found.append(schedule.get_last_lr()[0])
            schedule.optimizer.step()
            schedule.step()
        return found

    steps = rates("--trainer.max_epochs=3", "--model.decay_epochs=[1, 2]", "--model.warmup_epochs=0.5")
    assert steps == pytest.approx([1 / 3, 2 / 3, 1, 1] + [0.1] * 4 + [0.01] * 4)
    reference = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(reference, 10)
    expected = [1 / 3, 2 / 3]
    for _ in range(10):
        expected.append(cosine.get_last_lr()[0])
        reference.step()
        cosine.step()
    assert rates("--trainer.max_epochs=3", "--model.warmup_epochs=0.5") == pytest.approx(expected)
