"""Checks of a task's arguments, before anything is built."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import timm
from timm.models import build_model_with_cfg

import awconv  # noqa: F401  # registers its models with timm
from awconv.usage import near

# What timm takes beside a network's own arguments: where weights come from, and how a network is built. A checkpoint
# of somebody else's must not decide it.
_NOT_THE_NETWORKS = {
    name
    for function in (timm.create_model, build_model_with_cfg)
    for name, parameter in inspect.signature(function).parameters.items()
    if parameter.kind is not parameter.VAR_KEYWORD
} | {"num_classes", "in_chans", "features_only"}


def check_numbers(**numbers: tuple[float | None, float, float]) -> None:
    """Raises a ValueError for a number that is NaN or out of its range.

    Args:
        **numbers: by the argument's name: the number, or None, and the ends of its range.
    """
    for name, (number, least, most) in numbers.items():
        if number is not None and not least <= number <= most:  # which NaN is not, either
            raise ValueError(f"{name} must be a number from {least:g} to {most:g}, got {number}")


def near_networks(name: str) -> list[str]:
    """Names that timm knows and that are like another one."""
    return near(name, timm.list_models()) or timm.list_models(f"*{name.removeprefix('aw_').split('_')[0]}*")[:8]


def check_network(name: str, arguments: Mapping[str, Any] | None = None) -> None:
    """Raises a ValueError if timm does not know the network or its weights, and names similar ones; also if an argument
    is not the network's own."""
    if not isinstance(arguments, Mapping | None):
        raise ValueError(f"network_args must be a mapping, got {type(arguments).__name__}")
    taken = sorted(key for key in arguments or {} if key in _NOT_THE_NETWORKS or str(key).startswith("pretrained"))
    if taken:
        raise ValueError(
            f"network_args must be the network's own arguments, got {', '.join(taken)}; weights are given by "
            "--model.pretrained, the classes by the data"
        )
    if not isinstance(name, str) or not timm.is_model(name):
        close = near_networks(str(name))
        raise ValueError(
            f"network must be a name that timm.create_model knows, got {name!r}"
            + (f"; near it: {', '.join(close)}" if close else "")
            + "; --import=FILE.py registers networks of your own"
        )
    base, _, tag = name.partition(".")
    if tag and not timm.is_model_pretrained(name):
        tags = timm.list_pretrained(base + ".*")
        raise ValueError(f"network {name!r} has no such weights; there are {', '.join(tags) or 'none'}")
