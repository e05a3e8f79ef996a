"""The file of detections: which files it may replace, and which links it follows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from awconv.training.detections import DetectionFile

DETECTION = {"image_id": 1, "category_id": 2, "bbox": [0.0, 0.0, 1.0, 1.0], "score": 0.5}
TRAINER: Any = SimpleNamespace(is_global_zero=True, sanity_checking=False)
TASK: Any = SimpleNamespace(evaluation=None, category_ids=None)


@pytest.fixture(autouse=True)
def _found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("awconv.training.detections.coco_results", lambda *_: [DETECTION])


@pytest.mark.parametrize(
    "content",
    [
        json.dumps({"images": [], "annotations": [], "categories": []}),
        json.dumps([{name: value for name, value in DETECTION.items() if name != "score"}]),
        json.dumps([[DETECTION]]), json.dumps(DETECTION), "[1, 2]", "[", "[" * 5000, "{}", "", "my notes",
        b"\x89PNG\r\n\x1a\n\xff",
    ],
)  # fmt: skip
def test_another_file_is_refused_before_the_evaluation(content: str | bytes, tmp_path: Path) -> None:
    file = tmp_path / "annotations.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = file.read_bytes()
    with pytest.raises(
        ValueError, match=r"over .*annotations\.json, which holds no detections; name another file, or remove this one"
    ):
        DetectionFile(file).setup(TRAINER, TASK, "test")
    assert file.read_bytes() == before


def test_a_pipe_is_no_file_to_replace(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe, which holds no detections"):
        DetectionFile(tmp_path / "pipe").setup(TRAINER, TASK, "test")


@pytest.mark.parametrize("there", [None, [], [DETECTION], [DETECTION] * 1000])
def test_detections_of_a_former_run_are_renewed(there: list[Any] | None, tmp_path: Path) -> None:
    file = tmp_path / "new" / "found.json"
    if there is not None:
        file.parent.mkdir()
        file.write_text(json.dumps(there, indent=1) + "\n")
    for _ in range(2):
        callback = DetectionFile(file)
        callback.setup(TRAINER, TASK, "test")
        callback.on_test_end(TRAINER, TASK)
    assert json.loads(file.read_text()) == [DETECTION]
    assert os.listdir(file.parent) == ["found.json"]


def test_no_link_is_followed(tmp_path: Path) -> None:
    precious, file = tmp_path / "precious", tmp_path / "found.json"
    precious.write_text("mine")
    (tmp_path / "found.json.partial").symlink_to(precious)
    callback = DetectionFile(file)
    callback.setup(TRAINER, TASK, "test")
    file.symlink_to(precious)  # meanwhile
    callback.on_test_end(TRAINER, TASK)
    assert precious.read_text() == "mine"
    assert json.loads(file.read_text()) == [DETECTION]
    assert not file.is_symlink()


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".0123456789abcdef.partial"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    DetectionFile(tmp_path / "found.json").setup(TRAINER, TASK, "test")
    assert not left.exists()
