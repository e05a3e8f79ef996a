"""The choices that an AW branch leaves, as variants of a comparison."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import yaml

from awconv.compare.runs import Variant

CHOICES = (
    "reduction=4 reduction=8 in_expansion=1 out_expansion=2 kernel_expansion=3 activation=tanh activation=relu "
    "residual=false norm_layer=none select=layer3.* branch_lr_factor=0.1 branch_lr_factor=3 branch_weight_decay=0"
)

_LAYER = (
    "reduction",
    "in_expansion",
    "out_expansion",
    "kernel_expansion",
    "activation",
    "residual",
    "norm_layer",
    "select",
    "init",
)
_TRAINING = ("branch_lr_factor", "branch_weight_decay")


def arms(network: str, changes: Sequence[str]) -> list[Variant]:
    """One variant for each change, after the network as it is, which is called ``default``.

    Args:
        network: an AW network.
        changes: such as ``"reduction=4"``, or ``"reduction=4+activation=tanh"`` for both at once.

    Raises:
        ValueError: a change is none that a branch leaves, or there twice.
    """
    if len(set(changes)) < len(changes):
        raise ValueError(f"changes must differ, got {' '.join(changes)}")
    return [Variant("default", network=network), *(_arm(network, change) for change in changes)]


def _arm(network: str, change: str) -> Variant:
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
        else:
            aw_args[name] = None if text == "none" else yaml.safe_load(text) if name != "select" else text
    if aw_args:
        arguments.append(f"--model.network_args.aw_args={json.dumps(aw_args)}")
    return Variant(change.replace("*", "all").replace("/", "_"), network=network, arguments=tuple(arguments))
