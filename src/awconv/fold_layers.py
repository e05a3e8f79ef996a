"""What an AW-convolution's gain is over images, and the plain convolution with its mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from awconv.input_gain import weight_gain
from awconv.layers import AWConv1d, AWConv2d, AWConv3d
from awconv.moments import Moments
from awconv.ops.naive import expand
from awconv.revert import plain_layer

AWConv = AWConv1d | AWConv2d | AWConv3d


class GainStatistics:
    """The gain of an AW-convolution, before Expand, over all that it was given: what its weights are multiplied with.

    A gain over input channels counts: each value is then the product of two.

    Sums are float64. A layer that runs several times for an image counts each time.

    Args:
        name: of the layer.
        layer: the layer.
    """

    def __init__(self, name: str, layer: AWConv) -> None:
        self.name, self.layer = name, layer
        self._moments = Moments()

    def add(self, batch: Tensor) -> None:
        """Adds the gains of a batch of inputs, shape (N, C1, \\*size)."""
        of_input = self.layer.input_attention
        attention = self.layer.attention(self.layer.scale_input(batch))
        if of_input is None:
            self._moments.add(weight_gain(self.layer, attention))
        else:  # one value for each weight, so that those of a whole batch would take much memory
            for one, of_one in zip(attention.split(1), of_input(batch).split(1), strict=True):
                self._moments.add(weight_gain(self.layer, one, of_one))

    def mean(self) -> Tensor:
        """The mean gain, float64, shape (C2/r_C2, (C1/groups)/r_C1, h/r_hw, w/r_hw); shape (C2, C1/groups, h/r_hw,
        w/r_hw) with a gain over input channels.

        Raises:
            ValueError: the layer did not run.
        """
        if self._moments.count == 0:
            raise ValueError(
                f"fold: the layer {self.name!r} did not run in evaluation mode, so its mean attention is not known; "
                "remove the part of the network that only trains, or make that plain first, with awconv.revert"
            )
        return self._moments.mean()

    def variation(self) -> float:
        """How much the gain varies between images, relative to its root mean square, from 0 to 1."""
        return self._relative(self._moments.variance().mean())

    def spread(self) -> float:
        """How much the mean gain varies between its values, relative to the gain's root mean square, from 0 to 1."""
        return self._relative(self.mean().var(correction=0))

    def _relative(self, variance: Tensor) -> float:
        square = (self.mean().square() + self._moments.variance()).mean()
        return float((variance / square).sqrt()) if variance else 0.0


@contextmanager
def gathered(layers: Mapping[str, AWConv]) -> Iterator[dict[str, GainStatistics]]:
    """Gathers the gains of layers while their network runs. Each branch runs a second time for it."""
    found = {name: GainStatistics(name, layer) for name, layer in layers.items()}
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hook = _adding_to(found[name])
            handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        yield found


def _adding_to(statistics: GainStatistics) -> Any:
    def hook(layer: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        input: Tensor = arguments[0] if arguments else options["input"]
        batch = input[None] if input.dim() == len(layer.kernel_size) + 1 else input
        statistics.add(batch)

    return hook


def folded_layer(layer: AWConv, gain: Tensor) -> nn.Module:
    """The plain convolution whose weights are the layer's, multiplied with a gain.

    Args:
        layer: the layer, whose bias is shared.
        gain: before Expand, float64, shape (C2/r_C2, (C1/groups)/r_C1, h/r_hw, w/r_hw), or with finer blocks.

    Returns:
        The layer; its weights are computed in float64 and rounded to the old ones' dtype.
    """
    plain: Any = plain_layer(layer)
    weight = layer.weight.detach()
    rates = tuple(size // blocks for size, blocks in zip(weight.shape, gain.shape, strict=True))
    product = weight.cpu().double() * expand(gain[None], rates)[0]
    plain.weight = nn.Parameter(torch.empty_like(weight).copy_(product), requires_grad=layer.weight.requires_grad)
    folded: nn.Module = plain
    return folded
