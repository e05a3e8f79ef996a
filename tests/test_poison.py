"""Tests notice reads of uninitialised memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

FOUR = torch.zeros(2, 2)


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(2, 2),
        lambda: torch.empty(2, 2, requires_grad=True),
        lambda: torch.empty_like(FOUR),
        lambda: torch.empty_strided((2, 2), (1, 2)),
        lambda: torch.empty_permuted((2, 2), (1, 0)),
        lambda: FOUR.new_empty(2, 2),
        lambda: FOUR.new_empty_strided((2, 2), (1, 2)),
        lambda: torch.from_numpy(np.empty((2, 2))),
        lambda: torch.from_numpy(np.empty_like(FOUR.numpy())),
    ],
)
def test_unwritten_numbers_are_nan(allocate: Callable[[], Tensor]) -> None:
    assert allocate().isnan().all()


def test_unwritten_integers_are_large() -> None:
    assert torch.empty(3, dtype=torch.int64).tolist() == [2**63 - 1] * 3
    assert np.empty(3, np.uint8).tolist() == [255] * 3
    assert torch.empty(3, dtype=torch.bool).all()


def test_a_device_context_still_decides() -> None:
    with torch.device("meta"):
        assert torch.empty(2).device.type == torch.nn.Linear(2, 2).weight.device.type == "meta"


def test_a_traced_graph_is_what_users_have() -> None:
    def function(x: Tensor) -> Tensor:
        return torch.empty_like(x).copy_(x)

    graph = torch.export.export(_Module(function), (FOUR,)).graph
    assert not [node for node in graph.nodes if "fill" in str(node.target)]


class _Module(torch.nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)
