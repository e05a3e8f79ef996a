"""Conversions undone."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.layers import Conv2dSame
from torch import nn

from awconv import AWConv2d, convert, revert, train_only
from tests.networks import converted, kinds, moved, network


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "mobilenetv2_100"])
def test_a_network_that_was_converted_by_identity_is_what_it_was(name: str) -> None:
    plain = timm.create_model(name, num_classes=5).eval()
    model = copy.deepcopy(plain)
    parameters = dict(model.named_parameters())
    assert revert(convert(model, init="identity")) is model
    assert str(model) == str(plain)
    assert not model.training
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(images), plain(images))


def test_all_kinds_of_convolutions_come_back() -> None:
    plain = nn.Sequential(
        nn.Conv1d(4, 4, 3, padding="same", dilation=2),
        nn.Conv2d(4, 4, 3, 2, 1, groups=2, padding_mode="reflect"),
        Conv2dSame(4, 8, 3, stride=2, bias=False),
        nn.Conv3d(4, 4, (1, 2, 3)),
    )
    shared = nn.Sequential(plain, plain[1])
    model = revert(convert(copy.deepcopy(shared), ["*"], init="identity"))
    assert str(model) == str(shared)
    assert model[1] is model[0][1]
    volume = torch.randn(2, 4, 9, 9)
    assert torch.equal(model[0][1](volume), plain[1](volume))
    single = convert(nn.Conv2d(3, 4, 3), "", init="identity")
    assert type(revert(single)) is nn.Conv2d


def test_a_trained_branch_is_not_lost_by_mistake() -> None:
    model = moved(convert(network(), init="identity"))
    model[3].attention.start_as_identity()
    layers = converted(model)
    with pytest.raises(ValueError, match=r"attention of 1 of 2 .* such as of '2\.2', .*drop_attention=True"):
        revert(model)
    assert converted(model) == layers
    weight = model[2][2].weight
    revert(model, drop_attention=True)
    assert kinds(model) == kinds(network())
    assert model[2][2].weight is weight
    with pytest.raises(ValueError, match="attention of 2 of 2"):
        revert(convert(network()))


@pytest.mark.parametrize("name", ["repvgg_a0", "fastvit_t8"])
def test_networks_fold_again(name: str) -> None:
    plain = timm.create_model(name, num_classes=3).eval()
    model = revert(convert(copy.deepcopy(plain), init="identity"))
    images = torch.randn(2, 3, 64, 64)
    folded = timm.utils.reparameterize_model(model)
    assert torch.equal(folded(images), timm.utils.reparameterize_model(plain)(images))


def test_it_may_be_converted_again() -> None:
    model = revert(convert(network(), init="identity"))
    train_only(convert(model, init="identity"), "branch")
    revert(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert converted(convert(model)) == {"2.2", "3"}


def test_what_cannot_be_reverted_is_named() -> None:
    with pytest.raises(ValueError, match="Sequential has no AW-convolution"):
        revert(network())
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        revert("resnet18")
    hooked = convert(network(), init="identity")
    hooked[3].register_forward_hook(lambda module, inputs, output: None)
    with pytest.raises(ValueError, match="the layer '3' has hooks"):
        revert(hooked)
    parametrised = convert(network(), init="identity")
    nn.utils.parametrizations.weight_norm(parametrised[3])
    with pytest.raises(ValueError, match="the layer '3' is"):
        revert(parametrised)

    class Mine(AWConv2d):
        pass

    with pytest.raises(ValueError, match="the layer '0' is a Mine, of a class of its own"):
        revert(nn.Sequential(Mine(3, 4, 3)), drop_attention=True)
