"""Every algorithm computes the paper's sum, and the gradients of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from awconv.ops import aw_conv2d
from awconv.ops.choose import ALGORITHMS
from tests.ops.problems import TYPICAL, Case, cases, skip_other_kernels
from tests.ops.reference import aw_convolution

# Sums of at most a few hundred products of standard normals, in another order: a few hundred roundings of float64
# (1.1e-16 each) on terms of order one to ten.
FLOAT64 = dict(rtol=1e-11, atol=1e-11)


@settings(max_examples=150)
@given(case=cases())
def test_every_algorithm_equals_the_papers_sum(case: Case) -> None:
    values = {name: tensor.numpy() for name, tensor in case.tensors.items()}
    expected = aw_convolution(
        values["input"],
        values["weight"],
        values["attention"],
        values.get("bias"),
        case.per_axis(case.stride),
        case.padding_pairs(),
        case.per_axis(case.dilation),
        case.groups,
        case.residual,
    )
    for algorithm in ["auto", *case.able()]:
        output = case.run(algorithm)
        assert tuple(output.shape) == expected.shape, algorithm
        np.testing.assert_allclose(output.numpy(), expected, **FLOAT64, err_msg=algorithm)


@settings(max_examples=100)
@given(case=cases(least_batch=0, most_channels=41))
def test_every_algorithm_has_the_gradients_of_the_definition(case: Case) -> None:
    def gradients(algorithm: str) -> tuple[torch.Tensor, ...]:
        tensors = {name: tensor.clone().requires_grad_() for name, tensor in case.tensors.items()}
        output = case.run(algorithm, **tensors)
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
        return torch.autograd.grad((output * weights).sum(), tuple(tensors.values()))

    expected = gradients("naive")
    for algorithm in case.able():
        for gradient, reference in zip(gradients(algorithm), expected, strict=True):
            torch.testing.assert_close(gradient, reference, **FLOAT64, msg=lambda text, a=algorithm: f"{a}: {text}")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradients_agree_with_finite_differences(algorithm: str) -> None:
    case = TYPICAL[algorithm]
    names, tensors = zip(*((n, t.clone().requires_grad_()) for n, t in case.tensors.items()), strict=True)

    def run(*values: torch.Tensor) -> torch.Tensor:
        return case.run(algorithm, **dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("wanted", ["input", "weight", "attention"])
def test_a_gradient_can_be_asked_for_alone(algorithm: str, wanted: str) -> None:
    case = TYPICAL[algorithm]
    every = {name: tensor.clone().requires_grad_() for name, tensor in case.tensors.items()}
    (expected,) = torch.autograd.grad(case.run(algorithm, **every).square().sum(), every[wanted])
    alone = case.tensors[wanted].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(case.run(algorithm, **{wanted: alone}).square().sum(), alone)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_stays_within_its_rounding(algorithm: str, dtype: torch.dtype, device: str) -> None:
    skip_other_kernels(algorithm, device)
    case = TYPICAL[algorithm]
    rounded = {name: tensor.to(device, dtype) for name, tensor in case.tensors.items()}
    exact = {name: tensor.double().cpu().requires_grad_() for name, tensor in rounded.items()}
    low = {name: tensor.detach().requires_grad_() for name, tensor in rounded.items()}
    expected, output = case.run("naive", **exact), case.run(algorithm, **low)
    assert output.dtype == dtype
    # 1 + A, K * (1 + A), each of 12 products or partial sums, and the output may each be rounded once: about 16
    # roundings of half an eps, on terms of magnitude up to about 10 that the sum may cancel.
    tolerance = dict(rtol=16 * torch.finfo(dtype).eps, atol=40 * torch.finfo(dtype).eps)
    torch.testing.assert_close(output.double().cpu(), expected, **tolerance)
    for value, reference in zip(
        torch.autograd.grad(output.sum(), tuple(low.values())),
        torch.autograd.grad(expected.sum(), tuple(exact.values())),
        strict=True,
    ):
        # The gradient of the weights sums over batch and positions, 3 * 4 * 8 terms: up to 8 times the magnitude.
        assert value.dtype == dtype
        torch.testing.assert_close(
            value.double().cpu(), reference, rtol=8 * tolerance["rtol"], atol=8 * tolerance["atol"]
        )


@pytest.mark.parametrize("algorithm", ["fused", "per_tap", "per_sample", "naive"])
def test_half_precision_does_not_overflow_where_a_plain_convolution_does_not(algorithm: str, device: str) -> None:
    # Products of a tap sum up to 102,400, more than float16 holds; the next tap takes as much away.
    input, weight = torch.full((2, 16, 1, 4), 80.0), torch.full((4, 16, 1, 2), 80.0)
    weight[..., 1] = -80
    skip_other_kernels(algorithm, device)
    tensors = [tensor.to(device, torch.float16) for tensor in (input, weight, torch.zeros(2, 4, 1, 1, 2))]
    output = aw_conv2d(*tensors, algorithm=algorithm)
    assert torch.count_nonzero(output) == 0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_same_bits_twice_in_deterministic_mode(algorithm: str, device: str) -> None:
    skip_other_kernels(algorithm, device)
    case = TYPICAL[algorithm]
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(2):
            tensors = {name: t.to(device, torch.float32).requires_grad_() for name, t in case.tensors.items()}
            output = case.run(algorithm, **tensors)
            results.append((output, *torch.autograd.grad(output.square().sum(), tuple(tensors.values()))))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@pytest.mark.parametrize("algorithm", ["fused", "per_tap", "per_sample"])
def test_one_sample_with_channels_last_takes_a_gradient_with_gaps(algorithm: str) -> None:
    """Where PyTorch's own backward of a grouped convolution of such an input is wrong (torch 2.14)."""
    case = Case(2, 1, (5, 5), (6, 33, 1, 3), (6, 1, 1, 3), groups=3, stride=3, padding=(0, 1))
    tensors = {
        name: tensor.contiguous(memory_format=torch.channels_last) if name != "attention" else tensor
        for name, tensor in case.tensors.items()
    }
    gaps = torch.zeros(3, 13, 2, 2, dtype=torch.float64)[1:2, 1::2].copy_(torch.randn(1, 6, 2, 2))
    found, expected = (
        torch.autograd.grad(case.run(way, **leaves), tuple(leaves.values()), gaps)
        for way in (algorithm, "naive")
        for leaves in [{name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}]
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
