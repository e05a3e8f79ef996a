"""Settings of the attention branch as variants of a comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import timm
import torch
import yaml

from awconv.compare.variants import Change, find_change
from awconv.convert import ATTENTION_ARGUMENTS, convert
from awconv.layers import AW_LAYERS
from awconv.training.recipe import Recipe

_CHOICES = (
    "reduction=4 reduction=8 in_expansion=1 out_expansion=2 kernel_expansion=3 activation=tanh activation=relu "
    "residual=false input_gain=true norm_layer=none init=identity branch_lr_factor=0.1 branch_lr_factor=3 "
    "branch_weight_decay=0"
)

_LAYER = (*ATTENTION_ARGUMENTS, "norm_layer", "select", "init")
_TRAINING = ("branch_lr_factor", "branch_weight_decay")


def choices(network: str) -> list[str]:
    """Some changes of each kind, and AW in the last stage alone where timm knows the stages."""
    with torch.device("meta"):
        info: Any = getattr(timm.create_model(network), "feature_info", None)
    return [*_CHOICES.split(), *([f"select={info[-1]['module']}.*"] if info else [])]


def arms(
    network: str,
    changes: Sequence[str],
    network_args: Mapping[str, Any] | None = None,
    conversion: Mapping[str, Any] | None = None,
) -> list[Change]:
    """The network as it is, called ``default``, and one variant for each change.

    Args:
        network: an AW network, or one that is converted.
        changes: such as ``"reduction=4"``, or ``"reduction=4+activation=tanh"`` for both at once.
        network_args: the recipe's, to which a change of an AW network is added.
        conversion: arguments of :func:`awconv.convert`, to which a change of a converted network is added.

    Raises:
        ValueError: a change is unknown, given twice, or selects no layer.
    """
    if not changes:
        raise ValueError("vary must name at least one change, such as reduction=4")
    if len(set(changes)) < len(changes):
        raise ValueError(f"changes must differ, got {' '.join(changes)}")
    branch = _Branch(network, dict(network_args or {}), None if conversion is None else dict(conversion))
    return [
        Change("default", network=network, arguments=branch.arguments({})),
        *(_arm(branch, change) for change in changes),
    ]


def find_variant(base: Recipe, given: str) -> Change:
    """What a variant changes, given its name.

    Args:
        base: the recipe.
        given: as for :func:`awconv.compare.variants.find_change`, or with changes of the attention branch after a plus,
            such as ``"aw+reduction=8"`` or ``"aw+input_gain=true+reduction=8"``.

    Raises:
        FileNotFoundError: a YAML file is missing.
        ValueError: there is no such network, it has no attention branch, or a change is unknown.
    """
    name, plus, change = given.partition("+")
    if not plus or given.endswith((".yaml", ".yml")):
        return find_change(base.network, given)
    found = find_change(base.network, name)
    network = found.network or base.network
    conversion = base.conversion if name == "plain" else {} if found.arguments else None
    if found.overlay is not None or (conversion is None and not network.startswith("aw_")):
        raise ValueError(f"{name} has no attention branch that {change} could change; aw+{change} is AW with it")
    branch = _Branch(network, base.network_args, conversion)
    return replace(_arm(branch, change), name=_file_name(given))


@dataclass(frozen=True)
class _Branch:
    """Where a recipe has the arguments of the branch.

    Attributes:
        network: the network.
        network_args: the recipe's.
        conversion: arguments of :func:`awconv.convert`; None for a network that is an AW network by itself.
    """

    network: str
    network_args: dict[str, Any]
    conversion: dict[str, Any] | None

    def arguments(self, changes: Mapping[str, Any]) -> tuple[str, ...]:
        """The command line's arguments for changes of the branch."""
        if self.conversion is not None:
            return (f"--model.convert={json.dumps(self.conversion | dict(changes))}",)
        if not changes:
            return ()
        aw_args = (self.network_args.get("aw_args") or {}) | dict(changes)
        return (f"--model.network_args={json.dumps(self.network_args | {'aw_args': aw_args})}",)

    def layers(self, pattern: str) -> list[str]:
        """The network's AW-convolutions whose names match: a selection only leaves out."""
        with torch.device("meta"):
            network = timm.create_model(self.network)
            if self.conversion is not None:
                network = convert(network, **self.conversion)
        names = [name for name, module in network.named_modules() if isinstance(module, AW_LAYERS)]
        chosen = [name for name in names if fnmatchcase(name, pattern)]
        if not chosen:
            raise ValueError(f"no AW-convolution of {self.network} is called {pattern!r}; there are {', '.join(names)}")
        return chosen


def _arm(branch: _Branch, change: str) -> Change:
    changes: dict[str, Any] = {}
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
            changes[name] = branch.layers(text)
        else:
            changes[name] = None if text == "none" else _value(part, text)
    arguments += branch.arguments(changes)
    return Change(_file_name(change), network=branch.network, arguments=tuple(arguments))


def _file_name(change: str) -> str:
    return change.replace("*", "all").replace("/", "_")


def _value(change: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"the value of the change {change!r} is not YAML: {error}") from error
