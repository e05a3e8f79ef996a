"""Attention that does not depend on the input channel, on small images: all taps' products by one pointwise
convolution, scaled, and one product with a constant matrix that shifts each tap and adds up.

The matrix takes as many multiplications for each output channel as there are positions times taps times pixels: few,
beside the convolution, where an image has fewer pixels than channels. A number that is not finite spoils all positions
of its output channels, since zero times infinity is not a number.
"""

from __future__ import annotations

from itertools import product as combinations

import torch
from torch import Tensor

from awconv.ops.algorithm import CONV, Algorithm, Machine
from awconv.ops.problem import Problem, product
from awconv.ops.tracing import written

_MOST_ELEMENTS = 2**20  # of the matrix


def _obstacle(problem: Problem) -> str | None:
    if problem.attention_blocks[1] != 1:
        return "the attention must have size 1 along the input channels"
    if not all(isinstance(size, int) for size in problem.size):
        return "the sizes of its input are symbols, and its matrix needs numbers"
    elements = product(problem.size) * problem.taps * product(problem.out_size)
    if elements > _MOST_ELEMENTS:
        return f"its matrix takes at most {_MOST_ELEMENTS:,} elements, and this one has {written(elements)}"
    return None


def _shifted(problem: Problem, input: Tensor, weight: Tensor, attention: Tensor) -> Tensor:
    dtype = problem.dtype
    if dtype == torch.float16:  # a tap's product alone may overflow where the sum over the taps does not
        input, weight, attention = input.float(), weight.float(), attention.float()
    gain = problem.gain_of_taps(attention).squeeze(2).flatten(2)  # N, C2, taps
    if problem.depthwise:
        scaled = (weight.flatten(1) * gain).unsqueeze(3) * input.flatten(2).unsqueeze(2)
    else:
        ones = (1,) * problem.dims
        by_tap = weight.flatten(2).transpose(1, 2).reshape(-1, problem.group_in_channels, *ones)
        products = CONV[problem.dims](input, by_tap, groups=problem.geometry.groups)
        scaled = products * gain.reshape(-1, by_tap.shape[0], *ones)
    matrix = _matrix(problem, scaled)
    output = scaled.reshape(-1, problem.out_channels, matrix.shape[0]) @ matrix
    return output.reshape(input.shape[0], problem.out_channels, *problem.out_size).to(dtype)


def _matrix(problem: Problem, like: Tensor) -> Tensor:
    """Where each pixel's product of each tap is added: (taps * pixels, positions), of zeros and ones."""
    positions = torch.tensor(list(range(product(problem.out_size))), device=like.device)  # constants of a graph
    return (torch.tensor(_seen_from(problem), device=like.device)[:, None] == positions).to(like.dtype)


def _seen_from(problem: Problem) -> list[int]:
    """For each tap and each pixel, the flattened position from which that tap sees that pixel; -1 if none does."""
    return [
        _flat_position(problem, tap, pixel)
        for tap in combinations(*map(range, problem.kernel))
        for pixel in combinations(*map(range, problem.size))
    ]


def _flat_position(problem: Problem, tap: tuple[int, ...], pixel: tuple[int, ...]) -> int:
    geometry, flat = problem.geometry, 0
    for axis in range(problem.dims):
        offset = pixel[axis] + geometry.padding[axis][0] - tap[axis] * geometry.dilation[axis]
        position, rest = divmod(offset, geometry.stride[axis])
        if rest or not 0 <= position < problem.out_size[axis]:
            return -1
        flat = flat * problem.out_size[axis] + position
    return flat


def _cost(problem: Problem, machine: Machine) -> float:
    return float("inf")  # where kernels are known, others are faster; exports choose by other rules


ALGORITHM = Algorithm("shifted", _shifted, _obstacle, _cost)
