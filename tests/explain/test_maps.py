"""``awconv.attention_maps``: the maps that a network's layers compute with, from a network that is left as it was."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import awconv
from awconv.explain.maps import aw_layers, seeing_maps

NAME = "aw_resnet8_cifar.digits"


def digits_network() -> nn.Module:
    return timm.create_model(NAME, pretrained=True).eval()


def images(count: int = 5) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def by_inputs(model: nn.Module, input: Tensor) -> dict[str, Tensor]:
    """The maps of what goes into each layer, which is seen from outside."""
    seen, handles = {}, []
    for name, layer in aw_layers(model).items():
        handles.append(layer.register_forward_pre_hook(functools.partial(_keep, seen, name)))
    with torch.no_grad():
        model(input)
        for handle in handles:
            handle.remove()
        return {name: layer.attention(seen[name]) for name, layer in aw_layers(model).items()}


def _keep(seen: dict[str, Tensor], name: str, module: nn.Module, arguments: tuple[Tensor]) -> None:
    seen[name] = arguments[0]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, maps in found.items():
        torch.testing.assert_close(maps, expected[name], rtol=1e-4, atol=1e-5, msg=name)
        assert not maps.requires_grad


def test_the_maps_are_the_branches_of_what_goes_into_each_layer() -> None:
    model = digits_network()
    found = awconv.attention_maps(model, images())
    assert_same(found, by_inputs(model, images()))
    assert found["layer3.0.conv1"].shape == (5, 64, 1, 3, 3)
    assert found["layer1.0.conv1"].std(0).max() > 0.01  # they differ between images


AROUND: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled in place": lambda model: model.compile(backend="eager") or model,
    "a compiled part": lambda model: setattr(model, "layer2", torch.compile(model.layer2, backend="eager")) or model,
    "data parallel": nn.DataParallel,
    "compiled, data parallel": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    "averaged": torch.optim.swa_utils.AveragedModel,
    "fused": awconv.fuse,
}


@pytest.mark.parametrize("name", AROUND)
def test_what_is_around_a_network_changes_neither_maps_nor_names(name: str) -> None:
    expected = by_inputs(digits_network(), images())
    model = AROUND[name](digits_network())
    model.eval()
    if name.startswith("compiled"):
        model(images())  # which compiles it
    assert_same(awconv.attention_maps(model, images()), expected)


class Failing(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        raise RuntimeError("of the network")


@pytest.mark.parametrize("fails", [False, True])
def test_the_network_is_left_as_it_was(fails: bool) -> None:
    model: Any = digits_network().train()
    model.layer2.eval()
    model.layer1.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    handle = model.layer1[0].conv1.register_forward_hook(lambda *_: None)
    if fails:
        model.layer3[0].bn2 = Failing().train()

    def state() -> list[Any]:
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        flags = [(p.requires_grad, None if p.grad is None else float(p.grad.sum())) for p in model.parameters()]
        return [[m.training for m in model.modules()], hooks, flags]

    before, weights = state(), copy.deepcopy(model.state_dict())
    if fails:
        with pytest.raises(RuntimeError, match="of the network"):
            awconv.attention_maps(model, images())
    else:
        assert len(awconv.attention_maps(model, images())) == 6
    assert state() == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    handle.remove()


def test_a_layer_that_runs_twice_has_the_maps_of_both_calls_in_turn() -> None:
    layer = awconv.AWConv2d(4, 4, 3, padding=1).eval()
    (maps,) = awconv.attention_maps(nn.Sequential(layer, nn.ReLU(), layer), input := torch.randn(2, 4, 6, 6)).values()
    with torch.no_grad():
        torch.testing.assert_close(maps[:2], layer.attention(input))
        torch.testing.assert_close(maps[2:], layer.attention(layer(input).relu()))


def test_layers_that_share_a_branch_have_maps_of_their_own() -> None:
    make = functools.cache(awconv.layers.AttentionBranch.of)
    model = nn.Sequential(*(awconv.AWConv2d(4, 4, 3, padding=1, branch=make) for _ in range(2))).eval()
    assert model[0].attention is model[1].attention
    assert_same(awconv.attention_maps(model, input := torch.randn(3, 4, 6, 6)), by_inputs(model, input))


class Plane(nn.Module):
    """A branch of a user's own: a number for each image."""

    def __init__(self, spec: awconv.BranchSpec) -> None:
        super().__init__()
        self.size = spec.attention_size

    def forward(self, input: Tensor) -> Tensor:
        return input.flatten(1).mean(1).reshape(-1, 1, 1, 1, 1).expand(-1, *self.size)


def test_branches_of_ones_own_are_seen() -> None:
    model = nn.Sequential(awconv.AWConv2d(4, 8, 3, branch=Plane))
    (maps,) = awconv.attention_maps(model, input := torch.randn(3, 4, 6, 6)).values()
    torch.testing.assert_close(maps, input.mean((1, 2, 3)).reshape(3, 1, 1, 1, 1).expand(3, 8, 1, 3, 3))


@pytest.mark.parametrize(("layer", "size"), [(awconv.AWConv1d, (9,)), (awconv.AWConv3d, (5, 5, 5))])
def test_sequences_and_volumes_have_maps(layer: Any, size: tuple[int, ...]) -> None:
    (maps,) = awconv.attention_maps(layer(4, 6, 3, out_expansion=2), torch.randn(2, 4, *size)).values()
    assert maps.shape == (2, 3, 1, *[3] * len(size))


def test_maps_are_relative_after_a_conversion_by_identity() -> None:
    model = awconv.convert(timm.create_model("resnet8_cifar", in_chans=1, num_classes=10), init="identity").eval()
    assert all(not maps.any() for maps in awconv.attention_maps(model, images()).values())
    for branch in model.modules():
        if isinstance(branch, awconv.layers.AttentionBranch):
            nn.init.constant_(branch.norm2.bias, 1.0)
    for maps in awconv.attention_maps(model, images()).values():  # (1 + sigmoid(1)) / (1 + sigmoid(0)) - 1
        torch.testing.assert_close(maps, torch.full_like(maps, (1 + 0.7310586) / 1.5 - 1))


def test_a_detectors_list_of_images_goes_in_as_it_is() -> None:
    from awconv.models.detection import faster_rcnn

    detector = faster_rcnn("aw_resnet18", num_classes=3, min_size=64, max_size=64)
    maps = awconv.attention_maps(detector, [torch.rand(3, 64, 48), torch.rand(3, 40, 64)])
    assert {len(each) for each in maps.values()} == {2}
    assert all(name.startswith("backbone.") for name in maps)


def test_other_maps_can_take_their_places() -> None:
    model = digits_network()
    layers = aw_layers(model)
    with torch.no_grad():
        before = model(images())
        with seeing_maps(layers, lambda name, maps: torch.zeros_like(maps)):
            without = model(images())
        plain = timm.create_model("resnet8_cifar", in_chans=1, num_classes=10).eval()
        plain.load_state_dict({name: t for name, t in model.state_dict().items() if ".attention." not in name})
        torch.testing.assert_close(without, plain(images()), rtol=1e-4, atol=1e-4)
        assert torch.equal(model(images()), before)


def test_what_has_no_maps_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"Linear has no AW-convolution, so it has no attention maps; awconv\.convert"):
        awconv.attention_maps(nn.Linear(2, 2), torch.ones(1, 2))
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        awconv.attention_maps("aw_resnet50", torch.ones(1, 2))  # type: ignore[arg-type]
    model: Any = nn.Identity()
    model.unused = awconv.AWConv2d(4, 4, 3)
    with pytest.raises(ValueError, match=r"none of the 1 AW-convolutions of Identity ran .*'unused'"):
        awconv.attention_maps(model, images())
