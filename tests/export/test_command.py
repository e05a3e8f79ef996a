"""``awconv export`` and ``awconv predict --model``: equal predictions, the check, and a user's mistakes."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from awconv.cli import main
from awconv.export import onnx_format
from awconv.export.exported import open_exported
from awconv.export.metadata import Metadata, parsed
from awconv.tasks import ClassificationTask
from tests.data.samples import write_parquet
from tests.export.conftest import NAME

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

Exported = Callable[..., Path]


def predictions(source: str, images: Path, capsys: pytest.CaptureFixture[str], *more: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["predict", source, "--format=json", "--top_k=3", *more, str(images)]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["predictions"]
    return found


@pytest.mark.parametrize(
    ("ending", "arguments"),
    [
        (".onnx", {}),
        (".onnx", dict(uint8=True, size="dynamic")),
        (".onnx", dict(batch=7)),
        (".xml", dict(precision="fp32")),
        (".pt2", {}),
    ],
)
def test_a_file_predicts_what_its_checkpoint_does(
    ending: str, arguments: dict[str, Any], exported: Exported, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if ending == ".xml":
        pytest.importorskip("openvino")
    expected = predictions(f"--ckpt={NAME}", digits / "3", capsys)
    got = predictions(f"--model={exported(ending, **arguments)}", digits / "3", capsys, "--batch_size=10")
    assert len(got) == len(expected) >= 30
    for one, other in zip(got, expected, strict=True):
        assert (one["image"], one["label"]) == (other["image"], other["label"])
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-4)
        assert [lesser["probability"] for lesser in one["others"]] == pytest.approx(
            [lesser["probability"] for lesser in other["others"]], abs=1e-4
        )


def test_a_file_for_any_size_takes_an_image_size(
    exported: Exported, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = predictions(f"--ckpt={NAME}", digits / "3", capsys, "--image_size=12")
    file = exported(".onnx", uint8=True, size="dynamic")
    got = predictions(f"--model={file}", digits / "3", capsys, "--image_size=12")
    assert [one["label"] for one in got] == [one["label"] for one in expected]
    assert main(["predict", f"--model={exported('.onnx')}", "--image_size=12", str(digits)]) == 1
    assert "image_size must be 8, got 12: the network was exported for one size" in capsys.readouterr().err


def test_labels_give_the_accuracy_before_and_after(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", NAME, f"--out={tmp_path / 'a.onnx'}", f"--check={digits}"]) == 0
    size, figures = capsys.readouterr().out.splitlines()
    assert size.startswith(f"{tmp_path / 'a.onnx'}: ")
    assert f"on 360 images of {digits}, logits differ" in figures
    assert "; accuracy 99.17 % in PyTorch, 99.17 % in the file" in figures  # the figure of its model card
    write_parquet(tmp_path / "others.parquet", range(20))  # whose classes are digit0 and so on
    assert main(["export", NAME, f"--out={tmp_path / 'b.onnx'}", f"--check={tmp_path / 'others.parquet'}"]) == 0
    assert "; accuracy" not in capsys.readouterr().out


def test_calibration_fills_a_batch_with_fewer_images(digits: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for index, file in enumerate(sorted(digits.rglob("*.png"))[::60]):
        (few / f"{index}.png").write_bytes(file.read_bytes())
    out = tmp_path / "a.onnx"
    assert main(["export", NAME, f"--out={out}", "--precision=int8", f"--calibrate={few}", "--batch=8"]) == 0
    assert open_exported(out).metadata.batch == 8


def test_a_file_that_computes_something_else_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = onnx_format.write
    (tmp_path / "old.onnx").write_bytes(b"of an earlier export")

    def spoil(proto: Any, metadata: Metadata, file: Path) -> None:
        weight = max(proto.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        values = np.frombuffer(weight.raw_data, np.float32).copy()
        values[0] += 1
        weight.raw_data = values.tobytes()
        write(proto, metadata, file)

    monkeypatch.setattr(onnx_format, "write", spoil)
    assert main(["export", NAME, f"--out={tmp_path / 'old.onnx'}"]) == 1
    printed = capsys.readouterr()
    assert "the exported network does not compute what PyTorch does" in printed.err
    assert "logits must agree to 0.0001 of the largest" in printed.err
    assert printed.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["old.onnx"]
    assert (tmp_path / "old.onnx").read_bytes() == b"of an earlier export"


def test_an_export_changes_no_network(
    task: ClassificationTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: value.clone() for name, value in task.state_dict().items()}
    monkeypatch.setattr("awconv.export.command.load_task", lambda *_: task)
    assert main(["export", "x", f"--out={tmp_path / 'a.onnx'}"]) == 0
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())


def test_a_network_for_one_size_is_refused_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = dict(img_size=32, depth=1)
    task = ClassificationTask(
        ["a", "b"], [3, 32, 32], [0.5] * 3, [0.5] * 3, network="vit_tiny_patch16_224", network_args=arguments
    ).eval()
    monkeypatch.setattr("awconv.export.command.load_task", lambda *_: task)
    assert main(["export", "x", f"--out={tmp_path / 'a.onnx'}", "--size=dynamic"]) == 1
    error = capsys.readouterr().err
    assert "vit_tiny_patch16_224 takes images of one size only, so --size must be fixed: Input height" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{here}/a.txt", "out must end in .onnx (onnx), .xml (openvino), .pt2 (pt2), got {here}/a.txt"),
        ("{here}/a.onnx --format=openvino", "out must end in .xml for --format=openvino, got {here}/a.onnx"),
        ("{here}/none/a.onnx", "out: {here}/none is not a folder; make it first"),
        ("{here}/folder.onnx", "out must be a file, and {here}/folder.onnx is a folder"),
        ("{here}/a.onnx --precision=int8", "--precision=int8 needs --calibrate=FOLDER: images like those to come"),
        ("{here}/a.onnx --calibrate={here}", "calibrate is for --precision=int8; --check=FOLDER names images"),
        (
            "{here}/a.onnx --precision=int8 --calibrate={here}/folder.onnx",
            "calibrate: folder {here}/folder.onnx holds no image file",
        ),
        ("{here}/a.onnx --check={here}/none", "check must be a folder of images or a Parquet file, and {here}/none"),
        ("{here}/a.pt2 --precision=fp16", "precision must be fp32 with --format=pt2, got fp16"),
        ("{here}/a.pt2 --opset=18", "opset is of ONNX; leave it out with --format=pt2"),
        ("{here}/a.onnx --opset=9", "opset must be from 18 to 30, got 9"),
        ("{here}/a.onnx --batch=0", "batch must be dynamic or a number of at least 1, got 0"),
        ("{here}/a.onnx --image_size=0", "image_size must be at least 1, got 0"),
    ],
)
def test_a_users_mistake_is_one_line(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.onnx").mkdir()
    assert main(["export", NAME, *f"--out={arguments}".format(here=tmp_path).split()]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"awconv export: {message.format(here=tmp_path)}")
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["folder.onnx"]


@pytest.mark.parametrize(("ending", "module"), [(".onnx", "onnxscript"), (".xml", "openvino")])
def test_a_runtime_that_is_not_installed_is_named(
    ending: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    assert main(["export", NAME, f"--out={tmp_path / 'a'}{ending}"]) == 1
    extra = "onnx" if ending == ".onnx" else "openvino"
    assert f"needs {module!r}, which is not installed: pip install 'awconv[{extra}]'" in capsys.readouterr().err


def test_a_package_needs_a_compiler(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch._inductor.config

    with torch._inductor.config.patch("cpp.cxx", ("no-such-compiler",)):  # monkeypatch would remove it afterwards
        assert main(["export", NAME, f"--out={tmp_path / 'a.pt2'}"]) == 1
    needs = "awconv export: --format=pt2 needs a C++ compiler: install g++, or name one in the variable CXX\n"
    assert capsys.readouterr().err == needs
    assert not list(tmp_path.iterdir())


class TestFilesOfOthers:
    @pytest.mark.parametrize("ending", [".onnx", ".pt2"])
    def test_a_broken_file_is_named(self, ending: str, tmp_path: Path) -> None:
        file = tmp_path / f"a{ending}"
        file.write_bytes(b"broken")
        with pytest.raises(ValueError, match="is broken, or no"):
            open_exported(file)

    def test_a_package_without_metadata_never_runs(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "a.pt2", "w") as package:
            package.writestr("a/data/aotinductor/model/x.wrapper_metadata.json", "{}")
        with pytest.raises(ValueError, match="was not written by 'awconv export'"):
            open_exported(tmp_path / "a.pt2")

    def test_another_exporters_file_is_refused(self, exported: Exported, tmp_path: Path) -> None:
        model = onnx.load(exported(".onnx"))
        del model.metadata_props[:]
        onnx.save(model, tmp_path / "a.onnx")
        with pytest.raises(ValueError, match="was not written by 'awconv export'"):
            open_exported(tmp_path / "a.onnx")

    def test_weights_of_other_files_are_not_read(self, exported: Exported, tmp_path: Path) -> None:
        model = onnx.load(exported(".onnx"))
        onnx.save(model, tmp_path / "a.onnx", save_as_external_data=True, location="weights", size_threshold=0)
        with pytest.raises(ValueError, match="takes weights from other files"):
            open_exported(tmp_path / "a.onnx")

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("classes", []),
            ("classes", "0123456789"),
            ("input_size", [1, 8]),
            ("input_size", [2, 8, 8]),
            ("input_size", [1, 8, 10**9]),
            ("batch", True),
            ("batch", 0),
            ("mean", [float("nan")]),
            ("std", [0.0]),
            ("std", [1.0, 1.0]),
            ("crop_pct", 0),
            ("interpolation", "__import__"),
            ("precision", "fp8"),
            ("kind", ["classifier"]),
        ],
    )
    def test_metadata_out_of_range_are_refused(self, name: str, value: object, exported: Exported) -> None:
        (entry,) = onnx.load(exported(".onnx")).metadata_props
        assert parsed(entry.value, Path("a.onnx")).text() == entry.value
        spoilt = json.dumps(json.loads(entry.value) | {name: value})
        with pytest.raises(ValueError, match=rf"a\.onnx: its metadata awconv are damaged.*its {name} cannot be"):
            parsed(spoilt, Path("a.onnx"))

    @pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, '{"awconv": "1"}'])
    def test_other_text_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match="its metadata awconv are damaged"):
            parsed(text, Path("a.onnx"))


def test_either_a_checkpoint_or_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    both = ["predict", f"--ckpt={NAME}", "--model=a.onnx", str(tmp_path)]
    assert main(both) == 2
    assert "either --ckpt or --model names the network, got both" in capsys.readouterr().err
    for model, message in (
        ("a.txt", "model must be a file of awconv export (.onnx, .xml, .pt2), got a.txt"),
        ("none.onnx", "none.onnx is not there: expected a file of awconv export"),
    ):
        assert main(["predict", f"--model={model}", str(tmp_path)]) == 1
        assert message in capsys.readouterr().err
