"""Convolutions with an attention branch: "An Attention Module for Convolutional Neural Networks", 2021, arXiv
2108.08205."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import pad_same
from torch import Tensor, nn

from awconv.activation import Activation
from awconv.branch import AttentionBranch, attended
from awconv.branch_spec import BranchSpec, MakeBranch, MakePool, NormLayer, check_make_branch
from awconv.custom_branch import make_custom_branch
from awconv.exchange import Exchangeable
from awconv.input_gain import gain_branch, scaled
from awconv.load_messages import warn_of_branches
from awconv.ops import aw_conv1d, aw_conv2d, aw_conv3d
from awconv.ops.layer import run_layer
from awconv.ops.layer_operators import run_layer_compiled
from awconv.ops.problem import SPATIAL_NAMES
from awconv.ops.tracing import compiling, shape_of
from awconv.relative import BaseBranch

__all__ = ["AW_LAYERS", "AWConv1d", "AWConv2d", "AWConv2dSame", "AWConv3d", "AttentionBranch"]

BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_AW_CONV = {1: aw_conv1d, 2: aw_conv2d, 3: aw_conv3d}


class _AWConvNd(Exchangeable, nn.modules.conv._ConvNd):
    """What AWConv1d, AWConv2d and AWConv3d share: the branch beside the weights of the convolution they derive from."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        reduction: int = 16,
        in_expansion: int | None = None,
        out_expansion: int = 1,
        kernel_expansion: int = 1,
        activation: Activation = "sigmoid",
        residual: bool = True,
        input_gain: bool = False,
        norm_layer: NormLayer | Literal["batch"] | None = "batch",
        pool: MakePool | None = None,
        branch: MakeBranch | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        initialise: Any = super().__init__  # nn.Conv2d's or so, which takes fewer arguments than _ConvNd's
        initialise(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )
        self.reduction = reduction
        self.in_expansion = in_channels // groups if in_expansion is None else in_expansion
        self.out_expansion = out_expansion
        self.kernel_expansion = kernel_expansion
        self.residual = residual
        if norm_layer == "batch":
            norm_layer = BATCH_NORMS[len(self.kernel_size)]
        spec = self._spec(reduction, activation, residual, norm_layer, pool)
        check_make_branch(type(self).__name__, branch)
        if input_gain not in (True, False):
            raise ValueError(f"{type(self).__name__}: input_gain must be True or False, got {input_gain!r}")
        self.input_attention: BaseBranch | None = None
        with self.weight.device:  # whatever the default device is now
            self.attention = AttentionBranch.of(spec) if branch is None else make_custom_branch(branch, spec)
            if input_gain:
                self.input_attention = gain_branch(spec)
        self.activation = _name(activation, self.attention)
        for made in self.branches():
            if any(parameter.dtype != self.weight.dtype for parameter in made.parameters()):
                made.to(self.weight.dtype)  # which FakeTensorMode refuses even where it changes nothing
            if any(parameter.device != self.weight.device for parameter in made.parameters()):
                made.to(self.weight.device)  # of a module that was there before

    def _spec(self, *arguments: Any) -> BranchSpec:
        return BranchSpec(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            tuple(self._attention_size()),
            *arguments,
        )

    def _attention_size(self) -> list[int]:
        name, group_in_channels = type(self).__name__, self.in_channels // self.groups
        return [
            _blocks(name, "out_expansion", self.out_expansion, "out_channels", self.out_channels),
            _blocks(name, "in_expansion", self.in_expansion, "in_channels / groups", group_in_channels),
            *(
                _blocks(name, "kernel_expansion", self.kernel_expansion, "each kernel size", k)
                for k in self.kernel_size
            ),
        ]

    @property
    def input_gain(self) -> bool:
        """Whether the layer has a gain over input channels."""
        return self.input_attention is not None

    def branches(self) -> tuple[BaseBranch, ...]:
        """``attention``, and ``input_attention`` where there is one."""
        return (self.attention,) if self.input_attention is None else (self.attention, self.input_attention)

    def is_identity(self) -> bool:
        """Whether the layer computes what the plain convolution with its weights does, for every input."""
        return all(branch.is_identity() for branch in self.branches())

    def scale_input(self, batch: Tensor) -> Tensor:
        """What the convolution and ``attention`` get of a batch, shape (N, C1, \\*size): the batch times its gain."""
        return batch if self.input_attention is None else scaled(batch, self.input_attention)

    def forward(self, input: Tensor) -> Tensor:
        """Shape (N, C1, \\*size) to (N, C2, \\*out_size); the batch axis may be missing, as for nn.Conv.

        Raises:
            ValueError: the input does not have ``in_channels`` channels or the right number of axes.
        """
        if self.input_attention is None:
            return self._without_gain(input)
        batch = _as_batch(input, type(self).__name__, self.in_channels, len(self.kernel_size))
        return _without_batch_like(self._without_gain(self.scale_input(batch)), input)

    def _without_gain(self, input: Tensor) -> Tensor:
        """The layer behind its gain over input channels."""
        whole = self._run_whole(input)
        if whole is not None:
            return whole
        batch = _as_batch(input, type(self).__name__, self.in_channels, len(self.kernel_size))
        batch, attention = attended(self.attention, batch)
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
            residual=self.residual or self.attention.relative,
        )
        return _without_batch_like(output, input)

    def _run_whole(self, input: Tensor) -> Tensor | None:
        """What the layer makes of an input, where kernels run it as a whole: branch and convolution are plain ones."""
        if not isinstance(input, Tensor) or not input.is_cuda:
            return None
        branch = self._modules["attention"]  # in a tenth of the time of an attribute
        if (
            type(branch) is not AttentionBranch
            or branch.pool is not None
            or self._parameters.get("bias", self) is not None
            or self.padding_mode != "zeros"
            or type(self)._pad is not _AWConvNd._pad
        ):
            return None
        run = run_layer_compiled if compiling() else run_layer
        return run(
            input,
            self._parameters.get("weight"),
            branch,
            branch.modules_in_turn(),
            branch.attention_size,
            branch.relation(),
            (self.stride, self.padding, self.dilation, self.groups, self.residual or branch.relative),
        )

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
        warn_of_branches(self, state_dict, prefix, missing_keys)

    def _pad(self, input: Tensor) -> tuple[Tensor, Any]:
        """The input with the padding that the operator does not know, and the padding that is left to it."""
        if self.padding_mode == "zeros":
            return input, self.padding
        return F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), (0,) * len(self.kernel_size)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "input_attention" not in self._modules:
            self.__dict__.setdefault("input_attention", None)  # pickled before there was one
        if isinstance(self.attention, AttentionBranch):
            self.attention.activation, self.attention.residual = self.activation, self.residual  # old pickles lack them

    def extra_repr(self) -> str:
        attention = (
            f", reduction={self.reduction}, in_expansion={self.in_expansion}, out_expansion={self.out_expansion}, "
            f"kernel_expansion={self.kernel_expansion}, activation={self.activation!r}, residual={self.residual}"
            f"{', input_gain=True' if self.input_gain else ''}"
        )
        return f"{super().extra_repr()}{attention}{', init=identity' if self.attention.relative else ''}"


def _as_batch(input: Tensor, layer: str, in_channels: int, dims: int) -> Tensor:
    batch = input[None] if input.dim() == dims + 1 else input
    if batch.dim() != dims + 2 or shape_of(batch)[1] != in_channels:
        expected = f"(N, {in_channels}, {', '.join(SPATIAL_NAMES[dims])})"
        raise ValueError(f"{layer}: input must have shape {expected}, got {tuple(input.shape)}")
    return batch


def _convolve(input: Tensor, weight: Tensor, *arguments: Any, residual: bool) -> Tensor:
    return _AW_CONV[weight.dim() - 2](input, weight, *arguments, residual=residual)


def _without_batch_like(output: Tensor, input: Tensor) -> Tensor:
    return output[0] if input.dim() == output.dim() - 1 else output


# torch.fx does not look into these: they depend on the shapes of their arguments.
for _function in ("pad_same", "_as_batch", "_convolve", "_without_batch_like"):
    torch.fx.wrap(_function)


def _name(activation: Activation, branch: BaseBranch) -> str:
    """What the layer says of its activation."""
    if isinstance(branch, AttentionBranch):
        return branch.activation
    return activation if isinstance(activation, str) else getattr(activation, "__qualname__", type(activation).__name__)


def _blocks(name: str, argument: str, expansion: int, axis: str, size: int) -> int:
    if not isinstance(expansion, int) or expansion < 1 or size % expansion:
        raise ValueError(f"{name}: {argument} must divide {axis}, {size}, got {expansion!r}")
    return size // expansion


class AWConv1d(_AWConvNd, nn.Conv1d):
    """An AW-convolution over sequences, in the place of ``nn.Conv1d``. All else is as in :class:`AWConv2d`.

    Shape:
        Input (N, C1, L) or (C1, L), output (N, C2, L') or (C2, L').

    Examples:
        >>> import torch
        >>> from awconv import AWConv1d
        >>> AWConv1d(16, 32, 3, padding=1)(torch.randn(4, 16, 8)).shape
        torch.Size([4, 32, 8])
    """


class AWConv2d(_AWConvNd, nn.Conv2d):
    """An AW-convolution, in the place of ``nn.Conv2d``.

    ``O[n] = conv(I[n], K + A[n] * K) + bias``; with ``input_gain``, ``O[n] = conv((1 + g[n]) * I[n], K + A[n] * K) +
    bias``. The attention map A has the shape of the weights K. The branch
    ``attention`` (:class:`AttentionBranch`) computes it from each sample; ``layer.attention(input)`` is the map before
    Expand. ``weight`` and ``bias`` have the names of ``nn.Conv2d``, whose state dict loads with ``strict=False``, but
    the layer computes with ``weight * (1 + a)``. Therefore:

    - Plain weights that are loaded into the layer keep their function only if 1 + a is 1; else the layer logs a
      warning. In a network after ``awconv.convert(network, init="identity")`` it is, before a training: there a is
      relative to what the branch starts as.
    - Methods that fold layers into one plain convolution (``reparameterize`` and ``fuse`` of RepVGG, MobileOne and
      RepViT) would lose the attention. Fold first, then convert. A norm after the layer may be folded into it.
    - LoRA that is merged into ``weight`` would be multiplied by 1 + a, too. peft refuses the layer as a target, and
      the convolutions of branches, whose names targets may match: a ValueError of ``get_peft_model`` says what to do.
      Its adapters on other layers work and merge (``exclude_modules=r".*\\.(input_)?attention\\..*"``), and
      ``modules_to_save=["attention"]`` trains the branches beside them. The layer cannot notice libraries that replace
      its ``forward``, such as LyCORIS; do not merge their adapters into it.

    Args:
        in_channels: C1.
        out_channels: C2.
        kernel_size: as ``nn.Conv2d``; so are ``stride``, ``padding``, ``dilation``, ``groups``, ``bias``,
            ``padding_mode``, ``device`` and ``dtype``.
        reduction: r; the branch has ``max(C1 // reduction, 4)`` hidden channels.
        in_expansion: r_C1, how many input channels share a value; None for all those of a group.
        out_expansion: r_C2, how many output channels share a value.
        kernel_expansion: r_hw, how many neighbouring taps share a value along each kernel axis.
        activation: the end of the branch: ``"sigmoid"``, ``"tanh"`` or ``"relu"``; a module, of which each branch gets
            a copy; or what makes one when it is called without arguments, such as ``nn.Hardsigmoid``.
        residual: weights K + A * K if true, A * K otherwise.
        input_gain: whether the input is scaled first, by 1 + g for each sample and channel (g if not ``residual``). A
            second :class:`AttentionBranch`, ``input_attention``, gives g, shape (N, 1, C1, 1, 1), from the mean of each
            channel; ``pool`` and ``branch`` are not for it. The map is ``layer.attention(layer.scale_input(input))``.
        norm_layer: the branch's norms: ``"batch"``, something called with a number of channels, such as
            ``nn.BatchNorm2d``, or None for none.
        pool: how the branch pools its input: called with the size (h/r_hw, w/r_hw), it returns a module or a function
            from the input to shape (N, C1, h/r_hw, w/r_hw); ``nn.AdaptiveMaxPool2d`` is one. None is average pooling.
        branch: makes another attention branch: a function of a :class:`BranchSpec` that returns a module from the input
            to the map before Expand. None makes an :class:`AttentionBranch`.

    Raises:
        TypeError: ``activation``, ``norm_layer``, ``pool`` or ``branch`` is none of these.
        ValueError: an argument has an unknown value, or a rate does not divide the size that it expands.

    Shape:
        Input (N, C1, H, W) or (C1, H, W), output (N, C2, H', W') or (C2, H', W').

    Examples:
        >>> import torch
        >>> from awconv import AWConv2d
        >>> layer, input = AWConv2d(16, 32, 3, padding=1), torch.randn(4, 16, 8, 8)
        >>> layer(input).shape
        torch.Size([4, 32, 8, 8])
        >>> layer.attention(input).shape  # a value for each sample, output channel and tap
        torch.Size([4, 32, 1, 3, 3])
        >>> AWConv2d(16, 32, 3, input_gain=True).input_attention(input).shape  # one for each input channel
        torch.Size([4, 1, 16, 1, 1])
    """


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

    Its arguments and all else are as in :class:`AWConv2d`.

    Shape:
        Input (N, C1, D, H, W) or (C1, D, H, W), output (N, C2, D', H', W') or (C2, D', H', W').

    Examples:
        >>> import torch
        >>> from awconv import AWConv3d
        >>> AWConv3d(16, 32, 3, padding=1)(torch.randn(4, 16, 8, 8, 8)).shape
        torch.Size([4, 32, 8, 8, 8])
    """


AW_LAYERS = (AWConv1d, AWConv2d, AWConv3d)
