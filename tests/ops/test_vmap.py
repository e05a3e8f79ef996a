"""``vmap`` over the operator: problems side by side, of which some tensors differ and others are shared."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vmap

from awconv.ops.choose import ALGORITHMS
from tests.ops.problems import TYPICAL, Case, cases

TENSORS = ("input", "weight", "attention", "bias")
MAPPED = st.dictionaries(st.sampled_from(TENSORS), st.integers(-1, 1), min_size=1)


def several(case: Case, mapped: dict[str, int], count: int = 3) -> dict[str, Tensor]:
    """Tensors of the case, of which those that are mapped differ along an axis."""
    torch.manual_seed(case.seed)
    return {
        name: torch.randn(count, *tensor.shape, dtype=tensor.dtype).movedim(0, mapped[name])
        if name in mapped
        else tensor
        for name, tensor in case.tensors.items()
    }


def check(case: Case, mapped: dict[str, int], algorithm: str) -> None:
    """``vmap`` gives what a loop does, and the gradients of each problem."""
    mapped = {name: axis for name, axis in mapped.items() if name in case.tensors}
    if not mapped:
        return
    tensors = several(case, mapped)
    axes = tuple(mapped.get(name) for name in tensors)

    def run(*values: Tensor) -> Tensor:
        return case.run(algorithm, **dict(zip(tensors, values, strict=True)))

    def loss(*values: Tensor) -> Tensor:
        return run(*values).square().sum()

    every = tuple(range(len(tensors)))
    together = vmap(run, axes)(*tensors.values())
    grads = vmap(grad(loss, every), axes)(*tensors.values())
    shared = grad(lambda *values: vmap(run, axes)(*values).square().sum(), every)(*tensors.values())
    expected: list[list[Tensor]] = []
    for index in range(3):
        alone = [tensor.select(mapped[name], index) if name in mapped else tensor for name, tensor in tensors.items()]
        # float64; products come side by side, which changes the order of sums
        torch.testing.assert_close(together[index], run(*alone), rtol=1e-9, atol=1e-9)
        expected.append(list(grad(loss, every)(*alone)))
        for got, wanted in zip(grads, expected[-1], strict=True):
            torch.testing.assert_close(got[index], wanted, rtol=1e-9, atol=1e-9)
    for name, got, each in zip(tensors, shared, zip(*expected, strict=True), strict=True):
        wanted = torch.stack(each, mapped[name]) if name in mapped else torch.stack(each).sum(0)
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@settings(max_examples=8, deadline=None)
@given(mapped=MAPPED)
def test_every_algorithm_runs_problems_side_by_side(algorithm: str, mapped: dict[str, int]) -> None:
    check(TYPICAL[algorithm], mapped, algorithm)


@settings(max_examples=25, deadline=None)
@given(case=cases(least_batch=1), mapped=MAPPED)
def test_problems_of_any_kind_run_side_by_side(case: Case, mapped: dict[str, int]) -> None:
    for algorithm in (*case.able(), "auto"):
        check(case, mapped, algorithm)


def test_it_may_be_mapped_twice() -> None:
    case = TYPICAL["fused"]
    weights, inputs = torch.randn(2, *case.tensors["weight"].shape).double(), torch.randn(3, 3, 4, 7, 6).double()

    def run(weight: Tensor, input: Tensor) -> Tensor:
        return case.run(weight=weight, input=input)

    table = vmap(vmap(run, (None, 0)), (0, None))(weights, inputs)
    for row, weight in zip(table, weights, strict=True):
        for output, input in zip(row, inputs, strict=True):
            torch.testing.assert_close(output, run(weight, input), rtol=1e-9, atol=1e-9)  # as above
