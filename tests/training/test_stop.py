"""SIGTERM: soon, at one step of all processes, with a checkpoint and one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from awconv.training.checkpoints import find_last, read_checkpoint
from awconv.training.lock import locked

SECONDS = 10  # after which schedulers kill


def alive(group: int) -> list[str]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(stat.parent.name)
    return found


def stopped(root: Path, *arguments: str) -> str:
    """What a training prints that SIGTERM ends together with all of its processes, some steps after its first epoch."""
    command = [sys.executable, "-m", "awconv", "fit", "--model.network=aw_resnet8_cifar", "--trainer.max_epochs=500"]
    command += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.logger=false"]
    command += ["--trainer.enable_model_summary=false", f"--trainer.default_root_dir={root}", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        until = time.monotonic() + 120
        while not list(root.glob("checkpoints/*.ckpt")):
            assert process.poll() is None, process.communicate()[1][-4000:]
            assert time.monotonic() < until
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        sent = time.monotonic()
        printed = process.communicate(timeout=SECONDS)[1]
        while alive(process.pid):
            assert time.monotonic() < sent + SECONDS, alive(process.pid)
            time.sleep(0.05)
    finally:
        if alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in printed
    assert printed.count("stopped by SIGTERM") == 1
    return printed


def assert_goes_on(root: Path) -> None:
    last = find_last(root)
    assert last is not None
    checkpoint = read_checkpoint(last)
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
    assert last.name == "recent.ckpt" or progress["completed"] > 0
    assert not list(root.rglob("*.partial"))
    with locked(last.parent, seconds=0):  # it is free again
        pass


def test_two_processes_stop_together(tmp_path: Path) -> None:
    stopped(tmp_path, "--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=16")
    assert_goes_on(tmp_path)


def test_a_group_with_data_workers_stops(tmp_path: Path) -> None:
    for index in range(96):
        folder = tmp_path / "train" / str(index % 2)
        folder.mkdir(parents=True, exist_ok=True)
        picture = np.random.default_rng(index).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"{index}.png")
    data = ("--data=ImageFolder", f"--data.root={tmp_path}", "--data.image_size=24", "--data.in_memory=false")
    stopped(tmp_path, *data, "--data.num_workers=2", "--data.batch_size=8")
    assert_goes_on(tmp_path)


LONG = """
import sys, time
import awconv.cli
from awconv.tasks import ClassificationTask

step = ClassificationTask.validation_step

def slow(self, batch, batch_idx):
    if not self.trainer.sanity_checking and self.trainer.current_epoch:
        print("evaluating", flush=True)
        time.sleep(60)  # as an evaluation of many images takes
    return step(self, batch, batch_idx)

ClassificationTask.validation_step = slow
sys.exit(awconv.cli.main())
"""


def test_what_takes_long_is_cut_off(tmp_path: Path) -> None:
    """An evaluation within a training, at whose end the epoch's checkpoint would be written."""
    (tmp_path / "long.py").write_text(LONG)
    command = [sys.executable, str(tmp_path / "long.py"), "fit", "--model.network=resnet8_cifar"]
    command += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.logger=false"]
    command += ["--trainer.enable_model_summary=false", f"--trainer.default_root_dir={tmp_path}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "evaluating\n" in process.stdout
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=SECONDS)[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM within a step; the last checkpoint remains" in printed
    assert "Traceback" not in printed
    assert find_last(tmp_path) is not None
