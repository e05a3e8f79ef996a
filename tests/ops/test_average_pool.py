"""Pooling to the size of a kernel, by C code and by matrices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from awconv.ops import average_pool as module
from awconv.ops.average_pool import average_pool

POOLS = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def sizes(dims: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*[st.integers(1, 12)] * dims)


@pytest.fixture(params=["c code", "slices", "matrices"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "c code":
        monkeypatch.setattr(module, "library", lambda source, dtype: "there is no compiler")
    if request.param == "matrices":
        monkeypatch.setattr(module, "_by_slices", module._by_matrices)
    way: str = request.param
    return way


SPOILT = [((5,), (3,)), ((7, 7), (3, 3)), ((14, 14), (3, 2)), ((30, 21), (3, 3)), ((6, 5, 4), (3, 3, 3))]


@pytest.mark.parametrize(("size", "bins"), SPOILT)
@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_spoils_the_bins_that_cover_it(
    way: str, size: tuple[int, ...], bins: tuple[int, ...], number: float
) -> None:
    if way == "matrices":
        pytest.skip("spoils every bin of a channel and sample, as it says")
    pool = POOLS[len(size)]
    input = torch.randn(3, 2, *size, requires_grad=True)
    spoilt = input.detach().clone()
    spoilt[1, 0].flatten()[7 % spoilt[1, 0].numel()] = number
    torch.testing.assert_close(average_pool(spoilt, bins), pool(spoilt, bins), equal_nan=True)
    above = torch.randn(3, 2, *bins)
    above[2, 1].flatten()[1] = number
    (gradient,), (expected,) = (
        torch.autograd.grad(function(input, bins), input, above) for function in (average_pool, pool)
    )
    torch.testing.assert_close(gradient, expected, equal_nan=True)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # the same way for every example
@given(st.integers(1, 3).flatmap(lambda dims: st.tuples(sizes(dims), sizes(dims))))
def test_pooling_equals_adaptive_average_pooling(way: str, shape: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    size, bins = shape
    input = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    pooled, expected = average_pool(input, bins), POOLS[len(size)](input, bins)
    torch.testing.assert_close(pooled, expected)
    weights = torch.randn_like(pooled)
    torch.testing.assert_close(
        *(torch.autograd.grad((output * weights).sum(), input)[0] for output in (pooled, expected))
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pooling_in_low_precision_neither_overflows_nor_drifts(dtype: torch.dtype) -> None:
    input = torch.full((1, 1, 224, 224), 100.0, dtype=dtype)  # whose sum is 5 million, float16 ending at 65,504
    # The weights of the mean and the result are each rounded once.
    pooled, expected = average_pool(input, (3, 3)), torch.full((1, 1, 3, 3), 100.0, dtype=dtype)
    torch.testing.assert_close(pooled, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_pooling_can_be_differentiated_twice(way: str) -> None:
    input = torch.randn(2, 3, 7, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda input: average_pool(input, (3, 2)), input)
    assert torch.autograd.gradgradcheck(lambda input: average_pool(input, (3, 2)), input)


def test_pooling_takes_functional_transforms_and_tracing(way: str) -> None:
    input = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    expected = average_pool(input, (3, 2))
    jacobian = torch.autograd.functional.jacobian(lambda input: average_pool(input, (3, 2)), input)
    torch.testing.assert_close(torch.func.jacrev(lambda input: average_pool(input, (3, 2)))(input), jacobian)
    torch.testing.assert_close(torch.func.jacfwd(lambda input: average_pool(input, (3, 2)))(input), jacobian)
    traced = torch.jit.trace(lambda input: average_pool(input, (3, 2)), torch.randn_like(input))
    torch.testing.assert_close(traced(input), expected)
    compiled = torch.compile(lambda input: average_pool(input, (3, 2)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input), expected)


def test_pooling_need_not_be_contiguous_and_the_batch_may_be_empty(way: str) -> None:
    input = torch.randn(2, 3, 7, 5)
    torch.testing.assert_close(average_pool(input.transpose(2, 3), (3, 2)), F.adaptive_avg_pool2d(input.mT, (3, 2)))
    assert average_pool(input[:0], (3, 2)).shape == (0, 3, 3, 2)


def test_the_operators_keep_pytorchs_rules() -> None:
    input = torch.randn(2, 3, 7, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.awconv.average_pool, (input, [3, 2]))
    torch.library.opcheck(torch.ops.awconv.average_pool_backward, (input, [14, 9]))
