"""A layer's step in one node of autograd: by Triton's interpreter on a CPU, and on a GPU if there is one."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from awconv import AWConv2d
from awconv.ops.fused import cuda_plans, tiles
from awconv.ops.gpu import compiling_side_by_side
from tests.ops.layer_cases import CASES, assert_close, check_frozen, check_step, exact, run, step

pytestmark = pytest.mark.usefixtures("forgotten_plans")


@pytest.fixture
def device(triton_device: str) -> str:
    return triton_device


@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize("name", ["a tile", "a stride", "the gain in parts", "relative to the start"])
def test_inference_equals_that_of_the_modules_in_double_precision(name: str, samples: int, device: str) -> None:
    layer, image = CASES[name]._replace(samples=samples).make(device)
    before = copy.deepcopy(dict(layer.named_buffers()))
    reference = exact(layer).eval()
    with torch.inference_mode():
        output = run(layer.eval(), image)
        expected = reference(image.cpu().double())
    assert output is not None
    assert output.stride() == layer(image).stride()
    torch.testing.assert_close(output.cpu().double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert all(torch.equal(value, before[key]) for key, value in layer.named_buffers())


def test_a_sample_of_any_batch_gets_the_same_bits(device: str) -> None:
    layer, image = CASES["a tile"]._replace(samples=35).make(device)
    with torch.no_grad():
        together = run(layer.eval(), image)
        assert together is not None
        for index in (0, 17, 34):
            assert torch.equal(run(layer, image[index : index + 1]), together[index : index + 1])


def test_saved_tensors_may_lose_their_strides(device: str) -> None:
    layer, image = CASES["a tile"].make(device)
    expected = step(exact(layer), image.cpu().double(), AWConv2d.forward)

    def pack(tensor: Tensor) -> Tensor:  # as save_on_cpu does with pinned memory
        return torch.empty(tensor.size(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        found = step(layer, image, run)
    for key, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(found[key].cpu().to(value.dtype), value, rtol=0, atol=2e-5 * scale, msg=key)
    assert found["image"].stride() == image.stride()


def test_gradients_that_have_gradients_where_a_layer_is_applied_twice(device: str) -> None:
    layer, image = CASES["a tile"].make(device)
    image.requires_grad_()
    inputs = [image, *layer.parameters()]
    expected = torch.autograd.grad(run(layer, run(layer, image)).square().sum(), inputs)
    found = torch.autograd.grad(run(layer, run(layer, image)).square().sum(), inputs, create_graph=True)
    for index, (value, reference) in enumerate(zip(found, expected, strict=True)):
        atol = 1e-4 * float(reference.abs().max())
        torch.testing.assert_close(value, reference, rtol=0, atol=atol, msg=str(index))


def test_tensors_may_be_swapped_after_a_step() -> None:
    layer, image = CASES["a tile"].make("cpu")
    with torch.no_grad():
        assert run(layer, image) is not None
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert layer.weight.dtype == torch.float64


def test_a_compilation_that_fails_leaves_others_alone() -> None:
    mode = importlib.import_module("triton.runtime._async_compile").active_mode

    def fail() -> None:
        raise OSError("no space")

    for _ in range(2):
        with pytest.raises(OSError, match="no space"), compiling_side_by_side():
            mode.get().submit("kernel", fail, lambda kernel: None)
        assert mode.get() is None


@pytest.mark.parametrize("name", CASES)
def test_a_step_equals_that_of_the_parts_in_double_precision(name: str, device: str) -> None:
    check_step(name, run, device)


@pytest.mark.parametrize(
    ("name", "samples"), [("a tile", 1), ("a tile", 5), ("a stride", 3), ("groups", 5), ("dilation", 3)]
)
def test_tiles_of_several_samples(name: str, samples: int, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    if device == "cuda":
        pytest.skip("the plans for a GPU are remembered")

    def correlate(rows: int, inner: int, *rest: int) -> tiles.Tile:
        sizes = dict(tile_rows=16, tile_pixels=64, tile_inner=16)
        return tiles.Tile("scaled_sums", sizes, 4, 3)

    monkeypatch.setattr(tiles, "correlate", correlate)
    for planned in (cuda_plans.forward, cuda_plans.grad_input):
        monkeypatch.setattr(cuda_plans, planned.__name__, planned.__wrapped__)
    layer, image = CASES[name]._replace(samples=samples).make(device)
    expected = step(exact(layer), image.cpu().double(), AWConv2d.__call__)
    assert_close(step(layer, image, run), expected, 5e-5)


@pytest.mark.parametrize(
    "frozen",
    [["weight"], ["image"], ["image", "weight"], ["attention"], ["attention.norm2.bias", "attention.conv1.weight"]],
)
def test_only_what_requires_a_gradient_gets_one(frozen: list[str], device: str) -> None:
    check_frozen(frozen, run, device)


def test_only_the_weight(device: str) -> None:
    layer, image = CASES["a tile"].make(device)
    layer.attention.requires_grad_(False)
    reference = exact(layer)
    run(layer, image).square().sum().backward()
    reference(image.cpu().double()).square().sum().backward()
    assert_close(dict(weight=layer.weight.grad), dict(weight=reference.weight.grad), 5e-5)
    assert not run(layer.requires_grad_(False), image).requires_grad


def test_without_gradients_statistics_are_gathered_too(device: str) -> None:
    layer, image = CASES["a tile"].make(device)
    reference = exact(layer)
    with torch.no_grad():
        found, expected = run(layer, image), reference(image.cpu().double())
    assert not found.requires_grad
    assert_close(dict(layer.named_buffers(), output=found), dict(reference.named_buffers(), output=expected), 1e-5)


def test_the_same_bits_twice(device: str) -> None:
    layer, image = CASES["a stride"].make(device)
    first, second = (step(copy.deepcopy(layer), image, run) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def second_derivatives(layer: AWConv2d, image: Tensor, run: Callable[[AWConv2d, Tensor], Any]) -> dict[str, Tensor]:
    image = image.detach().requires_grad_()
    inputs = [image, *layer.parameters()]
    firsts = torch.autograd.grad(run(layer, image).square().sum(), inputs, create_graph=True)
    penalty = sum(first.square().sum() for first in firsts)
    found = [*(first.detach() for first in firsts), *torch.autograd.grad(penalty, inputs)]
    return {str(index): value for index, value in enumerate(found)}


@pytest.mark.parametrize("name", ["a tile", "relative, without the residual form"])
def test_second_derivatives(name: str, device: str) -> None:
    layer, image = CASES[name].make(device)
    expected = second_derivatives(exact(layer), image.cpu().double(), AWConv2d.__call__)
    assert_close(second_derivatives(layer, image, run), expected, 5e-4)


def test_a_backward_that_is_vectorised() -> None:
    layer, image = CASES["a tile"].make("cpu")  # on a GPU, PyTorch's own BatchNorm has none
    image.requires_grad_()
    inputs = [image, *layer.parameters()]
    output = run(layer, image)
    above = torch.randn(2, *output.shape)
    together = torch.autograd.grad(output, inputs, above, is_grads_batched=True, retain_graph=True)
    alone = [torch.autograd.grad(output, inputs, grad, retain_graph=True) for grad in above]
    expected = {str(index): torch.stack(grads) for index, grads in enumerate(zip(*alone, strict=True))}
    assert_close({str(index): value for index, value in enumerate(together)}, expected, 1e-4)


def test_saved_tensors_may_be_packed(device: str) -> None:
    layer, image = CASES["a tile"].make(device)
    expected = step(copy.deepcopy(layer), image, run)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor.clone()):
        found = step(layer, image, run)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_two_layers_may_share_a_branch(device: str) -> None:
    layer, image = CASES["a tile"].make(device)
    other = CASES["a stride"].make(device)[0]
    other.attention = layer.attention
    references = copy.deepcopy([layer, other])
    references = [made.cpu().double() for made in references]
    results = []
    for pair, input, through in (
        ((layer, other), image, run),
        (references, image.cpu().double(), AWConv2d.__call__),
    ):
        (through(pair[0], input).square().sum() + through(pair[1], input).square().sum()).backward()
        results.append({name: value.grad for name, value in pair[0].named_parameters()} | dict(pair[0].named_buffers()))
    assert_close(*results, 5e-5)
