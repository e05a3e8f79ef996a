"""Any attention as one batched matrix product: the attentional weights of each sample times what the kernel sees. In a
depthwise convolution it is the sum of a product.

What it sees at each position is gathered with the channels side by side, by an index that is a constant of an exported
graph. No convolution is left, and so none whose weights depend on the input.
"""

from __future__ import annotations

from itertools import product as combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from awconv.ops.algorithm import Algorithm, Machine
from awconv.ops.problem import Problem, product


def _obstacle(problem: Problem) -> str | None:
    if not all(isinstance(size, int) for size in problem.size):
        return "the sizes of its input are symbols, and its index needs numbers"
    if problem.padding_obstacle is not None:
        return f"it copies the input with its padding, {problem.padding_obstacle}"
    return None


def _matmul(problem: Problem, input: Tensor, weight: Tensor, attention: Tensor) -> Tensor:
    groups, rows = problem.geometry.groups, problem.taps * problem.group_in_channels
    weights = _weights(problem, weight, attention)
    columns = _columns(problem, input)
    if problem.depthwise:
        output = (columns * weights.squeeze(3).transpose(1, 2).unsqueeze(1)).sum(2).transpose(1, 2).contiguous()
        return output.reshape(input.shape[0], problem.out_channels, *problem.out_size)
    weights = weights.reshape(-1, problem.out_channels // groups, rows)
    if groups > 1:
        columns = columns.unflatten(3, (groups, -1)).permute(0, 3, 1, 2, 4)
    columns = columns.reshape(-1, product(problem.out_size), rows)
    output = torch.bmm(weights, columns.transpose(1, 2))
    return output.reshape(input.shape[0], problem.out_channels, *problem.out_size)


def _weights(problem: Problem, weight: Tensor, attention: Tensor) -> Tensor:
    """The weights of each sample, with the channels last: (N, C2, taps, C1/groups)."""
    gain = problem.gain_of_taps(attention).flatten(3).transpose(2, 3)  # N, C2, taps, blocks
    if problem.rates[1] == problem.group_in_channels:
        return weight.flatten(2).transpose(1, 2).contiguous() * gain  # a sample's gain beside contiguous channels
    blocked: Tensor = weight.flatten(2).transpose(1, 2).unflatten(2, (-1, problem.rates[1]))
    return (blocked * gain.unsqueeze(4)).flatten(3)


def _columns(problem: Problem, input: Tensor) -> Tensor:
    """What each tap sees at each position: (N, positions, taps, C1)."""
    channels_last = input.permute(0, *range(2, 2 + problem.dims), 1)
    padded = F.pad(channels_last, [0, 0, *problem.geometry.reversed_padding()])
    index = torch.tensor(_index(problem), device=input.device)
    columns = padded.flatten(1, -2).index_select(1, index)
    return columns.reshape(-1, product(problem.out_size), problem.taps, problem.in_channels)


def _index(problem: Problem) -> list[int]:
    """The place in the flattened, padded input of each tap of each position."""
    geometry = problem.geometry
    sizes = [size + sum(pair) for size, pair in zip(problem.size, geometry.padding, strict=True)]
    strides = [product(sizes[axis + 1 :]) for axis in range(problem.dims)]  # in elements

    def places(counts: tuple[int, ...], steps: tuple[int, ...]) -> list[int]:
        axes = [
            range(0, count * step * stride, step * stride)
            for count, step, stride in zip(counts, steps, strides, strict=True)
        ]
        return [sum(place) for place in combinations(*axes)]

    taps = places(problem.kernel, geometry.dilation)
    return [position + tap for position in places(problem.out_size, geometry.stride) for tap in taps]


def _cost(problem: Problem, machine: Machine) -> float:
    return float("inf")  # where kernels are known, others are faster; exports choose by other rules


ALGORITHM = Algorithm("matmul", _matmul, _obstacle, _cost)
