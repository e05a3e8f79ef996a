"""One plain convolution to one AW-convolution, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self

    from awconv.layers import AWConv2d


class Exchangeable:
    """What an AW-convolution shares with the plain convolution whose weights it has. :func:`awconv.convert` and
    :func:`awconv.revert` do the same for whole networks."""

    @classmethod
    def from_conv(cls, conv: nn.Module, *, init: Literal["fresh", "identity"] = "fresh", **arguments: Any) -> Self:
        """The AW-convolution that takes the place of a plain one, with its parameters (the same tensors), device, dtype
        and training mode.

        Args:
            conv: of this class's plain kind, such as ``nn.Conv2d`` for ``AWConv2d``.
            init: ``"fresh"``, or ``"identity"`` to compute what ``conv`` does, as for :func:`awconv.convert`.
            **arguments: of the attention (``reduction``, ``activation``, ...), and ``norm_layer``.

        Raises:
            TypeError: ``conv`` is of another kind, this class is one of your own, or an argument is unknown.
            ValueError: it cannot be replaced exactly (hooks, parametrisations), or an argument does not fit it.

        Examples:
            >>> import torch
            >>> from awconv import AWConv2d
            >>> conv = torch.nn.Conv2d(16, 32, 3, stride=2)
            >>> layer = AWConv2d.from_conv(conv, init="identity", reduction=8)
            >>> layer.weight is conv.weight
            True
        """
        from awconv.convert import COUNTERPARTS, convert  # which is made of layers

        plain = next(plain for plain, counterpart in COUNTERPARTS.items() if issubclass(cls, counterpart))
        if isinstance(conv, cls) or not isinstance(conv, plain):
            raise TypeError(
                f"{cls.__name__}.from_conv: conv must be an nn.{plain.__name__}, got {type(conv).__name__}; "
                "awconv.convert replaces convolutions inside of a network"
            )
        layer = convert(conv, "", init=init, **arguments)
        if not isinstance(layer, cls):
            raise TypeError(
                f"{cls.__name__}.from_conv: the counterpart of a {type(conv).__name__} is an {type(layer).__name__}, "
                f"of which it makes no {cls.__name__}; call {type(layer).__name__}.from_conv, or build yours yourself"
            )
        return layer

    def to_conv(self, attention: Tensor | None = None) -> nn.Module:
        """The plain convolution that this layer is for a constant attention, with its bias (the same tensor).

        Args:
            attention: the map A, before Expand: shape (C2/r_C2, (C1/groups)/r_C1, h/r_hw, w/r_hw), such as
                ``layer.attention(images).mean(0)``. The weights are K + A * K then (A * K without residual), in new
                tensors. None is for a layer that is the identity still: the weights are K, the same tensor.

        Returns:
            The convolution, in the layer's training mode.

        Raises:
            TypeError: ``attention`` is no tensor.
            ValueError: it has another shape, or a number that is not finite; or there is none, and the layer is no
                identity; or a gain over input channels has left the identity, which :func:`awconv.fold` can fold; or
                the layer has hooks, is parametrised or is of a class of your own.

        Examples:
            >>> import torch
            >>> from awconv import AWConv2d
            >>> layer, images = AWConv2d(16, 32, 3).eval(), torch.randn(8, 16, 9, 9)
            >>> conv = layer.to_conv(layer.attention(images).mean(0))  # what the layer does on average
            >>> type(conv).__name__, conv.weight.shape
            ('Conv2d', torch.Size([32, 16, 3, 3]))
        """
        from awconv.fold_layers import folded_layer  # which is made of layers
        from awconv.input_gain import unit_of
        from awconv.revert import replaceable_layers, revert

        layer = cast("AWConv2d", self)
        name = f"{type(self).__name__}.to_conv"
        replaceable_layers(layer, name)
        if attention is None:
            if not layer.is_identity():
                raise ValueError(
                    f"{name}: the attention of this layer is not the identity, so its weights change with each image. "
                    "Give a map that stands for all, such as layer.attention(images).mean(0), which makes another "
                    "function of it"
                )
            return revert(layer)
        if layer.input_attention is not None and not layer.input_attention.is_identity():
            raise ValueError(
                f"{name}: a map says nothing of the layer's gain over input channels, which is not the identity; "
                "awconv.fold takes the mean of both"
            )
        _check_map(name, attention, layer.attention.attention_size)
        return folded_layer(layer, attention.detach().cpu().double() + unit_of(layer.attention))


def _check_map(name: str, attention: Any, size: tuple[int, ...]) -> None:
    if not isinstance(attention, Tensor):
        raise TypeError(f"{name}: attention must be a Tensor, got {type(attention).__name__}")
    if tuple(attention.shape) != tuple(size):
        mean = "; take its mean over images, .mean(0)" if tuple(attention.shape[1:]) == tuple(size) else ""
        raise ValueError(f"{name}: attention must have shape {tuple(size)}, got {tuple(attention.shape)}{mean}")
    if not torch.isfinite(attention).all():
        raise ValueError(f"{name}: attention must be finite, and has NaN or infinity")
