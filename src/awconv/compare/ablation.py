"""Settings of the attention branch as variants of a comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import timm
import torch
import yaml

from awconv.compare.variants import Change
from awconv.convert import ATTENTION_ARGUMENTS
from awconv.layers import AW_LAYERS

_CHOICES = (
    "reduction=4 reduction=8 in_expansion=1 out_expansion=2 kernel_expansion=3 activation=tanh activation=relu "
    "residual=false norm_layer=none init=identity branch_lr_factor=0.1 branch_lr_factor=3 branch_weight_decay=0"
)

_LAYER = (*ATTENTION_ARGUMENTS, "norm_layer", "select", "init")
_TRAINING = ("branch_lr_factor", "branch_weight_decay")


def choices(network: str) -> list[str]:
    """Some changes of each kind, and AW in the last stage alone."""
    with torch.device("meta"):
        info: Any = timm.create_model(network).feature_info
    return [*_CHOICES.split(), f"select={info[-1]['module']}.*"]


def arms(network: str, changes: Sequence[str], network_args: Mapping[str, Any] | None = None) -> list[Change]:
    """The network as it is, called ``default``, and one variant for each change.

    Args:
        network: an AW network.
        changes: such as ``"reduction=4"``, or ``"reduction=4+activation=tanh"`` for both at once.
        network_args: the recipe's, to which a change is added.

    Raises:
        ValueError: a change is unknown, given twice, or selects no layer.
    """
    if not changes:
        raise ValueError("vary must name at least one change, such as reduction=4")
    if len(set(changes)) < len(changes):
        raise ValueError(f"changes must differ, got {' '.join(changes)}")
    given = dict(network_args or {})
    return [Change("default", network=network), *(_arm(network, change, given) for change in changes)]


def _arm(network: str, change: str, network_args: dict[str, Any]) -> Change:
    aw_args: dict[str, Any] = {}
    arguments = []
    for part in change.split("+"):
        name, equals, text = part.partition("=")
        if not equals or name not in _LAYER + _TRAINING:
            raise ValueError(
                f"a change must be NAME=VALUE with a name of {', '.join(_LAYER + _TRAINING)}, got {part!r}"
            )
        if name in _TRAINING:
            arguments.append(f"--model.{name}={text}")
        elif name == "select":
            aw_args[name] = _layers(network, text)
        else:
            aw_args[name] = None if text == "none" else _value(part, text)
    if aw_args:
        merged = network_args | {"aw_args": (network_args.get("aw_args") or {}) | aw_args}
        arguments.append(f"--model.network_args={json.dumps(merged)}")
    return Change(change.replace("*", "all").replace("/", "_"), network=network, arguments=tuple(arguments))


def _value(change: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"the value of the change {change!r} is not YAML: {error}") from error


def _layers(network: str, pattern: str) -> list[str]:
    """The network's AW-convolutions whose names match: a selection only leaves out."""
    with torch.device("meta"):
        modules = timm.create_model(network).named_modules()
        names = [name for name, module in modules if isinstance(module, AW_LAYERS)]
    chosen = [name for name in names if fnmatchcase(name, pattern)]
    if not chosen:
        raise ValueError(f"no AW-convolution of {network} is called {pattern!r}; there are {', '.join(names)}")
    return chosen
