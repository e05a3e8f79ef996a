"""Infinity and NaN go where the sums take them, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from awconv.ops.choose import ALGORITHMS
from tests.ops.campaign import NAMES, Drawn, draw, expected_output
from tests.ops.conftest import INSTRUCTIONS


def first_order(run: Callable[..., Tensor], above: Tensor, *tensors: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of its product with ``above``."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    output = run(*leaves)
    return {"output": output.detach()} | dict(
        zip((f"gradient of {name}" for name in NAMES), torch.autograd.grad(output, leaves, above), strict=True)
    )


def that_depend(drawn: Drawn, index: int, place: tuple[int, ...], padded: bool) -> dict[str, Tensor]:
    """Which results depend on a number of input, weight, attention or the output's gradient: of positive numbers none
    cancel. If ``padded``, also those that would if the padding were numbers, since zero times infinity may be NaN."""
    flat = [amount for pair in reversed(drawn.padding) for amount in pair]
    tensors = [torch.ones_like(tensor, dtype=torch.float64) for tensor in drawn.tensors]
    if padded:
        tensors[0] = F.pad(tensors[0], flat, value=1)
        drawn = replace(drawn, padding=((0, 0),) * drawn.problem.dims)
    tensors.append(torch.ones_like(expected_output(drawn, *tensors)))
    results = []
    for value in (1, 2):
        if index == 0 and padded:
            at = (*place[:2], *(p + before for p, before in zip(place[2:], flat[-2::-2], strict=True)))
        else:
            at = place
        tensors[index][at] = value
        results.append(first_order(lambda *t: expected_output(drawn, *t), tensors[3], *tensors[:3]))
    depend = {name: results[0][name] != results[1][name] for name in results[0]}
    if padded:
        seen = depend["gradient of input"]
        if index in (1, 2):  # the fused code puts zeros around the output's gradient, too
            depend["gradient of input"] = seen.flatten(2).any(2).reshape(*seen.shape[:2], *[1] * (seen.dim() - 2))
        else:
            depend["gradient of input"] = F.pad(seen, [-amount for amount in flat])
    return depend


@pytest.mark.parametrize("instructions", INSTRUCTIONS, indirect=True)
def test_what_is_not_finite_spoils_what_depends_on_it_and_nothing_else(instructions: None) -> None:
    algorithms = {name: algorithm for name, algorithm in ALGORITHMS.items() if name != "shifted"}  # as its file says
    checked = dict.fromkeys(algorithms, 0)
    for seed in range(120):
        drawn, random = draw(seed), np.random.default_rng(seed)
        output = expected_output(drawn, *(tensor.double() for tensor in drawn.tensors))
        tensors = [*drawn.tensors, torch.from_numpy(random.normal(size=output.shape)).to(drawn.problem.dtype)]
        index = int(random.choice([0, 0, 1, 2, 3, 3]))
        place = tuple(int(random.integers(size)) for size in tensors[index].shape)
        must, may = (that_depend(drawn, index, place, padded) for padded in (False, True))
        tensors[index] = tensors[index].clone()
        tensors[index][place] = float(random.choice([np.inf, -np.inf, np.nan]))
        for name, algorithm in algorithms.items():
            if algorithm.obstacle(drawn.problem) is not None:
                continue

            def run(*leaves: Tensor, algorithm: Any = algorithm, problem: Any = drawn.problem) -> Tensor:
                return problem.with_unseeing(algorithm.run(problem, *leaves))

            unseen = name == "input_gain" and index == 0  # as factored.py says
            for what, value in first_order(run, tensors[3], *tensors[:3]).items():
                spoilt = ~value.isfinite()
                where = f"{name}: {what}, seed {seed}, tensor {index} at {place}; {drawn}"
                if not (unseen and what == "gradient of attention"):
                    assert not (spoilt & ~may[what]).any(), f"{where}: spoilt without a reason"
                assert not (must[what] & ~spoilt).any(), f"{where}: hidden"
            checked[name] += 1
    assert min(checked.values()) >= 10
