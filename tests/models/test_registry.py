"""The models that timm gives by name."""

from __future__ import annotations

import functools

import pytest
import timm
import torch
from torch import nn

from awconv import AWConv2d
from awconv.models import CifarResNet

CIFAR_DEPTHS = (8, 20, 32, 44, 56, 110)
IMAGENET = ("aw_resnet18", "aw_resnet34", "aw_resnet50", "aw_resnet101", "aw_resnet152")
CIFAR = tuple(f"{prefix}resnet{depth}_cifar" for prefix in ("", "aw_") for depth in CIFAR_DEPTHS)
SMALL = ("aw_resnet18", "aw_resnet50", "resnet8_cifar", "aw_resnet8_cifar", "aw_resnet20_cifar")


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@functools.cache
def counted(name: str) -> int:
    with torch.device("meta"):
        return count(timm.create_model(name))


def branch_parameters(in_channels: int, out_channels: int) -> int:
    """Two pointwise convolutions and their norms, by the formulas of the paper's branch with r = 16."""
    hidden = max(in_channels // 16, 4)
    return in_channels * hidden + hidden * out_channels + 2 * (hidden + out_channels)


def stage_channels(widths: tuple[int, ...], blocks: tuple[int, ...], stem: int) -> list[tuple[int, int]]:
    """Input and output channels of the 3x3 convolutions of stages of basic blocks."""
    pairs, last = [], stem
    for width, number in zip(widths, blocks, strict=True):
        for _ in range(number):
            pairs += [(last, width), (width, width)]
            last = width
    return pairs


def test_aw_resnet50_has_the_papers_parameters() -> None:
    assert counted("aw_resnet50") == 25_722_240


@pytest.mark.parametrize(("depth", "blocks"), [(50, (3, 4, 6, 3)), (101, (3, 4, 23, 3)), (152, (3, 8, 36, 3))])
def test_bottleneck_resnets_gain_their_branches(depth: int, blocks: tuple[int, ...]) -> None:
    added = sum(n * branch_parameters(w, w) for n, w in zip(blocks, (64, 128, 256, 512), strict=True))
    assert counted(f"aw_resnet{depth}") == counted(f"resnet{depth}") + added


@pytest.mark.parametrize(("depth", "blocks"), [(18, (2, 2, 2, 2)), (34, (3, 4, 6, 3))])
def test_basic_resnets_gain_their_branches(depth: int, blocks: tuple[int, ...]) -> None:
    added = sum(branch_parameters(*pair) for pair in stage_channels((64, 128, 256, 512), blocks, 64))
    assert counted(f"aw_resnet{depth}") == counted(f"resnet{depth}") + added


@pytest.mark.parametrize("depth", CIFAR_DEPTHS)
def test_cifar_resnets_have_the_parameters_of_their_formula(depth: int) -> None:
    blocks = (depth - 2) // 6
    pairs = stage_channels((16, 32, 64), (blocks,) * 3, 16)
    plain = 3 * 16 * 9 + 2 * 16 + sum(9 * i * o + 2 * o for i, o in pairs) + 64 * 10 + 10
    assert counted(f"resnet{depth}_cifar") == plain
    assert counted(f"aw_resnet{depth}_cifar") == plain + sum(branch_parameters(*pair) for pair in pairs)


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_cifar_resnets_have_the_size_that_their_paper_gives(depth: int, millions: float) -> None:
    # Table 6 of arXiv 1512.03385, which rounds to two digits.
    assert float(f"{counted(f'resnet{depth}_cifar') / 1e6:.2g}") == millions


@pytest.mark.parametrize("name", [*IMAGENET, *(name for name in CIFAR if name.startswith("aw_"))])
def test_every_3x3_of_the_residual_blocks_is_replaced_and_nothing_else(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and "attention" not in path:
            assert isinstance(module, AWConv2d) == (module.kernel_size == (3, 3) and path != "conv1"), path


@pytest.mark.parametrize("name", SMALL)
def test_classifiers_and_inputs_of_other_sizes(name: str) -> None:
    model = timm.create_model(name, num_classes=7, in_chans=1)
    images = torch.randn(2, 1, 64, 64)
    assert model(images).shape == (2, 7)
    model.reset_classifier(3)
    assert model(images).shape == (2, 3)
    model.reset_classifier(0)
    assert model(images).shape == (2, model.num_features)
    assert model.forward_features(images).shape[:2] == (2, model.num_features)


@pytest.mark.parametrize("name", SMALL)
def test_features_only_gives_the_stages(name: str) -> None:
    model = timm.create_model(name, features_only=True)
    features = model(torch.randn(2, 3, 64, 64))
    assert [f.shape[1] for f in features] == model.feature_info.channels()
    assert [64 // f.shape[2] for f in features] == model.feature_info.reduction()
    assert len(features) == (3 if "cifar" in name else 5)
    assert any(isinstance(module, AWConv2d) for module in model.modules()) == name.startswith("aw_")


def test_the_attentions_arguments_go_through_create_model() -> None:
    model = timm.create_model("aw_resnet8_cifar", aw_args=dict(reduction=2, activation="tanh"))
    assert {(m.reduction, m.activation) for m in model.modules() if isinstance(m, AWConv2d)} == {(2, "tanh")}


def test_gradient_checkpointing_changes_no_gradient() -> None:
    # Without batch statistics in the blocks, whose running means would be updated twice.
    model = timm.create_model("resnet8_cifar")
    images = torch.randn(2, 3, 32, 32)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append(model.conv1.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_the_stages_group_the_parameters() -> None:
    matcher = timm.models.group_parameters(
        timm.create_model("resnet8_cifar"), CifarResNet(8).group_matcher(coarse=True)
    )
    assert [len(names) > 0 for names in matcher.values()] == [True] * len(matcher)


def test_the_shortcut_keeps_the_input_and_pads_zeros() -> None:
    shortcut = timm.create_model("resnet8_cifar").layer2[0].downsample
    input = torch.randn(2, 16, 8, 8)
    output = shortcut(input)
    assert output.shape == (2, 32, 4, 4)
    assert torch.equal(output[:, 8:24], input[:, :, ::2, ::2])
    assert torch.count_nonzero(output[:, :8]) == torch.count_nonzero(output[:, 24:]) == 0


def test_another_depth_is_refused() -> None:
    with pytest.raises(ValueError, match=r"depth must be 6n \+ 2, such as 20, .*got 21"):
        CifarResNet(21)


def test_weights_that_do_not_exist_are_not_invented() -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights exist for aw_resnet8_cifar"):
        timm.create_model("aw_resnet8_cifar", pretrained=True)
