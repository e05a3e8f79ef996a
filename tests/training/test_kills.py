"""Kills at random moments: the same command ends a training, or a comparison, as if nothing had killed it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from awconv.training.checkpoints import find_last, read_checkpoint
from tests.training.test_resume import ARGUMENTS

pytestmark = pytest.mark.campaign

KILLS = 3  # of a training, before it may end
_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def killed_and_finished(command: Sequence[str], begun: Callable[[], bool], rng: random.Random) -> list[str]:
    """Ends a command some times, and then lets it finish; returns what was done."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = []
    for _ in range(KILLS):
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        until = time.monotonic() + 120
        while not begun() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        delay = rng.uniform(0, 4)
        with suppress(subprocess.TimeoutExpired):
            process.wait(delay)
        number = rng.choice(_SIGNALS)
        process.send_signal(number)
        printed = process.communicate(timeout=90)[1]
        # By itself before and after the training, where there is nothing to keep.
        within_an_import = number == signal.SIGINT and "<frozen importlib" in printed  # which makes an error of it
        assert process.returncode in (0, 128 + number, -number) or within_an_import, f"{done}, {number.name}: {printed}"
        done.append(f"{number.name} after {delay:.2f} s")
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, f"{done}: {finished.stderr[-4000:]}"
    return done


def weights(root: Path) -> dict[str, torch.Tensor]:
    last = find_last(root)
    assert last is not None
    checkpoint = read_checkpoint(last)
    assert checkpoint["epoch"] == 2
    found: dict[str, torch.Tensor] = checkpoint["state_dict"]
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    root = tmp_path_factory.mktemp("undisturbed")
    command = [sys.executable, "-m", "awconv", "fit", *ARGUMENTS, f"--trainer.default_root_dir={root}"]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    return weights(root)


@pytest.mark.parametrize("trial", range(14))
def test_a_killed_training_ends_as_an_undisturbed_one(
    trial: int,
    undisturbed: dict[str, torch.Tensor],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    command = [sys.executable, "-m", "awconv", "fit", *ARGUMENTS, f"--trainer.default_root_dir={tmp_path}"]
    done = killed_and_finished(
        [*command, "--ckpt_path=last"], lambda: bool(list(tmp_path.rglob("*.ckpt"))), random.Random(f"fit {trial}")
    )
    found = weights(tmp_path)
    for name, tensor in undisturbed.items():
        assert torch.equal(found[name], tensor), f"trial {trial}, {done}: {name}"  # bit for bit
    assert not list(tmp_path.rglob("*.partial")), done
    record_property("kills of a training", KILLS)


def compare(folder: Path) -> list[str]:
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "model: {network: resnet8_cifar, lr: 0.05, warmup_epochs: 0.5}\n"
        "trainer: {max_epochs: 3, accelerator: cpu}\n"
        "recent_checkpoint: {every_n_steps: 2}\n"
    )
    return [sys.executable, "-m", "awconv", "compare", str(recipe), "--seeds=2", "--jobs=2", f"--out={folder / 'out'}"]


def runs(folder: Path) -> dict[str, Any]:
    found = {}
    for path in (folder / "out").glob("*-seed*.json"):
        run = json.loads(path.read_text())
        losses = [(epoch["train_loss"], epoch["val_score"]) for epoch in run["epochs"]]
        found[path.stem] = (run["score"], losses, run["versions"]["threads"])
    return found


@pytest.fixture(scope="module")
def undisturbed_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("compared")
    subprocess.run(compare(folder), env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    return runs(folder)


@pytest.mark.parametrize("trial", range(14))
def test_a_killed_comparison_ends_as_an_undisturbed_one(
    trial: int, undisturbed_runs: dict[str, Any], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    done = killed_and_finished(
        compare(tmp_path), lambda: bool(list(tmp_path.rglob("*.ckpt"))), random.Random(f"compare {trial}")
    )
    assert len(undisturbed_runs) == 4
    assert runs(tmp_path) == undisturbed_runs, f"trial {trial}, {done}"  # bit for bit
    assert not list(tmp_path.rglob("*.partial")), done
    record_property("kills of a comparison", KILLS)
