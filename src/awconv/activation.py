"""The end of an attention branch: its activation, and the constant that a branch starts as by identity."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

ACTIVATIONS: dict[str, type[nn.Module]] = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}

Activation = str | nn.Module | Callable[[], nn.Module]


class Start(NamedTuple):
    """The constant map that a branch starts as by identity.

    Attributes:
        preactivation: what the activation gets. It has a slope there.
        attention: a0, which the activation makes of it.
        gain: of the weights, 1 + a0; a0 without the residual form. It is not zero.
    """

    preactivation: float
    attention: float
    gain: float


START = {
    ("sigmoid", True): Start(0.0, 0.5, 1.5),
    ("sigmoid", False): Start(0.0, 0.5, 0.5),
    ("tanh", True): Start(0.0, 0.0, 1.0),
    ("tanh", False): Start(math.atanh(0.5), 0.5, 0.5),  # there would be no weights left at 0
    ("relu", True): Start(1.0, 1.0, 2.0),
    ("relu", False): Start(1.0, 1.0, 1.0),
}
"""Where a branch starts by identity, by (activation, residual)."""

_PREACTIVATIONS = (0.0, 1.0)  # of other activations: the first with a slope and a gain


def make_activation(activation: Activation) -> tuple[str, nn.Module]:
    """An activation's name, and a module of its own for a branch.

    The name is ``"sigmoid"``, ``"tanh"`` or ``"relu"`` for these, however they were given, and what ``repr`` says of
    other modules.

    Args:
        activation: a name, a module (which is copied), or what makes a module when it is called without arguments.

    Raises:
        TypeError: it makes no module.
    """
    if isinstance(activation, str):
        return activation, ACTIVATIONS[activation]()
    try:
        module = copy.deepcopy(activation) if isinstance(activation, nn.Module) else activation()
    except TypeError as error:
        raise TypeError(f"{_NO_MODULE}, got {activation!r} ({error})") from error
    if not isinstance(module, nn.Module):
        raise TypeError(f"{_NO_MODULE}, got {activation!r}, which made {module!r}")
    named = [name for name, kind in ACTIVATIONS.items() if type(module) is kind]
    return named[0] if named else " ".join(repr(module).split()), module


_NO_MODULE = (
    f"activation must be one of {list(ACTIVATIONS)}, a module, or what makes one when it is called without arguments, "
    "such as nn.Hardsigmoid"
)


def find_start(activation: nn.Module, residual: bool, size: Sequence[int]) -> Start | None:
    """Where a branch with any activation starts by identity, found in double precision.

    Args:
        activation: a module that takes preactivations of shape (N, \\*size).
        residual: whether weights are K + A * K.
        size: channels, and the sizes of the kernel.

    Returns:
        The start at the preactivation 0, or at 1 where the slope or the gain is 0 there; None where they are 0 at both,
        or the activation has no values yet (on the device ``meta``).
    """
    for preactivation in _PREACTIVATIONS:
        found = value_and_slope(activation, preactivation, size)
        if found is None:
            return None
        value, slope = found
        gain = 1 + value if residual else value
        if slope and gain and math.isfinite(slope * gain):
            return Start(preactivation, value, gain)
    return None


def value_and_slope(activation: nn.Module, preactivation: float, size: Sequence[int]) -> tuple[float, float] | None:
    """What an activation makes of a preactivation that is the same everywhere, and its derivative there.

    Returns:
        Two numbers, from double precision; None if the activation has no values yet.

    Raises:
        ValueError: a constant does not become a constant, or the shape changes.
    """
    tensors = list(chain(activation.parameters(), activation.buffers()))
    if any(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in tensors):
        return None
    with unset_fake_temporarily(), torch.device("cpu"), torch.inference_mode(False), torch.enable_grad():
        exact = copy.deepcopy(activation).to("cpu", torch.float64).eval()
        source = torch.full((1, *size), preactivation, dtype=torch.float64, requires_grad=True)
        values = exact(source * 1)  # which an activation may change in place
        if values.shape != source.shape or not torch.allclose(values, values.flatten()[0]):
            raise ValueError(
                f"activation must keep the shape and make a constant of a constant, which {activation} does not"
            )
        first = values.flatten()[0]
        slope = torch.autograd.grad(first, source)[0].flatten()[0].item() if first.requires_grad else 0.0
        return first.item(), slope
