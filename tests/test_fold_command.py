"""``awconv fold``, on scikit-learn's digits."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import lightning
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import awconv
from awconv.branch import AttentionBranch
from awconv.cli import main
from awconv.data import Digits
from awconv.layers import AW_LAYERS
from awconv.sources import load_task
from awconv.tasks import ClassificationTask
from awconv.training.checkpoints import find_last

NAME = "aw_resnet8_cifar.digits"
STAGES = [f"layer{stage}.0.conv{number}" for stage in (1, 2, 3) for number in (1, 2)]


def images_of(split: str) -> tuple[Tensor, Tensor]:
    """The images of a split as the network takes them, and their classes."""
    found = list(getattr(Digits(), f"{split}_dataloader")())
    images = torch.cat([images for images, _ in found])
    return (images / 255 - 0.305) / 0.376, torch.cat([targets for _, targets in found])


def aw_layers(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, AW_LAYERS)]


def checkpoint_of(file: Path, **arguments: Any) -> Path:
    """A checkpoint of a network with varied attention, whose classifier knows the images held out for validation."""
    classes = [str(digit) for digit in range(10)]
    task = ClassificationTask(classes, [1, 8, 8], [0.305], [0.376], **arguments).eval()
    for branch in task.modules():
        if isinstance(branch, AttentionBranch):
            nn.init.normal_(branch.norm2.weight, std=300)  # whose inputs are small
    network: Any = task.evaluated
    images, targets = images_of("val")
    with torch.no_grad():
        features = network.forward_head(network.forward_features(images), pre_logits=True)
        features -= (center := features.mean(0))
        solved = torch.linalg.lstsq(features, nn.functional.one_hot(targets, 10).float()).solution.T
        network.fc.weight.copy_(solved)
        network.fc.bias.copy_(-solved @ center)
        for parameter in [] if task.ema is None else task.network.parameters():  # which the averaged one is not
            parameter.zero_()
    return written(task, file)


def written(task: ClassificationTask, file: Path) -> Path:
    parts = {"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams), "callbacks": {}}
    torch.save(parts | {"pytorch-lightning_version": lightning.__version__}, file)
    return file


def by_the_library(source: str | Path, max_drop: float, split: str = "val") -> tuple[Any, Tensor]:
    """The report, and the logits of the folded network for the images of the test."""
    network = awconv.load(source).network
    report = awconv.fold(network, [images_of(split)], max_drop)
    with torch.no_grad():
        return report, network(images_of("test")[0])


def logits_of(source: str | Path) -> Tensor:
    with torch.no_grad():
        return awconv.load(source).network(images_of("test")[0])


@pytest.fixture
def folded(tmp_path: Path) -> Path:
    """The digits' network with some of its layers folded."""
    out = tmp_path / "folded.ckpt"
    assert main(["fold", NAME, "--data=Digits", "--max_drop=0.6", "--split=test", f"--out={out}"]) == 0
    return out


def test_it_prints_what_was_folded_and_writes_the_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "there" / "folded.ckpt"
    assert main(["fold", NAME, "--data=Digits", "--max_drop=0.5", "--split=test", f"--out={out}"]) == 0
    printed, said = capsys.readouterr()
    report, logits = by_the_library(NAME, 0.5, "test")
    assert [line.split()[0] for line in printed.splitlines()[1:7]] == [trial.layer for trial in report.trials]
    assert " ".join(printed.split()).endswith(report.table().note)
    assert said == f"awconv fold: the folded network is {out}\n"
    torch.testing.assert_close(logits_of(out), logits)
    assert aw_layers(awconv.load(out).network) == [name for name in STAGES if name in report.kept]
    assert [file.name for file in out.parent.iterdir()] == ["folded.ckpt"]


def test_the_images_held_out_for_validation_are_the_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        out = tmp_path / f"{split}.ckpt"
        given = [] if split == "val" else [f"--split={split}"]
        assert main(["fold", NAME, "--data=Digits", "--max_drop=100", "--format=json", f"--out={out}", *given]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["images"] == len(Digits().dataset(split)) == {"train": 1293, "val": 144}[split]
        assert {trial["layer"] for trial in found["trials"]} == set(STAGES)
    report, logits = by_the_library(NAME, 100)
    assert found["accuracy_after"] == report.accuracy_after
    torch.testing.assert_close(logits_of(tmp_path / "val.ckpt"), logits)


WRITTEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a registered network": (
        dict(network="aw_resnet8_cifar", network_args={"aw_args": {"reduction": 4}, "drop_rate": 0.1}),
        dict(network="resnet8_cifar", network_args={"drop_rate": 0.1}, convert=None),
    ),
    "one with squeeze-and-excitation": (
        dict(network="aw_seresnet8_cifar"),
        dict(network="seresnet8_cifar", network_args=None, convert=None),
    ),
    "a converted network": (
        dict(network="resnet8_cifar", convert={"init": "identity", "reduction": 4, "select": ["layer*.conv?"]}),
        dict(network="resnet8_cifar", network_args=None, convert=None),
    ),
    "a registered network that was converted": (
        dict(network="aw_resnet8_cifar", convert={"init": "identity", "activation": "tanh", "select": "conv1"}),
        dict(network="resnet8_cifar", network_args=None, convert=None),
    ),
    "an averaged network": (
        dict(network="aw_resnet8_cifar", ema_decay=0.9),
        dict(network="resnet8_cifar", network_args=None, convert=None),
    ),
    "what trained of a frozen network": (
        dict(network="resnet8_cifar", convert={"init": "identity"}, train_only=["branch"], pretrained=True),
        dict(network="resnet8_cifar", network_args=None, convert=None),
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_builds_the_same_network(name: str, tmp_path: Path) -> None:
    arguments, expected = WRITTEN[name]
    source = checkpoint_of(tmp_path / "trained.ckpt", **arguments)
    content = source.read_bytes()
    whole = aw_layers(load_task(source).evaluated)
    first = by_the_library(source, 100)[0]
    of_one = max(0.0, first.accuracy_before - first.trials[0].accuracy_alone)
    for max_drop in (of_one, 100):
        out = tmp_path / f"{max_drop}.ckpt"
        assert main(["fold", str(source), "--data=Digits", f"--max_drop={max_drop}", f"--out={out}"]) == 0
        report, logits = by_the_library(source, max_drop)
        assert bool(report.kept) == (max_drop < 100)
        torch.testing.assert_close(logits_of(out), logits, rtol=1e-4, atol=1e-4)
        task = load_task(out)
        assert aw_layers(task.evaluated) == [name for name in whole if name in report.kept]
        assert not any(task.hparams[name] for name in ("pretrained", "train_only", "ema_decay"))
    assert {name: task.hparams[name] for name in ("network", "network_args", "convert")} == expected
    assert source.read_bytes() == content


def test_every_command_takes_it(folded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logits, (_, targets) = logits_of(folded), images_of("test")
    assert 0 < len(aw_layers(awconv.load(folded).network)) < 6
    capsys.readouterr()
    assert main(["test", f"--ckpt_path={folded}", f"--trainer.default_root_dir={tmp_path}"]) == 0
    accuracy = (logits.argmax(1) == targets).double().mean().item()
    assert f"{accuracy:.6f}"[:6] in capsys.readouterr().out
    picture = tmp_path / "digit.png"
    Image.fromarray(next(iter(Digits().test_dataloader()))[0][0, 0].numpy()).save(picture)
    assert main(["predict", f"--ckpt={folded}", "--format=json", str(picture)]) == 0
    (prediction,) = json.loads(capsys.readouterr().out)["predictions"]
    assert prediction["label"] == str(int(logits[0].argmax()))
    assert prediction["probability"] == pytest.approx(logits[0].softmax(0).max().item(), abs=1e-5)
    assert main(["publish", str(folded), "--tag=folded", "--data=digits", f"--out={tmp_path}"]) == 0
    published = tmp_path / "aw_resnet8_cifar.folded"
    torch.testing.assert_close(logits_of(published), logits)
    card = (published / "README.md").read_text()
    assert "awconv test --data=Digits" in card
    assert "accuracy" not in card.partition("```")[0].replace("awconv", "")  # that of the network before is not its own
    with torch.no_grad():
        network = timm.create_model(f"local-dir:{published}", pretrained=True).eval()
        torch.testing.assert_close(network(images_of("test")[0]), logits)
    again = tmp_path / "again.ckpt"
    assert main(["fold", str(published), "--data=Digits", "--max_drop=100", f"--out={again}"]) == 0
    assert aw_layers(awconv.load(again).network) == []


def test_a_training_starts_from_it(folded: Path, tmp_path: Path) -> None:
    of_trainer = f"default_root_dir={tmp_path} max_steps=1 logger=false enable_progress_bar=false limit_val_batches=0"
    options = [f"--trainer.{option}" for option in of_trainer.split()]
    assert main(["fit", f"--model.pretrained={folded}", "--model.lr=0", "--model.warmup_epochs=0", *options]) == 0
    trained = find_last(tmp_path / "checkpoints")
    assert trained is not None
    network, start = load_task(trained).evaluated, load_task(folded).evaluated
    assert aw_layers(network) == aw_layers(start)
    for (name, parameter), (_, before) in zip(network.named_parameters(), start.named_parameters(), strict=True):
        torch.testing.assert_close(parameter, before, msg=name)
    out = tmp_path / "plain.ckpt"
    assert main(["fold", str(trained), "--data=Digits", "--max_drop=100", f"--out={out}"]) == 0
    assert torch.load(out, weights_only=True)["epoch"] == torch.load(trained, weights_only=True)["epoch"]


OUT = "--out={here}/o.ckpt"
REFUSED = {
    "no data": (f"{NAME} {OUT}", "missing: --data: the data set, such as Digits"),
    "an unknown option": (f"{NAME} --data=Digits --drop=1 {OUT}", "there is no option --drop; near it: --max_drop"),
    "an unknown option of the data": (f"{NAME} --data=Digits --data.rot=1 {OUT}", "there is no option --data.rot"),
    "a folder that is missing": (f"{NAME} --data=ImageFolder {OUT}", "--data.root is missing: the folder that holds"),
    "boxes": (f"{NAME} --data=Coco {OUT}", "there is no class 'Coco' for data; there are Cifar10"),
    "too large a drop": (
        f"{NAME} --data=Digits --max_drop=101 {OUT}",
        "max_drop must be a number from 0 to 100",
    ),
    "no drop": (f"{NAME} --data=Digits --max_drop=nan {OUT}", "max_drop must be a number"),
    "another ending": (f"{NAME} --data=Digits --out={{here}}/o.pt", r"out must be .* ends in \.ckpt"),
    "its input": ("{here}/plain.ckpt --data=Digits --out={here}/plain.ckpt", "is there already"),
    "a link": (f"{NAME} --data=Digits --out={{here}}/link.ckpt", "is there already"),
    "no folder": (f"{NAME} --data=Digits --out={{here}}/plain.ckpt/o.ckpt", "plain.ckpt: "),
    "a plain network": (
        f"{{here}}/plain.ckpt --data=Digits {OUT}",
        "has no AW-convolution, so there is nothing",
    ),
    "no such file": (f"{{here}}/none.ckpt --data=Digits {OUT}", "none.ckpt is not there"),
    "no held-out images": (f"{NAME} --data=Digits --data.val_fraction=0 {OUT}", "the data have no val split"),
    "another mean": (
        f"{NAME} --data=Digits --data.mean=[0.5] {OUT}",
        r"mean \[0\.305\], and the data have \[0\.5\]",
    ),
    "other classes": (f"{{here}}/three.ckpt --data=Digits {OUT}", r"has classes \['a', 'b', 'c'\], and the data have"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_in_a_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = REFUSED[name]
    if "plain" in arguments:
        checkpoint_of(tmp_path / "plain.ckpt", network="resnet8_cifar")
    if "three" in arguments:
        task = ClassificationTask(["a", "b", "c"], [1, 8, 8], [0.305], [0.376], network="aw_resnet8_cifar")
        written(task, tmp_path / "three.ckpt")
    (tmp_path / "link.ckpt").symlink_to("nowhere")
    before = sorted(tmp_path.iterdir())
    assert main(["fold", *arguments.format(here=tmp_path).split()]) in (1, 2)
    printed, said = capsys.readouterr()
    assert re.search(message, said), said
    assert printed == ""
    assert sorted(tmp_path.iterdir()) == before


def test_a_detector_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("awconv.fold_command.load_task", lambda *arguments: nn.Identity())
    assert main(["fold", "detector.ckpt", "--data=Digits", f"--out={tmp_path}/o.ckpt"]) == 1
    assert "only classifiers are folded, by their accuracy, and detector.ckpt is a detector" in capsys.readouterr().err


def test_networks_that_convert_themselves_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(awconv.models.BASELINES, "aw_resnet8_cifar")
    out = tmp_path / "o.ckpt"
    assert main(["fold", NAME, "--data=Digits", "--max_drop=100", f"--out={out}"]) == 1
    assert "makes AW-convolutions by code of its own" in capsys.readouterr().err
    assert not out.exists()


def test_data_of_another_kind_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part, index in itertools.product(("train", "val"), range(10)):
        folder = tmp_path / part / str(index)
        folder.mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (8, 8), (index, number, 0)).save(folder / f"{number}.png")
    assert main(["fold", NAME, "--data=ImageFolder", f"--data.root={tmp_path}", f"--out={tmp_path / 'o.ckpt'}"]) == 1
    assert "the network has channels [1], and the data have [3]; give data as it was" in capsys.readouterr().err
