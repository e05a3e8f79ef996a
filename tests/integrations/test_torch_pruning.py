"""Structured pruning of AW networks by torch-pruning."""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import Tensor, nn

import awconv
from awconv import AWConv2d
from awconv.branch import AttentionBranch
from awconv.integrations.torch_pruning import prunable
from tests.networks import moved

tp: Any = pytest.importorskip("torch_pruning", reason="needs torch-pruning")


class Zeros(nn.Module):
    """Sets channels to zero."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.channels = list(channels)

    def forward(self, input: Tensor) -> Tensor:
        keep = torch.ones(input.shape[1])
        keep[self.channels] = 0
        return input * keep.reshape(1, -1, *(1,) * (input.dim() - 2))


def network(kind: str = "", **arguments: Any) -> nn.Sequential:
    """12 channels, 12 of an AW layer, 8 of another one, with statistics other than 0 and 1."""
    groups = dict(depthwise=12, grouped=2).get(kind, 1)
    conv: Any = nn.Conv1d if kind == "1d" else Conv2dSame if kind == "same" else nn.Conv2d
    norm: Any = nn.BatchNorm1d if kind == "1d" else nn.BatchNorm2d
    mode = dict(padding_mode="circular") if kind == "circular" else {}
    middle = conv(12, 12, 3, padding=1, groups=groups, **mode)
    layers = [
        nn.Conv1d if kind == "1d" else nn.Conv2d,
        nn.ReLU(),
        middle,
        norm(12),
        nn.ReLU(),
        conv(12, 8, 3, stride=2),
    ]
    layers[0] = layers[0](3, 12, 3)
    pool: Any = nn.AdaptiveAvgPool1d(1) if kind == "1d" else nn.AdaptiveAvgPool2d(1)
    model = nn.Sequential(*layers, pool, nn.Flatten(), nn.Linear(8, 4))
    awconv.convert(model, ["2", "5"], **arguments)
    with torch.no_grad():
        moved(model).train()(images(kind, 16) * 2 + 1)
    return model.eval()


def images(kind: str = "", number: int = 4) -> Tensor:
    return torch.randn(number, 3, *((16,) if kind == "1d" else (11, 11)))


def prune(model: nn.Sequential, layer: int, channels: Sequence[int], example: Tensor) -> nn.Sequential:
    with prunable(model) as pruners:
        graph = tp.DependencyGraph().build_dependency(model, example[:1], customized_pruners=pruners)
        root = model[layer]
        group = graph.get_pruning_group(root, graph.get_pruner_of_module(root).prune_out_channels, list(channels))
        group.prune()
    return model


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fresh": ("", {}),
    "identity": ("", dict(init="identity", activation="tanh")),
    "without residual": ("", dict(init="identity", residual=False)),
    "input gain": ("", dict(init="identity", input_gain=True)),
    "without norms": ("", dict(norm_layer=None)),
    "a value for each input": ("", dict(in_expansion=1)),
    "inputs share values": ("", dict(in_expansion=3)),
    "outputs share values": ("", dict(out_expansion=4)),
    "all share values": ("", dict(out_expansion=2, in_expansion=4, kernel_expansion=3)),
    "maximum": ("", dict(pool=nn.AdaptiveMaxPool2d)),
    "depthwise": ("depthwise", dict(init="identity", input_gain=True)),
    "grouped": ("grouped", dict(in_expansion=2, input_gain=True)),
    "circular": ("circular", {}),
    "same": ("same", {}),
    "1d": ("1d", dict(init="identity")),
}


@pytest.mark.parametrize("channels", [[4, 5, 6, 7], [1, 2, 7, 8]])
@pytest.mark.parametrize("case", CASES)
def test_a_pruned_network_computes_what_it_did_with_those_channels_at_zero(case: str, channels: list[int]) -> None:
    kind, arguments = CASES[case]
    for root, after in ((0, 1), (2, 4)):
        model = network(kind, **arguments)
        if kind == "grouped":  # torch-pruning leaves each group as many
            channels = [1, 2, 7, 8]
        whole = copy.deepcopy(model)
        blinded = nn.Sequential(*whole[: after + 1], Zeros(channels), *whole[after + 1 :])
        if kind == "depthwise":  # whose outputs go with its inputs
            blinded = nn.Sequential(*whole[:2], Zeros(channels), *whole[2:5], Zeros(channels), *whole[5:])
        inputs = images(kind)
        pruned = prune(model, root, channels, inputs)
        assert pruned[root].out_channels == 8
        assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in whole.parameters())
        # Sums over fewer channels, in another order.
        torch.testing.assert_close(pruned(inputs), blinded(inputs), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(pruned(inputs), whole(inputs), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_050"])
def test_a_network_loses_half_its_channels_and_trains_on(name: str) -> None:
    model = awconv.convert(timm.create_model(name, num_classes=5), init="identity", input_gain=name == "resnet18")
    kinds = [type(module) for module in model.modules()]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    inputs, labels = torch.randn(4, 3, 64, 64), torch.arange(4)
    with prunable(model) as pruners:
        importance = tp.importance.MagnitudeImportance()
        kept = [model.get_classifier()]
        tp.pruner.BasePruner(
            model, inputs, importance, pruning_ratio=0.5, ignored_layers=kept, customized_pruners=pruners
        ).step()
    assert [type(module) for module in model.modules()] == kinds
    assert sum(parameter.numel() for parameter in model.parameters()) < 0.4 * parameters
    for layer in model.modules():
        if isinstance(layer, AWConv2d):
            assert layer.attention.conv1.in_channels == layer.in_channels
            assert layer.attention.attention_size[0] == layer.out_channels
            fresh = AWConv2d(layer.in_channels, layer.out_channels, 3, groups=layer.groups)
            assert fresh.attention.attention_size == layer.attention.attention_size
    optimizer = torch.optim.SGD(awconv.parameter_groups(model), lr=0.01)
    awconv.check_optimizer(model, optimizer)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        F.cross_entropy(model.train()(inputs), labels).backward()
        optimizer.step()
    branches = [branch for branch in model.modules() if isinstance(branch, AttentionBranch)]
    assert all(branch.norm2.weight.any() for branch in branches)
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(loaded.eval()(inputs), model.eval()(inputs))
    assert before.keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", ["resnet8_cifar", "aw_resnet8_cifar"])
def test_in_cifar_networks_the_blocks_are_pruned_inside(name: str) -> None:
    inputs = torch.randn(2, 3, 16, 16)
    for inside in (False, True):
        model = timm.create_model(name)
        kept = [model.fc, model.conv1, *(block.conv2 for block in (model.layer1[0], model.layer2[0], model.layer3[0]))]
        told = prunable(model) if name.startswith("aw_") else contextlib.nullcontext({})
        with told as pruners:
            tp.pruner.BasePruner(
                model,
                inputs,
                tp.importance.MagnitudeImportance(),
                pruning_ratio=0.5,
                ignored_layers=kept if inside else [model.fc],
                customized_pruners=pruners,
            ).step()
        if inside:
            assert model(inputs).shape == (2, 10)
            assert model.layer3[0].conv1.out_channels == 32
        else:
            with pytest.raises(RuntimeError, match="cannot be multiplied"):  # torch-pruning widens their shortcuts
                model(inputs)


def test_channels_of_small_weights_go_first() -> None:
    """torch-pruning knows the weights of an AW layer for those of a convolution."""
    model = network(norm_layer=None)
    del model[3]  # whose weights count, too
    with torch.no_grad():
        model[2].weight[[3, 9]] *= 1e-3
        model[2].bias[[3, 9]] *= 1e-3
        model[4].weight[:, [3, 9]] *= 1e-3
    expected = model[2].weight[[channel for channel in range(12) if channel not in (3, 9)]].clone()
    with prunable(model) as pruners:
        tp.pruner.BasePruner(
            model,
            images(),
            tp.importance.MagnitudeImportance(),
            pruning_ratio=2 / 12,
            ignored_layers=[model[0], model[4], model[-1]],
            customized_pruners=pruners,
        ).step()
    assert torch.equal(model[2].weight, expected)


def test_gradients_are_pruned_with_their_parameters() -> None:
    model = network()
    model(images()).square().sum().backward()
    gradient = model[2].attention.conv2.weight.grad.clone()
    prune(model, 2, [0, 1], images())
    assert torch.equal(model[2].attention.conv2.weight.grad, gradient[2:])
    for parameter in model.parameters():
        assert parameter.grad is None or parameter.grad.shape == parameter.shape


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a branch of one's own": (
        dict(branch=lambda spec: nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Conv2d(12, spec.attention_size[0], 1))),
        "is a CustomBranch",
    ),
    "a norm over channels": (dict(norm_layer=functools.partial(nn.GroupNorm, 1)), "has a GroupNorm, which takes"),
    "a pool of one's own": (dict(pool=lambda size: lambda x: x.sort(1)[0][:, :, :3, :3]), "has a pool of its own"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_branch_whose_channels_cannot_be_told_apart_is_refused(kind: str) -> None:
    arguments, message = REFUSED[kind]
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 3))
    awconv.convert(model, ["1"], **arguments)
    with pytest.raises(ValueError, match=f"the branch of layer '1' {message}"), prunable(model):
        pass
    assert type(model[1]) is AWConv2d


def test_after_an_error_the_layers_are_what_they_were() -> None:
    model, by_default = network(), tp.pruner.function.prune_depthwise_conv_out_channels
    with pytest.raises(ZeroDivisionError), prunable(model):
        assert 1 / (type(model[2]) is AWConv2d)
    assert type(model[2]) is AWConv2d
    assert tp.pruner.function.prune_depthwise_conv_out_channels is by_default


def test_a_copy_that_is_made_meanwhile_has_its_attention() -> None:
    model, images = network().eval(), torch.randn(2, 3, 12, 12)
    expected = model(images)
    with prunable(model):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for copied in (*copies, model):
        assert type(copied[2]) is AWConv2d
        assert torch.equal(copied(images), expected)


@pytest.mark.parametrize("activation", [lambda: nn.Softmax(1), lambda: nn.GroupNorm(1, 12, affine=False)])
def test_an_activation_that_mixes_channels_is_refused(activation: Any) -> None:
    model = awconv.convert(nn.Sequential(nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 3)), activation=activation)
    with pytest.raises(ValueError, match="layer '1' has an activation that mixes channels"), prunable(model):
        pass
    assert type(model[1]) is AWConv2d


def test_a_branch_of_several_layers_is_refused() -> None:
    model = awconv.convert(nn.Sequential(*[nn.Conv2d(12, 12, 3) for _ in range(3)]), ["1", "2"])
    model[2].attention = model[1].attention
    with pytest.raises(ValueError, match="branch of layer '2' belongs to layer '1' too"), prunable(model):
        pass


def test_it_is_not_nested() -> None:
    model = network()
    with (
        prunable(model),
        pytest.raises(ValueError, match="is within such a context already, as a TracedAWConv2d; leave"),
        prunable(model),
    ):
        pass
    assert type(model[2]) is AWConv2d
