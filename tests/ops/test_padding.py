"""Absurd strides, paddings and dilations cost no more than in a plain convolution."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from awconv.ops import aw_conv2d
from awconv.ops.choose import choose
from awconv.ops.geometry import Geometry
from awconv.ops.problem import Problem, describe

SIZE = 27
# Arguments, the kernel's size, and the same computed without them: from the input and the weights of one sample.
ABSURD: dict[str, tuple[dict[str, Any], int, Callable[[Tensor, Tensor], Tensor]]] = {
    "stride": (
        dict(stride=10_000, padding=1),
        3,
        lambda input, weight: F.conv2d(F.pad(input, (1, 0, 1, 0))[..., :3, :3], weight),
    ),
    "stride and padding": (
        dict(stride=10_000, padding=10_000),
        3,
        lambda input, weight: F.pad(F.conv2d(input[..., :3, :3], weight), (1, 1, 1, 1)),
    ),
    "stride within the padding": (
        dict(stride=100, padding=1_000),
        3,
        lambda input, weight: F.pad(F.conv2d(input[..., :3, :3], weight), (10, 10, 10, 10)),
    ),
    "dilation and padding": (
        dict(dilation=10_000, padding=10_000),
        3,
        lambda input, weight: F.conv2d(input, weight[..., 1:2, 1:2]),
    ),
    "dilation and padding of the same size": (  # 4,999 before and 5,000 after, of which no tap sees the input
        dict(dilation=9_999, padding="same"),
        2,
        lambda input, weight: F.conv2d(input, weight[..., :1, :1]) * 0,
    ),
}


@pytest.fixture(params=ABSURD)
def absurd(request: pytest.FixtureRequest) -> tuple[dict[str, Any], int, Callable[[Tensor, Tensor], Tensor]]:
    return ABSURD[request.param]


def tensors(kernel: int) -> list[Tensor]:
    shapes = ((1, 4, SIZE, SIZE), (6, 4, kernel, kernel), (1, 6, 1, kernel, kernel))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def described(arguments: dict[str, Any], kernel: int) -> Problem:
    defaults = dict(stride=1, padding=0, dilation=1, groups=1)
    return describe(2, *tensors(kernel), None, *(defaults | arguments).values(), True)


def test_the_result_and_its_derivatives_are_right(
    absurd: tuple[dict[str, Any], int, Callable[[Tensor, Tensor], Tensor]],
) -> None:
    arguments, kernel, plainly = absurd
    leaves = tensors(kernel)

    def derivatives(output: Tensor) -> list[Tensor]:
        once = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        twice = torch.autograd.grad(sum(gradient.square().sum() for gradient in once), leaves)
        return [output, *once, *twice]

    input, weight, attention = leaves
    expected = derivatives(plainly(input, weight * (1 + attention[0])))
    able = ["auto", "per_sample"]
    if "dilation" not in arguments:
        able += ["fused", "per_tap"]
    for algorithm in able:
        results = derivatives(aw_conv2d(*leaves, **arguments, algorithm=algorithm))
        for result, value in zip(results, expected, strict=True):
            torch.testing.assert_close(result, value, msg=lambda text, a=algorithm: f"{a}: {text}")


@pytest.mark.parametrize("algorithm", ["fused", "per_tap"])
def test_an_algorithm_that_copies_the_padding_says_so(algorithm: str) -> None:
    with pytest.raises(ValueError, match=r"copies the input with its padding, 1,604,322,916 elements a sample where"):
        aw_conv2d(*tensors(3), dilation=10_000, padding=10_000, algorithm=algorithm)


def test_auto_takes_one_that_does_not() -> None:
    assert choose(described(dict(dilation=10_000, padding=10_000), 3), "auto", "").name == "per_sample"
    # Padding that is large, and not yet an obstacle: 500 * 500 positions for 27 * 27.
    assert choose(described(dict(dilation=236, padding=236), 3), "auto", "").name == "per_sample"
    assert choose(described(dict(padding=1), 3), "auto", "").name == "fused"


def test_positions_that_see_nothing_are_left_out() -> None:
    problem = described(dict(stride=100, padding=1_000), 3)
    assert (problem.out_size, problem.unseeing) == ((1, 1), ((10, 10), (10, 10)))
    assert problem.padded_elements == 4 * 3 * 3
    assert described(dict(stride=10_000, padding=1), 3).geometry.stride == (SIZE, SIZE)
    usual = described(dict(stride=2, padding=1), 3)
    assert usual.geometry == Geometry((2, 2), ((1, 1), (1, 1)), (1, 1), 1)
    assert usual.unseeing == ((0, 0), (0, 0))


_MEASURED = """
import resource, torch
from awconv.ops import aw_conv2d
from tests.ops.test_padding import ABSURD, tensors
resource.setrlimit(resource.RLIMIT_DATA, (2**33, 2**33))  # so that a fault cannot take all memory of a machine
torch.set_num_threads(1)
aw_conv2d(*tensors(3)).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF)
for arguments, kernel, _ in ABSURD.values():
    leaves = tensors(kernel)
    once = torch.autograd.grad(aw_conv2d(*leaves, **arguments).square().sum(), leaves, create_graph=True)
    sum(gradient.square().sum() for gradient in once).backward()
after = resource.getrusage(resource.RUSAGE_SELF)
print((after.ru_maxrss - before.ru_maxrss) // 1024, after.ru_utime - before.ru_utime)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what the limits mean differs between systems")
def test_they_take_no_memory_and_no_time() -> None:
    result = subprocess.run([sys.executable, "-c", _MEASURED], capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stderr
    megabytes, seconds = map(float, result.stdout.split())
    assert (
        megabytes < 300
    )  # less than 50 here, all forward, backward and double backward; 25,000 when padding was written
    assert seconds < 10  # 0.4 here; minutes when each phase of a stride was run
