"""The figures of each class in an evaluation."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image
from sklearn.metrics import precision_recall_fscore_support

from awconv.cli import main
from awconv.training.class_report import CLASSES, CONFUSION, PICTURE, ClassReport, class_figures


def counted(true: torch.Tensor, predicted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    pairs, counts = torch.unique(torch.stack([true, predicted]), dim=1, return_counts=True)
    return pairs, counts


@pytest.mark.parametrize("number", [2, 7, 40])
def test_the_figures_are_those_of_scikit_learn(number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    true = torch.randint(number - 1, (300,), generator=generator)  # the last class has no image
    predicted = torch.where(torch.rand(300, generator=generator) < 0.5, true, torch.randint(number, (300,)))
    rows = class_figures(*counted(true, predicted), [str(index) for index in range(number)])
    precision, recall, f1, images = precision_recall_fscore_support(
        true, predicted, labels=range(number), zero_division=np.nan
    )
    for column, expected in ((1, images), (2, precision), (3, recall)):
        np.testing.assert_allclose([row[column] for row in rows], expected, rtol=1e-12)
    np.testing.assert_allclose([row[4] for row in rows if row[1]], f1[np.array(images) > 0], rtol=1e-12)


def report(folder: Path | None, classes: list[str], true: list[int], predicted: list[int], batches: int = 2) -> None:
    """An evaluation as Lightning calls the report."""
    trainer: Any = SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.TESTING), is_global_zero=True)
    task: Any = SimpleNamespace(classes=classes)
    one = ClassReport(folder)
    one.setup(trainer, task, "test")
    for batch in range(batches):
        outputs = {"targets": torch.tensor(true[batch::batches]), "predicted": torch.tensor(predicted[batch::batches])}
        one.on_test_batch_end(trainer, task, outputs, None, batch)
    one.on_test_end(trainer, task)


def test_a_folder_has_tables_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["cat\x1b[2J", "$dog$, large", "none"]
    for _ in range(2):  # the second one replaces the first
        report(tmp_path / "report", names, [0, 0, 0, 1], [0, 0, 1, 1])
    with (tmp_path / "report" / CLASSES).open() as file:
        head, *rows = csv.reader(file)
    assert head == ["class", "images", "precision", "recall", "F1"]
    assert rows[0] == [r"cat\x1b[2J", "3", "1.0", str(2 / 3), "0.8"]
    assert rows[1][:2] == ["$dog$, large", "1"]
    assert rows[2] == ["none", "0", "", "", ""]
    with (tmp_path / "report" / CONFUSION).open() as file:
        assert list(csv.reader(file))[1:] == [
            [r"cat\x1b[2J", r"cat\x1b[2J", "2"],
            [r"cat\x1b[2J", "$dog$, large", "1"],
            ["$dog$, large", "$dog$, large", "1"],
        ]
    assert Image.open(tmp_path / "report" / PICTURE).size > (300, 300)
    assert {path.name for path in (tmp_path / "report").iterdir()} == {CLASSES, CONFUSION, PICTURE}
    assert "66.7" in capsys.readouterr().out


def test_of_many_classes_the_worst_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    true = list(range(30))
    report(None, [f"class {index}" for index in true], true, [0, 0, *true[2:]])
    out = capsys.readouterr().out
    assert "class 1 " in out
    assert "class 29" not in out
    assert "the 20 of 30 classes with the lowest F1; --report.folder=FOLDER writes all" in " ".join(out.split())


def test_nothing_of_somebody_else_is_written_over(tmp_path: Path) -> None:
    (tmp_path / CLASSES).write_text("mine\n")
    with pytest.raises(ValueError, match=r"would be written over .*classes\.csv, which is no former report"):
        report(tmp_path, ["a"], [0], [0], 1)
    with pytest.raises(ValueError, match=r"report\.folder must be a folder, and .* is a file"):
        report(tmp_path / CLASSES, ["a"], [0], [0], 1)
    assert (tmp_path / CLASSES).read_text() == "mine\n"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a converted network on images of another size and normalisation than the data's own."""
    root = tmp_path_factory.mktemp("trained")
    arguments = ["--data.image_size=10", "--data.mean=[0.4]", "--data.crop_pct=0.9", "--trainer.max_steps=2"]
    network = ["--model.network=resnet8_cifar", "--model.convert={init: identity}", "--model.ema_decay=0.5"]
    assert main(["fit", *arguments, *network, *QUIET, f"--trainer.default_root_dir={root}"]) == 0
    (path,) = root.rglob("epoch*.ckpt")
    return path


QUIET = ("--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.logger=false")


def test_a_checkpoint_knows_its_images(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate = ["test", f"--ckpt={checkpoint}", "--data=Digits", *QUIET]
    assert main([*evaluate, f"--report.folder={tmp_path / 'report'}"]) == 0
    with (tmp_path / "report" / CLASSES).open() as file:
        assert sum(int(row["images"]) for row in csv.DictReader(file)) == 360
    told = ["--data.image_size=10", "--data.mean=[0.4]", "--data.crop_pct=0.9"]
    same, other = capsys.readouterr().out, {}
    for name, more in {"told": told, "larger": ["--data.image_size=16"], "other": ["--data.mean=[0.3]"]}.items():
        status = main([*evaluate, *more])
        other[name] = status, *capsys.readouterr()
    assert other["told"][:2] == (0, same.replace(f"Report: {tmp_path / 'report'}\n", ""))
    assert other["larger"][0] == 0
    assert other["larger"][1] != other["told"][1]
    assert other["other"][0] == 1
    assert "the checkpoint was trained with mean [0.4], and the data have [0.3]" in other["other"][2]


def test_a_training_from_a_checkpoint_takes_its_network(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["fit", f"--model.pretrained={checkpoint}", "--trainer.max_steps=1", *QUIET]
    assert main([*start, f"--trainer.default_root_dir={tmp_path}"]) == 0
    error = capsys.readouterr().err
    assert f"the network, resnet8_cifar, converted and the image size, 10: as in {checkpoint}" in error
    (path,) = tmp_path.rglob("epoch*.ckpt")
    trained = torch.load(path, weights_only=True)["hyper_parameters"]
    assert (trained["input_size"], trained["mean"], trained["crop_pct"]) == ([1, 10, 10], [0.4], 0.9)
    assert main([*start, "--model.network=resnet20_cifar", f"--trainer.default_root_dir={tmp_path}"]) == 1
    assert "does not hold the weights of resnet20_cifar" in capsys.readouterr().err
