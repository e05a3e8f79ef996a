"""The attention branch F1: "An Attention Module for Convolutional Neural Networks", 2021, arXiv 2108.08205."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.fx
from torch import Tensor, nn

from awconv.ops.average_pool import average_pool
from awconv.ops.branch import attend
from awconv.ops.problem import product

ACTIVATIONS: dict[str, type[nn.Module]] = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}
START = {
    ("sigmoid", True): 0.0,
    ("sigmoid", False): 0.0,
    ("tanh", True): 0.0,
    ("tanh", False): math.atanh(0.5),
    ("relu", True): 1.0,
    ("relu", False): 1.0,
}
"""Where a branch of constant attention starts, before its activation, by (activation, residual): the activation has a
slope there, and the gain, 1 + a (a without the residual form), is not zero; a power of two where there is one."""
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
            pooled: A0, shape (N, C1, h/r_hw, w/r_hw), where the caller has it already.

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

        The weight of the last norm becomes zero and its bias ``start``. Where the last norm has no weight to learn
        (there is no norm, or it is frozen), the weights of the convolution before it become zero instead.

        Raises:
            ValueError: the last norm has statistics but no weight, or ``start`` is not zero and there is no bias.
        """
        weight = getattr(self.norm2, "weight", None)
        frozen = isinstance(weight, Tensor) and not isinstance(weight, nn.Parameter)
        if isinstance(weight, nn.Parameter):
            weight.zero_()
        elif frozen or isinstance(self.norm2, nn.Identity):
            self.conv2.weight.zero_()
        else:
            raise ValueError(
                'init="identity" needs a branch whose norm_layer has a weight (affine), is frozen, or is None; '
                f"got {self.norm2}"
            )
        bias = self.norm2.bias if isinstance(weight, Tensor) else self.conv2.bias
        if isinstance(bias, Tensor):
            bias.fill_(start)
        elif start:
            raise ValueError(f'init="identity" with this activation needs a norm_layer with a bias, got {self.norm2}')


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
