"""Compares what an optimizer holds with what a network has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from awconv.parameter_groups import branch_parameters
from awconv.train_only import unwrapped

_LISTED = 4


def check_optimizer(model: nn.Module, optimizer: Any) -> None:
    """Checks that an optimizer trains all parameters of a model that require a gradient, and no others.

    :func:`awconv.convert` makes new parameters, the branches. An optimizer that was made before does not know them: the
    training runs, and they stay what they were.

    Args:
        model: a network, also in what ``torch.compile`` or ``DistributedDataParallel`` has wrapped around it.
        optimizer: of ``torch.optim``, or another object with ``param_groups``.

    Raises:
        TypeError: the model is no module, or the optimizer has no ``param_groups``.
        ValueError: the optimizer lacks trainable parameters, or holds parameters that the model does not have. Frozen
            parameters may be in it or not.

    Examples:
        >>> import torch
        >>> import awconv
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> model = awconv.convert(model)
        >>> awconv.check_optimizer(model, optimizer)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: check_optimizer: the optimizer lacks 6 of the 10 parameters that train: 6 of attention branches ...
        >>> awconv.check_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"check_optimizer: model must be an nn.Module, got {model!r}")
    if not isinstance(getattr(optimizer, "param_groups", None), Sequence):
        raise TypeError(
            f"check_optimizer: optimizer must have param_groups, as those of torch.optim, got {optimizer!r}"
        )
    model = unwrapped(model)
    named = {parameter: name for name, parameter in model.named_parameters()}
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    trained = [parameter for parameter in named if parameter.requires_grad]
    missing = [parameter for parameter in trained if parameter not in held]
    strangers = [parameter for parameter in held if parameter not in named]
    problems = []
    if missing:
        branches = branch_parameters(model)
        of_branches = [named[parameter] for parameter in missing if parameter in branches]
        others = [named[parameter] for parameter in missing if parameter not in branches]
        kinds = [
            f"{len(names)} of {kind} ({', '.join(names[:_LISTED])}{', ...' if len(names) > _LISTED else ''})"
            for kind, names in (("attention branches", of_branches), ("the rest", others))
            if names
        ]
        problems.append(f"lacks {len(missing)} of the {len(trained)} parameters that train: {' and '.join(kinds)}")
    if strangers:
        shapes = ", ".join(sorted({"lazy" if is_lazy(one) else str(tuple(one.shape)) for one in strangers})[:_LISTED])
        problems.append(f"holds {len(strangers)} that the model does not have, of shapes such as {shapes}")
    if problems:
        raise ValueError(
            f"check_optimizer: the optimizer {', and '.join(problems)}. It was made before awconv.convert, or of "
            "another network, or layers were replaced since: make it last, of awconv.parameter_groups(model) or "
            "model.parameters(); what must not train wants no gradient (awconv.train_only)"
        )
