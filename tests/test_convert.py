"""Conversion of networks."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from awconv import AWConv1d, AWConv2d, AWConv3d, convert


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, groups=2, bias=False)),
        nn.Conv2d(8, 4, (1, 3), padding=(0, 1), padding_mode="circular"),
    )


def kinds(model: nn.Module) -> dict[str, str]:
    names = {name: type(module).__name__ for name, module in model.named_modules()}
    return {name: kind for name, kind in names.items() if "Conv" in kind and "attention" not in name}


def test_every_spatial_convolution_but_the_stem_is_converted_in_place() -> None:
    model = network()
    assert convert(model) is model
    assert kinds(model) == {"0": "Conv2d", "2.0": "Conv2d", "2.2": "AWConv2d", "3": "AWConv2d"}
    assert model(torch.randn(2, 3, 9, 9)).shape == (2, 4, 4, 4)


def test_parameters_are_taken_over_not_copied() -> None:
    model = network().double()
    model[3].weight.requires_grad_(False)
    model[2].eval()
    old = [model[2][2], model[3]]
    convert(model)
    for before, after in zip(old, [model[2][2], model[3]], strict=True):
        assert after.weight is before.weight
        assert after.bias is before.bias
        assert after.attention.conv1.weight.dtype == torch.float64
        for name in ("stride", "padding", "dilation", "groups", "padding_mode", "kernel_size"):
            assert getattr(after, name) == getattr(before, name)
    assert not model[3].weight.requires_grad
    assert model[3].attention.conv1.weight.requires_grad
    assert not model[2][2].attention.norm1.training
    assert model[3].attention.norm1.training


def test_select_decides_by_name_and_module() -> None:
    model = convert(network(), lambda name, module: name == "0" or module.kernel_size == (1, 1), reduction=2)
    assert kinds(model) == {"0": "AWConv2d", "2.0": "AWConv2d", "2.2": "Conv2d", "3": "Conv2d"}
    assert model[0].reduction == 2


def test_a_shared_module_is_converted_once() -> None:
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), shared, nn.ReLU(), shared)
    convert(model)
    assert isinstance(model[1], AWConv2d)
    assert model[1] is model[3]


def test_one_and_three_dimensional_convolutions_are_converted() -> None:
    assert isinstance(convert(nn.Conv1d(4, 4, 3)), AWConv1d)
    assert isinstance(convert(nn.Conv3d(4, 4, 3)), AWConv3d)


def test_a_second_conversion_finds_nothing_left() -> None:
    model = convert(network())
    with pytest.raises(ValueError, match="no convolution of Sequential was selected"):
        convert(model)
    convert(model, lambda name, module: module.kernel_size == (1, 1))  # the branches have such, too
    assert kinds(model)["2.0"] == "AWConv2d"
    assert not any(isinstance(part, AWConv2d) for part in model[3].attention.modules())


class Unusual(nn.Conv2d):
    pass


@pytest.mark.parametrize("kind", ["subclass", "hook", "backward hook", "parametrised"])
def test_what_cannot_be_converted_exactly_is_left_and_logged(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    last = Unusual(4, 4, 3) if kind == "subclass" else nn.Conv2d(4, 4, 3)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), last)
    if kind == "hook":
        model[2].register_forward_hook(lambda *_: None)
    if kind == "backward hook":
        model[2].register_full_backward_hook(lambda *_: None)
    if kind == "parametrised":
        weight_norm(model[2])
    left = model[2]
    with caplog.at_level(logging.WARNING, logger="awconv"):
        convert(model)
    assert model[2] is left
    assert isinstance(model[1], AWConv2d)
    assert "convert: 2 is left as it is" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(select=lambda name, module: False), r"no convolution of Sequential was selected.*'0' \(Conv2d\(3, 8"),
        (dict(activation="gelu"), r"layer '2.2': AWConv2d: activation must be one of"),
        (dict(out_expansion=8), r"layer '3': AWConv2d: out_expansion must divide out_channels, 4, got 8"),
    ],
)
def test_an_error_names_the_layer_and_leaves_the_model(arguments: dict[str, Any], message: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=message):
        convert(model, **arguments)
    assert set(kinds(model).values()) == {"Conv2d"}


def test_an_argument_that_no_layer_has_is_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'reductoin'"):
        convert(network(), reductoin=4)


def test_what_is_no_module_or_no_function_is_named() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got 'resnet18'"):
        convert("resnet18")
    with pytest.raises(TypeError, match=r"select must be a function of a layer's name and the layer.*got 'layer4'"):
        convert(network(), "layer4")


def test_the_norm_can_be_chosen_or_left_out() -> None:
    assert isinstance(convert(network())[3].attention.norm1, nn.BatchNorm2d)
    assert isinstance(convert(network(), norm_layer=None)[3].attention.norm1, nn.Identity)


def test_a_model_without_convolutions_is_refused() -> None:
    with pytest.raises(ValueError, match="no convolution of Linear was selected for conversion; it has none"):
        convert(nn.Linear(3, 4))
