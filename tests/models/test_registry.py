"""The models that timm gives by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from awconv import AWConv2d
from awconv.model_costs import cost_table
from awconv.models import BASELINES, CifarResNet, WideResNet, variants

RESNETS = tuple(name for name in BASELINES if name.startswith("aw_") and "resnet" in name)
SMALL = (
    "aw_resnet18",
    "aw_resnet50",
    "aw_cbamresnet50",
    "aw_mobilenetv1_100",
    "aw_mobilenetv2_100",
    "se_tf_efficientnet_lite0",
    "resnet8_cifar",
    "aw_resnet8_cifar",
    "aw_seresnet20_cifar",
)


@pytest.mark.parametrize("name", RESNETS)
def test_every_3x3_of_the_residual_blocks_is_replaced_and_nothing_else(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and "attention" not in path:
            assert isinstance(module, AWConv2d) == (module.kernel_size == (3, 3) and path != "conv1"), path


@pytest.mark.parametrize(
    ("network", "layers"), [("mobilenetv1_100", 13), ("mobilenetv2_100", 17), ("se_tf_efficientnet_lite0", 16)]
)
def test_every_depthwise_convolution_is_replaced_and_nothing_else(network: str, layers: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(f"aw_{network}")
    convolutions = {
        path: m for path, m in model.named_modules() if isinstance(m, nn.Conv2d) and "attention" not in path
    }
    assert {path for path, m in convolutions.items() if isinstance(m, AWConv2d)} == {
        path for path, m in convolutions.items() if m.groups > 1
    }
    assert sum(isinstance(m, AWConv2d) for m in convolutions.values()) == layers


def test_every_convolution_of_a_vgg_but_the_first_is_replaced() -> None:
    with torch.device("meta"):
        model = timm.create_model("aw_vgg16")
    convolutions = [m for path, m in model.features.named_modules() if path.isdecimal() and isinstance(m, nn.Conv2d)]
    assert [isinstance(m, AWConv2d) for m in convolutions] == [False] + [True] * 12


# Channels of the depthwise convolutions, from the tables of the architectures (arXiv 1704.04861 and 1801.04381).
def test_every_network_with_attention_has_its_baseline() -> None:
    for name, baseline in BASELINES.items():
        assert timm.is_model(name)
        assert timm.is_model(baseline)
        assert baseline in (
            name.removeprefix(prefix) for prefix in ("aw_", "od_", "se", "cbam", "eca", "aa_", "se_", "cbam_")
        )
        assert len(baseline) < len(name)


def test_a_networks_variants_are_found_by_their_scheme() -> None:
    assert variants("resnet50") == {
        "aw": "aw_resnet50",
        "od": "od_resnet50",
        "se": "seresnet50",
        "aw_se": "aw_seresnet50",
        "cbam": "cbamresnet50",
        "aw_cbam": "aw_cbamresnet50",
        "eca": "ecaresnet50",
        "aw_eca": "aw_ecaresnet50",
    }
    assert variants("tf_efficientnet_lite0") == {
        "aw": "aw_tf_efficientnet_lite0",
        "se": "se_tf_efficientnet_lite0",
        "aw_se": "aw_se_tf_efficientnet_lite0",
    }
    assert variants("mobilenetv1_100")["aw_se"] == "aw_se_mobilenetv1_100"
    assert variants("wide_resnet28_10_cifar")["aa"] == "aa_wide_resnet28_10_cifar"
    assert variants("seresnet20_cifar") == {"aw": "aw_seresnet20_cifar"}
    assert variants("aw_resnet50") == variants("no_network") == {}


def test_every_network_with_attention_is_a_variant() -> None:
    found = {name for baseline in set(BASELINES.values()) for name in variants(baseline).values()}
    assert found == set(BASELINES)


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.campaign)])
def test_the_documents_table_is_that_of_the_command(every: int) -> None:
    document = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    names = list(BASELINES)[::every]
    printed = cost_table(names, quote="`").markdown().splitlines()
    first = document.index(printed[0])
    table = document[first:].split("\n\n")[0].splitlines()
    assert printed[:2] == table[:2]
    assert len(table) == 2 + len(BASELINES)
    assert set(printed) <= set(table)


def test_features_do_not_depend_on_those_asked_for_before() -> None:
    for indices in ((0,), (0, 1, 2)):
        model = timm.create_model("resnet8_cifar", features_only=True, out_indices=indices)
        assert len(model(torch.randn(2, 3, 32, 32))) == len(indices)
    assert len(timm.create_model("resnet8_cifar", features_only=True)(torch.randn(2, 3, 32, 32))) == 3


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


def test_another_depth_of_a_wide_resnet_is_refused() -> None:
    with pytest.raises(ValueError, match=r"depth must be 6n \+ 4, such as 10, .*got 20"):
        WideResNet(20, 10)


def test_another_depth_is_refused() -> None:
    with pytest.raises(ValueError, match=r"depth must be 6n \+ 2, such as 20, .*got 21"):
        CifarResNet(21)


def test_weights_that_do_not_exist_are_not_invented() -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights exist for aw_resnet50"):
        timm.create_model("aw_resnet50", pretrained=True)
