"""The norms of the branches of a converted network."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from awconv import convert
from tests.networks import network


def with_norm(norm: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3))


@pytest.mark.parametrize(
    ("norm", "kind"),
    [
        (nn.BatchNorm2d(8), nn.BatchNorm2d),
        (timm.layers.BatchNormAct2d(8), nn.BatchNorm2d),
        (nn.SyncBatchNorm(8), nn.SyncBatchNorm),
        (nn.GroupNorm(4, 8), nn.GroupNorm),
        (timm.layers.LayerNorm2d(8), nn.GroupNorm),
        (nn.InstanceNorm2d(8), nn.GroupNorm),
        (FrozenBatchNorm2d(8), FrozenBatchNorm2d),
        (timm.layers.FrozenBatchNormAct2d(8), FrozenBatchNorm2d),
        (nn.Identity(), nn.BatchNorm2d),
    ],
)
def test_the_branchs_norm_is_of_the_networks_kind(norm: nn.Module, kind: type[nn.Module]) -> None:
    plain = with_norm(norm).eval()
    model = convert(copy.deepcopy(plain), init="identity")
    assert {
        type(part) for layer in (model[2], model[4]) for part in (layer.attention.norm1, layer.attention.norm2)
    } == {kind}
    images = torch.randn(2, 3, 12, 12)
    output = model(images)
    torch.testing.assert_close(output, plain(images), rtol=1e-5, atol=1e-5)  # single precision, as above
    output.square().sum().backward()
    for layer in (model[2], model[4]):
        assert any(p.grad is not None and p.grad.any() for p in layer.attention.parameters())


def test_a_branch_with_group_norm_learns_even_where_it_sees_one_position() -> None:
    model = convert(with_norm(nn.GroupNorm(8, 8)), lambda name, layer: name == "2", kernel_expansion=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images = torch.randn(4, 3, 12, 12)
    model(images).square().mean().backward()
    assert model[2].attention.attention_size[2:] == (1, 1)
    for name, parameter in model[2].attention.named_parameters():
        assert parameter.grad.abs().max() > 1e-8, name
    optimizer.step()


@pytest.mark.parametrize(("batch_norms", "kind"), [(2, nn.GroupNorm), (4, nn.BatchNorm2d)])
def test_the_kind_that_a_network_has_most_of_decides(batch_norms: int, kind: type[nn.Module]) -> None:
    groups = nn.Sequential(nn.GroupNorm(1, 8), nn.GroupNorm(2, 8))
    model = nn.Sequential(with_norm(nn.GroupNorm(4, 8)), groups, *(nn.BatchNorm2d(12) for _ in range(batch_norms)))
    assert isinstance(convert(model)[0][2].attention.norm1, kind)


def test_branches_do_not_decide_the_norm_of_later_ones() -> None:
    model = convert(with_norm(nn.GroupNorm(2, 8)), "2", norm_layer=nn.BatchNorm2d)
    assert isinstance(convert(model, "4")[4].attention.norm1, nn.GroupNorm)


def test_a_frozen_backbone_trains_its_branches_alone() -> None:
    model = with_norm(FrozenBatchNorm2d(8)).requires_grad_(False)
    convert(model, init="identity")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{layer}.attention.conv{index}.weight" for layer in (2, 4) for index in (1, 2)}


def test_the_norm_can_be_chosen_or_left_out() -> None:
    assert isinstance(convert(network(), norm_layer=nn.InstanceNorm2d)[3].attention.norm1, nn.InstanceNorm2d)
    plain = network()
    model = convert(copy.deepcopy(plain), norm_layer=None, init="identity", activation="relu")
    assert isinstance(model[3].attention.norm1, nn.Identity)
    images = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(model(images), plain(images), rtol=1e-5, atol=1e-5)  # single precision, as above


# --- what is refused
