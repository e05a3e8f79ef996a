"""Converted networks and code that folds layers into one: RepVGG and others, norms, LoRA."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from torch import Tensor, nn

from awconv import AWConv2d, convert
from tests.networks import converted

FOLDED = ["repvgg_a0", "mobileone_s0", "repvit_m0_9", "fastvit_t8"]


@pytest.mark.parametrize("name", FOLDED)
def test_folding_a_converted_network_is_an_error_that_loses_nothing(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = convert(timm.create_model(name, num_classes=3)).eval()
    assert "would lose the attention" in caplog.text
    layers = converted(model)
    for network in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match=r"lose their attention\. Fold the plain network first"):
            timm.utils.reparameterize_model(network)
        assert converted(network) == layers


def test_folding_around_a_layer_is_noticed_if_it_was_selected_by_name() -> None:
    model = convert(timm.create_model("repvgg_a0", num_classes=3), "stages.0.0.conv_kxk.conv").eval()
    with pytest.raises(ValueError, match=r"lose their attention\. Fold the plain network first"):
        timm.utils.reparameterize_model(model)
    by_hand = timm.create_model("repvgg_a0", num_classes=3).eval()
    block = by_hand.stages[0][0].conv_kxk
    block.conv = convert(block.conv)
    assert not converted(timm.utils.reparameterize_model(by_hand))  # as the documentation warns


@pytest.mark.parametrize("name", FOLDED)
def test_a_folded_network_is_converted_exactly(name: str) -> None:
    model = timm.create_model(name, num_classes=3).train()
    images = torch.randn(8, 3, 64, 64)
    with torch.no_grad():
        model(images)  # statistics other than 0 and 1
        folded = timm.utils.reparameterize_model(model.eval())
        expected = folded(images)
        convert(folded, init="identity")
        assert len(converted(folded)) > 5
        torch.testing.assert_close(folded(images), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_a_method_that_only_has_the_name_of_folding_is_left_alone() -> None:
    class Fusion(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def fuse(self, first: Tensor, second: Tensor) -> Tensor:
            return first + second

        def forward(self, input: Tensor) -> Tensor:
            return self.fuse(input, self.conv(input))

    model = convert(Fusion(), "conv")
    assert model(torch.randn(2, 4, 5, 5)).shape == (2, 4, 5, 5)
    outside = nn.Sequential(nn.Conv2d(3, 4, 3), timm.create_model("repvgg_a0", num_classes=3).stages[0][0])
    convert(outside, "0")
    outside[1].reparameterize()  # which folds no AW-convolution
    assert isinstance(outside[1].conv_kxk if hasattr(outside[1], "conv_kxk") else outside[1].reparam_conv, nn.Module)


def test_a_norm_after_the_layer_is_folded_into_it_exactly() -> None:
    model = convert(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)), "0")
    images = torch.randn(8, 4, 9, 9)
    with torch.no_grad():
        model.train()(images)
        model.eval()
        fused = torch.nn.utils.fusion.fuse_conv_bn_eval(model[0], model[1])
        assert isinstance(fused, AWConv2d)
        torch.testing.assert_close(fused(images), model(images), rtol=1e-4, atol=1e-5)


def test_lora_beside_a_layer_is_exact_and_merged_before_conversion() -> None:
    class LoRA(nn.Module):
        """As peft's: beside its layer, until it is merged into the layer's weight."""

        def __init__(self, layer: nn.Conv2d) -> None:
            super().__init__()
            self.base_layer, self.merged = layer, False
            self.register_buffer("delta", torch.randn_like(layer.weight))

        def merge(self, safe_merge: bool = False) -> None:
            self.base_layer.weight.data += self.delta
            self.merged = True

        def forward(self, input: Tensor) -> Tensor:
            output = self.base_layer(input)
            return output if self.merged else output + nn.functional.conv2d(input, self.delta)

    model, images = LoRA(nn.Conv2d(4, 8, 3)), torch.randn(2, 4, 6, 6)
    merged = copy.deepcopy(model)
    expected = model(images)
    convert(model, "base_layer", init="identity")
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"LoRA\.merge\(\) would make"):
        model.merge(safe_merge=True)
    merged.merge()
    convert(merged, "base_layer", init="identity")
    torch.testing.assert_close(merged(images), expected, rtol=1e-4, atol=1e-4)


def test_fuse_convs_that_adds_kernels_is_an_error_too() -> None:
    class Added(nn.Module):
        """A kernel and a smaller one, until they are one kernel."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.small = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

        def fuse_convs(self) -> None:
            self.conv.weight.data[..., 1:2, 1:2] += self.small.weight.data

    model = convert(nn.Sequential(Added()), "0.conv")
    before = model[0].conv.weight.clone()
    with pytest.raises(ValueError, match=r"Added\.fuse_convs\(\) would make"):
        model[0].fuse_convs()
    assert torch.equal(model[0].conv.weight, before)


def test_a_network_that_was_pickled_by_an_earlier_version_still_refuses() -> None:
    method = b"cawconv.convert\n_lose_attention\n."  # the pickle of a function is its name
    with pytest.raises(ValueError, match=r"Block\.fuse\(\) would make"):
        pickle.loads(method)("Block.fuse")
