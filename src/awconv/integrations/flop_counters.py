"""Counters of operations that go by a module's type or by a graph: what to pass to them, so that they know AW layers.

Each then counts a layer's convolution, its branch and the multiplications by the attention, as :func:`awconv.summary`
does. ``torch.utils.flop_counter.FlopCounterMode`` needs nothing: awconv registers its operators there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from awconv.layer_costs import whole
from awconv.layers import AWConv1d, AWConv2d, AWConv2dSame, AWConv3d
from awconv.odconv import ODConv2d
from awconv.ops import flops, use_algorithm
from awconv.ops.tracing import traced_as_called

__all__ = ["count_by_fvcore", "ptflops_hooks", "thop_ops"]

_LAYERS = (AWConv1d, AWConv2d, AWConv2dSame, AWConv3d, ODConv2d)


def thop_ops() -> dict[Any, Callable[..., None]]:
    """For ``thop.profile(model, inputs=(images,), custom_ops=thop_ops())``.

    It serves thop, which stops at a layer that it has a rule for, and the fork ultralytics-thop, which also adds what
    it finds inside.

    Examples:
        >>> from awconv.integrations.flop_counters import thop_ops
        >>> sorted(layer.__name__ for layer in thop_ops())
        ['AWConv1d', 'AWConv2d', 'AWConv2dSame', 'AWConv3d', 'ODConv2d']
    """
    return dict.fromkeys(_LAYERS, _for_thop)


def _for_thop(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    operations = whole(layer, inputs[0], output)  # which may run a branch, and the rules inside it
    part: Any
    for part in list(layer.modules())[1:]:
        if "total_ops" in part.__dict__ or "total_ops" in part._buffers:
            part.total_ops *= 0
    layer.total_ops += operations


def ptflops_hooks() -> dict[Any, Callable[..., Any]]:
    """For ``ptflops.get_model_complexity_info(model, size, custom_modules_hooks=ptflops_hooks())``, with both of its
    backends.

    Examples:
        >>> import torch
        >>> from awconv.integrations.flop_counters import ptflops_hooks
        >>> torch.ops.awconv.fused in ptflops_hooks()  # of the backend that looks at operators
        True
    """
    hooks: dict[Any, Callable[..., Any]] = dict.fromkeys(_LAYERS, _for_ptflops)
    hooks[torch.ops.awconv.fused] = _fused_for_ptflops
    return hooks


def _for_ptflops(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    layer.__flops__ += whole(layer, inputs[0], output)


def _fused_for_ptflops(arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> int:
    _, weight, gain = arguments[:3]
    return flops.forward(weight.shape, gain.shape, outputs[0].shape)


def count_by_fvcore(analysis: Any) -> Any:
    """Counts an analysis of fvcore, or of mmengine, with the operators that a call runs.

    These trace a network, and traced networks are made of PyTorch's own operators for other runtimes: more of them, and
    other ones, than in a call.

    Args:
        analysis: a ``FlopCountAnalysis``.

    Returns:
        The same analysis, which knows its counts now: ``.total()``, ``.by_module()``, ...

    Raises:
        ValueError: the fused kernels cannot run on this machine, since it has no C compiler for instance.
    """
    analysis.set_op_handle(**{"awconv::fused": _fused_for_fvcore, "awconv::average_pool": None})
    with use_algorithm("fused"), traced_as_called():
        analysis.total()
    return analysis


def _fused_for_fvcore(inputs: list[Any], outputs: list[Any]) -> int:
    weight, gain, output = (value.type().sizes() for value in (inputs[1], inputs[2], outputs[0]))
    return flops.forward(weight, gain, output)
