"""Parameters in groups, by their kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from awconv import convert, parameter_groups


def test_every_trained_parameter_is_in_the_group_of_its_kind() -> None:
    model = convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)))
    model[3].weight.requires_grad_(False)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {group["name"]: {names[p] for p in group["params"]} for group in parameter_groups(model)}
    branch = {f"{i}.attention.{part}" for i in (2, 3) for part in ("conv1.weight", "conv2.weight")}
    branch |= {f"{i}.attention.norm{j}.{p}" for i in (2, 3) for j in (1, 2) for p in ("weight", "bias")}
    assert groups["branch"] == branch
    assert groups["weight"] == {"2.weight"}
    assert groups["rest"] == {"0.weight", "0.bias", "1.weight", "1.bias", "2.bias", "3.bias"}


@pytest.mark.parametrize(
    "optimizer", [lambda g: torch.optim.SGD(g, lr=1.0), lambda g: create_optimizer_v2(g, opt="momentum", lr=1.0)]
)
def test_optimisers_treat_the_groups_apart(optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
    model = timm.create_model("aw_resnet8_cifar")
    groups = parameter_groups(model, branch={"lr": 0.5, "weight_decay": 0.0}, rest={"lr": 0.0})
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    step = optimizer(groups)
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    step.step()
    for name, parameter in model.named_parameters():
        rate = 0.5 if ".attention." in name else 1.0 if "layer" in name and ".conv" in name else 0.0
        torch.testing.assert_close(parameter, before[name] - rate * parameter.grad)


def test_the_classifier_is_a_group_where_it_has_options() -> None:
    model = convert(timm.create_model("resnet18"), init="identity")
    groups = parameter_groups(model, head={"lr": 3e-3})
    assert [group["name"] for group in groups] == ["branch", "weight", "head", "rest"]
    assert groups[2] == {"name": "head", "params": [model.fc.weight, model.fc.bias], "lr": 3e-3}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert parameter_groups(nn.DataParallel(model), head={"lr": 3e-3}) == groups
    with pytest.raises(ValueError, match=r"Sequential has no classifier under get_classifier\(\), fc.*leave head out"):
        parameter_groups(convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))), head={"lr": 1.0})


def test_a_group_without_parameters_is_left_out() -> None:
    model = timm.create_model("resnet8_cifar").requires_grad_(False)
    convert(model)
    assert [group["name"] for group in parameter_groups(model)] == ["branch"]


def test_a_network_without_attention_or_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear has no AW-convolution; convert it first"):
        parameter_groups(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"branch must hold options of an optimiser, such as lr, got \{'params'"):
        parameter_groups(timm.create_model("aw_resnet8_cifar"), branch={"params": []})
    with pytest.raises(ValueError, match=r"rest must hold options of an optimiser, such as lr, got \[1\]"):
        parameter_groups(timm.create_model("aw_resnet8_cifar"), rest=[1])
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got 'resnet18'"):
        parameter_groups("resnet18")
