"""Conversion by identity: trained networks compute the same as before."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from awconv import convert
from awconv.layers import AWConv2dSame
from tests.networks import converted, network


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu"])
def test_identity_keeps_the_output_and_every_branch_learns(activation: str, residual: bool) -> None:
    plain = network()
    model = convert(copy.deepcopy(plain), init="identity", activation=activation, residual=residual)
    images = torch.randn(4, 3, 12, 12)
    for train in (True, False):
        expected, output = plain.train(train)(images), model.train(train)(images)
        # A few roundings of single precision (6e-8) in sums of at most 72 terms of order 1.
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    model.train()(images).square().sum().backward()
    for layer in (model[2][2], model[3]):
        assert layer.attention.norm2.weight.grad.abs().min() > 0


@pytest.mark.parametrize(
    ("activation", "residual"), [("tanh", True), ("relu", True), ("sigmoid", False), ("relu", False)]
)
def test_the_attentional_weights_are_the_old_ones_bit_for_bit_where_the_constant_allows(
    activation: str, residual: bool
) -> None:
    plain = network()
    model = convert(copy.deepcopy(plain), init="identity", activation=activation, residual=residual)
    for old, layer in ((plain[2][2], model[2][2]), (plain[3], model[3])):
        attention = layer.attention(torch.randn(2, 8, 12, 12))[0]
        weight = layer.weight + attention * layer.weight if residual else attention * layer.weight
        assert torch.equal(weight, old.weight)


def test_the_gradient_of_the_branch_is_that_of_finite_differences() -> None:
    model = convert(network(), init="identity").double()
    images = torch.randn(4, 3, 12, 12).double()
    weight = model[3].attention.norm2.weight

    def loss() -> Tensor:
        return model(images).square().sum()

    loss().backward()
    distance = 1e-5
    with torch.no_grad():
        weight[1] += distance
        above = loss()
        weight[1] -= 2 * distance
        below = loss()
    # Central differences of a smooth function in double precision: errors of distance squared, and 1e-16 / distance.
    torch.testing.assert_close(weight.grad[1], (above - below) / (2 * distance), rtol=1e-6, atol=1e-6)


def test_identity_divides_nothing_before_all_layers_are_known_to_fit() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    norms = iter([nn.BatchNorm2d] * 2 + [functools.partial(nn.BatchNorm2d, affine=False)] * 2)
    with pytest.raises(ValueError, match="layer '3': init=\"identity\" needs a branch whose norm_layer has a weight"):
        convert(model, init="identity", norm_layer=lambda channels: next(norms)(channels))
    assert converted(model) == set()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_an_activation_that_starts_above_zero_needs_a_bias() -> None:
    def without_shift(channels: int) -> nn.Module:
        norm = nn.GroupNorm(1, channels)
        norm.bias = None
        return norm

    with pytest.raises(ValueError, match=r"layer '2.2': .*needs a norm_layer with a bias"):
        convert(network(), init="identity", activation="relu", norm_layer=without_shift)
    convert(network(), init="identity", activation="sigmoid", norm_layer=without_shift)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_identity_rounds_as_the_weights_do(dtype: torch.dtype) -> None:
    plain = network().to(dtype)
    model = convert(copy.deepcopy(plain), init="identity")
    layer, old = model[2][2], plain[2][2]
    attention = layer.attention.act2(layer.attention.norm2.bias.detach())[:1]
    # Dividing by 1.5 and multiplying by 1.5 rounds twice.
    torch.testing.assert_close(layer.weight * (1 + attention), old.weight, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_tensorflows_padding_is_kept() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), Conv2dSame(4, 8, 3, stride=2), Conv2dSame(8, 8, 5, stride=2, groups=8))
    model = convert(copy.deepcopy(plain), init="identity")
    assert [type(layer) for layer in model[1:]] == [AWConv2dSame, AWConv2dSame]
    for size in (15, 16, 17, 18):  # pads by 0 to 3, and unevenly
        images = torch.randn(2, 3, size, size + 1)
        torch.testing.assert_close(model(images), plain(images), rtol=1e-5, atol=1e-5)  # as above


def test_a_meta_network_is_converted_without_values() -> None:
    with torch.device("meta"):
        model = convert(network(), init="identity")
    assert model(torch.empty(2, 3, 9, 9, device="meta")).shape == (2, 4, 4, 4)


# --- the branch's norm
