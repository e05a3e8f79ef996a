"""What an algorithm says of itself, and the plain convolution that most of them stand on."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from awconv.ops.problem import Problem


class Machine(NamedTuple):
    """What the cost estimates need to know of a class of devices.

    Attributes:
        element: time to move one element through memory, in multiply-adds of a plain convolution.
        grouped: time of a multiply-add in a convolution with one group per sample, relative to a plain convolution.
        weight: elements moved per element of a sample's own weights: to make, use and differentiate them.
        call: time to launch the work of one tap, shared among the samples of a usual batch.
        fused: time of a multiply-add in a fused kernel, relative to a plain convolution.
    """

    element: float
    grouped: float
    weight: float
    call: float
    fused: float


class Algorithm(NamedTuple):
    """One exact way to compute an AW-convolution.

    Attributes:
        name: what ``algorithm=`` calls it.
        run: ``run(problem, input, weight, attention)`` returns the output, without bias.
        obstacle: why it cannot run a problem, or None if it can.
        cost: ``cost(problem, machine)`` estimates its time for one sample, in multiply-adds of a plain convolution.
    """

    name: str
    run: Callable[[Problem, Tensor, Tensor, Tensor], Tensor]
    obstacle: Callable[[Problem], str | None]
    cost: Callable[[Problem, Machine], float]


CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def convolve(problem: Problem, input: Tensor, weight: Tensor, groups: int) -> Tensor:
    """The plain convolution of a problem, with the weights and the number of groups that the caller made of it."""
    geometry = problem.geometry
    both, rest = geometry.split_padding()
    if any(rest):
        input = F.pad(input, rest)
    return CONV[problem.dims](input, weight, None, geometry.stride, both, geometry.dilation, groups)
