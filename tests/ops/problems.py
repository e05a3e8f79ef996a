"""Random AW-convolutions over the whole grid of arguments."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import awconv.ops
from awconv.ops import aw_conv1d, aw_conv2d, aw_conv3d
from awconv.ops.algorithm import Algorithm
from awconv.ops.choose import ALGORITHMS
from awconv.ops.problem import Problem, describe

FUNCTIONS = {1: aw_conv1d, 2: aw_conv2d, 3: aw_conv3d}


@dataclass
class Case:
    dims: int
    batch: int
    size: tuple[int, ...]
    weight_shape: tuple[int, ...]
    attention_shape: tuple[int, ...]
    groups: int = 1
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    residual: bool = True
    has_bias: bool = False
    seed: int = 0
    tensors: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        generator = np.random.default_rng(self.seed)
        shapes = {
            "input": (self.batch, self.weight_shape[1] * self.groups, *self.size),
            "weight": self.weight_shape,
            "attention": (self.batch, *self.attention_shape),
        }
        if self.has_bias:
            shapes["bias"] = (self.weight_shape[0],)
        self.tensors = {name: torch.from_numpy(generator.normal(size=shape)) for name, shape in shapes.items()}

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(stride=self.stride, padding=self.padding, dilation=self.dilation, groups=self.groups)

    def run(self, algorithm: str = "auto", **tensors: torch.Tensor) -> torch.Tensor:
        return FUNCTIONS[self.dims](
            **(self.tensors | tensors), **self.arguments, residual=self.residual, algorithm=algorithm
        )

    def problem(self) -> Problem:
        tensors = (self.tensors.get(name) for name in ("input", "weight", "attention", "bias"))
        return describe(self.dims, *tensors, *self.arguments.values(), self.residual)

    def able(self) -> list[str]:
        """The algorithms that say that they can run it."""
        problem = self.problem()
        return [name for name, algorithm in ALGORITHMS.items() if algorithm.obstacle(problem) is None]

    def per_axis(self, value: Any) -> tuple[int, ...]:
        return (value,) * self.dims if isinstance(value, int) else tuple(value)

    def padding_pairs(self) -> list[tuple[int, int]]:
        if self.padding == "valid":
            return [(0, 0)] * self.dims
        if self.padding == "same":
            totals = [d * (k - 1) for d, k in zip(self.per_axis(self.dilation), self.weight_shape[2:], strict=True)]
            return [(total // 2, (total + 1) // 2) for total in totals]
        return [(amount, amount) for amount in self.per_axis(self.padding)]


def divisors(number: int) -> st.SearchStrategy[int]:
    return st.sampled_from([d for d in range(1, number + 1) if number % d == 0])


@st.composite
def cases(draw: st.DrawFn, dims: tuple[int, ...] = (1, 2, 3), least_batch: int = 0, most_channels: int = 4) -> Case:
    axes = draw(st.sampled_from(dims))
    largest_kernel = 4 if axes < 3 else 2
    group_in, group_out = draw(st.integers(1, most_channels)), draw(st.integers(1, max(3, most_channels - 1)))
    groups = draw(st.integers(1, 3)) if group_in * group_out < 100 else 1
    kernel = tuple(draw(st.integers(1, largest_kernel)) for _ in range(axes))

    def number(least: int, most: int) -> Any:
        return draw(st.one_of(st.integers(least, most), st.tuples(*[st.integers(least, most)] * axes)))

    padding = draw(st.sampled_from(["number", "number", "number", "same", "valid"]))
    stride = 1 if padding == "same" else number(1, 4)
    dilation = number(1, 2)
    padding = number(0, 3) if padding == "number" else padding
    dilations = (dilation,) * axes if isinstance(dilation, int) else dilation
    extents = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    weight_shape = (group_out * groups, group_in, *kernel)
    return Case(
        dims=axes,
        batch=draw(st.integers(least_batch, 3)),
        size=tuple(draw(st.integers(r, r + 5)) for r in extents),
        weight_shape=weight_shape,
        attention_shape=tuple(draw(st.one_of(st.just(1), divisors(size), st.just(size))) for size in weight_shape),
        groups=groups,
        stride=stride,
        padding=padding,
        dilation=dilation,
        residual=draw(st.booleans()),
        has_bias=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


class _OfAlgorithms(dict[str, Case]):
    def __missing__(self, name: str) -> Case:
        pytest.fail(_NO_PROBLEM.format(name=name), pytrace=False)


_NO_PROBLEM = (
    "the algorithm {name!r} of ALGORITHMS (src/awconv/ops/choose.py) has no entry in TYPICAL (tests/ops/problems.py): "
    "add the attention_shape of a problem that it can run, for instance {name!r}: (4, 2, 3, 2)"
)

# One problem for each algorithm, with all that can go wrong: groups, stride, dilation, uneven sizes.
TYPICAL = _OfAlgorithms(
    (
        name,
        Case(
            dims=2,
            batch=3,
            size=(7, 6),
            weight_shape=(4, 2, 3, 2),
            attention_shape=attention_shape,
            groups=2,
            stride=(2, 1),
            padding=(1, 2),
            dilation=(1, 2),
            has_bias=True,
        ),
    )
    for name, attention_shape in {
        "output_gain": (4, 1, 1, 1),
        "input_gain": (2, 2, 1, 1),
        "fused": (4, 2, 3, 2),
        "per_tap": (4, 1, 3, 2),
        "per_sample": (4, 2, 3, 2),
        "shifted": (4, 1, 3, 2),
        "matmul": (4, 2, 3, 2),
        "naive": (4, 2, 3, 2),
    }.items()
)


def forgotten_entries() -> list[str]:
    """What adding an algorithm takes and is not there, in words."""
    forgotten = [_NO_PROBLEM.format(name=name) for name in ALGORITHMS if name not in TYPICAL]
    forgotten += [
        f"TYPICAL (tests/ops/problems.py) has a problem for {name!r}, which ALGORITHMS (src/awconv/ops/choose.py) lacks"
        for name in TYPICAL
        if name not in ALGORITHMS
    ]
    for name in ALGORITHMS.keys() & TYPICAL.keys():
        obstacle = ALGORITHMS[name].obstacle(TYPICAL[name].problem())
        if obstacle is not None:
            forgotten.append(
                f"the problem of {name!r} in TYPICAL (tests/ops/problems.py) is one that it cannot run: {obstacle}; "
                "give it another attention_shape"
            )
    for module in pkgutil.walk_packages(awconv.ops.__path__, "awconv.ops."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, Algorithm) and ALGORITHMS.get(value.name) is not value:
                forgotten.append(
                    f"the algorithm {value.name!r} of {module.name} is not in ALGORITHMS (src/awconv/ops/choose.py): "
                    "import its module there and list it, from the most special to the most general"
                )
    return forgotten


def skip_other_kernels(algorithm: str, device: str) -> None:
    """The fused kernels of a GPU take larger problems than these: test_triton.py has those."""
    if (algorithm, device) == ("fused", "cuda"):
        pytest.skip("test_triton.py tests the kernels for GPUs")
