"""The definition of F1 and the branch that the layers have."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from awconv import AWConv1d, AWConv2d, AWConv3d
from awconv.ops.naive import attention_map, batch_norm, pool


@pytest.mark.parametrize(("layer", "size"), [(AWConv1d, (11,)), (AWConv2d, (7, 9)), (AWConv3d, (5, 6, 4))])
@pytest.mark.parametrize("rates", [{}, {"in_expansion": 2, "out_expansion": 3, "kernel_expansion": 3}])
@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu"])
def test_the_branch_is_the_definition(layer: Any, size: tuple[int, ...], rates: Any, activation: str) -> None:
    made = layer(12, 6, 3, groups=2, reduction=2, activation=activation, **rates).double()
    branch, I = made.attention, torch.randn(3, 12, *size).double()  # noqa: N806, E741  # as in the paper
    norms = []
    for norm in (branch.norm1, branch.norm2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        shape = (-1, *(1,) * len(size))
        norms.append(functools.partial(batch_norm, weight=norm.weight.view(shape), bias=norm.bias.view(shape)))
    found = attention_map(
        I,
        branch.conv1.weight.flatten(1),
        branch.conv2.weight.flatten(1),
        *norms,
        branch.attention_size,
        getattr(torch, activation),
    )
    torch.testing.assert_close(branch(I), found)


def test_pooling_and_the_norm_are_pytorchs() -> None:
    images = torch.randn(3, 4, 11, 7).double()
    torch.testing.assert_close(pool(images, (3, 2)), F.adaptive_avg_pool2d(images, (3, 2)))
    torch.testing.assert_close(pool(images[:, :, :2, :2], (3, 5)), F.adaptive_avg_pool2d(images[:, :, :2, :2], (3, 5)))
    torch.testing.assert_close(batch_norm(images), F.batch_norm(images, None, None, training=True))
