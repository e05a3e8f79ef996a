"""Grad-CAM of networks, and heat over photographs."""

from __future__ import annotations

import copy
import doctest
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import awconv
from awconv.explain import cam, grad_cam, overlay

pytest.importorskip("pytorch_grad_cam", reason="Grad-CAM needs the extra explain")


def digits_network() -> Any:
    return timm.create_model("aw_resnet8_cifar.digits", pretrained=True).eval()


def images(size: int = 16) -> Tensor:
    return torch.randn(3, 1, size, size, generator=torch.Generator().manual_seed(1))


def by_the_paper(model: Any, input: Tensor, classes: Tensor) -> Tensor:
    """Equations 1 and 2 of arXiv 1610.02391, before resizing: shape (N, h, w), each image's largest value 1."""
    features = model.forward_features(input).detach().requires_grad_()
    model.forward_head(features).gather(1, classes[:, None]).sum().backward()
    weights = features.grad.mean((2, 3), keepdim=True)
    return from_0_to_1((weights * features).sum(1).relu().detach())


def from_0_to_1(heat: Tensor) -> Tensor:
    heat = heat - heat.amin((1, 2), keepdim=True)
    return heat / heat.amax((1, 2), keepdim=True).clamp(min=1e-7)


@pytest.mark.parametrize("classes", [None, [7, 1, 3]])
def test_it_is_the_papers_equations_at_what_the_classifier_pools(classes: list[int] | None) -> None:
    model, input = digits_network(), images()
    chosen = model(input).argmax(1) if classes is None else torch.tensor(classes)
    coarse = by_the_paper(model, input, chosen)  # (3, 4, 4)
    heat = grad_cam(model, input, classes)
    assert heat.shape == (3, 16, 16)
    assert heat.dtype == torch.float32
    expected = from_0_to_1(nn.functional.interpolate(coarse[:, None], (16, 16), mode="bilinear")[:, 0])
    torch.testing.assert_close(heat, expected, rtol=1e-3, atol=1e-3)
    assert (heat.amax((1, 2)) > 0.99).any()


def test_a_network_whose_parameters_are_frozen_or_compiled_or_fused_gives_the_same() -> None:
    expected = grad_cam(digits_network(), images())
    torch.testing.assert_close(grad_cam(digits_network().requires_grad_(False), images()), expected)
    compiled = torch.compile(digits_network(), backend="eager")
    torch.testing.assert_close(grad_cam(compiled, images(), layer="layer3"), expected)
    torch.testing.assert_close(grad_cam(awconv.fuse(digits_network()), images()), expected, rtol=1e-3, atol=1e-3)


def test_the_network_is_left_as_it_was() -> None:
    model = digits_network().train()
    model.layer1.requires_grad_(False)
    gradient = model.fc.weight.grad = torch.ones_like(model.fc.weight)
    weights = copy.deepcopy(model.state_dict())
    with torch.inference_mode():
        grad_cam(model, images())
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert model.fc.weight.grad is gradient
    assert bool((gradient == 1).all())
    assert [p.requires_grad for p in model.parameters()].count(False) == len(list(model.layer1.parameters()))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_an_earlier_layer_gives_a_finer_map() -> None:
    model = digits_network()
    fine = grad_cam(model, images(), layer="layer1")
    torch.testing.assert_close(fine, grad_cam(model, images(), layer=model.layer1))
    assert fine.diff(dim=2).abs().mean() > grad_cam(model, images()).diff(dim=2).abs().mean()


class InPlaceAfter(nn.Module):
    """Pools what was changed in place after the last convolution, as DenseNets do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, input: Tensor) -> Tensor:
        return self.fc(self.conv(input).relu_().mean((2, 3)))


def test_what_changes_a_feature_map_in_place_does_not_change_its_picture() -> None:
    model = InPlaceAfter()
    features = model.conv(images()).detach().requires_grad_()
    logits = model.fc(features.relu().mean((2, 3)))
    logits.amax(1).sum().backward()
    heat = (features.grad.mean((2, 3), keepdim=True) * features).sum(1).relu().detach()
    expected = from_0_to_1(heat)
    torch.testing.assert_close(grad_cam(model, images()), expected, rtol=1e-3, atol=1e-3)


class OneActivation(nn.Module):
    """Its activation runs twice, the first time at twice the size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.act = nn.ReLU()
        self.fc = nn.Linear(6, 3)

    def forward(self, input: Tensor) -> Tensor:
        return self.fc(self.act(self.conv2(self.act(self.conv1(input)))).mean((2, 3)))


def test_a_module_that_runs_twice_is_passed_over() -> None:
    model = OneActivation()
    features = model.conv2(model.conv1(images()).relu()).detach().requires_grad_()
    model.fc(features.relu().mean((2, 3))).amax(1).sum().backward()
    coarse = (features.grad.mean((2, 3), keepdim=True) * features).sum(1).relu().detach()
    expected = nn.functional.interpolate(from_0_to_1(coarse)[:, None], (16, 16), mode="bilinear")[:, 0]
    torch.testing.assert_close(grad_cam(model, images()), from_0_to_1(expected), rtol=1e-3, atol=1e-3)


class Flat(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        return input.mean((2, 3))


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no batch": (Flat(), dict(images=torch.ones(1, 8, 8)), r"images must be .* shape \(N, C, H, W\).*\(1, 8, 8\)"),
    "bytes": (Flat(), dict(images=images().byte()), "images must be a floating-point tensor"),
    "no classifier": (nn.Conv2d(1, 2, 3), {}, r"must be a classifier.*its output is of shape \(1, 2, 14, 14\)"),
    "no feature map": (Flat(), {}, "Flat has no feature map of more than one pixel, .* for images of 16x16"),
    "too few classes": (InPlaceAfter(), dict(classes=[1]), r"an index from 0 to 1 for each of 3 images, got \[1\]"),
    "no such class": (InPlaceAfter(), dict(classes=[0, 1, 2]), "an index from 0 to 1"),
    "no such layer": (InPlaceAfter(), dict(layer="convs"), "must be a module of the network or its name, got 'convs'"),
    "a layer that runs twice": (OneActivation(), dict(layer="act"), "must run once in a pass, and this ReLU runs 2"),
    "rounded": (InPlaceAfter().bfloat16(), {}, r"no network in bfloat16; give copy\.deepcopy\(network\)\.float\(\)"),
    "a layer without places": (InPlaceAfter(), dict(layer="fc"), r"layer must have an output of shape .* \(3, 2\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_in_words(name: str) -> None:
    model, arguments, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        grad_cam(model, **({"images": images()} | arguments))


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pytorch_grad_cam", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'awconv\[explain\]'"):
        grad_cam(InPlaceAfter(), images())


def test_heat_stands_over_the_photograph_where_it_is() -> None:
    heat = torch.zeros(4, 4)
    heat[:, 2:] = 1
    picture = overlay(Image.new("RGB", (40, 20), (0, 200, 0)), heat)
    assert (picture.size, picture.mode) == ((40, 20), "RGB")
    cold, hot = picture.getpixel((1, 10)), picture.getpixel((38, 10))
    assert len(set(cold)) <= 2  # grey under nearly black
    assert hot[0] > hot[2] + 50  # inferno's end is yellow
    for wrong in (heat[None], heat + 0.5, heat * torch.nan):
        with pytest.raises(ValueError, match="heat must be a tensor of shape"):
            overlay(Image.new("L", (4, 4)), wrong)
    with pytest.raises(ValueError, match="opacity must be from 0 to 1, got 2"):
        overlay(Image.new("L", (4, 4)), heat, 2)


def test_the_docstrings_examples_run() -> None:
    assert doctest.testmod(cam).attempted > 5
    assert doctest.testmod(cam).failed == 0
