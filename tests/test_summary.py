"""The summary of a network: its text and its counts."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from awconv import AWConv2d, convert, summary


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Sequential(nn.Conv2d(8, 32, 1), nn.Conv2d(32, 16, 3, stride=2, padding=1)),
        nn.Conv2d(16, 16, (1, 5), groups=16),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 16, 3)),
        nn.Flatten(),
        nn.LazyLinear(10),
    )


def test_each_convolution_is_listed_with_the_reason_for_leaving_it() -> None:
    model = network()
    model(torch.zeros(1, 3, 16, 16))
    convert(model, "1.1")
    layers = {layer.name: layer for layer in summary(model).layers}
    assert {name: layer.reason for name, layer in layers.items()} == {
        "0": "the stem",
        "1.0": "kernel of size 1",
        "1.1": "",
        "2": "not selected",
        "3": "it is parametrised",
    }
    assert [name for name, layer in layers.items() if layer.converted] == ["1.1"]
    assert layers["2"].layer == "Conv2d 16 to 16, 1x5, 16 groups"


def test_parameters_and_operations_are_those_of_the_formulas() -> None:
    model = network()
    model(torch.zeros(1, 3, 16, 16))
    plain = summary(model, torch.zeros(2, 3, 16, 16))
    convert(model, ["1.1", "2"])
    counted = summary(model, torch.zeros(2, 3, 16, 16))
    first, second = counted.converted
    # Hidden channels max(C1 // 16, 4) = 4; two convolutions and the weight and bias of their norms.
    assert first.parameters == 32 * 4 + 4 * 16 + 2 * (4 + 16)
    assert second.parameters == 16 * 4 + 4 * 16 + 2 * (4 + 16)
    # For each of 2 images: the branch at 3x3 and 1x5 positions, and the lesser of the weights (16 x 32 x 9, 16 x 1 x 5)
    # and the partial products of all taps (16 x 9 at 8x8, 16 x 5 at 8x4).
    assert first.operations == 2 * (9 * (32 * 4 + 4 * 16) + min(16 * 32 * 9, 16 * 9 * 8 * 8))
    assert second.operations == 2 * (5 * (16 * 4 + 4 * 16) + min(16 * 5, 16 * 5 * 8 * 4))
    convolutions = 3 * 8 * 9 * 256 + 8 * 32 * 256 + 32 * 16 * 9 * 64 + 16 * 5 * 8 * 4 + 16 * 16 * 9 * 6 * 2
    assert plain.operations == 2 * (convolutions + 16 * 6 * 2 * 10)
    assert plain.operations_added == 0
    assert counted.operations == plain.operations + first.operations + second.operations
    assert counted.operations_added == first.operations + second.operations
    assert counted.parameters == plain.parameters + counted.parameters_added


def test_blocks_of_input_channels_scale_more_partial_products() -> None:
    layer = AWConv2d(32, 16, 3, padding=1, in_expansion=8)
    (counted,) = summary(nn.Sequential(layer), torch.zeros(1, 32, 4, 4)).converted
    assert counted.operations == 9 * (32 * 4 + 4 * 16 * 4) + min(16 * 32 * 9, 16 * 4 * 9 * 16)


def test_a_pool_of_ones_own_counts_what_it_does() -> None:
    def pool(size: tuple[int, int]) -> nn.Module:
        return nn.Sequential(nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(size))

    layer, image = AWConv2d(8, 4, 3, padding=1, pool=pool), torch.zeros(1, 8, 6, 6)
    found = summary(nn.Sequential(layer), image)
    of_pool, of_branch, scaling = 8 * 8 * 36, 9 * (8 * 4 + 4 * 4), min(8 * 4 * 9, 4 * 9 * 36)
    assert found.converted[0].operations == of_pool + of_branch + scaling
    assert found.operations == of_pool + of_branch + scaling + 8 * 4 * 9 * 36


def test_the_network_is_not_changed() -> None:
    model = convert(timm.create_model("resnet8_cifar")).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    summary(model, torch.randn(2, 3, 32, 32))
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_layer_that_is_called_twice_counts_twice() -> None:
    shared = AWConv2d(8, 8, 3, padding=1)
    once, twice = (summary(nn.Sequential(*[shared] * n), torch.zeros(1, 8, 9, 9)) for n in (1, 2))
    assert twice.operations == 2 * once.operations
    assert twice.parameters == once.parameters


def test_it_prints_a_table() -> None:
    model = convert(timm.create_model("resnet8_cifar"))
    with_operations = str(summary(model, torch.zeros(1, 3, 32, 32)))
    first, *_, last = with_operations.splitlines()
    assert first.split() == ["layer", "parameters", "added", "multiply-adds", "added"]
    assert " ".join(last.split()) == "6 of 7 2,096 88,128 +2.78% of parameters, +0.72% of multiply-adds"
    without = str(summary(model))
    assert "multiply-adds" not in without
    assert " ".join(without.splitlines()[-1].split()) == "6 of 7 2,096 +2.78% of parameters"


def test_it_says_to_which_attention_a_branch_is_relative() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    convert(model, "1")
    convert(model, "2", init="identity")
    convert(model, "3", init="identity", activation="relu")
    found = summary(model)
    assert [layer.relative_to for layer in found.layers] == [None, None, 0.5, 1.0]
    lines = [line.rstrip() for line in str(found).splitlines()]
    assert [line.endswith("relative to 0.5") for line in lines] == [False, False, False, True, False, False]
    assert lines[4].endswith("relative to 1")
    assert "relative" not in lines[1] + lines[2]
    with torch.device("meta"):
        on_meta = convert(nn.Sequential(nn.Conv2d(3, 8, 3)), "0", init="identity")
    assert summary(on_meta).layers[0].relative_to == 0.5


def test_other_inputs_than_one_tensor() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = AWConv2d(4, 4, 3)

        def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            return self.conv(first) + self.conv(second)

    images = torch.zeros(1, 4, 5, 5)
    counted = summary(Two(), (images, images))
    assert counted.operations == 2 * (4 * 4 * 9 * 9 + 9 * (4 * 4 + 4 * 4) + min(4 * 4 * 9, 4 * 9 * 9))


def test_layers_that_have_not_seen_an_input_are_listed() -> None:
    counted = summary(nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyConv2d(4, 3)))
    assert counted.layers[1].reason == "LazyConv2d is not initialised; call the model once"
    assert counted.parameters == 3 * 4 * 9 + 4


def test_what_is_no_module_is_named() -> None:
    with pytest.raises(TypeError, match=r"summary: model must be an nn\.Module, got 'resnet18'"):
        summary("resnet18")
