"""What an exported or traced graph is made of, and that it computes the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import awconv
from awconv.ops import aw_conv2d
from awconv.ops.choose import choose
from awconv.ops.exports import exporting_for, preferred
from awconv.ops.problem import describe

# Name: input, weight, attention and arguments of layers with all that decides the form.
LAYERS = {
    "dense": ((2, 8, 9, 10), (6, 8, 3, 3), (2, 6, 1, 3, 3), dict(padding=1)),
    "strided": ((2, 8, 9, 10), (6, 8, 3, 3), (2, 6, 1, 3, 3), dict(padding=(2, 1), stride=(2, 3), dilation=(2, 1))),
    "small": ((2, 96, 3, 4), (6, 96, 3, 3), (2, 6, 1, 3, 3), dict(padding=1)),
    "small and strided": ((2, 96, 4, 3), (6, 96, 3, 2), (2, 3, 1, 1, 2), dict(padding=1, stride=2)),
    "depthwise": ((2, 8, 11, 12), (8, 1, 3, 3), (2, 8, 1, 3, 3), dict(padding=1, groups=8)),
    "small depthwise": ((2, 8, 7, 7), (8, 1, 5, 5), (2, 8, 1, 5, 5), dict(padding=2, stride=2, groups=8)),
    "grouped": ((2, 8, 9, 10), (4, 4, 3, 3), (2, 4, 1, 3, 3), dict(padding=1, groups=2)),
    "by input channel": ((2, 8, 9, 10), (6, 8, 3, 3), (2, 3, 4, 3, 1), dict(padding=1, residual=False)),
    "output gain": ((2, 8, 9, 10), (6, 8, 3, 3), (2, 6, 1, 1, 1), dict(padding=1)),
}
EXPECTED = {
    ("dense", None): "matmul",
    ("dense", "onnxruntime"): "matmul",
    ("dense", "openvino"): "per_tap",
    ("small", "onnxruntime"): "shifted",
    ("small", "openvino"): "shifted",
    ("depthwise", "onnxruntime"): "matmul",
    ("depthwise", "openvino"): "per_tap",
    ("small depthwise", None): "shifted",
    ("by input channel", "openvino"): "matmul",
    ("output gain", "openvino"): "output_gain",
}


class Layer(nn.Module):
    """One AW-convolution with random weights."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        input, weight, attention, self.arguments = LAYERS[name]
        self.weight = nn.Parameter(torch.randn(weight))
        self.example = torch.randn(input), torch.rand(attention)

    def forward(self, input: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        return aw_conv2d(input, self.weight, attention, **self.arguments)

    def exact(self, input: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """In double precision by the definition."""
        tensors = (tensor.double() for tensor in (input, self.weight, attention))
        return aw_conv2d(*tensors, **self.arguments, algorithm="naive").float()


def test_the_form_follows_the_layer_and_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("awconv.ops.tracing.exporting", lambda: True)
    for (name, runtime), expected in EXPECTED.items():
        layer = Layer(name)
        arguments = dict(stride=1, padding=0, dilation=1, groups=1, residual=True) | layer.arguments
        problem = describe(2, layer.example[0], layer.weight, layer.example[1], None, *arguments.values())
        with exporting_for(runtime):
            assert choose(problem, "auto", "aw_conv2d").name == expected, name
        with exporting_for("openvino", batch=1):
            assert preferred(problem)[2] == "per_sample"
        with exporting_for("onnxruntime", batch=1):
            assert (preferred(problem)[2] == "per_sample") == ("depthwise" in name)


@pytest.mark.parametrize("runtime", [None, "onnxruntime", "openvino"])
@pytest.mark.parametrize("name", LAYERS)
def test_an_exported_layer_computes_the_same_at_any_batch_by_pytorchs_own_operators(
    name: str, runtime: str | None
) -> None:
    layer, batch = Layer(name), torch.export.Dim("batch")
    with exporting_for(runtime):
        program = torch.export.export(layer, layer.example, dynamic_shapes=({0: batch}, {0: batch}))
    assert not any("awconv" in str(node.target) for node in program.graph.nodes)
    for count in (1, 5):
        inputs = tuple(torch.randn(count, *tensor.shape[1:]) for tensor in layer.example)
        torch.testing.assert_close(program.module()(*inputs), layer.exact(*inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_exported_for_one_sample_computes_the_same(name: str, runtime: str) -> None:
    layer = Layer(name)
    example = tuple(tensor[:1] for tensor in layer.example)
    with exporting_for(runtime, batch=1):
        program = torch.export.export(layer, example)
    torch.testing.assert_close(program.module()(*example), layer.exact(*example), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_sees_what_it_is_for(strict: bool) -> None:
    """Dynamo, which makes strict ones, does not read a ContextVar everywhere (torch 2.11)."""
    layer = Layer("dense")
    for runtime, fused in ((None, False), ("onnxruntime_operator", True), ("openvino", False)):
        with exporting_for(runtime):
            program = torch.export.export(layer, layer.example, strict=strict)
        code = program.graph_module.print_readable(print_output=False)
        assert ("awconv.fused" in code) == fused


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (2, 1)])
def test_a_layer_that_sees_hardly_a_pixel_is_traced_and_exported(size: tuple[int, int]) -> None:
    layer, images = awconv.AWConv2d(8, 8, 3, padding=1).eval(), torch.randn(2, 8, *size)
    with torch.no_grad():
        expected = layer(images)
        traced, program = torch.jit.trace(layer, images), torch.export.export(layer, (images,))
        for result in (traced(images), program.module()(images)):
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_a_saved_trace_runs_in_a_process_without_awconv(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("aw_resnet8_cifar").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        traced = torch.jit.trace(model, images)
        traced.save(tmp_path / "traced.pt")
        other = torch.randn(2, 3, 32, 32)
        expected = model(other)
        torch.testing.assert_close(traced(other), expected, rtol=1e-4, atol=1e-4)
    torch.save((other, expected), tmp_path / "images.pt")
    code = (
        "import sys, torch; traced = torch.jit.load('traced.pt'); images, expected = torch.load('images.pt'); "
        "torch.testing.assert_close(traced(images), expected, rtol=1e-4, atol=1e-4); assert 'awconv' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=os.environ | {"PYTHONPATH": ""})


@pytest.mark.parametrize("name", LAYERS)
def test_a_traced_layer_computes_the_same_by_pytorchs_own_operators(name: str) -> None:
    layer = Layer(name)
    traced = torch.jit.trace(layer, layer.example)
    assert "awconv::" not in str(traced.inlined_graph)
    inputs = tuple(torch.randn_like(tensor) for tensor in layer.example)
    torch.testing.assert_close(traced(*inputs), layer.exact(*inputs), rtol=1e-4, atol=1e-4)


def test_the_branch_and_its_pooling_are_traced_as_pytorchs_own_operators() -> None:
    layer = awconv.AWConv2d(8, 8, 3, padding=1).eval()
    graph = torch.jit.trace(layer, torch.randn(2, 8, 10, 10)).inlined_graph
    assert "awconv::" not in str(graph)
