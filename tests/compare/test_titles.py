"""Titles of comparisons, and lists of variants."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from awconv.cli import main
from awconv.compare.commands import _listed
from tests.data.samples import write_tree

SHORT = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=1")


def title(folder: Path) -> str:
    return json.loads((folder / "results.json").read_text())["title"]


def test_a_title_names_the_data_that_was_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "digits.yaml"
    recipe.write_text("model: {network: resnet8_cifar}\n")
    write_tree(tmp_path / "cookware", {"train": 20, "val": 10})
    compared, other, ablated = (tmp_path / name for name in ("compared", "other", "ablated"))
    start = ["compare", str(recipe), "--seeds=1", "--variants=plain aw"]
    assert main([*start, f"--out={compared}", "--", *SHORT]) == 0
    assert title(compared) == "resnet8_cifar: plain against aw on Digits (digits)"
    photographs = [
        "--data=ImageFolder",
        f"--data.root={tmp_path}/cookware/",
        "--data.image_size=8",
        "--data.batch_size=10",
    ]
    assert main([*start, f"--out={other}", "--", *SHORT, *photographs]) == 0
    assert title(other) == "resnet8_cifar: plain against aw on ImageFolder cookware (digits)"
    assert "on ImageFolder cookware (digits)" in (other / "index.html").read_text()
    start = ["ablate", str(recipe), "--seeds=1", "--vary=reduction=4,activation=tanh"]
    assert main([*start, f"--out={ablated}", "--", *SHORT, *photographs]) == 0
    assert title(ablated) == "aw_resnet8_cifar: choices for the branch on ImageFolder cookware (digits)"
    assert "on ImageFolder cookware (digits)" in capsys.readouterr().out


def test_a_comparison_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text("model: {network: resnet8_cifar}\n")
    assert main(["compare", str(tmp_path / "r.yaml"), "--variants= ", f"--out={tmp_path}/out"]) == 1
    expected = "awconv compare: variants must name at least one, such as plain,aw, got ' '\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("plain,aw", ["plain", "aw"]),
        ("plain aw  se", ["plain", "aw", "se"]),
        ("plain, my file.yaml", ["plain", "my file.yaml"]),
        ("reduction=4,activation=tanh", ["reduction=4", "activation=tanh"]),
        ("kernel_expansion=[1, 3]", ["kernel_expansion=[1, 3]"]),
        ("kernel_expansion=[1,3] reduction=4", ["kernel_expansion=[1,3]", "reduction=4"]),
        ("plain,", ["plain", ""]),  # which is refused
        (" ", []),
    ],
)
def test_variants_and_changes_stand_between_commas_or_spaces(text: str, parts: list[str]) -> None:
    assert _listed(text) == parts
