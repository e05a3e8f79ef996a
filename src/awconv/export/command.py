"""``awconv export``: writes a trained network as a file of another runtime, and checks it."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from awconv.export import onnx_format, openvino_format, pt2_format
from awconv.export.check import compare, described
from awconv.export.check_detector import compare_objects
from awconv.export.description import inputs_of, metadata_of
from awconv.export.exported import ExportedClassifier, ExportedDetector, network_input, open_exported
from awconv.export.graph import Format, Inputs, exportable
from awconv.export.images import Images, opened, shipped
from awconv.export.metadata import Metadata
from awconv.export.ort import ort_library
from awconv.export.precision import halved, quantized
from awconv.extras import require
from awconv.ops.exports import Runtime
from awconv.sources import load_task
from awconv.tasks import ClassificationTask, DetectionTask, Task
from awconv.terminal import printable

_ENDINGS: dict[Format, str] = {"onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2"}
_RUNTIMES: dict[Format, Runtime | None] = {"onnx": "onnxruntime", "openvino": "openvino", "pt2": None}
_CALIBRATING = 256  # images, at most


@dataclass(frozen=True)
class _Settings:
    """What is written.

    Attributes:
        format: of the file.
        precision: of its numbers.
        inputs: what its network takes.
        opset: the version of ONNX's operators; None takes PyTorch's default.
        operator: whether AW-convolutions are awconv's operator for ONNX Runtime.
    """

    format: Format
    precision: Literal["fp32", "fp16", "int8"]
    inputs: Inputs
    opset: int | None
    operator: bool

    @property
    def form(self) -> Runtime | None:
        """For which runtime each layer chooses its form."""
        if self.precision == "int8":
            return "quantized"
        return "onnxruntime_operator" if self.operator else _RUNTIMES[self.format]


def export(
    source: str,
    out: Path,
    format: Literal["onnx", "openvino", "pt2"] | None = None,
    precision: Literal["fp32", "fp16", "int8"] = "fp32",
    calibrate: Path | None = None,
    check: Path | None = None,
    batch: Literal["dynamic"] | int = "dynamic",
    size: Literal["fixed", "dynamic"] = "fixed",
    image_size: int | None = None,
    uint8: bool = False,
    opset: int | None = None,
    operator: bool = False,
    pretrained: Path | None = None,
) -> int:
    """Writes a trained network as a file for ONNX Runtime, OpenVINO or AOTInductor, and checks it against PyTorch.

    The file holds the network, its classes and its preprocessing; ``awconv predict --model=FILE`` runs it. It is
    compared with PyTorch on real images before it comes to its place: if they differ, nothing is written. A file of
    that name is replaced.

    Args:
        source: a checkpoint of ``awconv fit``, ``compare`` or ``demo``, or a training's folder; what ``publish`` wrote;
            a name with weights in timm, such as resnet50; or a network on the hub, hf-hub:OWNER/NAME.
        out: the file to write: .onnx, .xml (OpenVINO, with a .bin beside it, which is replaced, too) or .pt2
            (AOTInductor).
        format: of the file; its ending says it, too.
        precision: fp32; fp16, half precision, in which OpenVINO's file only stores the weights; or int8, 8 bits.
        calibrate: for int8: images like those to come, a folder or a Parquet file, of which up to 256 give the ranges
            of activations.
        check: images to compare on, a folder or a Parquet file. Folders named as classes, and a Parquet file's labels,
            give the accuracy. By default those of calibrate, or photographs that scikit-learn ships.
        batch: dynamic, for batches of any size, or a number of images. A network for one number can be faster.
        size: fixed, or dynamic for images of any height and width.
        image_size: height and width of the images, if not those that it was trained on.
        uint8: take bytes, images that are resized and cropped but not normalised, and normalise them in the network.
        opset: the version of ONNX's operators, if not PyTorch's default.
        operator: for ONNX Runtime, make each AW-convolution one operator of awconv's own. It is faster, and a session
            needs the library that awconv.export.ort_library builds on its machine.
        pretrained: a file of weights: those that an adapter was trained on, or a name's, in the place of timm's.

    Returns:
        The exit status, 0.

    Raises:
        FileNotFoundError: the source or the images are missing.
        ModuleNotFoundError: the extra with the runtime is not installed.
        OSError: the operator cannot be built here.
        ValueError: the source is none of these, an option does not fit the format, the runtime cannot run the network,
            or it computes something else than PyTorch does.
    """
    started = time.monotonic()
    out = Path(os.path.expanduser(out))
    _check_place(out)
    kind = _format(out, format)
    _check_options(kind, precision, calibrate, opset)
    _check_operator(operator, kind, precision)
    for module, extra in _NEEDED[kind].items():
        require(module, extra=extra)
    task: Any = load_task(source, pretrained, image_size)
    inputs = inputs_of(task, batch, size == "dynamic", uint8)
    settings = _Settings(kind, precision, inputs, opset, operator)
    if inputs.detector:
        _check_detectors_options(settings)
    classes: list[str] = task.classes
    calibrating = None if calibrate is None else opened(calibrate, classes, "calibrate")
    images = opened(check, classes, "check") if check is not None else calibrating or shipped(inputs.size[0])
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
        file = Path(folder) / out.name
        _write(task, settings, calibrating, file)
        exported = open_exported(file)
        figures = _compared(exported, task, inputs, images)
        written = _moved(file, out)
    counted = "" if exported.nodes is None else f", {exported.nodes:,} operations"
    print(printable(f"{out}: {written / 1e6:,.2f} MB{counted}, {time.monotonic() - started:.0f} s"))
    print(printable(figures))
    return 0


_ONNX = {"onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx"}  # what a format needs, and in which extra it is
_NEEDED: dict[Format, dict[str, str]] = {"onnx": _ONNX, "openvino": _ONNX | {"openvino": "openvino"}, "pt2": {}}


def _check_place(out: Path) -> None:
    if out.is_dir():
        raise ValueError(f"out must be a file, and {out} is a folder")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"out: {out.parent} is not a folder; make it first")


def _format(out: Path, format: Format | None) -> Format:
    found = next((name for name, ending in _ENDINGS.items() if out.suffix == ending), None)
    wanted = ", ".join(f"{ending} ({name})" for name, ending in _ENDINGS.items())
    if found is None:
        expected = wanted if format is None else _ENDINGS[format]
        raise ValueError(f"out must end in {expected}, got {out}")
    if format is not None and format != found:
        raise ValueError(f"out must end in {_ENDINGS[format]} for --format={format}, got {out}")
    return found


def _check_options(format: Format, precision: str, calibrate: Path | None, opset: int | None) -> None:
    """Raises a ValueError for options that do not go together."""
    if precision == "int8" and calibrate is None:
        raise ValueError("--precision=int8 needs --calibrate=FOLDER: images like those to come, a hundred or more")
    if precision != "int8" and calibrate is not None:
        raise ValueError("calibrate is for --precision=int8; --check=FOLDER names images to compare on")
    if format == "pt2" and precision != "fp32":
        raise ValueError(f"precision must be fp32 with --format=pt2, got {precision}")
    if format == "pt2" and opset is not None:
        raise ValueError("opset is of ONNX; leave it out with --format=pt2")
    if opset is not None and not 18 <= opset <= 30:
        raise ValueError(f"opset must be from 18 to 30, got {opset}")


def _check_operator(operator: bool, format: Format, precision: str) -> None:
    """Raises an error where the operator cannot be used."""
    if not operator:
        return
    if format != "onnx":
        raise ValueError(f"operator is for ONNX Runtime: --format must be onnx, got {format}, which cannot load it")
    if precision != "fp32":
        raise ValueError(f"precision must be fp32 with --operator, which computes in single precision, got {precision}")
    ort_library()  # with which the file is checked


def _check_detectors_options(settings: _Settings) -> None:
    """Raises a ValueError for options that a detector does not have."""
    if settings.format == "pt2":
        raise ValueError("format must be onnx or openvino for a detector, got pt2")
    if settings.precision == "int8" or (settings.precision == "fp16" and settings.format == "onnx"):
        raise ValueError(
            f"precision must be fp32 for a detector, or fp16 with --format=openvino, got {settings.precision}: its "
            "boxes need single precision"
        )


def _compared(exported: ExportedClassifier | ExportedDetector, task: Task, inputs: Inputs, images: Images) -> str:
    """The figures of the check, in words."""
    if isinstance(task, ClassificationTask):
        assert isinstance(exported, ExportedClassifier)
        return described(compare(exported, task, inputs, images), images)
    assert isinstance(exported, ExportedDetector)
    assert isinstance(task, DetectionTask)
    return compare_objects(exported, task, images).described(images)


def _write(task: Task, settings: _Settings, calibrating: Images | None, file: Path) -> None:
    metadata = replace(metadata_of(task, settings.inputs, settings.precision), operator=settings.operator)
    with exportable(task, settings.inputs, settings.form) as module:
        if settings.format == "pt2":
            pt2_format.write(module, settings.inputs, metadata, file)
            return
        proto = onnx_format.translated(module, settings.inputs, settings.opset)
        scopes = onnx_format.strip(proto)
        if settings.precision == "int8":
            assert calibrating is not None
            assert isinstance(task, ClassificationTask)
            batches = _calibration(task, metadata, calibrating)
            proto = quantized(proto, scopes, module, batches, file.parent)
    if settings.precision == "fp16" and settings.format == "onnx":
        proto = halved(proto)
    (onnx_format if settings.format == "onnx" else openvino_format).write(proto, metadata, file)


def _calibration(task: ClassificationTask, metadata: Metadata, images: Images) -> Iterator[np.ndarray[Any, Any]]:
    """The network's inputs for images to calibrate on."""
    batch = metadata.batch or 1  # ONNX Runtime holds what all operations give for a batch, at once
    for pixels, _ in images.batches(images.chosen(max(batch, _CALIBRATING)), batch, metadata.input_size, task):
        repeated = pixels.repeat(-(-batch // len(pixels)), 1, 1, 1)[:batch]  # the last ones may not fill a batch
        yield network_input(metadata, repeated)


def _moved(file: Path, out: Path) -> int:
    """Moves a checked file to its place, after what lies beside it; returns their size in bytes."""
    beside = file.with_suffix(".bin")
    parts = [(beside, out.with_suffix(".bin"))] if beside.is_file() else []
    total = 0
    for part, place in [*parts, (file, out)]:
        total += part.stat().st_size
        part.chmod(0o644)
        os.replace(part, place)
    return total
