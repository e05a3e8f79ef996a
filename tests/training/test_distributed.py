"""Two processes on one machine (gloo) train and evaluate as one process does."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from awconv.training.checkpoints import find_last, read_checkpoint

# A norm over the batch differs between one large batch and two halves, and torch has no synchronised one for CPUs.
NETWORK = (
    "--model.network=resnet8_cifar",
    "--model.convert={norm_layer: null}",
    "--data.horizontal_flip=true",
    "--data.val_fraction=0.15",
    "--model.ema_decay=0.9",
    "--model.lr=0.02",  # at 0.1 a rounding that changes the sign of one activation has grown to 0.002 in the end
)


def fit(root: Path, *arguments: str) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """The last figures of each kind, and the weights."""
    script = root.with_suffix(".py")
    root.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(SCRIPT)
    command = [
        sys.executable,
        str(script),
        "fit",
        *NETWORK,
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=2",
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        f"--trainer.default_root_dir={root}",
        *arguments,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    (log,) = root.rglob("metrics.csv")
    figures: dict[str, float] = {}
    for row in csv.DictReader(log.open()):
        figures |= {name: float(value) for name, value in row.items() if value}
    last = find_last(root)
    assert last is not None
    return figures, read_checkpoint(last)["state_dict"]


# The command line, with norms that do not look at the batch.
SCRIPT = """
import sys
import timm
from torch import nn
from awconv.cli import main
from awconv.tasks.classification import ClassificationTask

build = ClassificationTask._build

def without_batch_norm(self, **pretrained):
    network = build(self, **pretrained)
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(1, child.num_features))
    return network

ClassificationTask._build = without_batch_norm
sys.exit(main())
"""


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    one, weights = fit(tmp_path / "one", "--data.batch_size=128")
    two, shared = fit(tmp_path / "two", "--data.batch_size=64", "--trainer.devices=2", "--trainer.strategy=ddp")
    # Gradients are means of halves in place of a mean of all, in single precision: 1e-7 each, which 18 steps
    # enlarge by up to some hundred times.
    assert weights.keys() == shared.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(
            shared[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    for name in ("train/loss", "val/loss", "val/accuracy"):
        assert two[name] == pytest.approx(one[name], rel=1e-3), name
    # 216 images are held out: were some evaluated twice, the accuracy would be no multiple of 1/216.
    assert (two["val/accuracy"] * 216) == pytest.approx(round(two["val/accuracy"] * 216), abs=1e-3)


@pytest.mark.gpu
def test_sharded_parameters_train_and_resume(tmp_path: Path) -> None:
    fit(tmp_path / "sharded", "--data.batch_size=64", "--trainer.strategy=fsdp", "--trainer.accelerator=gpu")
    command = ["--trainer.max_epochs=3", "--ckpt_path=last", f"--trainer.default_root_dir={tmp_path / 'sharded'}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.strategy=fsdp"]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "sharded.py"), "fit", *NETWORK, "--data.batch_size=64", *quiet, *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    last = find_last(tmp_path / "sharded")
    assert last is not None
    assert read_checkpoint(last)["epoch"] == 2
