"""Any CNN to its AW twin, by replacing convolutions."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from awconv.layers import AWConv1d, AWConv2d, AWConv3d

_TWINS: dict[type[nn.Module], type[AWConv1d | AWConv2d | AWConv3d]] = {
    nn.Conv1d: AWConv1d,
    nn.Conv2d: AWConv2d,
    nn.Conv3d: AWConv3d,
}
_AW = (AWConv1d, AWConv2d, AWConv3d)
_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_log = logging.getLogger(__name__)


def convert(
    model: nn.Module,
    select: Callable[[str, nn.Module], bool] | None = None,
    **arguments: Any,
) -> nn.Module:
    """Replaces convolutions of a model by AW-convolutions, in place.

    The new layers take over the old ones' own parameters (not copies), and so their dtype, device and
    ``requires_grad``, and their training mode. A module that occurs in several places is replaced by one layer in all
    of them. A subclass of a convolution, or one with hooks, is left alone and logged: what it computes is not known.

    Args:
        model: any module.
        select: called with the name and the module of each convolution; true converts it. By default every spatial
            convolution (a kernel larger than 1) but the stem, which is the first of them.
        **arguments: ``reduction``, ``in_expansion``, ``out_expansion``, ``kernel_expansion``, ``activation``,
            ``residual`` and ``norm_layer``, as for :class:`awconv.AWConv2d`.

    Returns:
        The model; a new layer if the model is itself a convolution.

    Raises:
        TypeError: an argument is none of these.
        ValueError: nothing was selected, or an argument does not fit a selected layer. The model is left as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be an nn.Module, got {model!r}; timm.create_model makes one of a name")
    if select is not None and not callable(select):
        raise TypeError(
            "convert: select must be a function of a layer's name and the layer, such as "
            f"lambda name, layer: name.startswith('layer4'), got {select!r}"
        )
    branches = {part for module in model.modules() if isinstance(module, _AW) for part in module.attention.modules()}
    convolutions = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _Convolution) and not isinstance(module, _AW) and module not in branches
    }
    if select is None:
        spatial = [name for name, module in convolutions.items() if _is_spatial(module)]
        chosen = set(spatial[1:] if spatial != [""] else spatial)
    else:
        chosen = {name for name, module in convolutions.items() if select(name, module)}

    twins: dict[nn.Module, nn.Module] = {}
    for name in convolutions:
        if name not in chosen:
            continue
        old = convolutions[name]
        if type(old) not in _TWINS or any(getattr(old, hooks) for hooks in _HOOKS):
            _log.warning("convert: %s is left as it is: %s has hooks or is a subclass", name, type(old).__name__)
            continue
        try:
            twins[old] = _twin(old, arguments)
        except ValueError as error:
            raise ValueError(f"convert: layer {name!r}: {error}") from error
    if not twins:
        raise ValueError(
            f"convert: no convolution of {type(model).__name__} was selected for conversion; it has "
            + (", ".join(f"{name!r} ({module})" for name, module in list(convolutions.items())[:8]) or "none")
            + ("" if select else ". By default only kernels larger than 1 are, without the first one; give select=")
        )

    if model in twins:
        return twins[model]
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in twins:
                parent._modules[name] = twins[child]
    return model


def _is_spatial(module: _Convolution) -> bool:
    return max(module.kernel_size) > 1


def _twin(old: _Convolution, arguments: dict[str, Any]) -> nn.Module:
    new = _TWINS[type(old)](
        old.in_channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        old.dilation,  # type: ignore[arg-type]
        old.groups,
        old.bias is not None,
        old.padding_mode,
        device=old.weight.device,
        dtype=old.weight.dtype,
        **arguments,
    )
    new.weight = old.weight
    new.bias = old.bias
    return new.train(old.training)
