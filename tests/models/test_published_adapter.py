"""An adapter from its training to a stranger's prediction, on the digits."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import awconv
from awconv.adapter import read_adapter
from awconv.cli import main
from awconv.models.published import ADAPTER, CARD, CONFIG, FILE, sha256
from awconv.sources import load_task
from awconv.tasks.adapted import load_adapted
from awconv.training.checkpoints import find_last
from tests.data.samples import digit
from tests.tasks.test_classification import pretrained_network

RECIPE = """
model:
  network: resnet8_cifar
  network_args: {drop_rate: 0.1}
  pretrained: BASE
  convert: {init: identity, activation: tanh}
  train_only: [branch, head, norm]
  ema_decay: 0.5
trainer: {max_epochs: 2, accelerator: cpu}
"""
WORDS = ("--tag=digits", "--data=the digits", "--recipe=recipe.yaml")


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and a run that trained an adapter on it."""
    folder = tmp_path_factory.mktemp("adapted")
    save_file(pretrained_network().state_dict(), folder / "base.safetensors")
    (folder / "recipe.yaml").write_text(RECIPE.replace("BASE", str(folder / "base.safetensors")))
    command = ["compare", str(folder / "recipe.yaml"), "--variants=plain", "--seeds=1", f"--out={folder / 'runs'}"]
    assert main(command) == 0
    return folder


@pytest.fixture(scope="module")
def published(compared: Path) -> Path:
    out = compared / "weights"
    assert main(["publish", str(compared / "runs" / "plain-seed0.json"), *WORDS, f"--out={out}"]) == 0
    return out / "resnet8_cifar.digits"


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    (tmp_path / "images").mkdir()
    for number in range(6):
        digit(number, 8).save(tmp_path / "images" / f"{number}.png")
    return [str(tmp_path / "images")]


def predictions(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    assert main(["predict", "--format=json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)["predictions"]


def test_an_adapter_predicts_what_the_checkpoint_does(
    compared: Path, published: Path, images: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert {path.name for path in published.iterdir()} == {ADAPTER, CONFIG, CARD}
    checkpoint = find_last(compared / "runs" / "plain-seed0")
    expected = predictions(capsys, f"--ckpt={checkpoint}", *images)
    adapter = (f"--ckpt={published / ADAPTER}", f"--pretrained={compared / 'base.safetensors'}")
    assert predictions(capsys, *adapter, *images) == expected
    assert len({prediction["probability"] for prediction in expected}) > 1


def test_the_folder_tells_all_that_a_stranger_needs(compared: Path, published: Path) -> None:
    config = json.loads((published / CONFIG).read_text())
    assert config["sha256"] == sha256(published / ADAPTER)
    assert config["pretrained_cfg"]["label_names"] == [str(number) for number in range(10)]
    tensors, metadata = read_adapter(published / ADAPTER)
    assert json.loads(metadata["task"]) == {
        "network": "resnet8_cifar",
        "network_args": {"drop_rate": 0.1},
        "convert": {"init": "identity", "activation": "tanh"},
        "classes": [str(number) for number in range(10)],
        "input_size": [1, 8, 8],
        "crop_pct": 1.0,
        "mean": config["pretrained_cfg"]["mean"],
        "std": config["pretrained_cfg"]["std"],
        "pretrained": "base.safetensors",
    }
    assert not {name for name in tensors if "conv" in name and ".attention." not in name}
    run = json.loads((compared / "runs" / "plain-seed0.json").read_text())
    card = (published / CARD).read_text()
    assert f"| test accuracy | {100 * run['score']:.2f} %" in card
    assert "It trains 3,226 of 77,098 parameters (4.18 %): branch 2,096 (2.72 %), head 650 (0.84 %), norm 480" in card


def test_the_code_on_the_card_runs(compared: Path, published: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (published / CARD).read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    last = find_last(compared / "runs" / "plain-seed0")
    assert last is not None
    task, inputs = load_task(last).cpu(), torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(names["model"](inputs), task.evaluated(inputs))


@pytest.mark.parametrize("kind", ["none", "another", "missing", "network"])
def test_without_its_base_an_adapter_predicts_nothing(
    kind: str, compared: Path, published: Path, images: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.safetensors"
    state = load_file(compared / "base.safetensors")
    if kind == "another":
        state["layer1.0.conv1.weight"][0, 0, 0, 0] += 1e-6
        save_file(state, path)
    elif kind == "network":
        save_file(timm.create_model("resnet20_cifar", in_chans=1).state_dict(), path)
    given = [] if kind == "none" else [f"--pretrained={path}"]
    assert main(["predict", f"--ckpt={published / ADAPTER}", *given, *images]) == 1
    expected = {
        "none": "was trained on the weights 'base.safetensors'; give them with --pretrained=FILE",
        "another": "the adapter was trained on another base: ",
        "missing": "other.safetensors'",
        "network": "does not hold the weights of resnet8_cifar: ",
    }
    assert expected[kind] in capsys.readouterr().err


def test_timms_weights_are_the_base_where_they_were(
    images: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a network whose weights timm finds in the package."""
    recipe, name = tmp_path / "recipe.yaml", "aw_resnet8_cifar.digits"
    settings = "{max_epochs: 1, limit_train_batches: 2, accelerator: cpu}"
    recipe.write_text(
        f"model: {{network: {name}, pretrained: true, train_only: [branch, head], lr: 0.01}}\ntrainer: {settings}\n"
    )
    assert main(["compare", str(recipe), "--variants=plain", "--seeds=1", f"--out={tmp_path / 'runs'}"]) == 0
    publish = ["publish", str(tmp_path / "runs" / "plain-seed0.json"), *WORDS, f"--out={tmp_path / 'weights'}"]
    assert main(publish) == 0
    adapter = tmp_path / "weights" / name / ADAPTER
    checkpoint = find_last(tmp_path / "runs")
    expected = predictions(capsys, f"--ckpt={checkpoint}", *images)
    assert predictions(capsys, f"--ckpt={adapter}", *images) == expected
    assert main(["predict", f"--ckpt={checkpoint}", f"--pretrained={adapter}", *images]) == 1
    assert "pretrained is the base of an adapter or the weights of a name, and " in capsys.readouterr().err
    (code,) = re.findall(r"```python\n(.*?)```", (adapter.parent / CARD).read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert torch.equal(names["model"].fc.weight, load_file(adapter)["fc.weight"])


def test_what_cannot_be_published_is_refused(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(compared / "runs", tmp_path / "runs")
    command = ["publish", str(tmp_path / "runs" / "plain-seed0.json"), *WORDS, f"--out={tmp_path / 'weights'}"]
    base = compared / "base.safetensors"
    base.rename(compared / "elsewhere")
    try:
        assert main(command) == 1
    finally:
        (compared / "elsewhere").rename(base)
    assert "base.safetensors" in capsys.readouterr().err
    assert not list((tmp_path / "weights").rglob("*.*ors"))
    for settings, message in (
        (
            "train_only: [head]",
            "an adapter needs its base, and that of a run with train_only and without pretrained",
        ),
    ):
        recipe, out = tmp_path / "recipe.yaml", tmp_path / settings.partition(":")[0]
        recipe.write_text(
            f"model: {{network: resnet8_cifar, {settings}}}\n"
            "trainer: {max_epochs: 1, limit_train_batches: 1, accelerator: cpu}\n"
        )
        assert main(["compare", str(recipe), "--variants=plain", "--seeds=1", f"--out={out}"]) == 0
        capsys.readouterr()
        assert main(["publish", str(out / "plain-seed0.json"), *command[2:]]) == 1
        assert message in capsys.readouterr().err


def test_a_run_that_froze_statistics_alone_is_published_whole(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "model: {network: resnet8_cifar, train_only: ['*.weight', '*.bias']}\n"
        "trainer: {max_epochs: 1, limit_train_batches: 1, accelerator: cpu}\n"
    )
    recipe, runs = tmp_path / "recipe.yaml", tmp_path / "runs"
    assert main(["compare", str(recipe), "--variants=plain", "--seeds=1", f"--out={runs}"]) == 0
    assert main(["publish", str(runs / "plain-seed0.json"), *WORDS, f"--out={tmp_path / 'weights'}"]) == 0
    folder = tmp_path / "weights" / "resnet8_cifar.digits"
    assert {path.name for path in folder.iterdir()} == {FILE, CONFIG, CARD}
    assert timm.create_model(f"local-dir:{folder}", pretrained=True, in_chans=1).fc.weight.any()


def test_adapters_of_others_and_their_metadata_are_checked(
    published: Path, images: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = timm.create_model("resnet8_cifar", num_classes=3)
    awconv.train_only(model, "head")
    told = json.loads(read_adapter(published / ADAPTER)[1]["task"])
    file = tmp_path / "a.safetensors"
    for entry, message in (
        (None, "does not tell its network and classes, as one of awconv publish does"),
        ("{", "has metadata that cannot be read: "),
        ("[]", "has metadata that cannot be read: "),
        (json.dumps(told | {"classes": "ab"}), "has metadata that cannot be: classes"),
        (json.dumps(told | {"checkpoint_path": "x"}), "has metadata that cannot be: checkpoint_path"),
        (
            json.dumps(told | {"network": "../x", "pretrained": True}),
            "cannot be built: network must be a name",
        ),
        (json.dumps(told | {"network_args": {"pretrained": True}}), "network_args must be the network's own arguments"),
        (json.dumps(told | {"convert": {"init": 3}}), "init must be 'fresh' or 'identity'"),
    ):
        awconv.save_adapter(model, file, metadata=None if entry is None else {"task": entry})
        base = [f"--pretrained={published}"] if entry and "base.safe" in entry else []
        assert main(["predict", f"--ckpt={file}", *base, *images]) == 1, message
        assert message in capsys.readouterr().err
    save_file({"a": torch.zeros(1)}, file)
    assert main(["predict", f"--ckpt={file}", *images]) == 1
    assert "is not an adapter of awconv.save_adapter; whole weights are loaded by" in capsys.readouterr().err


def test_it_is_the_average_that_is_published(compared: Path, published: Path) -> None:
    last = find_last(compared / "runs" / "plain-seed0")
    assert last is not None
    task, tensors = load_task(last), load_file(published / ADAPTER)
    adapted = load_adapted(published / ADAPTER, compared / "base.safetensors")
    for name, tensor in task.evaluated.cpu().state_dict().items():
        assert torch.equal(adapted.network.state_dict()[name], tensor) or name.endswith("num_batches_tracked"), name
    assert not torch.equal(tensors["fc.weight"], task.network.fc.weight.cpu())
