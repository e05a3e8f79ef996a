"""Random AW-convolutions by every algorithm that can run them, compared with sums in float64 from independent code.

``python -m tests.ops.campaign SEED ...`` repeats the problems of some seeds.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from awconv.ops.choose import ALGORITHMS
from awconv.ops.problem import Problem, describe

NAMES = ("input", "weight", "attention")
MOST_CHANNELS = 40  # of a group: more than two blocks of two vectors of any processor
MOST_WORK = 2**21  # multiply-adds of a sample


@dataclass
class Drawn:
    seed: int
    problem: Problem
    tensors: tuple[Tensor, ...]  # input, weight, attention, rounded to the problem's dtype
    wanted: tuple[bool, ...]  # gradients
    stride: tuple[int, ...]  # as it was asked for, where a problem leaves out what sees nothing
    padding: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in zip(NAMES, self.tensors, strict=True))
        return f"{shapes}, wanted {self.wanted}, {self.problem}"


def draw(seed: int) -> Drawn:
    random = np.random.default_rng(seed)

    def number(least: int, most: int) -> int:
        return int(random.integers(least, most + 1))

    def divisor(whole: int) -> int:
        return int(random.choice([1, whole, *(d for d in range(2, whole) if whole % d == 0)]))

    def channels() -> int:
        return number(1, MOST_CHANNELS) if random.random() < 0.6 else number(1, 4)

    dims = int(random.choice([1, 2, 2, 2, 3]))
    kernel = tuple(number(1, {1: 9, 2: 5, 3: 3}[dims]) for _ in range(dims))
    stride, dilation = (tuple(number(1, most) for _ in range(dims)) for most in (4, 2))
    extents = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    before = tuple(number(0, 4) for _ in range(dims))
    after = before if random.random() < 0.7 else tuple(number(0, 4) for _ in range(dims))
    size = []
    for axis in range(dims):
        least = max(1, extents[axis] - before[axis] - after[axis])
        extent = number(least, least + {1: 150, 2: 24, 3: 8}[dims] // int(random.choice([1, 3])))
        if random.random() < 0.5:  # then padding before can take the place of what the stride leaves
            extent = -(-extent // stride[axis]) * stride[axis]
        size.append(extent)
    group_in, group_out = channels(), channels()
    groups = 1 if group_in * group_out > 100 else number(1, 5)
    axes = zip(size, before, after, extents, stride, strict=True)
    positions = tuple((extent + b + a - r) // s + 1 for extent, b, a, r, s in axes)
    while np.prod(positions) * group_in * group_out * groups * np.prod(kernel) > MOST_WORK:
        if group_in >= group_out:
            group_in = -(-group_in // 2)
        else:
            group_out = -(-group_out // 2)
        if group_in == group_out == 1:
            break
    weight_shape = (group_out * groups, group_in, *kernel)
    dtype = torch.float64 if random.random() < 0.5 else torch.float32
    batch = number(1, 3) if random.random() < 0.95 else number(10, 30)  # more than are held at once
    shapes = ((batch, group_in * groups, *size), weight_shape, (batch, *map(divisor, weight_shape)))
    tensors = tuple(torch.from_numpy(random.normal(size=shape)).to(dtype) for shape in shapes)
    if dims == 2 and random.random() < 0.25:
        tensors = (tensors[0].contiguous(memory_format=torch.channels_last), *tensors[1:])
    # The public functions pad both sides alike, or by "same"; an algorithm takes any padding, and with it the kernels.
    even = tuple(max(pair) for pair in zip(before, after, strict=True))
    padding = before if before == after else even
    problem = describe(dims, *tensors, None, stride, padding, dilation, groups, bool(random.random() < 0.8))
    if before != after:
        pairs = tuple(zip(before, after, strict=True))
        geometry = problem.geometry._replace(stride=stride, padding=pairs)
        problem = replace(problem, geometry=geometry, out_size=positions, unseeing=((0, 0),) * dims)
    wanted = (True,) * 3 if random.random() < 0.8 else tuple(bool(b) for b in random.random(3) < 0.5)
    pairs = tuple(zip(before, after, strict=True))
    return Drawn(seed, problem, tensors, wanted if any(wanted) else (True, False, False), stride, pairs)


def expected_output(drawn: Drawn, input: Tensor, weight: Tensor, attention: Tensor) -> Tensor:
    """The paper's sum, one tap after another; all in float64."""
    problem = drawn.problem
    for axis in range(1, attention.dim()):
        attention = attention.repeat_interleave(weight.shape[axis - 1] // attention.shape[axis], axis)
    weights = attention * weight + (weight if problem.residual else 0)
    padded = F.pad(input, [amount for pair in reversed(drawn.padding) for amount in pair])
    spans = [d * (k - 1) for d, k in zip(problem.geometry.dilation, problem.kernel, strict=True)]
    padded = padded.unflatten(1, (problem.geometry.groups, -1))
    weights = weights.unflatten(1, (problem.geometry.groups, -1))
    total: Any = 0
    for tap in product(*map(range, problem.kernel)):
        seen = padded[
            (
                ...,
                *(
                    slice(t * d, extent - span + t * d, s)
                    for t, d, s, extent, span in zip(
                        tap, problem.geometry.dilation, drawn.stride, padded.shape[3:], spans, strict=True
                    )
                ),
            )
        ]
        total = total + torch.einsum("ngpc,ngc...->ngp...", weights[(..., *tap)], seen)
    output: Tensor = total.flatten(1, 2)
    return output


def results(drawn: Drawn, run: Callable[..., Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The output, the gradients of a fixed sum of it that are wanted, and those of a fixed sum of these."""
    tensors = [t.to(dtype).requires_grad_(w) for t, w in zip(drawn.tensors, drawn.wanted, strict=True)]
    leaves = {name: tensor for name, tensor in zip(NAMES, tensors, strict=True) if tensor.requires_grad}
    output = run(drawn, *tensors)
    generator = torch.Generator().manual_seed(drawn.seed)

    def random_like(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).float().to(dtype)

    above = random_like(output).requires_grad_()
    plain = torch.autograd.grad(output, tuple(leaves.values()), above, retain_graph=True)
    directions = [random_like(gradient) for gradient in plain]
    found = {"output": output.detach()}
    found |= {f"gradient of {name}": gradient for name, gradient in zip(leaves, plain, strict=True)}
    once = torch.autograd.grad(output, tuple(leaves.values()), above, create_graph=True)
    total = sum((gradient * direction).sum() for gradient, direction in zip(once, directions, strict=True))
    names = ["output's gradient", *leaves]
    twice = torch.autograd.grad(total, (above, *leaves.values()), allow_unused=True)
    for name, leaf, gradient in zip(names, (above, *leaves.values()), twice, strict=True):
        found[f"second gradient of {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return {name: value.detach() for name, value in found.items()}


def check(seed: int) -> Counter[str]:
    """Checks the problem of a seed.

    Returns:
        How many problems, runs of each algorithm and comparisons that was.

    Raises:
        AssertionError: a result is wrong, or an algorithm failed. The message tells how to do it again.
    """
    drawn = draw(seed)
    figures = Counter({"problems": 1})
    expected = results(drawn, expected_output, torch.float64)
    for name, algorithm in ALGORITHMS.items():
        if algorithm.obstacle(drawn.problem) is not None:
            continue

        def run(drawn: Drawn, *tensors: Tensor, algorithm: Any = algorithm) -> Tensor:
            return drawn.problem.with_unseeing(algorithm.run(drawn.problem, *tensors))

        again = f"CC={os.environ.get('CC', '')!r} python -m tests.ops.campaign {seed}"
        try:
            got = results(drawn, run, drawn.problem.dtype)
        except Exception as error:
            raise AssertionError(f"{name} failed: {error!r}; again: {again}; {drawn}") from error
        figures[f"by {name}"] += 1
        # A second gradient can be zero because what is added up cancels: it is as exact as the others are.
        twice = max(float(value.abs().max()) for what, value in expected.items() if what.startswith("second"))
        for what, value in got.items():
            figures["comparisons"] += 1
            terms = twice if what.startswith("second") else float(expected[what].abs().max())
            wrong = difference(value, expected[what], drawn.problem.dtype, max(1.0, terms))
            assert wrong is None, f"{name}: {what} {wrong}; again: {again}; {drawn}"
    return figures


def difference(value: Tensor, expected: Tensor, dtype: torch.dtype, largest: float) -> str | None:
    """What is wrong with a result; None if it is right."""
    if value.shape != expected.shape:
        return f"has shape {tuple(value.shape)} instead of {tuple(expected.shape)}"
    # Sums of up to some thousand products of standard normals, and of these again, each rounded once: with random signs
    # the roundings add up to some 100 of the type's eps, relative to the largest sums.
    error = float((value.double() - expected).abs().max())
    allowed = 100 * torch.finfo(dtype).eps * largest
    return None if error <= allowed else f"is off by {error:.3g} of {largest:.3g}, and {allowed:.2g} is rounding"


def main(seeds: Sequence[str]) -> None:
    for seed in seeds:
        print(seed, dict(check(int(seed))))


if __name__ == "__main__":
    main(sys.argv[1:])
