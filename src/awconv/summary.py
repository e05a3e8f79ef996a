"""What conversion did to a network: its layers, and what they cost."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.flop_counter import FlopCounterMode

from awconv import layer_costs
from awconv.convert import obstacle, weight_owners
from awconv.layers import AW_LAYERS, AWConv1d, AWConv2d, AWConv3d
from awconv.odconv import ODConv2d
from awconv.ops.algorithm import CONV
from awconv.selection import convolutions, is_spatial, stem
from awconv.tables import Table

_AWConv = AWConv1d | AWConv2d | AWConv3d


@dataclass(frozen=True)
class LayerSummary:
    """A convolution of a network.

    Attributes:
        name: its name in the network.
        layer: its kind and sizes.
        converted: whether it is an AW-convolution.
        reason: why not; empty for an AW-convolution.
        parameters: of its branch; of both, with a gain over input channels; of the attention of an ODConv.
        operations: multiply-adds that the attention adds for the inputs; None without inputs.
        relative_to: the constant attention that the branch started as by identity, to which its map is relative; None
            for a branch of the paper's form, and for a convolution without one.
        shares: the first layer that has the same branch, which counts its parameters; None for a branch of its own.
    """

    name: str
    layer: str
    converted: bool
    reason: str
    parameters: int
    operations: int | None
    relative_to: float | None = None
    shares: str | None = None


@dataclass(frozen=True)
class Summary:
    """The convolutions of a network and the cost of attention on them; printed, a table.

    Attributes:
        layers: each convolution, in the network's order.
        parameters: of the whole network.
        operations: multiply-adds of the whole network for the inputs, as :func:`summary` counts them; None without
            inputs.

    Examples:
        >>> import torch
        >>> import awconv
        >>> found = awconv.summary(torch.nn.Sequential(awconv.AWConv2d(16, 32, 3)))
        >>> [layer.name for layer in found.converted], found.parameters_added, found.parameters
        (['0'], 264, 4904)
    """

    layers: tuple[LayerSummary, ...]
    parameters: int
    operations: int | None

    @property
    def converted(self) -> tuple[LayerSummary, ...]:
        """The AW-convolutions."""
        return tuple(layer for layer in self.layers if layer.converted)

    @property
    def parameters_added(self) -> int:
        """Parameters of all branches."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def operations_added(self) -> int | None:
        """Multiply-adds that all attention adds; None without inputs."""
        if self.operations is None:
            return None
        return sum(layer.operations or 0 for layer in self.layers)

    def __str__(self) -> str:
        rows = []
        for layer in self.layers:
            own = layer.converted or layer.parameters
            added = (f"{layer.parameters:,}", _thousands(layer.operations)) if own else ("", "")
            rows.append((layer.name, layer.layer, *added, _remark(layer)))
        added = (f"{self.parameters_added:,}", _thousands(self.operations_added))
        share = f"{self.parameters_added / max(1, self.parameters - self.parameters_added):+.2%} of parameters"
        if self.operations is not None and self.operations_added is not None:
            share += (
                f", {self.operations_added / max(1, self.operations - self.operations_added):+.2%} of multiply-adds"
            )
        rows.append((f"{len(self.converted)} of {len(self.layers)}", "", *added, share))
        headings = ("layer", "", "parameters added", "multiply-adds added", "")
        if self.operations is not None:
            return Table(headings, rows, alignment="llrrl").plain()
        without = [(*row[:3], row[4]) for row in (headings, *rows)]
        return Table(without[0], without[1:], alignment="llrl").plain()


def _remark(layer: LayerSummary) -> str:
    remarks = [layer.reason] if layer.reason else []
    if layer.relative_to is not None:
        remarks.append(f"relative to {layer.relative_to:g}")
    if layer.shares is not None:
        remarks.append(f"has the branch of {layer.shares}")
    return ", ".join(remarks)


def summary(model: nn.Module, inputs: Any = None) -> Summary:
    """Lists the convolutions of a network: those that are AW-convolutions, and why the others are not.

    Operations are multiply-adds of convolutions, linear layers and matrix products. Norms, activations and pooling are
    not counted, as is usual. An AW-convolution adds those of its branch and the multiplications by the attention: of
    each sample's weights or of each tap's partial products, whichever are fewer. A gain over input channels adds those
    of its branch and a multiplication of each value of the input. A branch that several layers share
    counts its parameters in the first of them, and its multiply-adds in each.

    Args:
        model: any network; it is not changed. On the device ``meta`` nothing is computed.
        inputs: what the network is called with, a tensor or a tuple of arguments, to count operations:
            ``torch.zeros(1, 3, 224, 224)``. None counts parameters only.

    Raises:
        TypeError: the model is no module.

    Examples:
        >>> import torch
        >>> import awconv
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), awconv.AWConv2d(16, 32, 3))
        >>> print(awconv.summary(model, torch.zeros(1, 3, 8, 8)))  # doctest: +NORMALIZE_WHITESPACE
        layer                           parameters added  multiply-adds added
        0       Conv2d 3 to 16, 3x3                                            the stem
        1       AWConv2d 16 to 32, 3x3               264                6,336
        1 of 2                                       264                6,336
           +5.19% of parameters, +7.10% of multiply-adds
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"summary: model must be an nn.Module, got {model!r}; timm.create_model makes one of a name")
    plain_operations, added = (None, {}) if inputs is None else _operations(model, inputs)
    reasons = _reasons(model)
    layers = []
    counted: dict[nn.Parameter, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, AW_LAYERS):
            operations = None if inputs is None else added.get(name, 0)
            layers.append(_aw_layer(name, module, operations, counted))
        elif name in reasons:
            peer = module.attention if isinstance(module, ODConv2d) else nn.Identity()
            parameters = sum(parameter.numel() for parameter in peer.parameters())
            layers.append(LayerSummary(name, _described(module), False, reasons[name], parameters, added.get(name)))
    return Summary(
        layers=tuple(layers),
        parameters=sum(parameter.numel() for parameter in model.parameters() if not is_lazy(parameter)),
        operations=None if plain_operations is None else plain_operations + sum(added.values()),
    )


def _aw_layer(name: str, layer: _AWConv, operations: int | None, counted: dict[nn.Parameter, str]) -> LayerSummary:
    """An AW-convolution; its branch's parameters are added to those that are counted, with the layer that does."""
    parameters = set(layer.attention.parameters())
    shares = None
    if counted.keys() >= parameters:
        shares = next((counted[parameter] for parameter in layer.attention.parameters()), None)
    new = {parameter for branch in layer.branches() for parameter in branch.parameters()} - counted.keys()
    counted.update(dict.fromkeys(new, name))
    start = layer.attention.start
    return LayerSummary(
        name=name,
        layer=_described(layer),
        converted=True,
        reason="",
        parameters=sum(parameter.numel() for parameter in new),
        operations=operations,
        relative_to=start.attention if layer.attention.relative and start is not None else None,
        shares=shares,
    )


def _reasons(model: nn.Module) -> dict[str, str]:
    first, owners = stem(model), weight_owners(model)
    reasons = {}
    for name, module in convolutions(model).items():
        found = obstacle(module, owners)
        if found is not None:
            reasons[name] = found
        elif not is_spatial(module):
            reasons[name] = "kernel of size 1"
        else:
            reasons[name] = "the stem" if name == first else "not selected"
    return reasons


def _described(module: Any) -> str:
    kernel = "x".join(map(str, module.kernel_size))
    groups = f", {module.groups} groups" if module.groups > 1 else ""
    return f"{type(module).__name__} {module.in_channels} to {module.out_channels}, {kernel}{groups}"


def _operations(model: nn.Module, inputs: Any) -> tuple[int, dict[str, int]]:
    """Multiply-adds of the network without its attention, and those of each layer's attention."""
    plain = copy.deepcopy(model).eval()
    added: dict[str, int] = {}
    in_branches: list[int] = []  # which the counter of the whole network counts, too
    for name, layer in plain.named_modules():
        if isinstance(layer, (*AW_LAYERS, ODConv2d)):
            layer.forward = partial(_plain_forward, layer, name, added, in_branches)  # type: ignore[method-assign]
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        plain(*inputs if isinstance(inputs, tuple) else (inputs,))
    return counter.get_total_flops() // 2 - sum(in_branches), added


def _plain_forward(
    layer: layer_costs.Layer, name: str, added: dict[str, int], in_branches: list[int], input: Tensor
) -> Tensor:
    """The layer's plain convolution, which leaves a note of what the attention would have cost."""
    output = _convolved(layer, input)
    operations, seen = layer_costs.added(layer, input, output)
    added[name] = added.get(name, 0) + operations
    in_branches.append(seen)
    return output


def _convolved(layer: layer_costs.Layer, input: Tensor) -> Tensor:
    padded, padding = layer._pad(input)
    geometry = (layer.stride, padding, layer.dilation, layer.groups)
    output: Tensor = CONV[len(layer.kernel_size)](padded, layer.weight, layer.bias, *geometry)
    return output


def _thousands(number: int | None) -> str:
    return "" if number is None else f"{number:,}"
