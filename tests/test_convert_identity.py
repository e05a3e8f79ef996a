"""Conversion by identity: trained networks compute the same as before."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Conv2dSame
from torch import Tensor, nn

import awconv
from awconv import convert
from awconv.layers import AW_LAYERS, AWConv2dSame
from tests.networks import converted, moved, network


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


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu"])
def test_identity_keeps_the_weights_and_starts_at_them(activation: str, residual: bool) -> None:
    plain = network()
    model = convert(copy.deepcopy(plain), init="identity", activation=activation, residual=residual)
    state = model.state_dict()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(state[name], tensor), name
    added = set(state) - set(plain.state_dict())
    assert all(".attention." in f".{name}" for name in added)
    for layer in (model[2][2], model[3]):
        attention = layer.attention(torch.randn(2, 8, 12, 12))
        if (activation, residual) == ("tanh", False):
            # tanh(atanh(0.5)) and 0.5 differ by a rounding at most, 6e-8, which is divided by 0.5.
            assert attention.abs().max() <= 2e-7
        else:
            assert not attention.any()


@settings(deadline=None, max_examples=60)
@given(
    activation=st.sampled_from(["sigmoid", "tanh", "relu"]),
    residual=st.booleans(),
    expansion=st.sampled_from([1, 3]),
    groups=st.sampled_from([1, 2, 6]),
    out_channels=st.sampled_from([6, 12, 18]),
    norm_layer=st.sampled_from(["batch", None]),
    seed=st.integers(0, 99),
)
def test_a_trained_branch_gives_the_map_of_the_paper_relative_to_its_start(
    activation: str, residual: bool, expansion: int, groups: int, out_channels: int, norm_layer: Any, seed: int
) -> None:
    """Weights K (1 + a) / (1 + a0), or K a / a0, computed from the modules in double precision."""
    torch.manual_seed(seed)
    plain = nn.Conv2d(6, out_channels, 3, padding=1, groups=groups).double()
    layer = convert(
        plain,
        init="identity",
        activation=activation,
        residual=residual,
        kernel_expansion=expansion,
        norm_layer=norm_layer if norm_layer is None else nn.BatchNorm2d,
    )
    for parameter in layer.attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    layer.eval()
    branch, input = layer.attention, torch.randn(2, 6, 8, 7, dtype=torch.float64)
    pooled = F.adaptive_avg_pool2d(input, 3 // expansion)
    score = branch.norm2(branch.conv2(F.relu(branch.norm1(branch.conv1(pooled)))))
    attention = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu}[activation](score)
    attention = attention.reshape(2, out_channels, 1, 3 // expansion, 3 // expansion)
    attention = attention.repeat_interleave(expansion, 3).repeat_interleave(expansion, 4)
    start = {"sigmoid": 0.5, "tanh": 0.0 if residual else 0.5, "relu": 1.0}[activation]
    weights = plain.weight * ((1 + attention) / (1 + start) if residual else attention / start)
    expected = torch.stack(
        [
            F.conv2d(image, weight, plain.bias, padding=1, groups=groups)
            for image, weight in zip(input, weights, strict=True)
        ]
    )
    # Sums of at most 54 products in double precision (1e-16).
    torch.testing.assert_close(layer(input), expected, rtol=1e-11, atol=1e-11)


def test_pretrained_weights_may_be_loaded_before_or_after_the_conversion() -> None:
    plain, images = network().eval(), torch.randn(2, 3, 12, 12)
    before = convert(copy.deepcopy(plain), init="identity")
    after = convert(network(), init="identity").eval()
    missing, unexpected = after.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all("attention." in name for name in missing)
    assert torch.equal(after(images), before(images))
    torch.testing.assert_close(after(images), plain(images), rtol=1e-5, atol=1e-5)  # as above


@pytest.mark.parametrize("init", ["fresh", "identity"])
def test_a_state_dict_says_in_which_form_its_branches_were_trained(init: Any) -> None:
    trained, images = moved(convert(network(), init="identity")), torch.randn(2, 3, 12, 12)
    model = convert(network(), init=init).eval()
    model.load_state_dict(trained.state_dict())
    assert torch.equal(model(images), trained(images))
    assert model[3].attention.relative_to == 0.5
    assert "relative_to=0.5" in str(model[3])
    assert "init=identity" in str(model[3])


def test_a_state_dict_of_before_is_taken_as_it_was_trained() -> None:
    """The weights of former versions were divided, and their maps not relative."""
    trained, images = moved(convert(network())), torch.randn(2, 3, 12, 12)
    state = trained.state_dict()
    assert not any("relative_to" in name for name in state)
    model = convert(network(), init="identity").eval()
    model.load_state_dict(state)
    assert torch.equal(model(images), trained(images))
    assert model[3].attention.relative_to is None
    model.load_state_dict(convert(network(), init="identity").state_dict())
    assert model[3].attention.relative_to == 0.5


def test_a_state_dict_of_another_activation_is_refused() -> None:
    state = convert(network(), init="identity", activation="relu").state_dict()
    with pytest.raises(RuntimeError, match=r"3.attention.relative_to is 1, and this branch.* starts at 0.5"):
        convert(network(), init="identity").load_state_dict(state)


def test_a_mark_that_was_averaged_and_rounded_is_known() -> None:
    state = convert(network(), init="identity").state_dict()
    state["3.attention.relative_to"] = sum(10 * [torch.tensor(0.5) * 0.1], torch.zeros(()))
    assert state["3.attention.relative_to"] != 0.5
    convert(network()).load_state_dict(state)


def test_equal_bit_for_bit_where_the_algorithm_adds_in_the_same_order() -> None:
    plain = network().eval()
    model = convert(copy.deepcopy(plain), init="identity").eval()
    image = torch.randn(1, 3, 12, 12)  # whose weights are convolved with as they are
    with torch.inference_mode(), awconv.use_algorithm("per_sample"):
        assert torch.equal(model(image), plain(image))


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


def test_identity_changes_nothing_before_all_layers_are_known_to_fit() -> None:
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
def test_identity_rounds_nothing(dtype: torch.dtype) -> None:
    plain = network().to(dtype)
    model = convert(copy.deepcopy(plain), init="identity").eval()
    for layer, old in ((model[2][2], plain[2][2]), (model[3], plain[3])):
        assert torch.equal(layer.weight, old.weight)
        assert not layer.attention(torch.randn(2, 8, 12, 12, dtype=dtype)).any()
        assert layer.attention.relative_to.dtype == dtype


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


# --- training


@pytest.mark.parametrize(
    "optimiser",
    [
        pytest.param(functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01), id="sgd"),
        pytest.param(
            functools.partial(torch.optim.AdamW, lr=0.001, weight_decay=0.01), id="adamw", marks=pytest.mark.campaign
        ),
    ],
)
def test_with_frozen_branches_the_weights_learn_what_the_plain_networks_do(optimiser: Any) -> None:
    plain = timm.create_model("resnet18", num_classes=5, zero_init_last=False).double()
    model = convert(copy.deepcopy(plain), init="identity")
    for layer in model.modules():
        if isinstance(layer, AW_LAYERS):
            layer.attention.requires_grad_(False)
    start = copy.deepcopy(plain.state_dict())
    for network_ in (plain, model):
        optimizer = optimiser(parameter for parameter in network_.parameters() if parameter.requires_grad)
        for step in range(10):
            generator = torch.Generator().manual_seed(step)
            images = torch.randn(8, 3, 32, 32, generator=generator, dtype=torch.float64)
            targets = torch.randint(5, (8,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(network_.train()(images), targets).backward()
            optimizer.step()
    state = model.state_dict()
    for name, tensor in plain.state_dict().items():
        # Roundings of double precision (1e-16), which ten steps in train mode magnify to 1e-9 of the values at most.
        torch.testing.assert_close(state[name], tensor, rtol=1e-7, atol=1e-8, msg=name)
        if name.endswith("conv1.weight"):
            assert (tensor - start[name]).abs().max() > 1e-3, name
