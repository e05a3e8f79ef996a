"""Activations and pooling of the attention branch that are given as modules."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awconv import AWConv1d, AWConv2d, convert, load_adapter, save_adapter, train_only
from awconv.branch import AttentionBranch
from tests.networks import moved, network

IMAGES = (4, 3, 12, 12)


class Square(nn.Module):
    """With a learnt offset; its slope at 0 is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.tensor(0.25))

    def forward(self, input: Tensor) -> Tensor:
        return input.square() + self.offset


@pytest.mark.parametrize(
    ("activation", "residual", "start"),
    [
        (nn.Hardsigmoid, True, (0.0, 0.5, 1.5)),
        (nn.Softplus, True, (0.0, math.log(2), 1 + math.log(2))),
        (nn.Softplus(beta=2), False, (0.0, math.log(2) / 2, math.log(2) / 2)),
        (nn.LeakyReLU(0.1), True, (0.0, 0.0, 1.0)),
        (nn.LeakyReLU(0.1), False, (1.0, 1.0, 1.0)),  # no weights would be left at 0
        (Square, True, (1.0, 1.25, 2.25)),  # no slope at 0
        (nn.Sigmoid, True, (0.0, 0.5, 1.5)),
        (nn.ReLU(inplace=True), True, (1.0, 1.0, 2.0)),
        (lambda: nn.Softmax(1), False, (0.0, 1 / 8, 1 / 8)),
    ],
)
def test_identity_starts_where_the_activation_has_a_slope(activation: Any, residual: bool, start: Any) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    model = convert(copy.deepcopy(plain), init="identity", activation=activation, residual=residual)
    assert model[1].attention.start == pytest.approx(start, rel=1e-12)
    images = torch.randn(IMAGES)
    torch.testing.assert_close(model(images), plain(images), rtol=1e-5, atol=1e-5)  # roundings
    assert model[1].attention.is_identity()
    model(images).square().sum().backward()
    assert model[1].attention.norm2.weight.grad.abs().sum() > 0
    moved(model).double()
    attention = model[1].attention
    expected = attention.norm2(
        attention.conv2(F.relu(attention.norm1(attention.conv1(F.adaptive_avg_pool2d(model[0](images.double()), 3)))))
    )
    expected = attention.act2(expected) if residual else attention.act2(expected) - 1
    gain, a0 = start[2], start[1]
    found = attention(model[0](images.double())).squeeze(2)
    torch.testing.assert_close(found, ((1 + expected) / gain - 1) if not residual else (expected - a0) / gain)


def test_an_activation_with_parameters_that_moved_is_no_identity() -> None:
    model = convert(network(), init="identity", activation=Square)
    assert model[3].attention.is_identity()
    with torch.no_grad():
        model[3].attention.act2.offset += 0.5
    assert not model[3].attention.is_identity()


def test_each_layer_has_a_copy_of_a_module() -> None:
    given = nn.PReLU()
    model = convert(network(), activation=given)
    made = [model[2][2].attention.act2, model[3].attention.act2]
    assert len({id(given), *map(id, made)}) == 3
    assert all(torch.equal(act.weight, given.weight) for act in made)
    assert model[3].activation == "PReLU(num_parameters=1)"


class Step(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        return (input > 0.5).to(input.dtype)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(activation=Step, init="identity"), ValueError, r"layer '2.2': .* a slope at 0 or 1, .* got Step\(\)"),
        (dict(activation=torch.sigmoid), TypeError, "without arguments, such as nn.Hardsigmoid, got <built-in method"),
        (dict(activation=lambda: 0.5), TypeError, "which made 0.5"),
        (dict(activation=3), ValueError, "activation must be one of .* got 3"),
        (dict(activation=lambda: nn.GLU(1)), ValueError, "must keep the shape and make a constant of a constant"),
        (
            dict(pool=nn.AdaptiveMaxPool2d(3)),
            TypeError,
            "such as the class nn.AdaptiveMaxPool2d, got AdaptiveMaxPool2d",
        ),
        (dict(pool="max"), TypeError, "pool must be None or something called with the size"),
        (dict(pool=lambda size: None), TypeError, r"when it is called with a size, \(3, 3\).* returned None"),
    ],
)
def test_wrong_ones_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        convert(network(), **arguments)


def test_a_step_is_an_activation_of_a_network_from_scratch() -> None:
    assert convert(network(), activation=Step)(torch.randn(IMAGES)).shape == (4, 4, 5, 5)


@pytest.mark.parametrize("rate", [1, 3])
@pytest.mark.parametrize(
    "pool",
    [nn.AdaptiveMaxPool2d, lambda size: lambda input: F.adaptive_max_pool2d(input, size)],
    ids=["class", "function"],
)
def test_the_branch_pools_as_it_is_told(pool: Any, rate: int) -> None:
    layer = AWConv2d(6, 8, 3, pool=pool, kernel_expansion=rate).eval()
    default = AWConv2d(6, 8, 3, kernel_expansion=rate).eval()
    assert default.load_state_dict(layer.state_dict())
    images = torch.randn(2, 6, 9, 9)
    pooled = F.max_pool2d(images, 9 // (3 // rate))
    assert torch.equal(layer.attention(images), default.attention(images, pooled))
    assert not torch.allclose(layer(images), default(images), rtol=0.01)


def test_sequences_are_pooled_too() -> None:
    layer = AWConv1d(6, 8, 3, pool=nn.AdaptiveMaxPool1d)
    assert layer(torch.randn(2, 6, 9)).shape == (2, 8, 7)


def test_a_pool_of_another_size_is_named() -> None:
    layer = AWConv2d(6, 8, 3, pool=lambda size: nn.AdaptiveMaxPool2d(1))
    with pytest.raises(ValueError, match=r"shape \('N', 6, 3, 3\), got \(2, 6, 1, 1\)"):
        layer(torch.randn(2, 6, 9, 9))


def test_an_adapter_knows_how_its_branches_pool(tmp_path: Path) -> None:
    plain = timm.create_model("resnet8_cifar")

    def base(**arguments: Any) -> nn.Module:
        return convert(copy.deepcopy(plain), init="identity", **arguments).eval()

    source = base(pool=nn.AdaptiveMaxPool2d, activation=nn.Hardsigmoid)
    train_only(source, "branch", "head")
    save_adapter(moved(source), tmp_path / "adapter.safetensors")
    images = torch.randn(2, 3, 16, 16)
    taker = load_adapter(base(pool=nn.AdaptiveMaxPool2d, activation=nn.Hardsigmoid()), tmp_path / "adapter.safetensors")
    assert torch.equal(taker(images), source(images))
    with pytest.raises(ValueError, match=r"and the model's.* pool=None"):
        load_adapter(base(activation=nn.Hardsigmoid), tmp_path / "adapter.safetensors")


def test_branches_of_before_there_were_pools_are_unpickled() -> None:
    branch = AttentionBranch(6, (8, 1, 3, 3), 16, "sigmoid", nn.BatchNorm2d).eval()
    state = {name: value for name, value in branch.__dict__.items() if name != "pool"}
    old = AttentionBranch.__new__(AttentionBranch)
    old.__setstate__(copy.deepcopy(state))
    images = torch.randn(2, 6, 9, 9)
    assert torch.equal(old(images), branch(images))
