"""The attention branch F1: "An Attention Module for Convolutional Neural Networks", 2021, arXiv 2108.08205."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor, nn

from awconv.ops.average_pool import average_pool
from awconv.ops.branch import attend
from awconv.ops.problem import product

ACTIVATIONS: dict[str, type[nn.Module]] = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}


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

NormLayer = Callable[[int], nn.Module]

_CONV: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_MIN_HIDDEN = 4


class AttentionBranch(nn.Module):
    """F1: the attention map of every sample, in the shape of the weights before Expand.

    ::

        A0 = average-pool I to h/r_hw x w/r_hw
        A1 = ReLU(norm(pointwise convolution, C1 -> hidden))
        A2 = activation(norm(pointwise convolution, hidden -> C2/r_C2 * (C1/groups)/r_C1))

    with ``hidden = max(C1 // reduction, 4)``. With the weight of the last norm at zero the attention is a constant.

    A branch that starts as one, a0, gives its map relative to that: the layer's weights are those that the map A2 would
    make, divided by what a0 would, so that they are K at the start. For weights K (1 + A2) / (1 + a0) it gives

        A' = (1 + A2) / (1 + a0) - 1 = (A2 - a0) / (1 + a0)

    and for the form without residual, K A2 / a0, ``A' = A2 / a0 - 1``; the layer computes with K (1 + A') either way.
    The buffer ``relative_to`` holds a0, and is None in a branch of the paper's form.

    Args:
        in_channels: C1.
        attention_size: the sizes (C2/r_C2, (C1/groups)/r_C1, h/r_hw, w/r_hw) of one sample's map.
        reduction: r, of the hidden channels.
        activation: ``"sigmoid"``, ``"tanh"`` or ``"relu"``.
        norm_layer: called with a number of channels. None leaves the norms out and gives the convolutions a bias.
        residual: the form of the layer's weights, on which a0 depends.
    """

    relative_to: Tensor | None

    def __init__(
        self,
        in_channels: int,
        attention_size: Sequence[int],
        reduction: int,
        activation: str,
        norm_layer: NormLayer | None,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.activation, self.residual = activation, residual
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
        self.register_buffer("relative_to", None)

    @property
    def start(self) -> Start:
        """The constant that the branch starts as by identity."""
        return START[self.activation, self.residual]

    @property
    def relative(self) -> bool:
        """Whether the map is relative to the constant that the branch starts as."""
        return self._buffers["relative_to"] is not None

    def forward(self, input: Tensor, pooled: Tensor | None = None) -> Tensor:
        """Maps an input of shape (N, C1, H, W) to a compact attention map, shape (N, \\*attention_size).

        Args:
            input: of the convolution.
            pooled: A0, shape (N, C1, h/r_hw, w/r_hw), where the caller has it already.

        Raises:
            ValueError: batch statistics would have to be taken over a single value.
        """
        out_blocks, in_blocks, *kernel = self.attention_size
        attention: Tensor = average_pool(input, kernel) if pooled is None else pooled
        if _takes_batch_statistics(self.norm1) or _takes_batch_statistics(self.norm2):
            _check_statistics(attention)
        modules = (self.conv1, self.norm1, self.act1, self.conv2, self.norm2, self.act2)
        constant, gain = self.start[1:] if self.relative else (0.0, 1.0)
        attended = attend(modules, attention, self.attention_size, constant, gain)
        if attended is not None:
            return attended
        attention = self.act1(self.norm1(self.conv1(attention)))
        attention = self.act2(self.norm2(self.conv2(attention)))
        if self.relative_to is not None and (constant, gain) != (0, 1):
            attention = (attention - self.relative_to) / gain  # the buffer: torch.fx keeps it in state dicts, then
        return attention.reshape(-1, out_blocks, in_blocks, *kernel)

    @torch.no_grad()
    def start_as_identity(self) -> None:
        """Starts as a constant for every input, to which the map is relative, with a gradient that leads away from it.

        The weight of the last norm becomes zero and its bias the preactivation. Where the last norm has no weight to
        learn (there is no norm, or it is frozen), the weights of the convolution before it become zero instead.

        Raises:
            ValueError: the last norm has statistics but no weight, or the preactivation is not zero and there is no
                bias.
        """
        scale, shift = self._last_scale(), self._last_shift()
        if scale is None:
            raise ValueError(
                'init="identity" needs a branch whose norm_layer has a weight (affine), is frozen, or is None; '
                f"got {self.norm2}"
            )
        if shift is None and self.start.preactivation:
            raise ValueError(f'init="identity" with this activation needs a norm_layer with a bias, got {self.norm2}')
        scale.zero_()
        if shift is not None:
            shift.fill_(self.start.preactivation)
        self._set_relative(True)

    def is_identity(self) -> bool:
        """Whether the map is 0 for every input, as at the start by identity: the layer computes with its weights."""
        scale, shift = self._last_scale(), self._last_shift()
        if not self.relative or scale is None or scale.is_meta or scale.any():
            return False
        return shift is None or bool((shift == self.start.preactivation).all())

    def _last_scale(self) -> Tensor | None:
        """What makes the map a constant where it is zero."""
        weight = getattr(self.norm2, "weight", None)
        if isinstance(weight, nn.Parameter):
            return weight
        frozen = isinstance(weight, Tensor)
        return self.conv2.weight if frozen or isinstance(self.norm2, nn.Identity) else None

    def _last_shift(self) -> Tensor | None:
        has_weight = isinstance(getattr(self.norm2, "weight", None), Tensor)
        bias = self.norm2.bias if has_weight else self.conv2.bias
        return bias if isinstance(bias, Tensor) else None

    def _set_relative(self, relative: bool) -> None:
        if relative != self.relative:
            self.relative_to = self.conv2.weight.new_tensor(self.start.attention) if relative else None

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        """A state dict of a whole branch says which form it was trained in, and the branch takes that."""
        name = f"{prefix}relative_to"
        told = state_dict.get(name)
        if told is not None or self._is_whole(state_dict, prefix):
            if self.relative and told is None and not any(True for _ in self.norm2.buffers()):
                warnings.warn(_FORM_UNTOLD, stacklevel=2)
            self._set_relative(told is not None)
        if type(told) is Tensor and told.dim() == 0 and not told.is_meta and not self._starts_at(told.item()):
            error_messages = arguments[-1]
            error_messages.append(
                f"{name} is {told.item():g}, and this branch, of another activation or form, starts at "
                f"{self.start.attention:g}: convert the network with the arguments that the saved one had"
            )
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _is_whole(self, state_dict: Any, prefix: str) -> bool:
        """Whether a state dict has all of the branch but its form, and not only its parameters, say."""
        left_out = ("relative_to", "num_batches_tracked")
        return all(f"{prefix}{name}" in state_dict for name in self.state_dict() if not name.endswith(left_out))

    def _starts_at(self, constant: float) -> bool:
        return abs(constant - self.start.attention) < 0.01  # averages of several networks' are rounded

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._buffers.setdefault("relative_to", None)  # pickled before there was one

    def extra_repr(self) -> str:
        return f"relative_to={self.start.attention:g}" if self.relative else ""


_FORM_UNTOLD = (  # Norms with statistics tell parameters alone from a whole state dict.
    "weights without relative_to were loaded into attention branches that were converted by identity: they are taken "
    "as of the paper's form, K (1 + a). If they are parameters of a network that was converted by identity, add the "
    "buffers of its state_dict()"
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


# torch.fx does not look into these: they depend on the shapes of their arguments.
for _function in ("average_pool", "_check_statistics"):
    torch.fx.wrap(_function)
