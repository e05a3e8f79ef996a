"""Attention branches of a user's own, in the place of :class:`awconv.branch.AttentionBranch`."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from awconv.activation import Start
from awconv.branch_spec import BranchSpec, MakeBranch
from awconv.ops.tracing import autocasting
from awconv.relative import BaseBranch


class CustomBranch(BaseBranch):
    """A module of a user's as the attention branch of a layer, by the contract of :class:`awconv.BranchSpec`.

    Args:
        branch: the module.
        spec: what it was made for.
    """

    def __init__(self, branch: nn.Module, spec: BranchSpec) -> None:
        super().__init__(spec.attention_size, spec.residual)
        self.branch = branch
        self.layer = spec.describe_layer()
        self._start: Start | None = None
        _PARTS.update(branch.modules())

    @property
    def start(self) -> Start | None:
        return self._start

    def forward(self, input: Tensor) -> Tensor:
        """Maps an input of shape (N, C1, H, W) to a compact attention map, shape (N, \\*attention_size).

        Raises:
            TypeError: the user's module returns no tensor, or one of another dtype than the input's.
            ValueError: it returns another shape.
        """
        attention: Tensor = _checked(
            self.branch(input), input, self.attention_size, type(self.branch).__name__, self.layer
        )
        if self.relative_to is not None:
            gain = 1 + self.relative_to if self.residual else self.relative_to
            attention = (attention - self.relative_to) / gain
        return attention

    def start_as_identity(self) -> None:
        """Starts as the constant that ``start_constant()`` of the user's module gives.

        Raises:
            ValueError: the module lacks the two methods, or its constant leaves no weights.
        """
        start_constant = _method(self.branch, "start_constant")
        if start_constant is None or _method(self.branch, "is_constant") is None:
            raise ValueError(
                f'init="identity" needs two methods of the branch {type(self.branch).__name__}: start_constant(), '
                "which makes its map a constant a0 for every input, with a gradient that leads away, and returns a0; "
                "and is_constant(), which says whether it is that constant now. awconv.BranchSpec describes them"
            )
        with torch.no_grad():
            constant = start_constant()
        if isinstance(constant, bool) or not isinstance(constant, int | float):
            raise ValueError(
                f"start_constant() of the branch {type(self.branch).__name__} must return a number, the constant that "
                f"its map is now, got {constant!r}"
            )
        self._start = self._start_at(constant)
        if not self._start.gain:
            raise ValueError(
                f"start_constant() of the branch {type(self.branch).__name__} must leave weights, and with the "
                f"constant {constant:g} {'1 + a0' if self.residual else 'a0, without the residual form,'} is 0; start "
                "at another"
            )
        self._set_relative(True)

    def is_identity(self) -> bool:
        """Whether the map is 0 for every input; ``is_constant()`` of the user's module says so."""
        is_constant = _method(self.branch, "is_constant")
        on_meta = any(parameter.is_meta for parameter in self.branch.parameters())
        return self.relative and is_constant is not None and not on_meta and bool(is_constant())

    def _start_at(self, constant: float) -> Start:
        return Start(0.0, float(constant), float(1 + constant if self.residual else constant))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        told = state_dict.get(f"{prefix}relative_to")
        if self._start is None and type(told) is Tensor and told.dim() == 0 and not told.is_meta:
            self._start = self._start_at(told.item())
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _PARTS.update(self.branch.modules())


_PARTS: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def is_part_of_custom_branch(module: nn.Module) -> bool:
    """Whether a module is, or is in, a branch of a user's own."""
    return module in _PARTS


def _method(module: nn.Module, name: str) -> Callable[[], Any] | None:
    method = getattr(module, name, None)
    return method if callable(method) else None


def make_custom_branch(make: MakeBranch, spec: BranchSpec) -> BaseBranch:
    """What ``branch=`` makes of a spec, as a layer's attention branch.

    Raises:
        TypeError: it makes no module.
        ValueError: it makes an ``AttentionBranch`` of other sizes or of another form.
    """
    module = make(spec)
    if not isinstance(module, nn.Module):
        raise TypeError(f"{spec.describe_layer()}: branch must return an nn.Module, got {module!r}")
    if not isinstance(module, BaseBranch):
        return CustomBranch(module, spec)
    found, expected = (module.attention_size, module.residual), (spec.attention_size, spec.residual)
    if found != expected:
        raise ValueError(
            f"{spec.describe_layer()}: branch must return a branch with attention_size {expected[0]} and "
            f"residual={expected[1]}, got {found[0]} and residual={found[1]}; layers that share a branch need one shape"
        )
    return module


class BranchesOfNetwork:
    """Makes the branches of a network's layers: a module that was made for several layers is one branch in all of them.

    Args:
        make: as given to ``branch=``.
    """

    def __init__(self, make: MakeBranch) -> None:
        self._make = make
        self._made: dict[tuple[nn.Module, tuple[int, ...], bool], CustomBranch] = {}

    def __call__(self, spec: BranchSpec) -> BaseBranch:
        branch = make_custom_branch(self._make, spec)
        if not isinstance(branch, CustomBranch):
            return branch
        return self._made.setdefault((branch.branch, spec.attention_size, spec.residual), branch)


def _checked(attention: Any, input: Tensor, size: tuple[int, ...], branch: str, layer: str) -> Tensor:
    """The map, if it is as the layer needs it."""
    expected = f"{layer}: the branch {branch} must return"
    if not isinstance(attention, Tensor):
        raise TypeError(f"{expected} a tensor, the attention map, got {type(attention).__name__}")
    if attention.dim() != len(size) + 1 or attention.shape[0] != input.shape[0] or tuple(attention.shape[1:]) != size:
        raise ValueError(
            f"{expected} a map of shape (N, *attention_size), {(input.shape[0], *size)}, got {tuple(attention.shape)}; "
            "the branch finds attention_size in the BranchSpec that it is made of"
        )
    if attention.dtype != input.dtype and not autocasting(input.device.type):
        raise TypeError(
            f"{expected} a map with the dtype of its input, {input.dtype}, got {attention.dtype}; end it with "
            ".to(input.dtype)"
        )
    return attention


torch.fx.wrap("_checked")  # torch.fx does not look into it: it depends on the shapes of its arguments
