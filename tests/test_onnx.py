"""Export to ONNX: the batch is dynamic, the weights are constant, and ONNX Runtime computes the same as PyTorch."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from awconv import AWConv2d, convert
from awconv.ops.exports import exporting_for

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

SIZE = 64
# Parts of them: an export takes seconds a layer.
NETWORKS = [
    "aw_resnet50",
    pytest.param("aw_mobilenetv2_100", marks=pytest.mark.campaign),  # the next has its kinds of layers, too
    "tf_efficientnet_lite0",
]

# What turns constants into constants, and is not a computation on the input's values.
RESHAPING = {"Concat", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "aw_resnet50":
        return calibrated(timm.create_model(name, layers=(1, 2, 1, 1)))
    model = timm.create_model(name)
    if not name.startswith("aw_"):
        convert(model, init="identity")  # the padding is TensorFlow's
    return calibrated(
        nn.Sequential(model.conv_stem, model.bn1, *model.blocks[:3], nn.AdaptiveAvgPool2d(1), nn.Flatten())
    )


def calibrated(model: nn.Module) -> nn.Module:
    """The model in evaluation, with statistics of real activations: their scale does not grow from layer to layer, so
    that logits depend on the image and rounding stays rounding."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    with torch.no_grad():
        model.train()(torch.randn(8, 3, SIZE, SIZE))
    return model.eval()


def export(model: nn.Module, images: torch.Tensor, dynamic: bool = True) -> onnx.ModelProto:
    sizes = ({0: torch.export.Dim("batch")},) if dynamic else None
    program = torch.onnx.export(model, (images,), None, dynamo=True, dynamic_shapes=sizes, verbose=False)
    return program.model_proto


def computed_weights(graph: onnx.GraphProto) -> list[str]:
    """The convolutions whose weights are no constants."""
    constant = {tensor.name for tensor in graph.initializer}
    found = []
    for node in graph.node:  # sorted topologically, as ONNX requires
        if node.op_type == "Constant" or (
            node.op_type in RESHAPING and all(name in constant for name in node.input if name)
        ):
            constant.update(node.output)
        elif node.op_type in ("Conv", "ConvTranspose", "Gemm") and node.input[1] not in constant:
            found.append(node.name)
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_the_batch_is_dynamic_the_weights_are_constant_and_onnx_runtime_agrees(name: str) -> None:
    model = build(name)
    proto = export(model, torch.randn(2, 3, SIZE, SIZE))
    batch, *others = proto.graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param
    assert [size.dim_value for size in others] == [3, SIZE, SIZE]
    assert computed_weights(proto.graph) == []
    operators = {node.op_type for node in proto.graph.node}
    assert not operators & {"If", "Loop", "Scan", "Range", "NonZero"}
    assert not proto.functions

    double = copy.deepcopy(model).double()
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for size in (1, 3, 8):
        images = torch.randn(size, 3, SIZE, SIZE)
        with torch.no_grad():
            expected = model(images).numpy()
            exact = double(images.double()).numpy()
        (output,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        # Two roundings of one computation: how far a network amplifies rounding is what PyTorch's own error says.
        # A wrong tap or gain is at 1e-2 of the largest logit or more.
        scale = np.abs(exact).max()
        rounding = max(np.abs(expected - exact).max(), 1e-6 * scale)
        assert rounding < 1e-4 * scale
        np.testing.assert_allclose(output, exact, rtol=0, atol=10 * rounding)
        if size > 1:
            assert np.ptp(expected, axis=0).max() > 0.02 * scale  # the logits do depend on the image


def test_weights_made_for_each_sample_are_noticed() -> None:
    layer = AWConv2d(4, 4, 3).eval()
    with exporting_for("openvino", batch=1):
        graph = export(layer, torch.randn(1, 4, 5, 5), dynamic=False).graph
    assert len(computed_weights(graph)) == 1


def test_the_exporter_that_traces_writes_what_onnx_runtime_knows(tmp_path: Path) -> None:
    model = calibrated(timm.create_model("aw_resnet8_cifar"))
    file, images = tmp_path / "traced.onnx", torch.randn(2, 3, SIZE, SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, of the exporter's age
        torch.onnx.export(
            model, (images,), file, dynamo=False, input_names=["images"], dynamic_axes={"images": {0: "batch"}}
        )
    session = onnxruntime.InferenceSession(str(file))
    images = torch.randn(5, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = model(images)
    (output,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
