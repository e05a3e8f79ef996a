"""Random problems by every algorithm: output, gradients and second gradients against sums in float64."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

from awconv.ops.choose import ALGORITHMS
from tests.ops.campaign import check, draw, expected_output
from tests.ops.conftest import INSTRUCTIONS
from tests.ops.reference import aw_convolution

AT_ONCE = 50  # problems of a test
PROBLEMS = int(os.environ.get("AWCONV_CAMPAIGN_PROBLEMS", 10_000))
FIRST = 150  # of these, in every run of the tests


def parts(start: int, stop: int) -> Any:
    """Problems by their seeds, with each build of the C code in turn."""
    starts = range(start, stop, AT_ONCE)
    return pytest.mark.parametrize(
        ("seeds", "instructions"),
        [
            pytest.param(
                range(first, min(first + AT_ONCE, stop)), INSTRUCTIONS[index % len(INSTRUCTIONS)], id=str(first)
            )
            for index, first in enumerate(starts)
        ],
        indirect=["instructions"],
    )


def check_all(seeds: Iterable[int], record_property: Callable[[str, object], None]) -> None:
    began, figures, failures = time.monotonic(), Counter[str](), []
    for seed in seeds:
        try:
            figures += check(seed)
        except AssertionError as error:
            failures.append(str(error))
    figures["failures"] = len(failures)
    for name, number in figures.items():
        record_property(name, number)
    record_property("seconds of one core", time.monotonic() - began)
    assert not failures, "\n\n".join(failures[:10])


@parts(0, FIRST)
def test_every_algorithm_and_gradient_is_right(seeds: range, instructions: None, record_property: Any) -> None:
    check_all(seeds, record_property)


@pytest.mark.campaign
@parts(0, PROBLEMS)
def test_campaign(seeds: range, instructions: None, record_property: Any) -> None:
    check_all(seeds, record_property)


def test_the_sums_of_the_campaign_are_the_papers() -> None:
    checked = 0
    for seed in range(200):
        drawn = draw(seed)
        problem, tensors = drawn.problem, [tensor.double() for tensor in drawn.tensors]
        if problem.multiply_adds * len(tensors[0]) > 5_000:  # loops in Python
            continue
        values = [tensor.numpy() for tensor in tensors]
        arguments = (drawn.stride, drawn.padding, *problem.geometry[2:], problem.residual)
        paper = aw_convolution(*values, None, *arguments)
        np.testing.assert_allclose(expected_output(drawn, *tensors).numpy(), paper, rtol=1e-11, atol=1e-11)
        checked += 1
    assert checked >= 10


def test_a_wrong_result_is_seen_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ALGORITHMS["per_sample"]
    monkeypatch.setitem(
        ALGORITHMS, "per_sample", right._replace(run=lambda problem, *tensors: right.run(problem, *tensors) * 2)
    )
    with pytest.raises(AssertionError, match=r"per_sample: output is off by .*again: .*python -m tests.ops.campaign 5"):
        check(5)
    monkeypatch.setitem(ALGORITHMS, "per_sample", right)
    assert check(5)["by per_sample"] == 1
