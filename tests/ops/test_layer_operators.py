"""A whole layer in compiled graphs, by Triton's interpreter and on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from awconv import AWConv2d, use_algorithm
from tests.ops.layer_cases import CASES, arguments_of, assert_close, check_frozen, check_step, exact, step

pytest.importorskip("triton")
from awconv.ops import layer_operators
from awconv.ops.layer_operators import run_layer_compiled


@pytest.fixture
def device(triton_device: str) -> Iterator[str]:
    with use_algorithm("fused"):
        yield triton_device


def whole(layer: AWConv2d, image: Tensor) -> Tensor | None:
    return run_layer_compiled(image, layer.weight, *arguments_of(layer))


def compiled(layer: AWConv2d, image: Tensor) -> Tensor | None:
    torch._dynamo.reset()
    return torch.compile(whole, fullgraph=True, backend="aot_eager")(layer, image)


def arguments(layer: AWConv2d, image: Tensor, training: bool) -> tuple[Any, ...]:
    """Of an operator."""
    branch, statistics = layer.attention, ()
    norm1, norm2 = branch.norm1, branch.norm2
    if not training:
        statistics = (norm1.running_mean, norm1.running_var, norm2.running_mean, norm2.running_var)
    parameters = (branch.conv1.weight, norm1.weight, norm1.bias, branch.conv2.weight, norm2.weight, norm2.bias)
    padding = [amount for amount in layer.padding for _ in range(2)]
    numbers = (1e-5, 1e-3, "sigmoid", list(branch.attention_size), *branch.relation())
    geometry = (list(layer.stride), padding, list(layer.dilation), layer.groups, layer.residual)
    return image, layer.weight, *parameters, *statistics, *numbers, *geometry


# The kernels are those of test_layer.py: here, what the operators add.
@pytest.mark.parametrize("name", ["a tile", "channels first", "a stride", "relative, without the residual form"])
def test_a_step_equals_that_of_the_parts_in_double_precision(name: str, device: str) -> None:
    check_step(name, compiled, device)


@pytest.mark.parametrize("frozen", [["weight"], ["image"], ["image", "weight"], ["attention"]])
def test_only_what_requires_a_gradient_gets_one(frozen: list[str], device: str) -> None:
    check_frozen(frozen, compiled, device)


@pytest.mark.parametrize("name", ["a tile", "a stride", "relative to the start", "channels first"])
def test_inference_equals_that_of_the_modules_in_double_precision(name: str, device: str) -> None:
    layer, image = CASES[name].make(device)
    before = copy.deepcopy(dict(layer.named_buffers()))
    reference = exact(layer).eval()
    with torch.no_grad():
        output, expected = compiled(layer.eval(), image), reference(image.cpu().double())
        assert output is not None
        assert output.stride() == layer(image).stride()
    torch.testing.assert_close(output.cpu().double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert all(torch.equal(value, before[key]) for key, value in layer.named_buffers())


def test_a_graph_takes_batches_and_images_of_any_size(device: str) -> None:
    layer, image = CASES["a tile"].make(device)
    reference = exact(layer)
    torch._dynamo.reset()
    frames, counts = torch._dynamo.testing.CompileCounterWithBackend("aot_eager"), []
    run = torch.compile(whole, fullgraph=True, backend=frames, dynamic=True)
    for samples, size in ((3, (5, 6)), (8, (5, 6)), (4, (7, 9))):
        image = CASES["a tile"]._replace(samples=samples, size=size).make(device)[1]
        found, expected = (
            step(made, input, through)
            for made, input, through in ((layer, image, run), (reference, image.cpu().double(), AWConv2d.__call__))
        )
        assert_close(found, expected, 5e-5)
        layer.zero_grad(), reference.zero_grad()
        counts.append(frames.frame_count)
    assert counts[0] == counts[-1]


def test_what_the_kernels_do_not_run_is_left_to_the_parts(device: str) -> None:
    layer, image = CASES["a tile"].make(device)
    assert whole(layer.eval(), image) is None  # gradients that follow from running statistics
    layer.train().attention.norm1.momentum = None
    assert whole(layer, image) is None
    layer, image = CASES["a tile"].make(device)
    assert whole(layer.half(), image.half()) is None
    layer, image = CASES["a tile"].make(device)
    layer.attention.conv1.register_forward_hook(lambda *arguments: None)
    assert whole(layer, image) is None


def test_gradients_of_gradients_are_refused(device: str) -> None:
    layer, image = CASES["a tile"].make(device)
    output = whole(layer, image.requires_grad_())
    assert output is not None
    with pytest.raises(RuntimeError, match=r"without torch\.compile"):
        torch.autograd.grad(output.square().sum(), image, create_graph=True)


@pytest.mark.parametrize(
    ("name", "training"),
    [pytest.param("a tile", True, marks=pytest.mark.campaign), ("a tile", False), ("channels first", True)],
)
def test_the_operators_keep_pytorchs_rules(name: str, training: bool, device: str) -> None:
    layer, image = CASES[name].make(device)
    passed = arguments(layer, image.requires_grad_(training), training)
    if training:
        torch.library.opcheck(torch.ops.awconv.layer, passed)
    else:
        passed = tuple(value.detach() if isinstance(value, Tensor) else value for value in passed)
        torch.library.opcheck(torch.ops.awconv.layer_inference, passed)


@pytest.mark.skipif(
    torch.__version__ < (2, 11) and not torch.cuda.is_available(),
    reason="torch 2.9 asks the driver about tensors that are fake ones on a GPU",
)
@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_network_has_a_node_for_each_layer(training: bool) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):  # as on a GPU, which need not be there
        with torch.device("cuda"):
            network = timm.create_model("aw_resnet8_cifar").train(training)
            image = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
        with torch.set_grad_enabled(training):
            torch.compile(network, fullgraph=True, backend=keep)(image)
    names = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    layers = sum(isinstance(module, AWConv2d) for module in network.modules())
    assert layers > 5
    assert names.count("awconv.layer" if training else "awconv.layer_inference") == layers


@settings(max_examples=200)
@given(data=st.data())
def test_what_a_plan_keeps_fits_into_what_the_graph_expects(data: st.DataObject) -> None:
    """The operators' fake results know no tiles, and so no plan: too small a buffer would be written beyond its end."""
    draw, dtype = data.draw, data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    samples, height, width, hidden = (draw(st.integers(1, most)) for most in (40, 60, 60, 128))
    channels, columns = (draw(st.sampled_from([16, 20, 31, 64, 65, 129, 256, 512])) for _ in range(2))
    kernel = [draw(st.integers(1, 4)) for _ in range(2)]
    meta = dict(device="meta", dtype=draw(st.sampled_from([torch.float32, dtype])))
    image = torch.empty(samples, channels, height + 3, width + 3, device="meta", dtype=dtype)
    image = image.contiguous(memory_format=draw(st.sampled_from([torch.channels_last, torch.contiguous_format])))
    weight = torch.empty(columns, channels, *kernel, **meta)
    halves = [torch.empty(hidden, channels, 1, 1, **meta), torch.empty(columns, hidden, 1, 1, **meta)]
    norms = [torch.empty(size, device="meta") for size in (hidden, columns)]
    parameters = (halves[0], norms[0], norms[0], halves[1], norms[1], norms[1])
    form = (1e-5, 1e-5, "sigmoid", [columns, 1, *kernel], 0.0, 1.0, [1, 1], [0, 0, 0, 0], [1, 1], 1, True)
    planned = layer_operators._planned(image, weight, parameters, form, training=True)
    assert planned.kept_bytes <= layer_operators._kept_bytes(image, weight, hidden, columns, form[3])
