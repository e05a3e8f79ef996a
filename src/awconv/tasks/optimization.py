"""Optimiser and learning rate schedule of a training."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers, param_groups_weight_decay
from torch import nn
from torch.optim import Optimizer

from awconv.models.squeeze_excite import IdentitySqueezeExcite
from awconv.parameter_groups import branch_parameters
from awconv.tasks.checks import check_numbers
from awconv.train_only import head_parameters
from awconv.usage import near

_MOST = 1e18  # products of two such numbers are finite in single precision


@dataclass(frozen=True)
class Optimization:
    """Optimiser, linear warm-up and decay of the learning rate.

    Attributes: the arguments of :class:`awconv.tasks.Task` with the same names.

    Raises:
        ValueError: a number is out of its range.
    """

    optimizer: str
    optimizer_args: dict[str, Any]
    lr: float
    branch_lr_factor: float
    head_lr_factor: float
    momentum: float
    weight_decay: float
    branch_weight_decay: float | None
    warmup_epochs: float
    decay_epochs: tuple[float, ...]
    decay_rate: float

    def __post_init__(self) -> None:
        check_numbers(
            lr=(self.lr, 0, _MOST),
            branch_lr_factor=(self.branch_lr_factor, 0, _MOST),
            head_lr_factor=(self.head_lr_factor, 0, _MOST),
            momentum=(self.momentum, 0, 1),
            weight_decay=(self.weight_decay, 0, _MOST),
            branch_weight_decay=(self.branch_weight_decay, 0, _MOST),
            warmup_epochs=(self.warmup_epochs, 0, _MOST),
            decay_rate=(self.decay_rate, 0, 100 * _MOST),
            **{f"decay_epochs[{index}]": (epoch, 0, _MOST) for index, epoch in enumerate(self.decay_epochs)},
        )

    def make_optimizer(self, network: nn.Module, fused: bool = False) -> Optimizer:
        """An optimizer of a network's parameters.

        Args:
            network: has the parameters.
            fused: update all parameters by one kernel, where the optimizer can and ``optimizer_args`` choose no other
                way: a small network's update takes as long as its launches.

        Raises:
            ValueError: timm does not know the optimizer, or the optimizer an argument; or the classifier has a rate of
                its own, and the network no classifier.
        """
        groups = self._parameter_groups(network)
        try:
            ways: dict[str, Any] = {"fused": True} if fused and self._can_fuse() else {}
            return create_optimizer_v2(
                groups, opt=self.optimizer, lr=self.lr, momentum=self.momentum, **ways, **self.optimizer_args
            )
        except Exception as error:  # of timm, or of any optimizer
            close = near(self.optimizer, map(str, list_optimizers()))
            hint = f"; near it: {', '.join(close)}" if self.optimizer not in close and close else ""
            raise ValueError(
                f"optimizer must be a name of timm.optim.list_optimizers(), and optimizer_args its arguments, got "
                f"{self.optimizer!r} and {self.optimizer_args}: {error}{hint}"
            ) from error

    def _can_fuse(self) -> bool:
        try:
            kind: Any = get_optimizer_class(self.optimizer, bind_defaults=False)
        except Exception:  # of a name that timm does not know, which fails later, or of a composed one
            return False
        ways = {"fused", "foreach", "differentiable"}
        return "fused" in inspect.signature(kind).parameters and not ways & set(self.optimizer_args)

    def _parameter_groups(self, network: nn.Module) -> list[dict[str, Any]]:
        """timm's groups, with and without weight decay, each split into attention branches, classifier and the rest."""
        groups: list[dict[str, Any]] = param_groups_weight_decay(
            network, self.weight_decay, no_weight_decay_list=getattr(network, "no_weight_decay", set)()
        )
        branch = _of_attention(network)
        head = self._head(network) - branch
        own_decay = self.branch_weight_decay
        split = []
        for group in groups:
            decay = group["weight_decay"] and (group["weight_decay"] if own_decay is None else own_decay)
            rest = [p for p in group["params"] if p not in branch and p not in head]
            split.append(group | dict(lr=self.lr, params=rest))
            of_branch = [p for p in group["params"] if p in branch]
            split.append(group | dict(lr=self.lr * self.branch_lr_factor, weight_decay=decay, params=of_branch))
            of_head = [p for p in group["params"] if p in head]
            split.append(group | dict(lr=self.lr * self.head_lr_factor, params=of_head))
        return [group for group in split if group["params"]]

    def _head(self, network: nn.Module) -> set[nn.Parameter]:
        """The classifier's parameters, where they have a rate of their own."""
        if self.head_lr_factor == 1:
            return set()
        found = head_parameters(network)
        if not found:
            raise ValueError(
                f"head_lr_factor is {self.head_lr_factor:g}, and {type(network).__name__} has no classifier under "
                "get_classifier(), fc, classifier, head or heads; leave it out"
            )
        return found

    def schedule(self, steps_per_epoch: float, steps: float) -> Callable[[int], float]:
        """A function from the optimizer's step to a factor of the learning rate.

        Args:
            steps_per_epoch: the optimizer's steps in an epoch.
            steps: its steps in the whole training; may be infinite.

        Raises:
            ValueError: ``steps`` is infinite, and a cosine decay needs an end.
        """
        boundaries = [epoch * steps_per_epoch for epoch in self.decay_epochs]
        if not boundaries and math.isinf(steps):
            raise ValueError("a cosine decay needs an end: give trainer.max_epochs or trainer.max_steps")
        warmup = int(min(steps, round(self.warmup_epochs * steps_per_epoch)))

        def share(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            if boundaries:
                return float(self.decay_rate ** sum(step >= boundary for boundary in boundaries))
            return (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1.0, steps - warmup)))) / 2

        return share


def _of_attention(network: nn.Module) -> set[nn.Parameter]:
    """The parameters of what a pretrained network was given: attention branches, and their peer."""
    peers = (module for module in network.modules() if isinstance(module, IdentitySqueezeExcite))
    return branch_parameters(network) | {parameter for peer in peers for parameter in peer.parameters()}
