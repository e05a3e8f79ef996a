"""The attention branch F1 and the layers built on it: "An Attention Module for Convolutional Neural Networks", 2021,
arXiv 2108.08205."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import pad_same
from torch import Tensor, nn

from awconv.ops import aw_conv1d, aw_conv2d, aw_conv3d
from awconv.ops.average_pool import average_pool, pool_beside, pools_beside
from awconv.ops.branch import attend
from awconv.ops.problem import SPATIAL_NAMES, product

ACTIVATIONS: dict[str, type[nn.Module]] = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}
NormLayer = Callable[[int], nn.Module]

# Where a branch of constant attention starts, before its activation, by (activation, residual): the activation has a
# slope there, and 1 + a (a without the residual form) is not zero; a power of two where there is one.
_START = {
    ("sigmoid", True): 0.0,
    ("sigmoid", False): 0.0,
    ("tanh", True): 0.0,
    ("tanh", False): math.atanh(0.5),
    ("relu", True): 1.0,
    ("relu", False): 1.0,
}
_AW_CONV = {1: aw_conv1d, 2: aw_conv2d, 3: aw_conv3d}
_CONV: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_MIN_HIDDEN = 4
_log = logging.getLogger(__name__)


class AttentionBranch(nn.Module):
    """F1: the attention map of every sample, in the shape of the weights before Expand.

    ::

        A0 = average-pool I to h/r_hw x w/r_hw
        A1 = ReLU(norm(pointwise convolution, C1 -> hidden))
        A2 = activation(norm(pointwise convolution, hidden -> C2/r_C2 * (C1/groups)/r_C1))

    with ``hidden = max(C1 // reduction, 4)``. The norm of A2 ends the branch: with its gain at zero the attention is a
    constant.

    Args:
        in_channels: C1.
        attention_size: the sizes (C2/r_C2, (C1/groups)/r_C1, h/r_hw, w/r_hw) of one sample's map.
        reduction: r, of the hidden channels.
        activation: ``"sigmoid"``, ``"tanh"`` or ``"relu"``.
        norm_layer: called with a number of channels. None leaves the norms out and gives the convolutions a bias.
    """

    def __init__(
        self,
        in_channels: int,
        attention_size: Sequence[int],
        reduction: int,
        activation: str,
        norm_layer: NormLayer | None,
    ) -> None:
        super().__init__()
        self.attention_size = tuple(attention_size)
        out_blocks, in_blocks, *kernel = attention_size
        conv = _CONV[len(kernel)]
        hidden = max(in_channels // reduction, _MIN_HIDDEN)
        self.conv1 = conv(in_channels, hidden, 1, bias=norm_layer is None)
        self.norm1 = norm_layer(hidden) if norm_layer is not None else nn.Identity()
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = conv(hidden, out_blocks * in_blocks, 1, bias=norm_layer is None)
        self.norm2 = norm_layer(out_blocks * in_blocks) if norm_layer is not None else nn.Identity()
        self.act2 = ACTIVATIONS[activation]()

    def forward(self, input: Tensor, pooled: Tensor | None = None) -> Tensor:
        """Maps an input of shape (N, C1, H, W) to a compact attention map, shape (N, \\*attention_size).

        Args:
            input: of the convolution.
            pooled: A0, shape (N, C1, h/r_hw, w/r_hw), from who has it already.

        Raises:
            ValueError: batch statistics would have to be taken over a single value.
        """
        out_blocks, in_blocks, *kernel = self.attention_size
        attention: Tensor = average_pool(input, kernel) if pooled is None else pooled
        if _takes_batch_statistics(self.norm1) or _takes_batch_statistics(self.norm2):
            _check_statistics(attention)
        modules = (self.conv1, self.norm1, self.act1, self.conv2, self.norm2, self.act2)
        attended = attend(modules, attention, self.attention_size)
        if attended is not None:
            return attended
        attention = self.act1(self.norm1(self.conv1(attention)))
        attention = self.act2(self.norm2(self.conv2(attention)))
        return attention.reshape(-1, out_blocks, in_blocks, *kernel)

    @torch.no_grad()
    def start_constant(self, start: float) -> None:
        """Starts as the constant ``activation(start)`` for every input, with a gradient that leads away from it.

        The gain of the last norm becomes zero and its shift ``start``. A last norm that has no gain to learn (none, or
        a frozen one) passes this to the convolution before it, whose weights become zero.

        Raises:
            ValueError: the last norm has statistics but no gain, or ``start`` is not zero and there is no shift.
        """
        gain = getattr(self.norm2, "weight", None)
        frozen = isinstance(gain, Tensor) and not isinstance(gain, nn.Parameter)
        if isinstance(gain, nn.Parameter):
            gain.zero_()
        elif frozen or isinstance(self.norm2, nn.Identity):
            self.conv2.weight.zero_()
        else:
            raise ValueError(
                'init="identity" needs a branch whose norm_layer has a gain (affine), is frozen, or is None; '
                f"got {self.norm2}"
            )
        shift = self.norm2.bias if isinstance(gain, Tensor) else self.conv2.bias
        if isinstance(shift, Tensor):
            shift.fill_(start)
        elif start:
            raise ValueError(
                f'init="identity" with this activation needs a norm_layer with a shift (bias), got {self.norm2}'
            )


def _takes_batch_statistics(norm: nn.Module) -> bool:
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or isinstance(norm, nn.SyncBatchNorm):
        return False  # (that one takes them over several processes, and knows how many)
    return norm.training or norm.running_mean is None


def _check_statistics(pooled: Tensor) -> None:
    if product((pooled.shape[0], *pooled.shape[2:])) == 1:
        raise ValueError(
            "AW-convolution: the attention branch cannot take batch statistics of one value a channel: its "
            f"input has batch size 1 and is pooled to {tuple(pooled.shape[2:])}. Train with at least 2 samples "
            "a batch, call .eval() on the norm layers, or give the layer another norm_layer, such as "
            "functools.partial(nn.GroupNorm, 1)"
        )


class _AWConvNd(nn.modules.conv._ConvNd):
    """What AWConv1d, AWConv2d and AWConv3d share: the branch beside the weights of the convolution they derive from."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any,
        padding: Any,
        dilation: Any,
        groups: int,
        bias: bool,
        padding_mode: str,
        *,
        reduction: int,
        in_expansion: int | None,
        out_expansion: int,
        kernel_expansion: int,
        activation: str,
        residual: bool,
        norm_layer: NormLayer | None,
        device: Any,
        dtype: Any,
    ) -> None:
        super().__init__(  # type: ignore[call-arg]  # the convolution's own, which takes fewer arguments than _ConvNd's
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
            padding_mode=padding_mode,  # type: ignore[arg-type]  # checked there
            device=device,
            dtype=dtype,
        )
        name = type(self).__name__
        group_in_channels = in_channels // groups
        if in_expansion is None:
            in_expansion = group_in_channels
        if activation not in ACTIVATIONS:
            raise ValueError(f"{name}: activation must be one of {list(ACTIVATIONS)}, got {activation!r}")
        if residual not in (True, False):
            raise ValueError(f"{name}: residual must be True or False, got {residual!r}")
        if not isinstance(reduction, int) or reduction < 1:
            raise ValueError(f"{name}: reduction must be a positive integer, got {reduction!r}")
        attention_size = [
            _blocks(name, "out_expansion", out_expansion, "out_channels", out_channels),
            _blocks(name, "in_expansion", in_expansion, "in_channels / groups", group_in_channels),
            *(_blocks(name, "kernel_expansion", kernel_expansion, "each kernel size", k) for k in self.kernel_size),
        ]
        self.reduction = reduction
        self.in_expansion = in_expansion
        self.out_expansion = out_expansion
        self.kernel_expansion = kernel_expansion
        self.activation = activation
        self.residual = residual
        with self.weight.device:  # whatever the default device is now
            self.attention = AttentionBranch(in_channels, attention_size, reduction, activation, norm_layer)
        self.attention.to(self.weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Shape (N, C1, \\*size) to (N, C2, \\*out_size); a single sample without the batch axis is taken as nn.Conv
        takes it.

        Raises:
            ValueError: the input does not have ``in_channels`` channels or the right number of axes.
        """
        batch = _as_batch(input, type(self).__name__, self.in_channels, len(self.kernel_size))
        if _pools_beside(self.attention, batch):
            batch, pooled = pool_beside(batch, self.attention.attention_size[2:])
            attention = self.attention(batch, pooled)
        else:
            attention = self.attention(batch)
        batch, padding = self._pad(batch)
        output = _convolve(
            batch,
            self.weight,
            attention,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            residual=self.residual,
        )
        return _without_batch_like(output, input)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,  # always true, whatever load_state_dict was asked for
        missing_keys: list[str],
        *lists: list[str],
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *lists)
        plain = f"{prefix}weight" in state_dict and not any(key.startswith(f"{prefix}attention.") for key in state_dict)
        told = any("attention." in key for key in missing_keys)  # of another layer of the network that is being loaded
        if plain and not told:
            _log.warning(
                "plain weights were loaded into AW-convolutions (the first is %r), whose branches keep what they were: "
                "the network computes with weight * (1 + a), not with these weights. To start from what the plain "
                'network computes, load them into that, and then call awconv.convert(network, init="identity")',
                prefix.rstrip("."),
            )

    def _pad(self, input: Tensor) -> tuple[Tensor, Any]:
        """The input with the padding that the operator does not know, and the padding that is left to it."""
        if self.padding_mode == "zeros":
            return input, self.padding
        return F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), (0,) * len(self.kernel_size)

    @torch.no_grad()
    def start_constant(self) -> Tensor:
        """Makes the branch start as a constant a (:meth:`AttentionBranch.start_constant`), from which it can learn.

        Returns:
            What the weights are multiplied with then: 1 + a, or a without the residual form; no axes. With its weights
            divided by this, the layer computes what its plain convolution did: exactly where it is a power of two, and
            else to rounding.

        Raises:
            ValueError: the branch's norm has no gain or no shift.
        """
        start = _START[self.activation, self.residual]
        self.attention.start_constant(start)
        constant: Tensor = self.attention.act2(self.weight.new_full((), start))
        return 1 + constant if self.residual else constant

    def extra_repr(self) -> str:
        attention = (
            f", reduction={self.reduction}, in_expansion={self.in_expansion}, out_expansion={self.out_expansion}, "
            f"kernel_expansion={self.kernel_expansion}, activation={self.activation!r}, residual={self.residual}"
        )
        return f"{super().extra_repr()}{attention}"


def _as_batch(input: Tensor, layer: str, in_channels: int, dims: int) -> Tensor:
    batch = input[None] if input.dim() == dims + 1 else input
    if batch.dim() != dims + 2 or batch.shape[1] != in_channels:
        expected = f"(N, {in_channels}, {', '.join(SPATIAL_NAMES[dims])})"
        raise ValueError(f"{layer}: input must have shape {expected}, got {tuple(input.shape)}")
    return batch


def _pools_beside(branch: AttentionBranch, input: Any) -> bool:
    """Whether a branch may get what was pooled for it: nothing watches what comes in, and torch.fx does not trace."""
    return (
        isinstance(input, Tensor)
        and type(branch) is AttentionBranch
        and "forward" not in branch.__dict__
        and not (branch._forward_hooks or branch._forward_pre_hooks)
        and not (branch._backward_hooks or branch._backward_pre_hooks)
        and not torch.nn.modules.module._has_any_global_hook()
        and pools_beside(input, branch.attention_size[2:])
    )


def _convolve(input: Tensor, weight: Tensor, *arguments: Any, residual: bool) -> Tensor:
    return _AW_CONV[weight.dim() - 2](input, weight, *arguments, residual=residual)


def _without_batch_like(output: Tensor, input: Tensor) -> Tensor:
    return output[0] if input.dim() == output.dim() - 1 else output


# torch.fx does not look into these: they depend on the shapes of their arguments.
for _function in (
    "average_pool",
    "pad_same",
    "_check_statistics",
    "_as_batch",
    "_convolve",
    "_without_batch_like",
):
    torch.fx.wrap(_function)


def _blocks(name: str, argument: str, expansion: int, axis: str, size: int) -> int:
    if not isinstance(expansion, int) or expansion < 1 or size % expansion:
        raise ValueError(f"{name}: {argument} must divide {axis}, {size}, got {expansion!r}")
    return size // expansion


class AWConv1d(_AWConvNd, nn.Conv1d):
    """An AW-convolution over sequences, in the place of ``nn.Conv1d``.

    ``O[n] = conv(I[n], K + A[n] * K) + bias``, where the attention map A has the shape of the weights K and is computed
    from the sample itself by the branch ``attention`` (:class:`AttentionBranch`); ``layer.attention(input)`` is the map
    before Expand. ``weight`` and ``bias`` are those of ``nn.Conv1d``, whose state dict loads with ``strict=False``, but
    ``weight`` alone is not what the layer computes with: that is ``weight * (1 + a)``. What that means for
    loading, folding and LoRA: :class:`AWConv2d`.

    Args:
        in_channels: C1.
        out_channels: C2.
        kernel_size: as ``nn.Conv1d``; so are ``stride``, ``padding``, ``dilation``, ``groups``, ``bias``,
            ``padding_mode``, ``device`` and ``dtype``.
        reduction: r; the branch has ``max(C1 // reduction, 4)`` hidden channels.
        in_expansion: r_C1, how many input channels share a value; None for all those of a group.
        out_expansion: r_C2, how many output channels share a value.
        kernel_expansion: r_hw, how many neighbouring taps share a value along each kernel axis.
        activation: ``"sigmoid"``, ``"tanh"`` or ``"relu"``, the end of the branch.
        residual: weights K + A * K if true, A * K otherwise.
        norm_layer: the branch's norm, called with a number of channels; None for none.

    Raises:
        ValueError: an argument has an unknown value, or a rate does not divide the size that it expands.

    Shape:
        Input (N, C1, L) or (C1, L), output (N, C2, L') or (C2, L').
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: str | int = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        reduction: int = 16,
        in_expansion: int | None = None,
        out_expansion: int = 1,
        kernel_expansion: int = 1,
        activation: str = "sigmoid",
        residual: bool = True,
        norm_layer: NormLayer | None = nn.BatchNorm1d,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            reduction=reduction,
            in_expansion=in_expansion,
            out_expansion=out_expansion,
            kernel_expansion=kernel_expansion,
            activation=activation,
            residual=residual,
            norm_layer=norm_layer,
            device=device,
            dtype=dtype,
        )


class AWConv2d(_AWConvNd, nn.Conv2d):
    """An AW-convolution, in the place of ``nn.Conv2d``.

    ``O[n] = conv(I[n], K + A[n] * K) + bias``, where the attention map A has the shape of the weights K and is computed
    from the sample itself by the branch ``attention`` (:class:`AttentionBranch`); ``layer.attention(input)`` is the map
    before Expand. ``weight`` and ``bias`` are those of ``nn.Conv2d``, whose state dict loads with ``strict=False``, but
    ``weight`` alone is not what the layer computes with: that is ``weight * (1 + a)``. So

    - plain weights loaded into the layer keep their function only if 1 + a is 1, which is logged. To keep it, load them
      into the plain network first and then call ``awconv.convert(network, init="identity")``.
    - what folds layers into one plain convolution (RepVGG's, MobileOne's and RepViT's ``reparameterize`` and ``fuse``)
      would lose the attention: fold first, then convert. Norms after the layer may be folded into it.
    - LoRA beside the layer is right as long as it is apart, ``layer(x) + delta(x)``. Merged into ``weight``, delta is
      multiplied by 1 + a as well, and the layer cannot notice: never merge it (peft's ``merge_and_unload``).

    Args:
        in_channels: C1.
        out_channels: C2.
        kernel_size: as ``nn.Conv2d``; so are ``stride``, ``padding``, ``dilation``, ``groups``, ``bias``,
            ``padding_mode``, ``device`` and ``dtype``.
        reduction: r; the branch has ``max(C1 // reduction, 4)`` hidden channels.
        in_expansion: r_C1, how many input channels share a value; None for all those of a group.
        out_expansion: r_C2, how many output channels share a value.
        kernel_expansion: r_hw, how many neighbouring taps share a value along each kernel axis.
        activation: ``"sigmoid"``, ``"tanh"`` or ``"relu"``, the end of the branch.
        residual: weights K + A * K if true, A * K otherwise.
        norm_layer: the branch's norm, called with a number of channels; None for none.

    Raises:
        ValueError: an argument has an unknown value, or a rate does not divide the size that it expands.

    Shape:
        Input (N, C1, H, W) or (C1, H, W), output (N, C2, H', W') or (C2, H', W').
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        reduction: int = 16,
        in_expansion: int | None = None,
        out_expansion: int = 1,
        kernel_expansion: int = 1,
        activation: str = "sigmoid",
        residual: bool = True,
        norm_layer: NormLayer | None = nn.BatchNorm2d,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            reduction=reduction,
            in_expansion=in_expansion,
            out_expansion=out_expansion,
            kernel_expansion=kernel_expansion,
            activation=activation,
            residual=residual,
            norm_layer=norm_layer,
            device=device,
            dtype=dtype,
        )


class AWConv2dSame(AWConv2d):
    """An AW-convolution in the place of ``timm.layers.Conv2dSame``: the output has size ceil(size / stride).

    TensorFlow's padding, which depends on the input's size; ``padding`` is not used. All else is as in
    :class:`AWConv2d`; the attention is that of the input without padding.
    """

    def _pad(self, input: Tensor) -> tuple[Tensor, Any]:
        padded: Tensor = pad_same(input, list(self.kernel_size), list(self.stride), list(self.dilation))
        return padded, (0, 0)


class AWConv3d(_AWConvNd, nn.Conv3d):
    """An AW-convolution over volumes, in the place of ``nn.Conv3d``.

    ``O[n] = conv(I[n], K + A[n] * K) + bias``, where the attention map A has the shape of the weights K and is computed
    from the sample itself by the branch ``attention`` (:class:`AttentionBranch`); ``layer.attention(input)`` is the map
    before Expand. ``weight`` and ``bias`` are those of ``nn.Conv3d``, whose state dict loads with ``strict=False``, but
    ``weight`` alone is not what the layer computes with: that is ``weight * (1 + a)``. What that means for
    loading, folding and LoRA: :class:`AWConv2d`.

    Args:
        in_channels: C1.
        out_channels: C2.
        kernel_size: as ``nn.Conv3d``; so are ``stride``, ``padding``, ``dilation``, ``groups``, ``bias``,
            ``padding_mode``, ``device`` and ``dtype``.
        reduction: r; the branch has ``max(C1 // reduction, 4)`` hidden channels.
        in_expansion: r_C1, how many input channels share a value; None for all those of a group.
        out_expansion: r_C2, how many output channels share a value.
        kernel_expansion: r_hw, how many neighbouring taps share a value along each kernel axis.
        activation: ``"sigmoid"``, ``"tanh"`` or ``"relu"``, the end of the branch.
        residual: weights K + A * K if true, A * K otherwise.
        norm_layer: the branch's norm, called with a number of channels; None for none.

    Raises:
        ValueError: an argument has an unknown value, or a rate does not divide the size that it expands.

    Shape:
        Input (N, C1, D, H, W) or (C1, D, H, W), output (N, C2, D', H', W') or (C2, D', H', W').
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int],
        stride: int | tuple[int, int, int] = 1,
        padding: str | int | tuple[int, int, int] = 0,
        dilation: int | tuple[int, int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        reduction: int = 16,
        in_expansion: int | None = None,
        out_expansion: int = 1,
        kernel_expansion: int = 1,
        activation: str = "sigmoid",
        residual: bool = True,
        norm_layer: NormLayer | None = nn.BatchNorm3d,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            reduction=reduction,
            in_expansion=in_expansion,
            out_expansion=out_expansion,
            kernel_expansion=kernel_expansion,
            activation=activation,
            residual=residual,
            norm_layer=norm_layer,
            device=device,
            dtype=dtype,
        )
