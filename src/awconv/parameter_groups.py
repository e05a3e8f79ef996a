"""The parameters of an AW network, apart by what they are, for optimisers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from awconv.odconv import WITH_BRANCHES
from awconv.relative import refuse_fused
from awconv.train_only import head_parameters, unwrapped


def parameter_groups(
    model: nn.Module,
    *,
    branch: Mapping[str, Any] | None = None,
    weight: Mapping[str, Any] | None = None,
    head: Mapping[str, Any] | None = None,
    rest: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Splits the trainable parameters of a model into groups with options of their own.

    After ``awconv.convert(model, init="identity")`` the plain network's rate and decay suit the weights, and on
    held-out images they suited the branches, too (docs/retrofit.md): give options for a reason. A new classifier wants
    about ten times the rate of a pretrained network.

    Args:
        model: a network with AW-convolutions.
        branch: options for the attention branches, such as ``lr`` or ``weight_decay``. The optimiser's options hold
            for what is not given.
        weight: options for the weights that the attention multiplies.
        head: options for the classifier, as :func:`awconv.train_only` finds it. None leaves it in the rest.
        rest: options for all other parameters (biases of AW-convolutions too).

    Returns:
        Groups as the optimisers of ``torch.optim`` and timm take them, called ``"branch"``, ``"weight"``, ``"head"``
        and ``"rest"``. A parameter that does not require a gradient is in none, and an empty group is left out.

    Raises:
        TypeError: the model is no module.
        ValueError: the model has no AW-convolution, or no classifier that options were given for, or options are no
            mapping or hold ``params`` or ``name``.

    Examples:
        >>> import torch
        >>> import awconv
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), awconv.AWConv2d(8, 16, 3))
        >>> groups = awconv.parameter_groups(model, branch={"lr": 0.01, "weight_decay": 0.0})
        >>> optimizer = torch.optim.SGD(groups, lr=0.001, momentum=0.9, weight_decay=1e-4)
        >>> [(group["name"], len(group["params"]), group["lr"]) for group in optimizer.param_groups]
        [('branch', 6, 0.01), ('weight', 1, 0.001), ('rest', 3, 0.001)]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"parameter_groups: model must be an nn.Module, got {model!r}")
    refuse_fused(model, "parameter_groups")
    options = {"branch": branch, "weight": weight, "head": head, "rest": rest}
    for name, given in options.items():
        if given is not None and (not isinstance(given, Mapping) or {"params", "name"} & set(given)):
            raise ValueError(f"parameter_groups: {name} must hold options of an optimiser, such as lr, got {given}")
    branches = branch_parameters(model)
    if not branches:
        raise ValueError(
            f"parameter_groups: {type(model).__name__} has no AW-convolution; convert it first (awconv.convert)"
        )
    weights: Any = {module.weight for module in model.modules() if isinstance(module, WITH_BRANCHES)}
    heads = set()
    if head is not None:
        heads = head_parameters(unwrapped(model))
    if head is not None and not heads:
        raise ValueError(
            f"parameter_groups: {type(model).__name__} has no classifier under get_classifier(), fc, classifier, head "
            "or heads; leave head out"
        )
    members: dict[str, list[nn.Parameter]] = {name: [] for name in options}
    kinds: dict[str, set[nn.Parameter]] = {"branch": branches, "weight": weights, "head": heads}
    for parameter in model.parameters():
        if parameter.requires_grad:
            members[next((kind for kind, group in kinds.items() if parameter in group), "rest")].append(parameter)
    return [{"name": name, "params": members[name], **(options[name] or {})} for name in options if members[name]]


def branch_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of a model's attention branches, those of ODConvs included; none for a network without.

    Examples:
        >>> import awconv
        >>> from awconv.parameter_groups import branch_parameters
        >>> sum(parameter.numel() for parameter in branch_parameters(awconv.AWConv2d(64, 64, 3)))
        648
    """
    layers = (module for module in model.modules() if isinstance(module, WITH_BRANCHES))
    return {parameter for layer in layers for branch in layer.branches() for parameter in branch.parameters()}
