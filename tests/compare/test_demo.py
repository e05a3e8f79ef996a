"""The demo: what it trains, says and shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from awconv.compare import demo
from awconv.compare.commands import _verdict
from awconv.compare.record import EpochRecord, Record
from awconv.explain.folder import write_folder

SHORT = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=4"]


def test_it_says_what_the_task_is_and_ends_with_table_curves_and_explanation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pytorch_grad_cam", reason="the explanation needs the extra explain")
    assert demo(seeds=1, out=tmp_path, overrides=SHORT) == 0
    printed, said = capsys.readouterr()
    assert "5,385 scenes to learn from, and 1,440 of other digits for the test" in printed
    assert (
        printed.index("The task")
        < printed.index("paired difference")
        < printed.index("One seed says")
        < printed.index("Attention acts most in")
    )
    assert str(tmp_path / "explain" / "index.html") in said
    assert "<svg" in (tmp_path / "curves.svg").read_text()
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [run["variant"] for run in runs] == ["plain", "aw"]
    figures = json.loads((tmp_path / "explain" / "explain.json").read_text())
    assert figures["images"] == 1440
    assert figures["accuracy"] == pytest.approx(100 * runs[1]["score"], abs=0.1)  # one image's rounding may differ


def test_a_folder_that_cannot_be_replaced_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    write_folder(tmp_path / "explain", {"explain.json": b"{}"})
    (tmp_path / "explain" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds what awconv explain did not write"):
        demo(seeds=1, out=tmp_path, overrides=SHORT)
    assert {path.name for path in tmp_path.iterdir()} == {"explain"}


@pytest.mark.parametrize(
    ("aw", "said"),
    [
        ((0.66, 0.67, 0.68), "AW is better at this task"),
        ((0.54, 0.55, 0.56), "AW is worse at this task"),
        ((0.59, 0.62, 0.63), "Neither is better at this task"),
        ((0.62,), "One seed says nothing"),
    ],
)
def test_it_says_what_the_difference_tells(aw: tuple[float, ...], said: str) -> None:
    plain = (0.60, 0.61, 0.62)[: len(aw)]
    records = [
        Record(variant, network, seed, 1, "test", score, [EpochRecord(1.0, score, 1.0)], {}, {})
        for seed in range(len(aw))
        for variant, network, score in (("plain", "resnet8_cifar", plain[seed]), ("aw", "aw_resnet8_cifar", aw[seed]))
    ]
    assert said in _verdict(records)
