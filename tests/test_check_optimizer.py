"""What an optimizer holds, compared with what the network has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import nn

from awconv import check_optimizer, convert, parameter_groups, train_only
from tests.networks import network


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def test_an_optimizer_that_was_made_before_the_conversion_lacks_the_branches() -> None:
    model = timm.create_model("resnet18")
    optimizer = sgd(model.parameters())
    check_optimizer(model, optimizer)
    convert(model)
    with pytest.raises(
        ValueError,
        match=r"lacks 96 of the 158 parameters that train: 96 of attention branches \(layer1\.0\.conv1\.attention\."
        r".*, \.\.\.\)\. It was made before awconv\.convert",
    ):
        check_optimizer(model, optimizer)
    check_optimizer(model, sgd(model.parameters()))
    check_optimizer(model, sgd(parameter_groups(model)))


def test_what_is_frozen_is_not_missed_and_may_be_there() -> None:
    model = convert(network())
    everything = sgd(model.parameters())
    train_only(model, "branch")
    check_optimizer(model, everything)
    check_optimizer(model, sgd(parameter_groups(model)))
    train_only(model, "*")
    with pytest.raises(ValueError, match=r"lacks .*: 2 of the rest \(0\.weight, 0\.bias\)"):
        check_optimizer(model, sgd(parameter for name, parameter in model.named_parameters() if name[:2] != "0."))


def test_parameters_of_layers_that_were_replaced_are_told() -> None:
    model = timm.create_model("resnet8_cifar", num_classes=10)
    optimizer = sgd(model.parameters())
    model.reset_classifier(3)
    with pytest.raises(
        ValueError,
        match=r"lacks 2 of the .*fc\.weight, fc\.bias\), and holds 2 that .*shapes such as \(10, 64\), \(10,\)",
    ):
        check_optimizer(model, optimizer)


def test_wrapped_networks_and_other_optimizers_are_known() -> None:
    model = convert(network())
    optimizer = SimpleNamespace(param_groups=[{"params": list(model.parameters())}])
    for wrapped in (nn.DataParallel(model), torch.compile(model)):
        check_optimizer(wrapped, optimizer)
        with pytest.raises(ValueError, match=r"attention branches \(2\.2\.attention"):
            check_optimizer(wrapped, sgd([model[0].weight]))


def test_other_types_are_named() -> None:
    with pytest.raises(TypeError, match="optimizer must have param_groups"):
        check_optimizer(network(), 0.1)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        check_optimizer("resnet18", sgd(network().parameters()))
