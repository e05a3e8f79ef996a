"""Training parts of a network: what trains, what stays, and for how long."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import awconv
from awconv.train_only import TrainedParts

NORM = nn.modules.batchnorm._BatchNorm
OPTIMISERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
}


def adapted(network: str = "resnet18", classes: int = 5) -> nn.Module:
    plain = timm.create_model(network, num_classes=classes)
    for name, parameter in plain.named_parameters():
        if name.endswith("bn2.weight"):
            nn.init.ones_(parameter)  # of ResNet's last norms, which start at zero and would stop the gradient
    return awconv.convert(plain, init="identity")


def trained(model: nn.Module, optimiser: str = "sgd", steps: int = 3, size: int = 64) -> nn.Module:
    """After some steps with all parameters in the optimiser, as Lightning and timm's scripts may do it."""
    optimizer = OPTIMISERS[optimiser](model.parameters())
    model.train()
    for step in range(steps):
        images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(images).square().sum().backward()
        optimizer.step()
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize(
    ("network", "optimiser", "parts"),
    [
        ("resnet18", "sgd", ("branch", "head")),
        ("resnet18", "adamw", ("branch", "head", "norm")),
        ("tf_efficientnet_lite0", "sgd", ("head", "norm")),
        ("tf_efficientnet_lite0", "adamw", ("branch", "head")),
    ],
)
def test_what_is_not_named_stays_bit_for_bit(network: str, optimiser: str, parts: tuple[str, ...]) -> None:
    model = adapted(network)
    awconv.train_only(model, *parts)
    before = state(model)
    moved = changed(before, trained(model, optimiser))
    head = {"resnet18": "fc.", "tf_efficientnet_lite0": "classifier."}[network]
    expected = set()
    for name in before:
        if ".attention." in name:
            part = "branch"
        elif name.startswith(head):
            part = "head"
        else:
            part = "norm" if re.search(r"(bn\d|downsample\.1)\.", name) else "rest"
        if part in parts and not name.endswith("relative_to"):
            expected.add(name)
    # The last norm's weight is zero at the start, and weights before it have a gradient from the second step on.
    assert moved == expected


@pytest.mark.parametrize("again", ["eval and train", "deepcopy", "pickle", "torch.save", "children"])
def test_norms_that_are_held_stay_in_evaluation_mode(again: str) -> None:
    model = adapted()
    awconv.train_only(model, "head", "layer4.1.bn2")
    for name, module in model.named_modules():
        if isinstance(module, NORM):
            assert module.training == (name == "layer4.1.bn2"), name
    if again == "deepcopy":
        model = copy.deepcopy(model)
    elif again == "pickle":
        model = pickle.loads(pickle.dumps(model))
    elif again == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        model = torch.load(file, weights_only=False)
    elif again == "children":
        for child in model.modules():
            child.train()
    assert not model.eval().layer4[1].bn2.training
    assert model.train().training
    for name, module in model.named_modules():
        expected = name == "layer4.1.bn2" or not isinstance(module, NORM)
        assert module.training == expected, name
    copied = copy.deepcopy(model)
    copied.bn1.train()
    assert copied.bn1.train() is copied.bn1  # and not the norm that it was copied from


def test_a_compiled_network_holds_its_norms() -> None:
    model = adapted("resnet8_cifar")
    awconv.train_only(model, "head")
    before, images = state(model), torch.randn(2, 3, 16, 16)
    expected = model.train()(images)
    compiled = torch.compile(model, backend="eager").train()
    # The same operations, which the compiler may order anew.
    torch.testing.assert_close(compiled(images), expected, rtol=1e-4, atol=1e-4)
    assert not changed(before, model)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_processes_that_train_together_leave_what_is_frozen(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = adapted()
        awconv.train_only(model, "branch", "head")
        before = state(model)
        trained(nn.parallel.DistributedDataParallel(model), steps=2, size=32)
    finally:
        dist.destroy_process_group()
    moved = changed(before, model)
    assert {"fc.weight", "layer4.1.conv2.attention.norm2.weight"} <= moved
    assert all(".attention." in name or name.startswith("fc.") for name in moved)


def test_calling_it_again_undoes_what_it_did_before() -> None:
    model = adapted()
    modes = {name: module.training for name, module in model.named_modules()}
    awconv.train_only(model, "head")
    awconv.train_only(model, "norm")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name
        for name, _ in model.named_parameters()
        if ".attention." not in name and re.search(r"(bn\d|downsample\.1)\.", name)
    }
    assert not model.layer1[0].conv1.attention.norm1.training
    assert model.bn1.training
    awconv.train_only(model, "*")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all("train" not in vars(module) for module in model.modules())


def test_an_optimiser_that_was_there_before_leaves_what_is_frozen_now() -> None:
    model = adapted()
    optimizer = OPTIMISERS["sgd"](model.parameters())
    for _ in range(2):
        model(torch.randn(2, 3, 32, 32)).square().sum().backward()
        optimizer.step()  # which leaves gradients and a momentum
    awconv.train_only(model, "head")
    before = state(model)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    assert changed(before, model) == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize(
    ("build", "head"),
    [
        (lambda: torchvision.models.resnet18(), "fc"),
        (lambda: torchvision.models.mobilenet_v2(), "classifier.1"),
        (lambda: torchvision.models.vit_b_32(), "heads.head"),
        (lambda: torchvision.models.swin_t(), "head"),
        (lambda: timm.create_model("convnext_atto", num_classes=3), "head.fc"),
        (lambda: timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3), "head"),
    ],
)
def test_the_head_is_the_classifier_whatever_its_name(build: Callable[[], nn.Module], head: str) -> None:
    with torch.device("meta"):
        model = build()
    awconv.train_only(model, "head")
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    two = {"head_dist.weight", "head_dist.bias"} & set(dict(model.named_parameters()))
    assert names == {f"{head}.weight", f"{head}.bias"} | two


def test_layer_norms_and_group_norms_are_norms_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.LayerNorm(5), nn.InstanceNorm2d(4, affine=True))
    told = awconv.train_only(model, "norm")
    assert told.parts == {"norm": 8 + 10 + 8}
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"0.weight", "0.bias"}


@given(parts=st.lists(st.sampled_from(["branch", "head", "norm", "layer1.*", "*conv1.weight", "bn1"]), min_size=1))
def test_the_figures_are_those_of_the_network(parts: list[str]) -> None:
    model = timm.create_model("aw_resnet8_cifar")
    told = awconv.train_only(model, *parts)
    assert told.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert told.parameters == sum(p.numel() for p in model.parameters())
    held = [m for m in model.train().modules() if isinstance(m, NORM) and not m.training]
    assert told.held_norms == len(held)
    assert list(told.parts) == list(dict.fromkeys(parts))
    assert str(told).startswith(f"trains {told.trained:,} of {told.parameters:,} parameters (")


def test_figures_are_printed_with_their_shares() -> None:
    told = TrainedParts({"branch": 1500, "norm": 500}, parameters=100_000, held_norms=1)
    expected = "trains 2,000 of 100,000 parameters (2.00 %): branch 1,500 (1.50 %), norm 500 (0.50 %)"
    assert str(told) == f"{expected}; 1 norm keeps its statistics"
    assert str(TrainedParts({"*": 8}, 8, 0)) == "trains 8 of 8 parameters (100.00 %): * 8 (100.00 %)"


def test_a_part_that_is_not_there_leaves_the_network_as_it_was() -> None:
    plain = timm.create_model("resnet18", num_classes=5)
    for parts, message in (
        ((), 'name what trains: "branch", "head", "norm", a name or a glob; "\\*" is all'),
        (("head", "branch"), r"ResNet has no AW-convolution; convert it first: awconv.convert\(model, init="),
        (("layr4.*",), r"no module and no parameter is called 'layr4\.\*'; near it: 'layer4\.1'"),
        (("act1",), r"'act1' has neither parameters nor statistics"),
    ):
        with pytest.raises(ValueError, match=f"train_only: {message}"):
            awconv.train_only(plain, *parts)
    with pytest.raises(TypeError, match=r'each part must be a string, as in train_only\(model, "head"\), got \[\'head'):
        awconv.train_only(plain, ["head"])
    assert all(parameter.requires_grad for parameter in plain.parameters())
    assert all(module.training for module in plain.modules())
    with pytest.raises(ValueError, match=r"the classifier of ResNet has no parameters; timm's model.reset_classifier"):
        awconv.train_only(timm.create_model("resnet18", num_classes=0), "head")
    with pytest.raises(ValueError, match=r"Sequential has no classifier under get_classifier\(\), fc, .*has '0', '1'"):
        awconv.train_only(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()), "head")
    with pytest.raises(ValueError, match=r"Linear has no norm outside attention branches that could train"):
        awconv.train_only(nn.Linear(2, 2), "norm")
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got 'resnet18'; timm.create_model makes one"):
        awconv.train_only("resnet18", "head")
