"""The attention branch F1: "An Attention Module for Convolutional Neural Networks", 2021, arXiv 2108.08205."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from awconv.activation import ACTIVATIONS, START, Activation, Start, find_start, make_activation, value_and_slope
from awconv.branch_spec import BranchSpec, MakePool, NormLayer
from awconv.ops.average_pool import average_pool, pool_beside, pools_beside
from awconv.ops.branch import attend, unwatched
from awconv.ops.branch_operators import attend_compiled
from awconv.ops.problem import product
from awconv.ops.tracing import compiling, eager
from awconv.relative import BaseBranch

_CONV: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_MIN_HIDDEN = 4
_MODULES = ("conv1", "norm1", "act1", "conv2", "norm2", "act2")


class AttentionBranch(BaseBranch):
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
        activation: ``"sigmoid"``, ``"tanh"`` or ``"relu"``; another module, which is copied; or what makes one. It
            keeps the shape, and makes a constant of a constant.
        norm_layer: called with a number of channels. None leaves the norms out and gives the convolutions a bias.
        residual: the form of the layer's weights, on which a0 depends.
        pool: makes A0 in another way: called with (h/r_hw, w/r_hw), it returns a module or a function that maps the
            input to shape (N, C1, h/r_hw, w/r_hw), as ``nn.AdaptiveMaxPool2d`` does. None is average pooling.
    """

    pool: Callable[[Tensor], Tensor] | None

    def __init__(
        self,
        in_channels: int,
        attention_size: Sequence[int],
        reduction: int,
        activation: Activation,
        norm_layer: NormLayer | None,
        residual: bool = True,
        pool: MakePool | None = None,
    ) -> None:
        super().__init__(attention_size, residual)
        out_blocks, in_blocks, *kernel = attention_size
        conv = _CONV[len(kernel)]
        hidden = max(in_channels // reduction, _MIN_HIDDEN)
        self.conv1 = conv(in_channels, hidden, 1, bias=norm_layer is None)
        self.norm1 = norm_layer(hidden) if norm_layer is not None else nn.Identity()
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = conv(hidden, out_blocks * in_blocks, 1, bias=norm_layer is None)
        self.norm2 = norm_layer(out_blocks * in_blocks) if norm_layer is not None else nn.Identity()
        self.activation, self.act2 = make_activation(activation)
        if isinstance(activation, nn.Module) and any(True for _ in self.act2.parameters()):
            self.act2.to(self.conv2.weight.device)
        if self.activation not in ACTIVATIONS:
            self._start = find_start(self.act2, residual, self._preactivation_size())
        self.pool = None if pool is None else _made_pool(pool, tuple(kernel))

    @classmethod
    def of(cls, spec: BranchSpec) -> AttentionBranch:
        """The branch that a spec describes; ``functools.cache`` of this shares one among layers that are alike."""
        return cls(
            spec.in_channels,
            spec.attention_size,
            spec.reduction,
            spec.activation,
            spec.norm_layer,
            spec.residual,
            spec.pool,
        )

    @property
    def start(self) -> Start | None:
        """The constant that the branch starts as by identity; None if its activation has none."""
        return START[self.activation, self.residual] if self.activation in ACTIVATIONS else self._start

    def _preactivation_size(self) -> tuple[int, ...]:
        out_blocks, in_blocks, *kernel = self.attention_size
        return (out_blocks * in_blocks, *kernel)

    def forward(self, input: Tensor, pooled: Tensor | None = None) -> Tensor:
        """Maps an input of shape (N, C1, H, W) to a compact attention map, shape (N, \\*attention_size).

        Args:
            input: of the convolution.
            pooled: A0, shape (N, C1, h/r_hw, w/r_hw), where the caller has it already.

        Raises:
            ValueError: batch statistics would have to be taken over a single value.
        """
        out_blocks, in_blocks, *kernel = self.attention_size
        attention: Tensor = self._pool(input, kernel) if pooled is None else pooled
        check_batch_statistics((self.norm1, self.norm2), attention, "AW-convolution")
        constant, gain = self.relation()
        attended = None
        if not compiling():
            attended = attend(self.modules_in_turn(), attention, self.attention_size, constant, gain)
        elif attention.is_cuda:
            attended = attend_compiled(self.modules_in_turn(), attention, self.attention_size, constant, gain)
        if attended is not None:
            return attended
        attention = self.act1(self.norm1(pointwise(self.conv1, attention)))
        attention = self.act2(self.norm2(pointwise(self.conv2, attention)))
        if self.relative_to is not None and (constant, gain) != (0, 1):
            attention = (attention - self.relative_to) / gain  # the buffer: torch.fx keeps it in state dicts, then
        return attention.reshape(-1, out_blocks, in_blocks, *kernel)

    def modules_in_turn(self) -> tuple[nn.Module, ...]:
        """What maps A0 to A2, in this order."""
        modules = self._modules
        return tuple(map(modules.get, _MODULES))  # type: ignore[arg-type]

    def relation(self) -> tuple[float, float]:
        """The constant that the map is relative to, and the gain of the weights there; (0, 1) in the paper's form."""
        start = self.start if self.relative else None
        return (0.0, 1.0) if start is None else start[1:]

    def _pool(self, input: Tensor, kernel: Sequence[int]) -> Tensor:
        if self.pool is None:
            return average_pool(input, kernel)
        return _checked_pool(self.pool(input), (self.conv1.in_channels, *kernel))

    @torch.no_grad()
    def start_as_identity(self) -> None:
        """Starts as a constant for every input, to which the map is relative, with a gradient that leads away from it.

        The weight of the last norm becomes zero and its bias the preactivation. Where the last norm has no weight to
        learn (there is no norm, or it is frozen), the weights of the convolution before it become zero instead.

        Raises:
            ValueError: the last norm has statistics but no weight, the preactivation is not zero and there is no bias,
                or the activation has neither at 0 nor at 1 a slope and a gain.
        """
        if self.start is None:
            raise ValueError(
                'init="identity" needs an activation with a slope at 0 or 1, and a value there that leaves weights '
                f"({'1 + a0' if self.residual else 'a0, without the residual form,'} is not 0); got {self.activation}"
            )
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
        if not self.relative or self.start is None or scale is None or scale.is_meta or scale.any():
            return False
        unmoved = shift is None or bool((shift == self.start.preactivation).all())
        return unmoved and (self.activation in ACTIVATIONS or self._activation_is_unmoved(self.start))

    def _activation_is_unmoved(self, start: Start) -> bool:
        """Whether an activation, which may have parameters, makes a0 of its preactivation as at the start."""
        found = value_and_slope(self.act2, start.preactivation, self._preactivation_size())
        return found is not None and self._starts_at(found[0])

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

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "pool" not in self._modules:
            self.__dict__.setdefault("pool", None)  # pickled before there was one


def attended(branch: BaseBranch, input: Tensor) -> tuple[Tensor, Tensor]:
    """The map of an input, and a tensor equal to the input, which what uses the map must take in its place.

    On a GPU the pooling's gradient is then added to that of the tensor's only other use in place.
    """
    if not takes_pooled(branch, input) or not pools_beside(input, branch.attention_size[2:]):
        return input, branch(input)
    passed, pooled = pool_beside(input, branch.attention_size[2:])
    return passed, branch(passed, pooled)


def takes_pooled(branch: BaseBranch, input: Any) -> bool:
    """Whether a branch may get what was pooled for it: nothing watches what comes in, and torch.fx does not trace."""
    of_library = isinstance(input, Tensor) and type(branch) is AttentionBranch
    return of_library and branch.pool is None and unwatched((branch,))


def pointwise(conv: Any, pooled: Tensor) -> Tensor:
    """A pointwise convolution; of a single position it is a linear layer, which a CPU runs in a tenth of the time."""
    if isinstance(pooled, Tensor) and pooled.device.type == "cpu" and type(conv) in _CONV.values() and eager(pooled):
        one = product(pooled.shape[2:]) == 1 and conv.weight.dtype == pooled.dtype and conv.groups == 1
        if one and unwatched((conv,)):
            output = F.linear(pooled.flatten(1), conv.weight.flatten(1), conv.bias)
            return output.reshape(*output.shape, *pooled.shape[2:])
    convolved: Tensor = conv(pooled)
    return convolved


def _made_pool(pool: MakePool, size: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    made = pool(size)
    if not callable(made):
        raise TypeError(
            f"pool must return a module or a function when it is called with a size, {size}, as nn.AdaptiveMaxPool2d "
            f"does; got {pool!r}, which returned {made!r}"
        )
    return made


def _takes_batch_statistics(norm: nn.Module) -> bool:
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or isinstance(norm, nn.SyncBatchNorm):
        return False  # (that one takes them over several processes, and knows how many)
    return norm.training or norm.running_mean is None


def check_batch_statistics(norms: Sequence[nn.Module], pooled: Tensor, layer: str) -> None:
    """Raises a ValueError if a norm would take batch statistics of one value a channel.

    Args:
        norms: of a branch.
        pooled: what comes into it.
        layer: what the branch is of, for the message.
    """
    if any(_takes_batch_statistics(norm) for norm in norms):
        _check_statistics(pooled, layer)


def _check_statistics(pooled: Tensor, layer: str) -> None:
    if product((pooled.shape[0], *pooled.shape[2:])) == 1:
        raise ValueError(
            f"{layer}: the attention branch cannot take batch statistics of one value a channel: its "
            f"input has batch size 1 and is pooled to {tuple(pooled.shape[2:])}. Train with at least 2 samples "
            "a batch, call .eval() on the norm layers, or give the layer another norm_layer, such as "
            "functools.partial(nn.GroupNorm, 1)"
        )


def _checked_pool(pooled: Tensor, size: tuple[int, ...]) -> Tensor:
    if not isinstance(pooled, Tensor) or tuple(pooled.shape[1:]) != size:
        got = tuple(pooled.shape) if isinstance(pooled, Tensor) else type(pooled).__name__
        raise ValueError(
            f"AW-convolution: pool of the attention branch must map the input to shape {('N', *size)}, got {got}; "
            f"it is called with the last sizes, {size[1:]}, and makes what pools to them"
        )
    return pooled


# torch.fx does not look into these: they depend on the shapes of their arguments.
for _function in ("average_pool", "_check_statistics", "_checked_pool"):
    torch.fx.wrap(_function)
