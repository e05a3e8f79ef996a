"""Methods of other libraries that fold several layers into one, after some of them have got attention."""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any, NoReturn

from torch import nn

# Methods without arguments that make one plain convolution of several layers: timm's, RepVGG's, RepLKNet's, peft's,
# Ultralytics'.
_FOLDING = (
    "reparameterize",
    "fuse",
    "fuse_convs",
    "switch_to_deploy",
    "convert_to_deploy",
    "merge_kernel",
    "merge",
)
# Those that keep the attention: they scale output channels of K, and so of K (1 + A), by the norm behind it and make a
# bias, as awconv.fuse does, or remove what inference does not run.
_EXACT = {
    "ultralytics.nn.tasks.BaseModel.fuse",
    "ultralytics.nn.modules.head.Detect.fuse",
    "ultralytics.nn.modules.head.Pose26.fuse",
    "ultralytics.nn.modules.head.Segment26.fuse",
    "ultralytics.nn.modules.block.Proto26.fuse",
}
# Those that the first of _EXACT calls of the blocks in a network, to run their `forward_fuse` afterwards. They add
# kernels, which attention multiplies each by its own map: such a block must stay as it is, and the rest can be fused.
_OF_BLOCKS = {
    "ultralytics.nn.modules.conv.RepConv.fuse_convs",
    "ultralytics.nn.modules.block.RepVGGDW.fuse",
}
_log = logging.getLogger(__name__)


def keep_attention(model: nn.Module, layers: set[nn.Module]) -> None:
    """Makes an error of each method that would fold one of some layers into a plain convolution.

    Blocks of Ultralytics, which a network's own method folds with others, then stay as they are instead.

    Args:
        model: a network.
        layers: those that have attention, or will have it, in the model.
    """
    refused, left = set(), set()
    for module in model.modules():
        methods = [method for method in _FOLDING if _is_called_without_arguments(module, method)]
        if not methods or layers.isdisjoint(module.modules()):
            continue
        for method in methods:
            known, name = _origin(module, method), f"{type(module).__name__}.{method}"
            if known in _OF_BLOCKS:
                setattr(module, method, functools.partial(_stay, name))
                setattr(module, "forward_fuse", functools.partial(_run_unfused, module))  # noqa: B010 - a Module types it
                left.add(f"{name}()")
            elif known not in _EXACT:
                setattr(module, method, functools.partial(_lose_attention, name))  # stays in copies and pickles
                refused.add(f"{name}()")
    if refused:
        _log.warning(
            "convert: %s would lose the attention, and now raises an error; to fold a network, do it before conversion",
            ", ".join(sorted(refused)),
        )
    if left:
        _log.warning(
            "convert: %s would lose the attention, and now leaves its block as it is; the rest of the network fuses",
            ", ".join(sorted(left)),
        )


def _origin(module: nn.Module, method: str) -> str:
    function = getattr(type(module), method)
    return f"{function.__module__}.{function.__qualname__}"


def _is_called_without_arguments(module: nn.Module, method: str) -> bool:
    function = getattr(type(module), method, None)
    if not inspect.isfunction(function):
        return False
    try:
        inspect.signature(function).bind(module)
    except TypeError:  # something else of that name, which forward may call
        return False
    return True


def keeps_attention(value: object) -> bool:
    """Whether an attribute of a module is what :func:`keep_attention` put in the place of a method."""
    return isinstance(value, functools.partial) and value.func in (_lose_attention, _stay, _run_unfused)


def _lose_attention(name: str, *arguments: Any, **options: Any) -> NoReturn:
    raise ValueError(
        f"{name}() would make a plain convolution of layers with attention, and lose their attention. Fold the plain "
        "network first (with timm.utils.reparameterize_model, for one), then call awconv.convert"
    )


def _stay(name: str) -> None:
    _log.info("%s() leaves the block as it is: it has AW-convolutions", name)


def _run_unfused(module: nn.Module, *inputs: Any) -> Any:
    return type(module).forward(module, *inputs)
