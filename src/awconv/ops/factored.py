"""Attention that factors out of the sum: a gain on the output, or on the input, of one plain convolution.

Without structure along the kernel and the input channels, ``sum (1 + a[p]) K[p, c, i, j] I[c, ...]`` is ``1 + a[p]``
times the plain output. Without structure along the kernel and the output channels of a group, it is the plain
convolution of ``(1 + a[c]) I[c]``. The whole input is scaled: infinity in a pixel that the stride skips makes the
gain's gradient NaN, and nothing else.
"""

from __future__ import annotations

from torch import Tensor

from awconv.ops.algorithm import Algorithm, Machine, convolve
from awconv.ops.problem import Problem
from awconv.ops.tracing import written


def _output_obstacle(problem: Problem) -> str | None:
    _, in_blocks, *kernel_blocks = problem.attention_blocks
    if in_blocks == 1 and all(blocks == 1 for blocks in kernel_blocks):
        return None
    return "the attention must have size 1 along the input channels and the kernel axes"


def _output_gain(problem: Problem, input: Tensor, weight: Tensor, attention: Tensor) -> Tensor:
    gain = problem.gain(attention).flatten(1).repeat_interleave(problem.rates[0], dim=1)
    return convolve(problem, input, weight, problem.geometry.groups) * gain.reshape(*gain.shape, *(1,) * problem.dims)


def _input_obstacle(problem: Problem) -> str | None:
    out_blocks, _, *kernel_blocks = problem.attention_blocks
    if problem.geometry.groups % out_blocks == 0 and all(blocks == 1 for blocks in kernel_blocks):
        return None
    return (
        "the attention must have size 1 along the kernel axes and, along the output channels, "
        f"a divisor of groups = {written(problem.geometry.groups)}"
    )


def _input_gain(problem: Problem, input: Tensor, weight: Tensor, attention: Tensor) -> Tensor:
    groups, out_blocks = problem.geometry.groups, problem.attention_blocks[0]
    gain = problem.gain(attention).flatten(2)
    gain = gain.repeat_interleave(groups // out_blocks, dim=1).repeat_interleave(problem.rates[1], dim=2)
    gain = gain.reshape(-1, problem.in_channels, *(1,) * problem.dims)
    return convolve(problem, input * gain, weight, groups)


def _cost(problem: Problem, machine: Machine) -> float:
    return 0.0  # always chosen: one plain convolution, and one pass over its output or input


OUTPUT_GAIN = Algorithm("output_gain", _output_gain, _output_obstacle, _cost)
INPUT_GAIN = Algorithm("input_gain", _input_gain, _input_obstacle, _cost)
