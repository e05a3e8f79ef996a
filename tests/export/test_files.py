"""Exported files in their runtimes, on real digits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import awconv
from awconv.export.openvino_format import core
from awconv.tasks import ClassificationTask
from tests.export.conftest import NAME, logits, normalised

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

Exported = Callable[..., Path]


def onnx_logits(file: Path, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (output,) = session.run(["logits"], {"images": images})
    return output


def assert_near(got: np.ndarray[Any, Any], exact: np.ndarray[Any, Any], tolerance: float) -> None:
    """Relative to the largest logit."""
    assert got.shape == exact.shape
    assert np.abs(got - exact).max() <= tolerance * np.abs(exact).max()


class TestOnnx:
    def test_takes_batches_of_any_size(self, exported: Exported, task: ClassificationTask, batch: torch.Tensor) -> None:
        for count in (1, 3, 50):
            got = onnx_logits(exported(".onnx"), normalised(task, batch[:count]))
            assert_near(got, logits(task, batch[:count]), 1e-5)

    def test_takes_bytes_of_any_height_and_width(
        self, exported: Exported, task: ClassificationTask, batch: torch.Tensor
    ) -> None:
        file = exported(".onnx", uint8=True, size="dynamic")
        for height, width in ((8, 8), (12, 20), (9, 7)):
            images = batch[:3].repeat(1, 1, 3, 3)[:, :, :height, :width].contiguous()
            assert_near(onnx_logits(file, images.numpy()), logits(task, images), 1e-5)

    def test_halves_are_inside_only(self, exported: Exported, task: ClassificationTask, batch: torch.Tensor) -> None:
        file = exported(".onnx", precision="fp16")
        kinds = Counter(tensor.data_type for tensor in onnx.load(file).graph.initializer)
        assert kinds[onnx.TensorProto.FLOAT16] > 10
        assert kinds[onnx.TensorProto.FLOAT] == 0
        # 11 bits give 5e-4; a few layers add up.
        assert_near(onnx_logits(file, normalised(task, batch)), logits(task, batch), 1e-2)

    def test_eight_bits_keep_the_classes(
        self, exported: Exported, task: ClassificationTask, batch: torch.Tensor
    ) -> None:
        file, whole = exported(".onnx", precision="int8"), exported(".onnx")
        exact = logits(task, batch)
        got = onnx_logits(file, normalised(task, batch))
        assert np.mean(got.argmax(1) == exact.argmax(1)) >= 0.95
        assert_near(got, exact, 0.1)
        assert np.abs(got - exact).max() > 1e-4 * np.abs(exact).max()  # it is quantized

        def bytes_of_weights(model: Path) -> int:
            """Without the matrices that pool."""
            return sum(len(tensor.raw_data) for tensor in onnx.load(model).graph.initializer if len(tensor.dims) > 2)

        assert bytes_of_weights(file) < 0.5 * bytes_of_weights(whole)

    def test_eight_bits_leave_the_attention_branch_alone(self, exported: Exported, task: ClassificationTask) -> None:
        graph = onnx.load(exported(".onnx", precision="int8")).graph
        by_output = {name: node for node in graph.node for name in node.output}
        sigmoids = [node for node in graph.node if node.op_type == "Sigmoid"]
        assert len(sigmoids) == sum(isinstance(module, awconv.AWConv2d) for module in task.evaluated.modules())
        for sigmoid in sigmoids:
            assert by_output[sigmoid.input[0]].op_type != "DequantizeLinear"
        convolutions = [node for node in graph.node if node.op_type == "Conv"]
        quantized = [node for node in convolutions if by_output.get(node.input[1], node).op_type == "DequantizeLinear"]
        assert len(convolutions) - len(quantized) == 2 * len(sigmoids)

    def test_says_nothing_but_what_a_prediction_needs(self, exported: Exported, task: ClassificationTask) -> None:
        file = exported(".onnx")
        model = onnx.load(file)
        (entry,) = model.metadata_props
        assert entry.key == "awconv"
        assert json.loads(entry.value) == {
            "awconv": awconv.__version__,
            "kind": "classifier",
            "network": NAME,
            "classes": [str(digit) for digit in range(10)],
            "input_size": [1, 8, 8],
            "dynamic_size": False,
            "batch": None,
            "uint8": False,
            "precision": "fp32",
            "mean": task.channel_means,
            "std": task.channel_deviations,
            "crop_pct": task.crop_pct,
            "interpolation": task.interpolation,
            "score_threshold": 0.0,
            "min_size": 0,
            "max_size": 0,
            "stretched": False,
            "operator": False,
        }
        content = file.read_bytes()
        assert str(Path(awconv.__file__).parent).encode() not in content  # PyTorch notes the code of each node
        assert b".py" not in content


class TestOpenVino:
    @pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 1e-2), ("int8", 0.1)])
    def test_computes_the_same(
        self, precision: str, tolerance: float, exported: Exported, task: ClassificationTask, batch: torch.Tensor
    ) -> None:
        pytest.importorskip("openvino")
        model = core().read_model(exported(".xml", precision=precision))
        assert json.loads(model.get_rt_info(["awconv"]).value)["precision"] == precision
        compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        for count in (1, 50):
            got = compiled(normalised(task, batch[:count]))["logits"]
            assert_near(got, logits(task, batch[:count]), tolerance)

    def test_signals_are_handled_when_files_are_gone(self, exported: Exported) -> None:
        """Files with a Core each, dropped in the order in which they came, left signal handlers a freed stack."""
        pytest.importorskip("openvino")
        code = (
            "import os, signal, sys\n"
            "from pathlib import Path\n"
            "from awconv.export.openvino_format import OpenVinoFile\n"
            "signal.signal(signal.SIGUSR1, lambda *_: print('handled'))\n"
            "files = [OpenVinoFile(Path(sys.argv[1])) for _ in range(3)]\n"
            "while files:\n"
            "    del files[0]\n"
            "os.kill(os.getpid(), signal.SIGUSR1)\n"
        )
        done = subprocess.run([sys.executable, "-c", code, exported(".xml")], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, "handled\n")

    def test_halves_take_less_room(self, exported: Exported) -> None:
        pytest.importorskip("openvino")
        whole, half = (exported(".xml", precision=p).with_suffix(".bin").stat().st_size for p in ("fp32", "fp16"))
        assert half < 0.6 * whole


def test_a_package_of_aotinductor_needs_torch_and_awconv_only(
    exported: Exported, task: ClassificationTask, batch: torch.Tensor, tmp_path: Path
) -> None:
    file = exported(".pt2")
    torch.save(torch.from_numpy(normalised(task, batch)), tmp_path / "images.pt")
    code = f"""
import sys, torch, awconv
network = torch._inductor.aoti_load_package({str(file)!r})
images = torch.load({str(tmp_path / "images.pt")!r})
torch.save([network(images), network(images[:1])], {str(tmp_path / "logits.pt")!r})
assert not {{"lightning", "onnx", "sklearn"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    for got, images in zip(torch.load(tmp_path / "logits.pt"), (batch, batch[:1]), strict=True):
        assert_near(got.numpy(), logits(task, images), 1e-5)
