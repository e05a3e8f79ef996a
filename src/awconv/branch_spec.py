"""What a layer tells the maker of its attention branch: the contract of ``branch=``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from awconv.activation import ACTIVATIONS, Activation

NormLayer = Callable[[int], nn.Module]
MakePool = Callable[[tuple[int, ...]], Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class BranchSpec:
    """What ``branch=`` of :class:`awconv.AWConv2d` and :func:`awconv.convert` is called with, once for each layer.

    ``branch`` returns a module, the attention branch. The contract:

    - **Map.** The module maps the layer's input, shape (N, in_channels, H, W), to the attention map before Expand,
      shape (N, \\*attention_size), with the dtype of the input (autocast's under autocast). Another shape or dtype is
      an error that names the layer.
    - **Device and dtype.** The layer moves the module to its own.
    - **Sharing.** One module may be returned for several layers. It is trained and counted as one, and has to fit all
      of them. Specs of layers that are alike are equal and have a hash, so that
      ``branch=functools.cache(make_branch)`` shares one module among them. Make a new cache for each network.
    - **Identity.** ``init="identity"`` needs two methods of the module. ``start_constant()`` sets its parameters so
      that the map is a constant a0 for every input, with a gradient that leads away, and returns a0. For weights
      ``K + A * K``, a0 must not be -1; for ``A * K``, not 0. ``is_constant()`` says whether the map is that constant
      now. The layer makes its map relative to a0, weights K (1 + a) / (1 + a0), and keeps a0 in the buffer
      ``relative_to``, as with its own branch (:class:`awconv.layers.AttentionBranch`).
    - **Cost.** :func:`awconv.summary` counts the module's parameters, and the multiply-adds of its convolutions, linear
      layers and matrix products.

    A subclass of ``AttentionBranch`` may be returned, too; ``AttentionBranch.of(spec)`` makes one of a spec.

    Attributes:
        in_channels: C1.
        out_channels: C2.
        kernel_size: (h, w); like the next three, as in the layer.
        stride: (vertical, horizontal).
        padding: two numbers, or ``"same"`` or ``"valid"``.
        dilation: (vertical, horizontal).
        groups: number of groups of channels.
        attention_size: (C2/r_C2, (C1/groups)/r_C1, h/r_hw, w/r_hw), the sizes of one sample's map.
        reduction: as the layer was given it; like the next four, the branch may use it or not.
        activation: a name, a module, or what makes one.
        residual: whether the weights are K + A * K.
        norm_layer: called with a number of channels, or None for no norm.
        pool: called with (h/r_hw, w/r_hw), or None for average pooling.
        name: of the layer in the network that is converted; empty for a layer that is made by itself. Specs that differ
            in nothing else are equal.

    Examples:
        >>> import torch
        >>> from awconv import AWConv2d, BranchSpec
        >>> class OneValuePerChannel(torch.nn.Module):
        ...     def __init__(self, spec: BranchSpec) -> None:
        ...         super().__init__()
        ...         self.linear = torch.nn.Linear(spec.in_channels, spec.attention_size[0])
        ...     def forward(self, input: torch.Tensor) -> torch.Tensor:
        ...         return self.linear(input.mean((2, 3))).sigmoid()[:, :, None, None, None].expand(-1, -1, 1, 3, 3)
        >>> layer = AWConv2d(16, 32, 3, branch=OneValuePerChannel)
        >>> layer(torch.randn(4, 16, 8, 8)).shape
        torch.Size([4, 32, 6, 6])
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    attention_size: tuple[int, ...]
    reduction: int
    activation: Activation
    residual: bool
    norm_layer: NormLayer | None
    pool: MakePool | None
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        layer = f"AWConv{len(self.kernel_size)}d"
        if not callable(self.activation) and self.activation not in ACTIVATIONS:
            raise ValueError(
                f"{layer}: activation must be one of {list(ACTIVATIONS)}, a module, or what makes one, such as "
                f"nn.Hardsigmoid; got {self.activation!r}"
            )
        if self.residual not in (True, False):
            raise ValueError(f"{layer}: residual must be True or False, got {self.residual!r}")
        if not isinstance(self.reduction, int) or self.reduction < 1:
            raise ValueError(f"{layer}: reduction must be a positive integer, got {self.reduction!r}")
        if isinstance(self.norm_layer, nn.Module) or not (self.norm_layer is None or callable(self.norm_layer)):
            raise TypeError(
                f"{layer}: norm_layer must be 'batch', None or something called with a number of channels, such as "
                f"nn.BatchNorm2d, got {self.norm_layer!r}"
            )
        if isinstance(self.pool, nn.Module) or not (self.pool is None or callable(self.pool)):
            raise TypeError(
                f"{layer}: pool must be None or something called with the size to pool to, such as the class "
                f"nn.AdaptiveMaxPool2d, got {self.pool!r}"
            )

    def describe_layer(self) -> str:
        """The layer, for messages."""
        kind = f"AWConv{len(self.kernel_size)}d"
        return f"{kind} {self.name!r}" if self.name else f"{kind}({self.in_channels}, {self.out_channels})"


MakeBranch = Callable[[BranchSpec], Any]


def check_make_branch(layer: str, branch: Any) -> None:
    """Raises a TypeError if ``branch=`` is something else than None or a function."""
    if isinstance(branch, nn.Module) or not (branch is None or callable(branch)):
        raise TypeError(
            f"{layer}: branch must be None or a function of an awconv.BranchSpec that returns a module, got {branch!r}"
            "; one module in several layers is branch=lambda spec: module"
        )
