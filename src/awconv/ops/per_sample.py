"""Any attention: the attentional weights of every sample, and one convolution with the samples as groups."""

from __future__ import annotations

from torch import Tensor

from awconv.ops.algorithm import Algorithm, Machine, convolve
from awconv.ops.problem import Problem


def _obstacle(problem: Problem) -> str | None:
    return "the batch is empty, and a convolution needs at least one group" if problem.empty else None


def _per_sample(problem: Problem, input: Tensor, weight: Tensor, attention: Tensor) -> Tensor:
    batch = input.shape[0]
    blocked: list[int] = []  # each axis of the weight as (blocks, rate), so that the gain broadcasts over the rates
    for blocks, rate in zip(problem.attention_blocks, problem.rates, strict=True):
        blocked += [blocks, rate]
    gain = problem.gain(attention)
    for axis in range(len(problem.rates)):
        gain = gain.unsqueeze(2 + 2 * axis)
    weights = (weight.reshape(blocked) * gain).reshape(batch * weight.shape[0], *weight.shape[1:])
    output = convolve(
        problem, input.reshape(1, -1, *input.shape[2:]).contiguous(), weights, batch * problem.geometry.groups
    )
    return output.reshape(batch, weight.shape[0], *output.shape[2:])


def _cost(problem: Problem, machine: Machine) -> float:
    weights = problem.out_channels * problem.group_in_channels * problem.taps
    return machine.grouped * problem.multiply_adds + machine.element * machine.weight * weights


ALGORITHM = Algorithm("per_sample", _per_sample, _obstacle, _cost)
