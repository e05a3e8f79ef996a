"""A peer from the literature: "Omni-Dimensional Dynamic Convolution", ICLR 2022, arXiv 2209.07947, with one kernel."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from awconv.branch import check_batch_statistics, pointwise
from awconv.branch_spec import NormLayer
from awconv.layers import AW_LAYERS, _as_batch, _convolve, _without_batch_like
from awconv.load_messages import warn_of_gains
from awconv.ops.algorithm import CONV
from awconv.ops.channel_gain import pooled_globally, scale

__all__ = ["WITH_BRANCHES", "ODAttention", "ODConv2d"]

_MIN_HIDDEN = 16


class ODAttention(nn.Module):
    """The gains of an ODConv with one kernel, from one trunk.

    ::

        z = ReLU(norm(pointwise convolution, C1 -> hidden)) of the mean of each channel
        alpha_c, alpha_f, alpha_s = sigmoid(pointwise convolution with bias, hidden -> C1, C2, h * w) of z

    with ``hidden = max(C1 // reduction, 16)``. As in the authors' code, a depthwise layer has no alpha_f, and a kernel
    of size 1 no alpha_s; the convolutions' weights start by Kaiming's normal distribution (fan-out, ReLU), their biases
    at zero.

    Args:
        in_channels: C1.
        out_channels: C2.
        kernel_size: (h, w).
        groups: number of groups of channels.
        reduction: of the hidden channels.
        norm_layer: called with a number of channels. None leaves the norm out and gives the trunk a bias.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, ...],
        groups: int,
        reduction: int,
        norm_layer: NormLayer | None,
    ) -> None:
        super().__init__()
        self.kernel_size = tuple(kernel_size)
        hidden, taps = max(in_channels // reduction, _MIN_HIDDEN), kernel_size[0] * kernel_size[1]
        depthwise = groups == in_channels == out_channels
        self.trunk = nn.Conv2d(in_channels, hidden, 1, bias=norm_layer is None)
        self.norm = nn.Identity() if norm_layer is None else norm_layer(hidden)
        self.act = nn.ReLU(inplace=True)
        self.channel_head = nn.Conv2d(hidden, in_channels, 1)
        self.filter_head = None if depthwise else nn.Conv2d(hidden, out_channels, 1)
        self.spatial_head = None if taps == 1 else nn.Conv2d(hidden, taps, 1)
        for conv in (self.trunk, self.channel_head, self.filter_head, self.spatial_head):
            if conv is not None:
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
                if conv.bias is not None:
                    nn.init.zeros_(conv.bias)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor | None]:
        """Maps the means of an input, shape (N, C1, 1, 1), to gains.

        Returns:
            alpha_c, shape (N, C1, 1, 1), and alpha_f alpha_s, shape (N, C2, 1, h, w): what the input and the weights
            are multiplied by. The second has size 1 where there is no alpha_f or no alpha_s, and is None without both.

        Raises:
            ValueError: batch statistics would have to be taken over a single value.
        """
        check_batch_statistics((self.norm,), pooled, "ODConv")
        hidden = self.act(self.norm(pointwise(self.trunk, pooled)))
        of_input = torch.sigmoid(pointwise(self.channel_head, hidden))
        of_weights: Tensor | None = None
        if self.filter_head is not None:
            of_weights = torch.sigmoid(pointwise(self.filter_head, hidden)).unsqueeze(-1)
        if self.spatial_head is not None:
            of_taps = torch.sigmoid(pointwise(self.spatial_head, hidden)).reshape(-1, 1, 1, *self.kernel_size)
            of_weights = of_taps if of_weights is None else of_weights * of_taps
        return of_input, of_weights


class ODConv2d(nn.Conv2d):
    """An omni-dimensional dynamic convolution with one kernel, in the place of ``nn.Conv2d``.

    ``O[n] = conv(I[n], alpha_f[n] alpha_c[n] alpha_s[n] * K) + bias`` (the paper's equation 2 with n = 1): gains for
    output channels, input channels and taps, each between 0 and 1, that depend on the mean of each input channel
    (:class:`ODAttention`, under ``attention``). The bias is not scaled. It is computed exactly: alpha_c scales the
    input, and :func:`awconv.aw_conv2d` takes the rest as an attention map.

    This is a rival to compare AW-convolutions with, for trainings from scratch: it has no start by identity, since it
    begins with weights of an eighth or so, which norms make up for; and ``awconv.fuse``, ``fold``, ``revert`` and
    ``explain`` leave it alone. The authors divide what goes into each sigmoid by a temperature, which falls from 30 to
    1 in the first ten epochs and matters most for their softmax over several kernels. With one kernel there is no
    softmax, and here the temperature is 1 throughout.

    Args:
        in_channels: C1.
        out_channels: C2.
        kernel_size: as ``nn.Conv2d``; so are ``stride``, ``padding``, ``dilation``, ``groups``, ``bias``,
            ``padding_mode``, ``device`` and ``dtype``.
        reduction: the trunk has ``max(C1 // reduction, 16)`` channels.
        norm_layer: the trunk's norm: ``"batch"``, something called with a number of channels, or None for none.

    Raises:
        TypeError: ``norm_layer`` is none of these.
        ValueError: an argument is out of its range.

    Shape:
        Input (N, C1, H, W) or (C1, H, W), output (N, C2, H', W') or (C2, H', W').

    Examples:
        >>> import torch
        >>> from awconv import ODConv2d
        >>> layer = ODConv2d(16, 32, 3, padding=1)
        >>> layer(torch.randn(4, 16, 8, 8)).shape
        torch.Size([4, 32, 8, 8])
    """

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
        norm_layer: NormLayer | Literal["batch"] | None = "batch",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        initialise: Any = super().__init__  # of which PyTorch says less than it takes
        sizes = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        initialise(*sizes, device=device, dtype=dtype)
        if isinstance(reduction, bool) or not isinstance(reduction, int) or reduction < 1:
            raise ValueError(f"ODConv2d: reduction must be a positive integer, got {reduction!r}")
        if isinstance(norm_layer, nn.Module) or not (norm_layer in ("batch", None) or callable(norm_layer)):
            raise TypeError(
                "ODConv2d: norm_layer must be 'batch', None or something called with a number of channels, such as "
                f"nn.BatchNorm2d, got {norm_layer!r}"
            )
        self.reduction = reduction
        norm: Any = nn.BatchNorm2d if norm_layer == "batch" else norm_layer
        with self.weight.device:  # whatever the default device is now
            self.attention = ODAttention(in_channels, out_channels, self.kernel_size, groups, reduction, norm)
        if any(parameter.dtype != self.weight.dtype for parameter in self.attention.parameters()):
            self.attention.to(self.weight.dtype)

    def branches(self) -> tuple[nn.Module, ...]:
        """``attention``: what an optimiser takes for an attention branch."""
        return (self.attention,)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        warn_of_gains(state_dict, prefix, missing_keys=arguments[2])

    def forward(self, input: Tensor) -> Tensor:
        """Shape (N, C1, H, W) to (N, C2, H', W'); the batch axis may be missing, as for nn.Conv2d.

        Raises:
            ValueError: the input does not have ``in_channels`` channels or the right number of axes.
        """
        batch = _as_batch(input, type(self).__name__, self.in_channels, 2)
        batch, pooled = pooled_globally(batch)
        of_input, of_weights = self.attention(pooled)
        batch, padding = self._pad(scale(batch, of_input))
        geometry: Any = (self.stride, padding, self.dilation, self.groups)
        if of_weights is None:
            output = CONV[2](batch, self.weight, self.bias, *geometry)
        else:
            output = _convolve(batch, self.weight, of_weights, self.bias, *geometry, residual=False)
        return _without_batch_like(output, input)

    def _pad(self, input: Tensor) -> tuple[Tensor, Any]:
        """The input with the padding that the operator does not know, and the padding that is left to it."""
        if self.padding_mode == "zeros":
            return input, self.padding
        return F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), (0, 0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, reduction={self.reduction}"


WITH_BRANCHES = (*AW_LAYERS, ODConv2d)
"""Layers with ``branches()``: AW-convolutions and their peer."""

# torch.fx does not look into these: they depend on the shapes and dtypes of their arguments.
for _function in ("_as_batch", "_convolve", "_without_batch_like", "pooled_globally", "scale"):
    torch.fx.wrap(_function)
