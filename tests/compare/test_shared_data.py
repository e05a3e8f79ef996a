"""Data that are decoded once, for all processes of a comparison, and what they use of the machine."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from awconv.cli import main
from awconv.compare import shared_data as module
from awconv.compare.cores import usable_cores
from awconv.compare.shared_data import DataError, OpenedData, shared_data
from awconv.data.datasets import InMemoryImages
from awconv.training.recipe import Recipe


def recipe(*arguments: str) -> Recipe:
    return Recipe.parse(["--model.network=resnet8_cifar", "--trainer.accelerator=cpu", *arguments])


def photographs(root: Path, count: int = 60) -> None:
    """Noise in two classes, and a broken file."""
    generator = np.random.default_rng(0)
    for index in range(count):
        folder = root / "train" / f"class{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{index:02}.png")
    (root / "train" / "class0" / "broken.png").write_bytes(b"no image")


def of_folder(root: Path, *more: str) -> Recipe:
    return recipe("--data=ImageFolder", f"--data.root={root}", "--data.image_size=8", "--data.batch_size=8", *more)


def batches(data: Any, split: str) -> list[list[torch.Tensor]]:
    torch.manual_seed(0)
    return [list(batch) for batch in getattr(data, f"{split}_dataloader")()]


def test_batches_of_shared_data_are_those_of_data_that_were_decoded_here(tmp_path: Path) -> None:
    photographs(tmp_path)
    settings = of_folder(tmp_path, "--data.broken_images=skip")
    with shared_data(tmp_path / "out") as shared:
        decoded = shared.of(settings)
        assert decoded is not None
        assert shared.of(of_folder(tmp_path, "--data.broken_images=skip", "--model.lr=0.2")) == decoded  # the same data
        mine, theirs = settings.build(), settings.build()
        own = OpenedData().of(settings, mine, "test")
        mapped = OpenedData().of(settings, theirs, "test", decoded)
        for split in ("train", "val", "test"):
            expected, found = batches(own, split), batches(mapped, split)
            assert len(expected) == len(found) > 0
            for one, other in zip(expected, found, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert mapped.test_split == own.test_split == "val"  # there is no folder of test images
        if os.path.exists("/proc/self/maps"):  # no copy: the memory is the file's
            assert str(decoded / "train-images.npy") in Path("/proc/self/maps").read_text()
    assert not decoded.parent.exists()


def test_each_data_set_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    whole = InMemoryImages.__init__

    def counted(self: InMemoryImages, *args: Any, **kwargs: Any) -> None:
        made.append(len(args[1]))
        whole(self, *args, **kwargs)

    monkeypatch.setattr(InMemoryImages, "__init__", counted)
    settings = recipe()
    with shared_data(tmp_path) as shared:
        decoded = shared.of(settings)
        assert len(made) == 3  # splits
        for _ in range(2):
            OpenedData().of(settings, settings.build(), "test", decoded)
            assert shared.of(settings) == decoded
        assert len(made) == 3
        assert shared.of(recipe("--data.val_fraction=0.2")) != decoded
        assert len(made) == 6


def test_data_that_are_not_kept_in_memory_are_left_to_each_process(tmp_path: Path) -> None:
    with shared_data(tmp_path) as shared:
        assert shared.of(recipe("--data.in_memory=false")) is None
    assert list(tmp_path.iterdir()) == []


def test_data_that_cannot_be_read_fail_once_with_the_reason(tmp_path: Path) -> None:
    photographs(tmp_path)
    with shared_data(tmp_path / "out") as shared:
        for _ in range(2):
            with pytest.raises(DataError, match=r"BrokenImageError: .*broken\.png: "):
                shared.of(of_folder(tmp_path))


def test_what_a_killed_process_has_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".decoded" / "0" / "train-images.npy"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half an array")
    with shared_data(tmp_path) as shared:
        assert not left.exists()
        decoded = shared.of(recipe())
        assert decoded is not None
        assert np.load(decoded / "train-images.npy").shape[1:] == (1, 8, 8)


def test_an_interruption_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        (tmp_path / ".decoded" / "0" / "train-images.npy").write_bytes(b"half an array")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", interrupted)
    with pytest.raises(KeyboardInterrupt), shared_data(tmp_path) as shared:
        shared.of(recipe())
    assert list(tmp_path.iterdir()) == []


def test_on_a_full_disk_each_process_decodes_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.np, "save", full)
    with shared_data(tmp_path) as shared:
        assert shared.of(recipe()) is None
        assert not (tmp_path / ".decoded" / "0").exists()
    assert "cannot hold the decoded images (No space left on device); each process decodes" in capsys.readouterr().err


@pytest.mark.campaign
def test_ctrl_c_while_settings_are_chosen_side_by_side_leaves_nothing_broken(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """All processes of a terminal get it: those that still import, too. The same command goes on."""
    photographs(tmp_path / "data")
    out, path = tmp_path / "out", tmp_path / "tiny.yaml"
    path.write_text(
        "model: {network: resnet8_cifar}\ntrainer: {max_epochs: 1, accelerator: cpu}\n"
        f"data: {{class_path: ImageFolder, init_args: {{root: {tmp_path / 'data'}, image_size: 8, batch_size: 8, "
        "broken_images: skip}}\n"
    )
    command = ["compare", str(path), "--variants=plain", "--seeds=1", f"--out={out}"]
    command += ["--tune=lr=0.01,0.02,0.03,0.04"]
    ended = threading.Event()

    def press(*processes: int) -> None:
        for process in processes:
            os.kill(process, signal.SIGINT)

    def user() -> None:
        while len(children := [one.pid for one in active_children() if one.pid is not None]) < 2 and not ended.is_set():
            time.sleep(0.01)
        press(*children)  # these ignore it: only the first process decides
        while not list(out.glob("tune/*-seed0.json")) and not ended.is_set():
            time.sleep(0.01)
        if not ended.is_set():
            press(*children, os.getpid())

    thread = threading.Thread(target=user)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    thread.start()
    try:
        status = main([*command, "--jobs=2"])
    finally:
        ended.set()
        thread.join()
        signal.signal(signal.SIGINT, before)
    printed = capfd.readouterr()
    assert status == 130
    assert "Interrupted; " in printed.out
    assert printed.err == ""  # of no process
    assert caplog.text.count("left out a broken image") == 1
    assert not (out / ".decoded").exists()
    assert active_children() == []
    assert main(command) == 0
    assert "of 4 runs are finished already" in capfd.readouterr().out
    assert (out / "index.html").exists()


def test_cores_are_those_that_this_process_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    assert usable_cores(tmp_path) == 6
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    assert usable_cores(tmp_path) == 3  # two and a half
    (tmp_path / "cpu.max").write_text("10000 100000\n")
    assert usable_cores(tmp_path) == 1
    for text in ("max 100000\n", "1600000 100000\n", "", "0 0\n"):
        (tmp_path / "cpu.max").write_text(text)
        assert usable_cores(tmp_path) == 6
    older = tmp_path / "older" / "cpu"
    older.mkdir(parents=True)
    for name, value in (("quota", "400000"), ("period", "100000")):
        (older / f"cpu.cfs_{name}_us").write_text(value)
    assert usable_cores(tmp_path / "older") == 4
    (older / "cpu.cfs_quota_us").write_text("-1")  # no limit
    assert usable_cores(tmp_path / "older") == 6
