"""The optimiser of a training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from awconv.tasks.optimization import Optimization

SGD = Optimization("sgd", {}, 0.1, 1, 1, 0.9, 1e-2, None, 0, (), 0.1)


def updated(optimization: Optimization, fused: bool) -> tuple[torch.Tensor, torch.optim.Optimizer]:
    torch.manual_seed(0)
    network = nn.Linear(5, 3)
    optimizer = optimization.make_optimizer(network, fused)
    for _ in range(3):
        optimizer.zero_grad()
        network(torch.ones(2, 5)).square().sum().backward()
        optimizer.step()
    return network.weight.detach(), optimizer


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_fused_update_is_the_usual_one(name: str) -> None:
    optimization = replace(SGD, optimizer=name)
    fused, optimizer = updated(optimization, fused=True)
    assert all(group["fused"] for group in optimizer.param_groups)
    usual, optimizer = updated(optimization, fused=False)
    assert not any(group["fused"] for group in optimizer.param_groups)
    torch.testing.assert_close(fused, usual, rtol=1e-5, atol=1e-6)  # single precision, in another order


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("lamb", {}), ("lookahead_sgd", {}), ("sgd", {"foreach": True}), ("adamw", {"fused": False})],
)
def test_an_optimizer_that_cannot_or_shall_not_be_fused_is_left(name: str, arguments: dict[str, bool]) -> None:
    _, optimizer = updated(replace(SGD, optimizer=name, optimizer_args=arguments), fused=True)
    assert not any(group.get("fused") for group in optimizer.param_groups)
