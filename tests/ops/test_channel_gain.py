"""The product with a gain for each sample and channel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from awconv.ops.channel_gain import mean_beside, pooled_globally, scale


def test_the_node_of_the_scaling_has_two_derivatives() -> None:
    input = torch.randn(2, 3, 4, 3, dtype=torch.float64, requires_grad=True)
    factor = torch.randn(2, 3, 1, 1, dtype=torch.float64, requires_grad=True)

    def call(input: Tensor, factor: Tensor) -> Tensor:
        passed, mean = mean_beside(input * 1)
        return scale(passed, mean.tanh() + factor)

    assert torch.autograd.gradcheck(call, (input, factor))
    assert torch.autograd.gradgradcheck(call, (input, factor))


@pytest.mark.parametrize("size", [(5,), (4, 3), (2, 3, 2)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_gradients_in_place_are_those_of_autograd(size: tuple[int, ...], channels_last: bool) -> None:
    source = torch.randn(2, 3, *size, dtype=torch.float64)
    if channels_last:
        source = source.movedim(1, -1).contiguous().movedim(-1, 1)
    factor, weights = torch.randn(2, 3, *[1] * len(size), dtype=torch.float64), torch.randn_like(source)

    def gradients(ours: bool) -> tuple[Tensor, ...]:
        input, gain = source.clone().requires_grad_(), factor.clone().requires_grad_()
        once = input.sin()  # has another use, whose gradient must stay what it is
        passed, mean = pooled_globally(once) if ours else (once, once.mean(list(range(2, once.dim())), keepdim=True))
        of_mean = gain * mean.tanh()
        output = scale(passed, of_mean) if ours else passed * of_mean
        return torch.autograd.grad(((output + once) * weights).sum(), (input, gain))

    for got, want in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)  # both in float64


def test_the_scaled_input_has_the_inputs_dtype() -> None:
    input = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16)
    assert scale(input, torch.rand(2, 3, 1, 1)).dtype == torch.bfloat16
