"""What a training prints, and which folders it leaves."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from awconv.cli import main
from awconv.training.quiet import without_noise
from awconv.training.watch import Pace

FIT = ("fit", "--model.network=aw_resnet8_cifar", "--trainer.limit_train_batches=2")
CHECKPOINT = "lightning_logs/version_0/checkpoints/epoch=1-step=4.ckpt"
NEXT = [
    f"  awconv test --config=lightning_logs/version_0/awconv_fit.yaml --ckpt_path={CHECKPOINT}",
    f"  awconv predict --ckpt={CHECKPOINT} IMAGES",
    f"  awconv publish {CHECKPOINT} --tag=NAME --data='the training images, in words'",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder in which a process trained, and what the process printed."""
    folder = tmp_path_factory.mktemp("trained")
    command = [sys.executable, "-m", "awconv", *FIT, "--trainer.max_epochs=2"]
    return folder, subprocess.run(command, cwd=folder, capture_output=True, text=True)


def folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("lightning_logs/*"))


def test_a_training_says_what_it_trains_where_the_checkpoint_is_and_what_comes_next(
    trained: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    _, process = trained
    assert process.returncode == 0
    assert process.stderr.splitlines() == [
        "awconv fit: aw_resnet8_cifar, 83,178 parameters",
        f"awconv fit: trained; the checkpoint is {CHECKPOINT}",
        *NEXT,
    ]
    assert "loss:" in process.stdout.replace("train/loss:", "")
    assert "FLOPs" not in process.stdout


def test_the_commands_that_come_next_run_as_they_are_and_leave_no_logs(
    trained: tuple[Path, subprocess.CompletedProcess[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, process = trained
    monkeypatch.chdir(folder)
    test, predict, publish = (shlex.split(line)[1:] for line in process.stderr.splitlines() if line.startswith("  "))
    assert main(test) == 0
    assert "test/accuracy" in capsys.readouterr().out
    assert folders(folder) == ["version_0"]
    assert main([*predict[:-1], "none.png"]) == 1  # which takes the checkpoint
    assert "none.png is neither an image file nor a folder" in capsys.readouterr().err
    assert main(publish) == 0
    assert "in weights/aw_resnet8_cifar.NAME" in capsys.readouterr().out


def test_a_finished_training_says_so_and_leaves_no_second_folder(
    trained: tuple[Path, subprocess.CompletedProcess[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = trained
    monkeypatch.chdir(folder)
    threads = torch.get_num_threads()
    assert main([*FIT, "--trainer.max_epochs=2", "--ckpt_path=last"]) == 0
    torch.set_num_threads(threads)  # it has taken those of the checkpoint
    printed = capsys.readouterr().err.splitlines()
    assert printed[-4:] == [f"awconv fit: there was nothing left to train; the checkpoint is {CHECKPOINT}", *NEXT]
    assert folders(folder) == ["version_0"]


def test_a_stopped_training_says_where_its_checkpoint_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(self: Pace, trainer: pl.Trainer, *_: object) -> None:
        if trainer.current_epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Pace, "on_train_epoch_start", stop, raising=False)
    monkeypatch.chdir(tmp_path)
    assert main([*FIT, "--trainer.max_epochs=3"]) == 128 + signal.SIGTERM
    recent = "lightning_logs/version_0/checkpoints/recent.ckpt"
    assert capsys.readouterr().err.splitlines()[1:] == [
        f"awconv fit: stopped; the checkpoint is {recent}",
        *(line.replace(CHECKPOINT, recent) for line in NEXT),
        "awconv fit: stopped by SIGTERM; the same command with --ckpt_path=last goes on",
    ]


def test_paths_with_spaces_are_quoted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "a b"
    assert main([*FIT, "--trainer.max_epochs=1", f"--trainer.default_root_dir={root}"]) == 0
    last = root / "lightning_logs" / "version_0" / "checkpoints" / "epoch=0-step=2.ckpt"
    assert capsys.readouterr().err.splitlines()[-2] == f"  awconv predict --ckpt='{last}' IMAGES"


def test_a_training_that_fails_before_its_first_step_leaves_nothing(tmp_path: Path) -> None:
    arguments = [*FIT, "--model.pretrained=none.pth", f"--trainer.default_root_dir={tmp_path}"]
    assert main(arguments) == 1
    assert list(tmp_path.iterdir()) == []
    earlier = tmp_path / "lightning_logs" / "version_0" / "metrics.csv"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("somebody's")
    assert main(arguments) == 1
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [earlier]


def test_an_evaluation_logs_where_it_is_asked_to(
    trained: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    arguments = [f"--ckpt_path={trained[0] / CHECKPOINT}", f"--trainer.default_root_dir={tmp_path}"]
    assert main(["validate", *arguments]) == 0
    assert folders(tmp_path) == []
    assert main(["validate", *arguments, "--trainer.logger=true"]) == 0
    assert folders(tmp_path) == ["version_0"]


def test_only_what_says_nothing_is_left_out_and_only_inside_commands() -> None:
    noise = "The 'val_dataloader' does not have many workers which may be a bottleneck"
    handler = logging.Handler()
    logging.getLogger("lightning.pytorch").addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with without_noise():
                warnings.warn(noise, stacklevel=1)
                warnings.warn("the validation loss of epoch 0 is nan", stacklevel=1)
                said = [
                    text
                    for text in ("GPU available: False, used: False", "GPU available: True (cuda), used: True")
                    if handler.filter(logging.makeLogRecord({"msg": text}))
                ]
            warnings.warn(noise, stacklevel=1)
    finally:
        logging.getLogger("lightning.pytorch").removeHandler(handler)
    assert said == ["GPU available: True (cuda), used: True"]
    assert [str(one.message) for one in caught] == ["the validation loss of epoch 0 is nan", noise]
    assert handler.filters == []
