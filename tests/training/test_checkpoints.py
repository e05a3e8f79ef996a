"""Checkpoints that were damaged, or made to do harm; folders that two processes want."""

from __future__ import annotations

import json
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
from awconv.compare.runs import base_network
from awconv.models.pretrained import not_finite, read_weights
from awconv.predict import load_task
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
    ("argument", "message"),
    [
        ("--trainer.limit_train_batches=0", "trainer.limit_train_batches must be more than 0"),
        ("--trainer.max_epochs=0", "trainer.max_epochs must be more than 0"),
        ("--trainer.max_steps=0", "trainer.max_steps must be more than 0"),
        ("--model.ema_decay=1e400", "ema_decay must be a number from 0 to 1, got inf"),
        ("--model.ema_decay=1.5", "ema_decay must be a number from 0 to 1, got 1.5"),
        ("--model.lr=.nan", "lr must be a number from 0 to 1e+18, got nan"),
        ("--model.lr=-1", "lr must be a number from 0 to 1e+18, got -1"),
        ("--model.lr=1e308", "lr must be a number from 0 to 1e+18, got 1e+308"),
        ("--model.lr=1e18", "the loss became infinite or not a number"),
        ("--model.momentum=2", "momentum must be a number from 0 to 1, got 2"),
        ("--model.label_smoothing=1.2", "label_smoothing must be a number from 0 to 1, got 1.2"),
        ("--model.erasing=-0.1", "erasing must be a number from 0 to 1"),
        ("--model.warmup_epochs=.inf", "warmup_epochs must be a number from 0 to 1e+18"),
        ("--model.decay_epochs=[1, .nan]", "decay_epochs[1] must be a number from 0 to 1e+18"),
        ("--model.optimizer=sdg", "optimizer must be a name of timm.optim.list_optimizers()"),
        ("--model.optimizer_args={nestrov: true}", "optimizer_args its arguments, got 'sgd' and {'nestrov': True}"),
        ("--model.network_args={drop_rte: 0.1}", "cannot be built with network_args {'drop_rte': 0.1}"),
        ("--model.mixup={mixup_alfa: 0.1}", "mixup must hold arguments of timm.data.Mixup"),
        ("--data.split_seed=null", "awconv fit: data.split_seed must not be null"),
        ("--data.batch_size=null", "awconv fit: data.batch_size must not be null"),
        ("--data.num_workers=5000", "awconv fit: num_workers must be at most"),
    ],
)
def test_options_out_of_range_are_refused(
    argument: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SHORT, "--trainer.max_epochs=1", f"--trainer.default_root_dir={tmp_path}", argument]
    assert main(["fit", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.rglob("*.ckpt"))


def recipe(folder: Path, text: str) -> str:
    (folder / "recipe.yaml").write_text(text)
    return str(folder / "recipe.yaml")


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [1]", "model must be a mapping of settings, got '[1]'"),
        ("model: resnet8_cifar", "model must be a mapping of settings, got 'resnet8_cifar'"),
        ("- model", "must be a mapping such as"),
        ("model: {network: [", "cannot be read as YAML"),
        ("\x00", "cannot be read as YAML"),
        (LAUGHS, "its aliases make more than 100,000 values of it"),
        ("model: &model {network: *model}", "an alias stands within what it names"),
        ("x: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("x: " + "y" * 2**20, "must have at most 1,048,576 bytes"),
    ],
)
@pytest.mark.parametrize("command", ["fit", "compare"])
def test_recipes_that_are_none_are_refused(
    command: str, text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path, text)
    assert (
        main(["fit", f"--config={path}"] if command == "fit" else ["compare", path, f"--out={tmp_path / 'out'}"]) == 1
    )
    error = capsys.readouterr().err
    assert f"recipe {path}" in error
    assert message in error
    assert "Traceback" not in error
    assert {file.name for file in tmp_path.iterdir()} == {"recipe.yaml"}


def test_a_section_may_be_a_file_and_a_recipe_may_be_given_as_text(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text("network: resnet8_cifar")
    path = recipe(tmp_path, "model: model.yaml")
    for given in (path, '{"model": {"network": "resnet8_cifar"}}'):
        cli = TrainingCLI([f"--config={given}"], run=False, build=False)
        assert cli.config.model.network == "resnet8_cifar"
    assert base_network(Path(path), []) == "resnet8_cifar"


def test_a_network_of_null_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, "model: {network: null}")
    assert main(["compare", path, f"--out={tmp_path / 'out'}"]) == 1
    assert f"recipe {path} must name a network under model.network" in capsys.readouterr().err


def test_settings_of_somebody_elses_run_are_not_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a file of a run names is compared as text."""
    path = recipe(tmp_path, "model: {network: resnet8_cifar}\ntrainer: {max_epochs: 1, limit_train_batches: 2}\n")
    command = ["compare", path, "--variants=plain", "--seeds=1", f"--out={tmp_path / 'out'}"]
    assert main(command) == 0
    file = tmp_path / "out" / "plain-seed0.json"
    run = json.loads(file.read_text())
    (tmp_path / "planted.py").write_text("raise SystemExit('imported')")
    sys.path.insert(0, str(tmp_path))
    try:
        for section, name in (
            ("trainer", "callbacks"),
            ("trainer", "strategy"),
            ("data", "class_path"),
            ("model", "optimizer"),
        ):
            planted = json.loads(json.dumps(run))
            planted["recipe"][section][name] = (
                "planted.Thing" if name != "callbacks" else [{"class_path": "planted.Thing"}]
            )
            file.write_text(json.dumps(planted))
            assert main(command) == 1
            error = capsys.readouterr().err
            assert "holds a run of other settings" in error
            assert "planted.Thing" in error
            assert "planted" not in sys.modules
    finally:
        sys.path.remove(str(tmp_path))


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_weights_of_every_precision_are_looked_at(dtype: torch.dtype) -> None:
    whole = torch.tensor([0.5, -2.0]).to(dtype)
    broken = torch.tensor([0.5, float("nan")]).to(dtype)
    assert not_finite({"whole": whole, "broken": broken, "count": torch.tensor(3)}, {}) == ["broken"]
    assert not_finite({"broken": broken}, {"broken": broken}) == []  # as it was made


def test_a_folder_that_cannot_be_locked_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def acquire(*arguments: Any, **options: Any) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock; use SoftFileLock instead")

    monkeypatch.setattr("awconv.training.lock.FileLock.acquire", acquire)
    with pytest.warns(UserWarning, match="cannot be locked"), locked(tmp_path):
        pass
