"""Structured pruning of AW networks by the library torch-pruning (extra ``integrations``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

from awconv.branch import AttentionBranch
from awconv.evaluation_mode import evaluation_mode
from awconv.extras import require
from awconv.integrations.stand_in import StandIn, made_class, refuse_nested, standing_in
from awconv.layers import AW_LAYERS


@contextmanager
def prunable(model: nn.Module) -> Iterator[dict[type[nn.Module], Any]]:
    """Lets torch-pruning trace and prune the AW-convolutions of a network, while the context lasts.

    Outputs that are pruned take their part of the attention map with them, inputs theirs of the branch's first
    convolution: in evaluation the network computes what it would with those channels at zero. While the context lasts,
    AW layers run as plain convolutions, whose graph torch-pruning understands: take gradients for an importance, and
    train, outside of it.

    Args:
        model: a network with AW-convolutions.

    Yields:
        ``customized_pruners`` for torch-pruning's dependency graph and its pruners.

    Raises:
        ModuleNotFoundError: torch-pruning is not installed.
        ValueError: a branch is one of a user's own, was fused, belongs to several layers, or has a pool, a norm or an
            activation whose channels cannot be told apart; or the network is within such a context already. The network
            is left as it was.

    Examples:
        >>> import timm
        >>> import torch
        >>> from awconv.integrations.torch_pruning import prunable
        >>> model = timm.create_model("aw_resnet18", num_classes=10)
        >>> with prunable(model) as pruners:  # doctest: +SKIP
        ...     images, kept = torch.zeros(1, 3, 64, 64), [model.fc]
        ...     importance = torch_pruning.importance.MagnitudeImportance()
        ...     torch_pruning.pruner.BasePruner(
        ...         model, images, importance, pruning_ratio=0.5, ignored_layers=kept, customized_pruners=pruners
        ...     ).step()
    """
    functions = require("torch_pruning", extra="integrations").pruner.function
    layers = {name: module for name, module in model.named_modules() if isinstance(module, AW_LAYERS)}
    refuse_nested(layers, "prunable")
    shared = _shared_branches(layers)
    for name, layer in layers.items():
        obstacle = shared.get(name) or next(filter(None, map(_obstacle, layer.branches())), None)
        if obstacle:
            raise ValueError(
                f"prunable: the branch of layer {name!r} {obstacle}; prune the plain network, and convert it then"
            )
    classes: dict[nn.Module, type[nn.Module]] = {}
    made: dict[tuple[type[nn.Module], bool], type[nn.Module]] = {}
    pruners: dict[type[nn.Module], Any] = {}
    for layer in layers.values():
        kind, depthwise = type(layer), layer.groups == layer.out_channels > 1  # as torch-pruning tells them apart
        if (kind, depthwise) not in made:
            made[kind, depthwise] = made_class(_Traced, kind)
            pruners[made[kind, depthwise]] = _pruner(functions, depthwise)
        classes[layer] = made[kind, depthwise]
    by_default = functions.prune_depthwise_conv_out_channels
    try:
        # What torch-pruning calls where a group starts at a depthwise layer, whatever customized_pruners say.
        functions.prune_depthwise_conv_out_channels = _pruner(functions, depthwise=True).prune_out_channels
        with standing_in(classes):
            yield pruners
    finally:
        functions.prune_depthwise_conv_out_channels = by_default


class _Traced(StandIn):
    """An AW layer that runs as the plain convolution that it derives from."""

    def forward(self: Any, input: Tensor) -> Tensor:
        """Shape as the layer's; the output has the layer's weights, without attention."""
        padded, padding = self._pad(input)
        convolve = getattr(torch.nn.functional, f"conv{len(self.kernel_size)}d")
        output: Tensor = convolve(padded, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)
        return output


def _shared_branches(layers: Mapping[str, Any]) -> dict[str, str]:
    """The layers that share a branch, or a part of one, with another, and with which."""
    owners: dict[nn.Parameter, str] = {}
    shared = {}
    for name, layer in layers.items():
        for branch in layer.branches():
            for parameter in branch.parameters():
                owner = owners.setdefault(parameter, name)
                if owner != name:
                    shared[name] = f"belongs to layer {owner!r} too, whose channels are others"
    return shared


def _obstacle(branch: nn.Module) -> str | None:
    """Why the channels of a branch cannot be pruned; None if they can."""
    if type(branch) is not AttentionBranch:
        return f"is a {type(branch).__name__}"
    if branch.pool is not None and not isinstance(branch.pool, _POOLS):
        return f"has a pool of its own, {branch.pool!r}"
    if not isinstance(branch.norm2, _BY_CHANNEL):
        return f"has a {type(branch.norm2).__name__}, which takes statistics of all channels together"
    if any(parameter.numel() > 1 for parameter in branch.act2.parameters()):
        return "has an activation with parameters for each channel"
    if not _keeps_channels_apart(branch):
        return f"has an activation that mixes channels, {branch.act2!r}"
    return None


@torch.no_grad()
def _keeps_channels_apart(branch: AttentionBranch) -> bool:
    """Whether a change of one channel changes no other one behind the activation. It is tried."""
    out_blocks, in_blocks, *taps = branch.attention_size
    weight = branch.conv2.weight
    before = torch.randn(1, out_blocks * in_blocks, *taps, dtype=weight.dtype, device=weight.device)
    after = before.clone()
    after[:, 0] += 1
    with evaluation_mode(branch):
        outputs = [branch.act2(value) for value in (before, after)]
    return torch.equal(outputs[0][:, 1:], outputs[1][:, 1:])


_POOLS = (
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
)
_BY_CHANNEL = (_BatchNorm, FrozenBatchNorm2d, nn.Identity)


class _Handler:
    """A pruning function that counts as one of torch-pruning's own, by which that tells how important channels are."""

    def __init__(self, prune: Callable[[Any, Sequence[int]], nn.Module], counts_as: Any, pruner: Any) -> None:
        self.prune, self.counts_as = prune, counts_as
        self.__self__ = pruner  # where torch-pruning looks for it

    def __call__(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        return self.prune(layer, idxs)

    def __eq__(self, other: object) -> bool:
        return self is other or other == self.counts_as

    def __hash__(self) -> int:
        return hash(self.counts_as)


def _pruner(functions: Any, depthwise: bool) -> Any:
    """The pruner of AW layers with a group for each channel, or of the others, as torch-pruning has pruners."""
    kind = "depthwise_conv" if depthwise else "conv"
    plain = getattr(functions, f"prune_{kind}_out_channels").__self__
    pruner = type(plain)()

    def outputs(layer: Any, idxs: Sequence[int]) -> nn.Module:
        if isinstance(layer, _Traced):
            _prune_branches(layer, outputs=idxs, inputs=idxs if depthwise else ())
        return plain.prune_out_channels(layer, idxs)  # type: ignore[no-any-return]

    def inputs(layer: Any, idxs: Sequence[int]) -> nn.Module:
        _prune_branches(layer, outputs=(), inputs=idxs)
        return plain.prune_in_channels(layer, idxs)  # type: ignore[no-any-return]

    pruner.prune_out_channels = _Handler(outputs, plain.prune_out_channels, pruner)
    pruner.prune_in_channels = pruner.prune_out_channels
    if not depthwise:  # there, one of both prunes both
        pruner.prune_in_channels = _Handler(inputs, plain.prune_in_channels, pruner)
    return pruner


@torch.no_grad()
def _prune_branches(layer: Any, outputs: Sequence[int], inputs: Sequence[int]) -> None:
    """Removes channels of a layer from its branches, and from its arguments; its weights are still whole.

    Args:
        layer: an AW layer. Of one with groups, inputs are those of the first group, and in each other the same.
        outputs: output channels.
        inputs: input channels, over all groups.
    """
    branch, depthwise = layer.attention, layer.groups == layer.out_channels > 1
    kept = sorted(set(range(layer.in_channels)) - set(inputs))
    of_group = layer.in_channels // layer.groups
    in_group = list(range(of_group)) if depthwise else kept[: len(kept) // layer.groups]
    if inputs and layer.groups > 1 and not depthwise:  # torch-pruning keeps the first group's pattern in each
        kept = [group * of_group + channel for group in range(layer.groups) for channel in in_group]
    rows, layer.out_expansion = _blocks(layer.out_channels, layer.out_expansion, outputs)
    columns, layer.in_expansion = _blocks(of_group, layer.in_expansion, sorted(set(range(of_group)) - set(in_group)))
    out_blocks, in_blocks, *taps = branch.attention_size
    values = [row * in_blocks + column for row in rows for column in columns]
    if values != list(range(out_blocks * in_blocks)):
        _keep_values(branch, values)
    branch.attention_size = (len(rows), len(columns), *taps)
    if inputs:
        for made in layer.branches():
            made.conv1.weight = _kept(made.conv1.weight, kept, 1)
            made.conv1.in_channels = len(kept)
        if layer.input_attention is not None:
            _keep_values(layer.input_attention, kept)
            layer.input_attention.attention_size = (1, len(kept), *(1 for _ in taps))


def _blocks(channels: int, expansion: int, pruned: Sequence[int]) -> tuple[list[int], int]:
    """The blocks of channels that share a value, after pruning: the old block of each, and the channels in one.

    Where the blocks that are left have different sizes, each channel gets its own value, which is that of its block.
    """
    gone = set(pruned)
    of_channels = [channel // expansion for channel in range(channels) if channel not in gone]
    sizes = {of_channels.count(block) for block in set(of_channels)}
    if len(sizes) == 1:
        return sorted(set(of_channels)), sizes.pop()
    return of_channels, 1


def _keep_values(branch: AttentionBranch, values: Sequence[int]) -> None:
    """Keeps these of the values that a branch's last convolution makes, in this order; one may be there twice."""
    conv, norm = branch.conv2, branch.norm2
    conv.weight = _kept(conv.weight, values, 0)
    conv.bias = None if conv.bias is None else _kept(conv.bias, values, 0)
    conv.out_channels = len(values)
    for name, tensor in [*norm.named_parameters(), *norm.named_buffers()]:
        if tensor.dim():
            setattr(norm, name, _kept(tensor, values, 0))
    if isinstance(norm, _BatchNorm):
        norm.num_features = len(values)


def _kept(tensor: Any, indices: Sequence[int], axis: int) -> Any:
    """A parameter or a buffer with some of its entries along an axis, its gradient too."""
    index = torch.tensor(indices, device=tensor.device)
    chosen = tensor.detach().index_select(axis, index)
    if not isinstance(tensor, nn.Parameter):
        return chosen
    parameter = nn.Parameter(chosen, tensor.requires_grad)
    parameter.grad = None if tensor.grad is None else tensor.grad.index_select(axis, index)
    return parameter
