"""Checkpoints that are damaged or malicious; folders that two processes use, or none may write."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image

from awconv.cli import main
from awconv.models.pretrained import not_finite, read_weights
from awconv.sources import load_task
from awconv.tasks import DetectionTask
from awconv.training import TrainingCLI
from awconv.training.checkpoints import AtomicCheckpointIO, find_last, read_checkpoint
from awconv.training.lock import clear, locked

QUIET = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
SHORT = (*QUIET, "--model.network=aw_resnet8_cifar", "--trainer.logger=false", "--trainer.limit_train_batches=2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    assert main(["fit", *SHORT, "--trainer.max_epochs=1", f"--trainer.default_root_dir={root}"]) == 0
    last = find_last(root)
    assert last is not None
    return last


def changed(trained: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    content = torch.load(trained, weights_only=True)
    change(content)
    AtomicCheckpointIO().save_checkpoint(content, folder / "changed.ckpt")
    return folder / "changed.ckpt"


def test_a_changed_bit_is_noticed(trained: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(trained) as archive:
        parts = [part for part in archive.infolist() if "/data/" in part.filename]
    largest = max(parts, key=lambda part: part.file_size)  # weights: any bit of them is a number
    content = bytearray(trained.read_bytes())
    content[largest.header_offset + 128 + largest.file_size // 2] ^= 1
    spoiled = tmp_path / "spoiled.ckpt"
    spoiled.write_bytes(content)
    torch.load(spoiled, weights_only=True)  # which does not look
    with pytest.raises(ValueError, match=f"spoiled.ckpt is broken.*it has changed.*{largest.filename}"):
        load_task(spoiled)


def test_weights_may_hold_a_mask(tmp_path: Path) -> None:
    mask = torch.full((3, 3), -torch.inf).triu(1)
    torch.save({"mask": mask, "weight": torch.zeros(3)}, tmp_path / "weights.pt")
    expected = {"mask": mask, "weight": torch.ones(3)}
    assert torch.equal(read_weights(tmp_path / "weights.pt", expected)["mask"], mask)
    with pytest.raises(ValueError, match="not a number, such as mask"):
        read_weights(tmp_path / "weights.pt", expected | {"mask": torch.zeros(3, 3)})


def test_compressed_parts_are_refused(trained: Path, tmp_path: Path) -> None:
    """A few bytes of an archive may stand for any number of zeros."""
    with zipfile.ZipFile(trained) as there, zipfile.ZipFile(tmp_path / "c.ckpt", "w", zipfile.ZIP_DEFLATED) as here:
        for part in there.infolist():
            here.writestr(part.filename, there.read(part))
    with pytest.raises(ValueError, match="it has changed since it was written"):
        read_checkpoint(tmp_path / "c.ckpt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["network.conv1.weight", "network.bn1.running_var"])
def test_weights_that_are_no_numbers_are_refused(name: str, value: float, trained: Path, tmp_path: Path) -> None:
    path = changed(trained, tmp_path, lambda content: content["state_dict"][name].view(-1)[0].fill_(value))
    with pytest.raises(ValueError, match=f"infinite or not a number, such as {name}"):
        load_task(path)
    goes_on = [*SHORT, "--trainer.max_epochs=2", f"--trainer.default_root_dir={tmp_path / 'on'}", f"--ckpt_path={path}"]
    assert main(["fit", *goes_on]) == 1
    assert not list(tmp_path.glob("on/**/*.ckpt"))


@pytest.mark.parametrize(
    "name", ["network.backbone.body.conv1.weight", "network.roi_heads.box_predictor.cls_score.bias"]
)
def test_a_detectors_too(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    trainer.strategy.connect(DetectionTask(["cat"], [1], network="resnet8_cifar", min_size=32, max_size=32))
    whole = tmp_path / "whole.ckpt"
    trainer.save_checkpoint(whole)
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    assert main(["predict", f"--ckpt={whole}", str(tmp_path / "a.png")]) == 0
    path = changed(whole, tmp_path, lambda content: content["state_dict"][name].view(-1)[0].fill_(float("nan")))
    capsys.readouterr()
    assert main(["predict", f"--ckpt={path}", str(tmp_path / "a.png")]) == 1
    printed = capsys.readouterr()
    assert f"infinite or not a number, such as {name}" in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(state_dict=[1]),
        lambda content: content["state_dict"].update({"network.conv1.weight": "text"}),
        lambda content: content.update(hyper_parameters=3),
        lambda content: content["hyper_parameters"].update(_class_path="antigravity.Task"),
        lambda content: content.update(callbacks=None),
        lambda content: content.update(epoch="two"),
        lambda content: content.update(loops=[]),
        lambda content: content.update(optimizer_states="none"),
        lambda content: content.update(loops={}),
        lambda content: content["loops"].update(fit_loop=7),
        lambda content: content.update(optimizer_states=[{"state": 1}]),
        lambda content: content.update(lr_schedulers=[5]),
        lambda content: content["loops"]["fit_loop"]["epoch_progress"]["total"].update(processed="text"),
        lambda content: content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"].update(ready=-1),
        lambda content: content["loops"]["fit_loop"].update({"epoch_loop.val_loop.batch_progress": {"total": 7}}),
        lambda content: content["optimizer_states"][0]["state"].update({20: [1]}),
        lambda content: content["optimizer_states"][0]["state"][20].update(momentum_buffer=torch.zeros(7)),
        lambda content: content["optimizer_states"][0]["param_groups"][0].update(lr="text"),
        lambda content: content["optimizer_states"][0]["param_groups"][0].update(momentum="text"),
        lambda content: content["lr_schedulers"][0]["base_lrs"].__setitem__(2, None),
        lambda content: content["lr_schedulers"][0].update(_step_count=torch.tensor(3)),
        lambda content: content["callbacks"].update(SameThreads={"threads": "many"}),
        lambda content: content["callbacks"].update(SameThreads={"threads": 10**9}),
        lambda content: content["callbacks"].update(SameSettings=[]),
    ],
)
def test_parts_of_other_types_are_an_error_of_one_line(
    change: Callable[[dict[str, Any]], Any], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed(trained, tmp_path, change)
    arguments = [*SHORT, "--trainer.max_epochs=2", f"--trainer.default_root_dir={tmp_path / 'on'}"]
    assert main(["fit", *arguments, f"--ckpt_path={path}"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert re.search(r"awconv fit: .*(changed\.ckpt|the checkpoint)", error)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("key", ["hparams", "module_arguments"])
def test_hyper_parameters_of_former_versions_import_nothing(key: str, trained: Path, tmp_path: Path) -> None:
    path = changed(trained, tmp_path, lambda content: content.update({key: {"_instantiator": "antigravity.make"}}))
    with pytest.raises(ValueError, match=rf"changed\.ckpt is not a checkpoint of awconv fit: its {key} cannot be"):
        load_task(path)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    "argument",
    [
        {"pretrained": True},
        {"checkpoint_path": "weights.pth"},
        {"pretrained_cfg": {"url": "http://example.org/weights.pth"}},
        {"pretrained_cfg_overlay": {"hf_hub_id": "somebody/weights"}},
        {"cache_dir": "/tmp"},
    ],
)
def test_a_checkpoint_does_not_say_where_weights_come_from(
    argument: dict[str, Any], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    for function in ("load_state_dict_from_hf", "load_state_dict_from_url", "load_pretrained", "load_checkpoint"):
        for module in ("timm.models._builder", "timm.models._factory"):
            monkeypatch.setattr(f"{module}.{function}", lambda *a, **k: asked.append(a), raising=False)
    path = changed(trained, tmp_path, lambda content: content["hyper_parameters"].update(network_args=argument))
    with pytest.raises(
        ValueError, match=f"network_args must be the network's own arguments, got {next(iter(argument))}"
    ):
        load_task(path)
    assert asked == []


def test_a_folder_belongs_to_one_process(tmp_path: Path) -> None:
    script = "import sys, time; from pathlib import Path; from awconv.training.lock import locked\n"
    script += "with locked(Path(sys.argv[1])): print('ready', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "ready\n"
    (tmp_path / "half.ckpt.partial").write_text("being written")
    with (
        pytest.raises(ValueError, match=f"{tmp_path} is in use by process {other.pid}, host .*; wait until"),
        locked(tmp_path, seconds=0),
    ):
        pass
    clear(tmp_path.parent)
    assert (tmp_path / "half.ckpt.partial").exists()  # somebody else's
    other.send_signal(signal.SIGKILL)
    other.wait()
    with locked(tmp_path, seconds=1):
        assert not (tmp_path / "half.ckpt.partial").exists()


def test_two_trainings_do_not_write_to_one_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("awconv.training.lock._SECONDS", 0.0)
    monkeypatch.setattr("awconv.training.checkpoints.locked", lambda folder: locked(folder, seconds=0))
    with locked(tmp_path / "checkpoints"):
        assert main(["fit", *SHORT, "--trainer.max_epochs=1", f"--trainer.default_root_dir={tmp_path}"]) == 1
    assert f"checkpoints is in use by process {os.getpid()}" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.ckpt"))


def test_two_trainings_that_begin_at_once_take_folders_of_their_own(tmp_path: Path) -> None:
    arguments = [argument for argument in SHORT if "logger" not in argument]
    first, second = (
        TrainingCLI([*arguments, "--trainer.max_epochs=1", f"--trainer.default_root_dir={tmp_path}"], run=False)
        for _ in range(2)
    )
    folders = []
    for one in (first, second):  # neither has written anything yet
        one.before_fit()
        folders.append(one.trainer.log_dir)
    assert folders == [str(tmp_path / "lightning_logs" / f"version_{number}") for number in range(2)]


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    left = tmp_path / "lightning_logs" / "version_0" / "checkpoints" / "recent.ckpt.partial"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    assert main(["fit", *SHORT, "--trainer.max_epochs=1", f"--trainer.default_root_dir={tmp_path}"]) == 0
    assert not left.exists()


def test_double_precision_goes_on_in_double_precision(tmp_path: Path) -> None:
    def weights(name: str, *arguments: str) -> dict[str, torch.Tensor]:
        root = f"--trainer.default_root_dir={tmp_path / name}"
        assert main(["fit", *SHORT, "--trainer.precision=64-true", "--model.decay_epochs=[9]", root, *arguments]) == 0
        last = find_last(tmp_path / name)
        assert last is not None
        found: dict[str, torch.Tensor] = read_checkpoint(last)["state_dict"]
        return found

    whole = weights("whole", "--trainer.max_epochs=2")
    weights("parts", "--trainer.max_epochs=1")
    parts = weights("parts", "--trainer.max_epochs=2", "--ckpt_path=last")
    assert whole["network.conv1.weight"].dtype == torch.float64
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name  # bit for bit


def test_a_training_goes_on_with_its_number_of_threads(tmp_path: Path) -> None:
    root = f"--trainer.default_root_dir={tmp_path}"
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert main(["fit", *SHORT, "--trainer.max_epochs=1", root]) == 0
        torch.set_num_threads(1)
        assert main(["fit", *SHORT, "--trainer.max_epochs=2", root, "--ckpt_path=last"]) == 0
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_overfitted_batches_are_the_same_in_each_epoch(tmp_path: Path) -> None:
    arguments = [*SHORT[:-1], "--trainer.max_epochs=3", "--trainer.overfit_batches=2", "--data.crop_padding=0"]
    cli = TrainingCLI([*arguments, f"--trainer.default_root_dir={tmp_path}"], run=False)
    seen: dict[int, list[float]] = {}

    def training_step(batch: Any, batch_idx: int, of: Any = cli.model.training_step) -> Any:
        seen.setdefault(cli.trainer.current_epoch, []).append(float(batch[0].double().sum()))
        return of(batch, batch_idx)

    cli.model.training_step = training_step
    cli.trainer.fit(cli.model, cli.datamodule)
    assert len(seen[0]) == 2
    assert seen[0] == seen[1] == seen[2]
    assert seen[0][0] != seen[0][1]


def test_weights_that_became_infinite_are_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of an average of the weights, which the loss of the training does not see."""
    cli = TrainingCLI(
        [*SHORT, "--trainer.max_epochs=2", "--model.ema_decay=0.9", f"--trainer.default_root_dir={tmp_path}"], run=False
    )

    def on_train_epoch_end() -> None:
        cli.model.ema.module.conv1.weight.data[0] = float("inf")

    cli.model.on_train_epoch_end = on_train_epoch_end
    with pytest.raises(ValueError, match=r"weights became infinite or not a number by step 2: ema.module.conv1.weight"):
        cli.trainer.fit(cli.model, cli.datamodule)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_weights_of_every_precision_are_looked_at(dtype: torch.dtype) -> None:
    whole = torch.tensor([0.5, -2.0]).to(dtype)
    broken = torch.tensor([0.5, float("nan")]).to(dtype)
    assert not_finite({"whole": whole, "broken": broken, "count": torch.tensor(3)}, {}) == ["broken"]
    assert not_finite({"broken": broken}, {"broken": broken}) == []  # as it was made


@pytest.mark.parametrize("below", ["", "not/yet/there"])
def test_a_closed_folder_is_named(
    below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of somebody without root's rights, which the tests may have."""
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, *mode: Path(path) != tmp_path and access(path, *mode))
    assert main(["fit", *SHORT, f"--trainer.default_root_dir={tmp_path / below}"]) == 1
    assert f"awconv fit: {tmp_path}: Permission denied; give another place" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_locked_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def acquire(*arguments: Any, **options: Any) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock; use SoftFileLock instead")

    monkeypatch.setattr("awconv.training.lock.FileLock.acquire", acquire)
    with pytest.warns(UserWarning, match="cannot be locked"), locked(tmp_path):
        pass
