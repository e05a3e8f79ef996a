"""The digits' network, exported in every form, once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from awconv.data import Digits
from awconv.export import onnx_format
from awconv.ops import exports
from awconv.sources import load_task
from awconv.tasks import ClassificationTask

Exported = Callable[..., Path]
NAME = "aw_resnet8_cifar.digits"


@pytest.fixture(scope="session")
def task() -> ClassificationTask:
    loaded = load_task(NAME)
    assert isinstance(loaded, ClassificationTask)
    return loaded


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All images of the test split as files, in a folder for each class."""
    folder = tmp_path_factory.mktemp("digits")
    images = Digits().dataset("test")
    for index, (image, target) in enumerate(zip(images.images, images.targets, strict=True)):
        path = folder / f"{target}" / f"{index:03}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image[0].numpy()).save(path)
    return folder


@pytest.fixture(scope="session")
def batch() -> torch.Tensor:
    """Real digits, uint8, shape (50, 1, 8, 8)."""
    return Digits().dataset("test").images[:50]


@pytest.fixture(scope="session", autouse=True)
def _translated_once() -> Iterator[None]:
    """Translation takes most of an export's time, and is the same for all files of the same input and form."""
    known: dict[Any, Any] = {}
    translated = onnx_format.translated

    def remembered(module: torch.nn.Module, inputs: Any, opset: int | None) -> Any:
        digest = sum(float(tensor.double().sum()) for tensor in module.state_dict().values())
        key = (type(module), digest, inputs, opset, exports.target())
        if key not in known:
            known[key] = translated(module, inputs, opset)
        return copy.deepcopy(known[key])

    patch = pytest.MonkeyPatch()
    patch.setattr(onnx_format, "translated", remembered)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Callable[..., Path]:
    """Exports the digits' network by the command, once for each set of arguments."""
    from awconv.export import export

    folder = tmp_path_factory.mktemp("exported")
    files: dict[str, Path] = {}

    def make(ending: str, **arguments: Any) -> Path:
        if arguments.get("size") == "dynamic" and torch.__version__ < (2, 10):
            pytest.skip("torch 2.9 does not export images of any size in batches of any size")
        key = f"{ending}{sorted(arguments.items())}"
        if key not in files:
            if arguments.get("precision") == "int8":
                arguments["calibrate"] = digits
            files[key] = folder / f"{len(files)}{ending}"
            assert export(NAME, files[key], **arguments) == 0
        return files[key]

    return make


def logits(task: ClassificationTask, images: torch.Tensor) -> np.ndarray[Any, Any]:
    """PyTorch's, in double precision."""
    network = copy.deepcopy(task.evaluated).double().eval()
    with torch.no_grad():
        result: np.ndarray[Any, Any] = network((images.double() - task.mean.double()) / task.std.double()).numpy()
    return result


def normalised(task: ClassificationTask, images: torch.Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = ((images - task.mean) / task.std).numpy()
    return array
