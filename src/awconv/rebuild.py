"""What timm keeps of how a network was built, for a converted one.

``timm.models.save_for_hf`` and ``push_to_hf_hub`` describe a network by its architecture and its arguments, and
``timm.create_model`` builds it by them again. :func:`awconv.convert` changes the network of both.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from awconv.layers import AW_LAYERS

CONVERTED = "awconv_converted"
"""A network of timm after :func:`awconv.convert`, under the name that timm knows it by (awconv.models.registry)."""


def remember_conversion(model: nn.Module, layers: Sequence[str], arguments: Mapping[str, Any]) -> None:
    """Lets timm describe a network as a converted one. A network that timm did not build is left as it is.

    Args:
        model: the network, converted.
        layers: the names of its convolutions that became others. They are kept in the place of a selection, which may
            be a function.
        arguments: those of :func:`awconv.convert` beside the selection that are not the defaults. Where text cannot say
            one of them, timm refuses to save the network, and asks for ``model_args``.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    if not isinstance(cfg, dict) or not cfg.get("architecture"):
        return
    network_args = dict(getattr(model, "_model_args", {}))  # where timm keeps them, since 1.0.31
    convert: dict[str, Any] = {"select": [glob.escape(name) for name in layers]}
    convert |= {name: value if _is_text(value) else NotText(repr(value)) for name, value in arguments.items()}
    _describe(model, CONVERTED, dict(network=cfg["architecture"], network_args=network_args, convert=convert))


def forget_conversions(model: nn.Module) -> None:
    """Lets timm describe a network as the one that it was before all its conversions."""
    while getattr(model, "pretrained_cfg", None) and model.pretrained_cfg.get("architecture") == CONVERTED:  # type: ignore[operator,union-attr]
        arguments: Any = getattr(model, "_model_args", {})
        if "network" not in arguments:
            return
        _describe(model, arguments["network"], dict(arguments.get("network_args") or {}))


def forget_layers(model: nn.Module) -> None:
    """Of a network some of whose AW-convolutions became plain ones in a way that no description has: lets timm refuse
    to save it. Where none is left, the network is again what it was before its conversions."""
    cfg, arguments = getattr(model, "pretrained_cfg", None), getattr(model, "_model_args", None)
    if not isinstance(cfg, dict) or not isinstance(arguments, dict):
        return
    if cfg.get("architecture") == CONVERTED and not any(isinstance(module, AW_LAYERS) for module in model.modules()):
        forget_conversions(model)
    else:
        _describe(model, cfg.get("architecture", ""), arguments | dict(folded=NotText("some of its layers")))


class NotText:
    """In the place of an argument that JSON cannot say, and that pickle could not keep, such as a function.

    Args:
        value: what it was, for people.
    """

    def __init__(self, value: str) -> None:
        self.value = value

    def __repr__(self) -> str:
        return self.value


def _is_text(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _describe(model: Any, architecture: str, arguments: dict[str, Any]) -> None:
    cfg = model.pretrained_cfg | dict(architecture=architecture)
    if getattr(model, "default_cfg", None) is model.pretrained_cfg:
        model.default_cfg = cfg  # timm's older name for it
    model.pretrained_cfg, model._model_args = cfg, arguments
