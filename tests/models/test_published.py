"""The weights that come with the package."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import nn

import awconv.models.published as published
from awconv import AWConv2d
from awconv.cli import main
from awconv.compare import compare
from awconv.model_card import Trained, card, loading
from awconv.models.published import CARD, CONFIG, FILE, WEIGHTS
from awconv.publish import publish
from awconv.sources import load_task
from awconv.tasks import ClassificationTask, DetectionTask
from awconv.training import TrainingCLI

FOLDERS = sorted(WEIGHTS.iterdir())
QUIET = ("--trainer.enable_progress_bar=false", "--trainer.logger=false", "--trainer.accelerator=cpu")


def figure(folder: Path) -> float:
    """The accuracy on the model card, in percent."""
    match = re.search(r"\| test accuracy \| ([\d.]+) %", (folder / CARD).read_text())
    assert match is not None
    return float(match[1])


def test_there_are_some_and_they_are_small() -> None:
    assert FOLDERS
    assert sum(file.stat().st_size for folder in FOLDERS for file in folder.iterdir()) < 5e6


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_weights_load_by_name_with_their_own_settings(folder: Path) -> None:
    model = timm.create_model(folder.name, pretrained=True)
    expected = load_file(folder / FILE)
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())
    config = json.loads((folder / CONFIG).read_text())
    assert model.pretrained_cfg["label_names"] == config["pretrained_cfg"]["label_names"]
    assert model.num_classes == len(config["pretrained_cfg"]["label_names"])
    assert folder.name in timm.list_pretrained("*cifar*")
    channels, height, width = config["pretrained_cfg"]["input_size"]
    assert model(torch.zeros(1, channels, height, width)).shape == (1, model.num_classes)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_layout_is_that_of_a_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = timm.create_model(folder.name, pretrained=True).state_dict()
    local = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert all(torch.equal(local.state_dict()[name], tensor) for name, tensor in reference.items())
    if "safetensors" not in inspect.getsource(torch.serialization):
        pytest.skip(f"torch {torch.__version__} loads no safetensors file from a URL")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    network = folder.name.partition(".")[0]
    cfg = json.loads((folder / CONFIG).read_text())["pretrained_cfg"]
    remote = timm.create_model(
        network,
        pretrained=True,
        pretrained_cfg=cfg | dict(url=(folder / FILE).resolve().as_uri(), architecture=network),
    )
    assert all(torch.equal(remote.state_dict()[name], tensor) for name, tensor in reference.items())


def test_a_network_without_a_tag_is_untouched_by_its_weights() -> None:
    model = timm.create_model("aw_resnet8_cifar")
    assert model.conv1.in_channels == 3
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_cards_are_those_that_publish_writes_now(folder: Path) -> None:
    written = (folder / CARD).read_text()
    cells = dict(re.findall(r"^\| ([a-z ]+) \| (.*) \|$", written, re.MULTILINE))
    recipe, epochs = re.findall(r"`(.*)`, (\d+) epochs", cells["recipe"])[0]
    versions = dict(entry.split(" ", 1) for entry in cells["made with"].split(", "))
    scores = {short: float(cells[f"{split} accuracy"][:-2]) / 100 for short, split in SPLITS.items()}
    task = load_task(folder)
    assert isinstance(task, ClassificationTask)
    name = folder.name.partition(".")[0]
    trained = Trained(task, name, int(cells["seed"]), int(epochs), versions, scores, {})
    (data,) = re.findall(r"parameters trained on (.*) by awconv, a library", written)
    how = loading(trained, folder.name, recipe, None)
    assert card(trained, folder.name, data, recipe, cells["licence"], how, adapts=False) == written


SPLITS = {"test": "test", "val": "validation"}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_hub_reads_the_figures_of_a_card(folder: Path) -> None:
    told = ModelCard.load(folder / CARD).data
    assert (told.license, told.library_name, told.pipeline_tag) == ("apache-2.0", "timm", "image-classification")
    assert "awconv" in told.tags
    of_test, of_validation = told.eval_results
    assert (of_test.dataset_split, of_validation.dataset_split) == ("test", "validation")
    assert of_test.task_type == "image-classification"
    assert of_test.metric_type == "accuracy"
    assert of_test.metric_value == pytest.approx(figure(folder) / 100, abs=1e-9)
    assert told.datasets is None  # neither is a data set of the hub as it is there


@pytest.mark.parametrize("adapts", [False, True])
def test_the_hub_learns_what_a_training_started_from(adapts: bool) -> None:
    task = ClassificationTask(["a", "b"], [3, 32, 32], [0.5] * 3, [0.5] * 3, network="resnet18", pretrained=True)
    trained = Trained(task, "resnet18", 0, 1, {}, {"val": 0.25}, {}, "owner/photographs")
    told = ModelCard(card(trained, "resnet18.x", "photos: mine", None, "mit", "", adapts)).data
    assert told.base_model == "timm/resnet18.a1_in1k"
    assert told.base_model_relation == ("adapter" if adapts else "finetune")
    assert told.datasets == ["owner/photographs"]
    (result,) = told.eval_results
    assert (result.dataset_type, result.dataset_name) == ("owner/photographs", "photos: mine")
    assert (result.dataset_split, result.metric_value) == ("validation", 0.25)


def test_changed_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / FOLDERS[0].name
    shutil.copytree(FOLDERS[0], copy)
    published.verify(copy / FILE)
    content = bytearray((copy / FILE).read_bytes())
    content[-1] ^= 1
    (copy / FILE).write_bytes(content)
    with pytest.raises(ValueError, match=r"is not the published file: its SHA-256 must be [0-9a-f]{64}, got"):
        published.verify(copy / FILE)
    with pytest.raises(ValueError, match=r"is not the published file"):
        timm.create_model(FOLDERS[0].name, pretrained=True, pretrained_cfg_overlay=dict(file=str(copy / FILE)))


def evaluated(network: str, *arguments: str) -> TrainingCLI:
    return TrainingCLI(["test", *arguments, f"--model.network={network}", "--model.pretrained=true", *QUIET])


def test_the_digits_reproduce_their_figure() -> None:
    cli = evaluated("aw_resnet8_cifar.digits")
    accuracy = 100 * cli.trainer.callback_metrics["test/accuracy"].item()
    assert f"{accuracy:.2f}" == f"{figure(WEIGHTS / 'aw_resnet8_cifar.digits'):.2f}"  # 360 images: 0.28 each
    assert any(isinstance(module, AWConv2d) for module in cli.model.network.modules())


@pytest.mark.parametrize("folder", [f for f in FOLDERS if "cifar10_jpeg" in f.name], ids=lambda folder: folder.name)
def test_a_subset_of_cifar10_agrees_with_the_figure(folder: Path, shared_data: Path) -> None:
    cli = evaluated(
        folder.name,
        "--config=recipes/cifar10_jpeg_resnet8.yaml",
        f"--data.train={shared_data / 'cifar10-jpeg' / 'test.parquet'}",
        f"--data.test={shared_data / 'cifar10-jpeg' / 'test.parquet'}",
        "--trainer.limit_test_batches=16",
    )
    # Of 2,000 images, the share deviates by about one point; three of them.
    assert 100 * cli.trainer.callback_metrics["test/accuracy"].item() == pytest.approx(figure(folder), abs=3)


def test_weights_of_other_classes_are_not_evaluated(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model.network=aw_resnet8_cifar.digits", "--model.pretrained=true", *QUIET]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("awconv.data.Digits.classes", ["odd", "even"])
        assert main(["test", *arguments]) == 1
    assert "they are of 10 classes, the data of 2" in capsys.readouterr().err
    assert main(["test", "--model.network=aw_resnet8_cifar.none", *QUIET]) == 1
    assert "'aw_resnet8_cifar.none' has no such weights; there are aw_resnet8_cifar" in capsys.readouterr().err


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe and its run."""
    folder = tmp_path_factory.mktemp("compared")
    recipe = folder / "tiny.yaml"
    recipe.write_text("model: {network: resnet8_cifar, ema_decay: 0.5}\ntrainer: {max_epochs: 2, accelerator: cpu}\n")
    assert main(["compare", str(recipe), "--variants=aw", "--seeds=1", f"--out={folder / 'runs'}"]) == 0
    return folder


def test_texts_of_a_run_stay_texts_on_its_card(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(compared / "runs", tmp_path, dirs_exist_ok=True)
    path = tmp_path / "aw-seed0.json"
    run = json.loads(path.read_text())
    run["versions"]["torch"] = "<script>alert(1)</script>|\n\n# Heading\x1b]0;title\x07"
    path.write_text(json.dumps(run))
    out = tmp_path / "\x1b[2J"
    assert main(["publish", str(path), "--tag=t", "--data=x", "--recipe=digits", f"--out={out}"]) == 0
    written = (out / "aw_resnet8_cifar.t" / CARD).read_text()
    assert r"torch &lt;script&gt;alert(1)&lt;/script&gt;\| # Heading\x1b]0;title\x07, " in written
    assert "\n# Heading" not in written
    assert "\x1b" not in capsys.readouterr().out


def test_publishing_a_run(compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(compared, tmp_path, dirs_exist_ok=True)
    recipe, runs, out = tmp_path / "tiny.yaml", tmp_path / "runs", tmp_path / "weights"
    arguments = ["--tag=tiny", "--data=the digits", f"--recipe={recipe}", f"--out={out}"]
    assert main(["publish", str(runs / "aw-seed0.json"), *arguments]) == 0
    folder = out / "aw_resnet8_cifar.tiny"
    run = json.loads((runs / "aw-seed0.json").read_text())
    assert figure(folder) == pytest.approx(100 * run["score"], abs=0.005)
    published.verify(folder / FILE)
    capsys.readouterr()
    cli = TrainingCLI(
        ["test", "--model.network=aw_resnet8_cifar", f"--model.pretrained={folder / FILE}", *QUIET], save_config=False
    )  # the averaged weights, as they were tested
    assert cli.trainer.callback_metrics["test/accuracy"].item() == pytest.approx(run["score"], abs=1e-6)
    command = f"awconv test --config={recipe} --model.network=aw_resnet8_cifar --model.pretrained={folder / FILE}"
    assert command in (folder / CARD).read_text()
    for name, text in (
        ("tag", "../../tiny"),
        ("tag", ""),
        ("license", "mit\ntags: [x]"),
        ("data", "a\n---"),
        ("recipe", ""),
        ("dataset", "photographs"),
    ):
        assert main(["publish", str(runs / "aw-seed0.json"), *arguments, f"--{name}={text}"]) == 1
        assert f"awconv publish: {name} must be " in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.yaml", "runs", "weights"}
    assert main(["publish", str(tmp_path / "none.json"), *arguments]) == 1
    assert "is not a file; expected a record of awconv compare" in capsys.readouterr().err
    other = run | {"epochs": [*run["epochs"][:-1], run["epochs"][-1] | {"train_loss": 0.125}]}
    (runs / "other-seed0.json").write_text(json.dumps(other))
    shutil.copytree(runs / "aw-seed0", runs / "other-seed0")
    assert main(["publish", str(runs / "other-seed0.json"), *arguments]) == 1
    assert "is not the last checkpoint of the run" in capsys.readouterr().err
    (runs / "other-seed0.json").write_text(json.dumps(run | {"network": "../../elsewhere"}))
    assert main(["publish", str(runs / "other-seed0.json"), *arguments]) == 1
    assert "says that its network is ../../elsewhere, and" in capsys.readouterr().err
    assert main(["publish", str(runs / "aw-seed0.json"), "--tag=../up", *arguments[1:]]) == 1
    assert (
        "tag must be a name, without folders, of letters, digits, '.', '-' and '_', at most 100, got '../up'"
        in capsys.readouterr().err
    )
    assert [path.name for path in out.iterdir()] == ["aw_resnet8_cifar.tiny"]
    shutil.rmtree(runs / "aw-seed0")
    assert main(["publish", str(runs / "aw-seed0.json"), *arguments]) == 1
    assert "there is no checkpoint under" in capsys.readouterr().err


def test_a_network_of_ones_own_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that timm knows by name only, without a configuration or a number of features."""

    def tiny_of_my_own(
        pretrained: bool = False, num_classes: int = 10, in_chans: int = 1, **kwargs: object
    ) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(in_chans, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)
        )

    monkeypatch.setitem(timm.models._registry._model_entrypoints, "tiny_of_my_own", tiny_of_my_own)
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text("model: {network: tiny_of_my_own}\ntrainer: {max_epochs: 1, accelerator: cpu}\n")
    assert compare(recipe, "plain", seeds=1, out=out) == 0
    arguments = ["--tag=digits", "--data=the digits", "--recipe=recipe.yaml", f"--out={tmp_path / 'weights'}"]
    assert main(["publish", str(out / "plain-seed0.json"), *arguments]) == 0
    folder = tmp_path / "weights" / "tiny_of_my_own.digits"
    assert json.loads((folder / CONFIG).read_text())["pretrained_cfg"]["num_classes"] == 10
    assert "small network" not in (folder / CARD).read_text()
    checkpoint = next((out / "plain-seed0").rglob("*.ckpt"))
    assert main(["publish", str(checkpoint), *arguments]) == 0


PUBLISHED = {
    "averaged": ("--model.network=resnet8_cifar", "--model.ema_decay=0.5"),
    "arguments": ("--model.network=aw_resnet8_cifar", "--model.network_args={aw_args: {reduction: 4}}"),
    "identity": ("--model.network=resnet8_cifar", "--model.convert={init: identity}"),
    "fresh": ("--model.network=resnet8_cifar", "--model.convert={init: fresh, activation: tanh}"),
    "tagged": ("--model.network=aw_resnet8_cifar.digits", "--model.pretrained=true"),
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_the_command_of_a_checkpoints_card_gives_its_figure(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    short = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--data.val_fraction=0.2")
    assert main(["fit", *PUBLISHED[kind], *short, *QUIET]) == 0
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.ckpt")
    assert main(["publish", str(checkpoint), "--tag=t", "--data=the digits", "--out=my weights"]) == 0
    (folder,) = (tmp_path / "my weights").iterdir()
    written = (folder / CARD).read_text()
    found = re.search(r"\| validation accuracy \| ([\d.]+) %", written)
    command = re.search(r"^    awconv (.*)$", written, re.MULTILINE)
    (result,) = ModelCard(written).data.eval_results
    assert found is not None
    assert command is not None
    cli = TrainingCLI([*shlex.split(command[1]), *QUIET], save_config=False)
    assert f"{100 * cli.trainer.callback_metrics['val/accuracy'].item():.2f}" == found[1]
    assert f"{100 * result.metric_value:.2f}" == found[1]


def test_a_detectors_checkpoint_is_not_published(tmp_path: Path) -> None:
    task = DetectionTask(["cat"], [1], network="resnet8_cifar")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("awconv.publish.read_checkpoint", lambda path: {"callbacks": {}})
        patch.setattr("awconv.publish.load_task", lambda path: task)
        with pytest.raises(ValueError, match=r"only classifiers are published, and .*x\.ckpt is of a detector"):
            publish(tmp_path / "x.ckpt", "t", "cats", out=tmp_path)
