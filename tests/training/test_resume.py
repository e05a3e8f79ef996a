"""Interruptions: after any stop, the same command with --ckpt_path=last ends with the same weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from awconv.training import TrainingCLI
from awconv.training.checkpoints import AtomicCheckpointIO, find_last, read_checkpoint

# Everything that draws random numbers: order, crops, flips, erasing, mixup, dropout. 9 batches an epoch, of which three
# make a step.
ARGUMENTS = (
    "--data.batch_size=144",
    "--data.horizontal_flip=true",
    "--model.network=aw_resnet8_cifar",
    "--model.network_args={drop_rate: 0.3}",
    "--model.mixup={mixup_alpha: 0.2, cutmix_alpha: 1.0}",
    "--model.erasing=0.25",
    "--model.ema_decay=0.9",
    "--trainer.max_epochs=3",
    "--trainer.accumulate_grad_batches=3",
    "--trainer.gradient_clip_val=1.0",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--recent_checkpoint.every_n_steps=1",
)


class StopError(Exception):
    pass


class Interrupt(pl.Callback):
    """Stops a training without a warning after some batches."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.after:
            raise StopError


def train(root: Path, *arguments: str) -> dict[str, Tensor]:
    """The weights of the last checkpoint after a training."""
    TrainingCLI(["fit", *ARGUMENTS, f"--trainer.default_root_dir={root}", *arguments])
    return final_weights(root)


def final_weights(root: Path) -> dict[str, Tensor]:
    last = find_last(root)
    assert last is not None
    checkpoint = read_checkpoint(last)
    assert checkpoint["epoch"] == 2
    return checkpoint["state_dict"]


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name  # bit for bit: the computation is the same


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return train(tmp_path_factory.mktemp("uninterrupted"))


# After 11 batches, the last checkpoint is that of the first epoch's end, from which Lightning itself skips an epoch if
# max_steps is given; after 17 one within the second; after 18 one within the second, with the epoch's own still
# unwritten; after 22, gradients of one batch of three are lost.
@pytest.mark.parametrize("after", [11, 17, 18, 22])
def test_a_stopped_training_ends_as_an_uninterrupted_one(
    after: int, uninterrupted: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TrainingCLI.instantiate_trainer

    def with_interrupt(self: TrainingCLI, **kwargs: Any) -> pl.Trainer:
        trainer = original(self, **kwargs)
        trainer.callbacks.append(Interrupt(after))  # type: ignore[attr-defined]
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(TrainingCLI, "instantiate_trainer", with_interrupt)
        with pytest.raises(StopError):
            train(tmp_path)
    of_this_length = ["--trainer.max_steps=9"] if after == 11 else []
    assert_equal(train(tmp_path, "--ckpt_path=last", *of_this_length), uninterrupted)


@pytest.mark.campaign  # half a minute; test_stop.py and the tests above interrupt trainings of this process
def test_signals_lose_nothing(uninterrupted: dict[str, Tensor], tmp_path: Path) -> None:
    """kill -9 as soon as there is a checkpoint, SIGTERM in the resumed training, and the rest."""
    command = [sys.executable, "-m", "awconv", "fit", *ARGUMENTS, f"--trainer.default_root_dir={tmp_path}"]
    command.append("--ckpt_path=last")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as in the tests' own process: sums depend on the threads
    outputs = []
    for number in (signal.SIGKILL, signal.SIGTERM):
        before = set(tmp_path.rglob("*.ckpt"))
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and set(tmp_path.rglob("*.ckpt")) <= before:
            time.sleep(0.005)
        process.send_signal(number)
        outputs.append(process.communicate(timeout=120)[1])
        assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 128 + signal.SIGTERM)
    assert "there is no checkpoint under" in outputs[0]
    assert "going on from" in outputs[1]
    assert "stopped by SIGTERM" in outputs[1]
    assert "--ckpt_path=last" in outputs[1]
    finished = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert "going on from" in finished.stderr
    assert_equal(final_weights(tmp_path), uninterrupted)


def test_a_broken_last_checkpoint_is_named_and_the_one_before_it_used(
    uninterrupted: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = train(tmp_path)
    last = find_last(tmp_path)
    assert last is not None
    content = last.read_bytes()
    last.write_bytes(content[: len(content) // 2])
    assert_equal(train(tmp_path, "--ckpt_path=last"), expected)
    assert f"checkpoint {last} is broken" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"checkpoint .*ckpt is broken"):
        TrainingCLI(["fit", *ARGUMENTS, f"--trainer.default_root_dir={tmp_path}", f"--ckpt_path={last}"])


def test_checkpoints_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder" / "a.ckpt"
    whole = {"state_dict": {"a": torch.ones(3)}, "hyper_parameters": {}, "callbacks": {}}
    AtomicCheckpointIO().save_checkpoint(whole, path)

    def crash(checkpoint: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", crash)
        with pytest.raises(OSError, match="No space left"):
            AtomicCheckpointIO().save_checkpoint({}, path)
    assert torch.equal(read_checkpoint(path)["state_dict"]["a"], torch.ones(3))


def test_checkpoints_cannot_run_code(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "broken into"),)

    torch.save({"state_dict": Payload()}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"checkpoint .*a\.ckpt is broken, or not a checkpoint"):
        read_checkpoint(tmp_path / "a.ckpt")
    assert not (tmp_path / "broken into").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--model.network=resnet8_cifar", r"trained with --model.network=aw_resnet8_cifar, and this .* resnet8_cifar"),
        ("--data.image_size=16", r"trained with input_size \[1, 8, 8\], and the data have \[1, 16, 16\]"),
        ("--model.lr=0.01", r"of a training with other settings: model\.lr is 0\.1 there, 0\.01 now\. Give those"),
        ("--seed_everything=3", r"other settings: seed_everything is 0 there, 3 now"),
        ("--trainer.accumulate_grad_batches=1", r"other settings: trainer\.accumulate_grad_batches is 3 there, 1 now"),
        ("--model.ema_decay=null", r"trained with --model.ema_decay=0.9, and this training has None"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(argument: str, message: str, tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(ValueError, match=message):
        train(tmp_path, argument, "--ckpt_path=last")
