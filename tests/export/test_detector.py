"""Exported detectors on photographs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops.boxes import batched_nms, clip_boxes_to_image

from awconv.cli import main
from awconv.export import detector as graph
from awconv.tasks import DetectionTask
from tests.photographs import SEEN, photograph

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def task() -> DetectionTask:
    """An untrained Faster R-CNN with AW-convolutions whose scores are decided, and differ between objects."""
    torch.manual_seed(0)
    task = DetectionTask(
        ["a", "b", "c"], [1, 2, 3], network="resnet8_cifar", convert={"select": ["*layer2*"]}, min_size=64, max_size=96
    ).eval()
    network: Any = task.network
    for layer in [*network.rpn.head.modules(), *network.roi_heads.box_predictor.modules()]:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.normal_(layer.weight, std=0.05)
    return task


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for name in SEEN:
        photograph(name).save(folder / f"{name}.png")
    return folder


def detections(source: str, photographs: Path, capsys: pytest.CaptureFixture[str]) -> list[list[dict[str, Any]]]:
    capsys.readouterr()
    assert main(["predict", source, "--format=json", "--threshold=0.2", str(photographs)]) == 0
    return [one["detections"] for one in json.loads(capsys.readouterr().out)["predictions"]]


@pytest.mark.skipif(torch.__version__ < (2, 10), reason="torch 2.9 does not export how a detector drops proposals")
def test_a_file_finds_what_its_checkpoint_does(
    task: DetectionTask,
    photographs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("awconv.export.command.load_task", lambda *_: task)
    monkeypatch.setattr("awconv.predict.load_task", lambda *_: task)
    file = tmp_path / "a.onnx"
    assert main(["export", "x", f"--out={file}"]) == 0
    assert "objects are the same, and their scores differ from PyTorch's by" in capsys.readouterr().out
    expected, got = (detections(source, photographs, capsys) for source in ("--ckpt=x", f"--model={file}"))
    assert sum(map(len, expected)) > 20
    for ours, theirs in zip(got, expected, strict=True):
        assert [one["label"] for one in ours] == [one["label"] for one in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert one["score"] == pytest.approx(other["score"], abs=1e-3)
            assert one["box"] == pytest.approx(other["box"], abs=0.05)  # pixels
    assert main(["predict", f"--model={file}", "--threshold=0.01", str(photographs)]) == 1
    assert "threshold must be at least 0.05, below which the file gives nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("a.onnx --batch=2", "batch must be 1 for a detector, got 2"),
        ("a.onnx --uint8=true", "uint8 is for classifiers"),
        ("a.pt2", "format must be onnx or openvino for a detector, got pt2"),
        ("a.onnx --precision=fp16", "precision must be fp32 for a detector, or fp16 with --format=openvino, got fp16"),
    ],
)
def test_what_a_detector_does_not_take_is_named(
    arguments: str,
    message: str,
    task: DetectionTask,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("awconv.export.command.load_task", lambda *_: task)
    assert main(["export", "x", *f"--out={tmp_path}/{arguments}".split()]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_stands_in_for_torchvisions_functions_gives_the_same() -> None:
    torch.manual_seed(0)
    corners = 60 * torch.rand(500, 2)
    boxes = torch.cat([corners, corners + 40 * torch.rand(500, 2)], 1)
    scores, classes = torch.rand(500), torch.randint(0, 4, (500,))
    kept = graph._batched_nms(boxes, scores, classes, 0.5)
    assert 20 < len(kept) < 480
    assert torch.equal(kept, batched_nms(boxes, scores, classes, 0.5))
    clipped = graph._clipped(boxes - 20, (torch.tensor(30.0), torch.tensor(50.0)))
    assert torch.equal(clipped, clip_boxes_to_image(boxes - 20, (30, 50)))
    coder, codes = BoxCoder((10.0, 10.0, 5.0, 5.0)), torch.randn(500, 12)
    assert torch.equal(graph._decoded(coder, codes, [boxes]), coder.decode(codes, [boxes]))
    assert graph._decoded(coder, codes[:0], [boxes[:0]]).shape == (0, 3, 4)
