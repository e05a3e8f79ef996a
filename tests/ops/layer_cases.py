"""Layers that kernels for GPUs run as a whole, and how the tests run them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from awconv import AWConv2d, use_algorithm
from awconv.ops.layer import run_layer


class Case(NamedTuple):
    layer: dict[str, Any]
    samples: int = 2
    size: tuple[int, int] = (5, 6)
    channels_last: bool = True
    identity: bool = False

    def make(self, device: str) -> tuple[AWConv2d, Tensor]:
        """The layer and an input."""
        torch.manual_seed(0)
        arguments = dict(in_channels=16, out_channels=16, kernel_size=3, padding=1, bias=False) | self.layer
        layer, format = AWConv2d(**arguments), torch.channels_last if self.channels_last else torch.contiguous_format
        if self.identity:
            layer.attention.start_as_identity()
        for norm in (layer.attention.norm1, layer.attention.norm2):
            for tensor, low, high in (
                (norm.weight, -1.0, 2.0),
                (norm.bias, -0.5, 0.5),
                (norm.running_mean, -0.5, 0.5),
                (norm.running_var, 0.5, 2.0),
            ):
                nn.init.uniform_(tensor, low, high)
        image = torch.randn(self.samples, layer.in_channels, *self.size).to(memory_format=format)
        return layer.to(device, memory_format=format), image.to(device)


CASES = {
    "a tile": Case({}),
    "channels first": Case(dict(out_channels=24), channels_last=False),
    "a stride": Case(dict(stride=2, padding="valid")),
    "a stride that skips pixels": Case(dict(stride=3, kernel_size=2, padding=0), size=(7, 8)),
    "a hidden width of no multiple of four": Case(dict(in_channels=20, out_channels=20, reduction=4)),
    "groups": Case(dict(in_channels=32, out_channels=32, groups=2)),
    "dilation": Case(dict(dilation=2, padding=2)),
    "the gain in parts": Case(dict(in_channels=80, kernel_size=(1, 2), padding=0), size=(3, 4)),
    "one tap": Case(dict(kernel_size=1, padding=0), samples=5, size=(3, 3)),
    "one position": Case(dict(padding=0), samples=3, size=(3, 3)),
    "relative to the start": Case({}, identity=True),
    "without the residual form": Case(dict(residual=False, activation="tanh")),
    "relative, without the residual form": Case(dict(residual=False, activation="relu"), identity=True),
}


ON_GPU = ("a tile", "a stride")


def arguments_of(layer: AWConv2d) -> tuple[Any, ...]:
    """What a layer tells those that run it as a whole, beside its input and its weight."""
    branch = layer.attention
    convolution = (layer.stride, layer.padding, layer.dilation, layer.groups, layer.residual or branch.relative)
    return branch, branch.modules_in_turn(), branch.attention_size, branch.relation(), convolution


def run(layer: AWConv2d, image: Tensor) -> Tensor | None:
    """The layer in one node; None where it is not run so."""
    with use_algorithm("fused"):
        return run_layer(image, layer._parameters.get("weight"), *arguments_of(layer))


def exact(layer: AWConv2d) -> AWConv2d:
    return copy.deepcopy(layer).cpu().double()


def step(layer: AWConv2d, image: Tensor, run: Callable[[AWConv2d, Tensor], Tensor | None]) -> dict[str, Tensor | None]:
    """The output, its gradients for a fixed gradient of it, and the buffers then."""
    image = image.detach().requires_grad_()
    output = run(layer, image)
    assert output is not None
    above = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape)
    output.backward(above.to(output.device, output.dtype))
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return dict(output=output.detach(), image=image.grad, **grads, **dict(layer.named_buffers()))


def assert_close(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    """Relative to the largest number of each."""
    for name, reference in expected.items():
        if reference is None:
            assert found[name] is None, name
            continue
        scale = max(float(reference.double().abs().max()), 1e-3)
        message = f"{name}: {{}}"
        torch.testing.assert_close(
            found[name].double().cpu(),
            reference.double().cpu(),
            rtol=0,
            atol=tolerance * scale,
            msg=message.format,
        )


def check_step(name: str, run: Callable[[AWConv2d, Tensor], Tensor | None], device: str) -> None:
    """A step of a case, beside its parts in double precision."""
    if device == "cuda" and name not in ON_GPU:
        pytest.skip("a case takes a dozen kernels, which are compiled")
    layer, image = CASES[name].make(device)
    expected = step(exact(layer), image.cpu().double(), AWConv2d.__call__)
    found = step(layer, image, run)
    assert_close(found, expected, 5e-5)
    assert found["output"].is_contiguous(memory_format=torch.channels_last) or not CASES[name].channels_last
    assert found["image"].stride() == image.stride()
    assert found["weight"].stride() == layer.weight.stride()


def check_frozen(frozen: list[str], run: Callable[[AWConv2d, Tensor], Any], device: str) -> None:
    """Gradients where the parameters of these names, or the image, need none."""
    layer, image = CASES["a tile"].make(device)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(not any(name.startswith(prefix) for prefix in frozen))
    reference, results = exact(layer), []
    for made, input, through in ((layer, image, run), (reference, image.cpu().double(), AWConv2d.__call__)):
        input = input.detach().requires_grad_("image" not in frozen)
        through(made, input).square().sum().backward()
        results.append(dict(image=input.grad, **{key: value.grad for key, value in made.named_parameters()}))
    assert_close(*results, 5e-5)
