"""The public functions: check, choose, run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from awconv.ops import tracing
from awconv.ops.algorithm import Algorithm
from awconv.ops.choose import choose, wanted
from awconv.ops.problem import Problem, TensorFacts, describe

_CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def _aw_conv(
    dims: int,
    input: Tensor,
    weight: Tensor,
    attention: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
    residual: bool,
    algorithm: str,
) -> Tensor:
    if isinstance(input, Tensor) and tracing.autocasting(input.device.type):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight, attention = _autocast(input, dtype), _autocast(weight, dtype), _autocast(attention, dtype)
        bias = _autocast(bias, dtype)
    tensors = (input, weight, attention, bias)
    problem, chosen = plan(wanted(algorithm), dims, *tensors, stride, padding, dilation, groups, residual)
    with tracing.without_autocast(problem.device):
        output = problem.with_unseeing(chosen.run(problem, input, weight, attention))
        if bias is not None:
            output = output + bias.unflatten(0, (-1,) + (1,) * dims)
    if dims in _CHANNELS_LAST and not tracing.is_batched(input):
        channels_last = _CHANNELS_LAST[dims]
        if input.is_contiguous(memory_format=channels_last) and not input.is_contiguous():
            output = output.contiguous(memory_format=channels_last)
    return output


def plan(algorithm: str, dims: int, *arguments: Any) -> tuple[Problem, Algorithm]:
    """The checked problem and the algorithm chosen for it."""
    if not tracing.compiling() and not tracing.jit_tracing():
        try:
            around = (tracing.function_obstacle(), torch.is_grad_enabled())
            return _remembered_plan(around, algorithm, dims, *map(_facts, arguments))
        except TypeError:
            pass  # lists and sizes that are symbols have no hash; that of a check comes again
    return _new_plan(algorithm, dims, *arguments)


def _new_plan(algorithm: str, dims: int, *arguments: Any) -> tuple[Problem, Algorithm]:
    with tracing.numbers():
        problem = describe(dims, *arguments)
    return problem, choose(problem, algorithm, f"aw_conv{dims}d")


@lru_cache(maxsize=4096, typed=True)  # typed: True is no stride, and equals 1
def _remembered_plan(around: tuple[str | None, bool], *arguments: Any) -> tuple[Problem, Algorithm]:
    """A plan for all that it follows from: in small layers the checks would take longer than the convolution."""
    return _new_plan(*arguments)


def _facts(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return TensorFacts(argument.shape, argument.dtype, argument.device, argument.requires_grad)
    return argument


_Argument = TypeVar("_Argument", Tensor, Tensor | None)


def _autocast(tensor: _Argument, dtype: torch.dtype) -> _Argument:
    """Casts what PyTorch's own autocast would: any floating-point tensor but a float64 one."""
    if not isinstance(tensor, Tensor) or tensor.dtype in (dtype, torch.float64) or not tensor.dtype.is_floating_point:
        return tensor
    return tensor.to(dtype)


def aw_conv1d(
    input: Tensor,
    weight: Tensor,
    attention: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    residual: bool = True,
    algorithm: str = "auto",
) -> Tensor:
    """AW-convolution over sequences: :func:`aw_conv2d` with one spatial axis.

    Args:
        input: shape (N, C1, L).
        weight: shape (C2, C1/groups, k).
        attention: shape (N, a2, a1, ak), each a divisor of the weight's size along its axis.
        bias: shape (C2,), or None.
        stride: distance between two positions of the window.
        padding: zeros on both sides, or ``"same"`` or ``"valid"``.
        dilation: distance between the taps of the kernel.
        groups: number of groups of channels.
        residual: weights K + A * K if true, A * K otherwise.
        algorithm: as for :func:`aw_conv2d`.

    Returns:
        Shape (N, C2, L'), with the dtype of ``input``.

    Raises:
        TypeError, ValueError: as for :func:`aw_conv2d`.

    Examples:
        >>> import torch
        >>> from awconv import aw_conv1d
        >>> attention = torch.full((2, 4, 1, 3), 0.5)
        >>> aw_conv1d(torch.ones(2, 3, 8), torch.ones(4, 3, 3), attention).shape
        torch.Size([2, 4, 6])
    """
    return _aw_conv(
        1, input, weight, attention, bias, stride, padding, dilation, groups, residual=residual, algorithm=algorithm
    )


def aw_conv2d(
    input: Tensor,
    weight: Tensor,
    attention: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    residual: bool = True,
    algorithm: str = "auto",
) -> Tensor:
    """AW-convolution (arXiv 2108.08205): a convolution whose weights are multiplied by an attention map of each sample.

    ``O[n] = conv(I[n], K + A[n] * K) + bias``. The attention map A is ``attention``, expanded to the shape of the
    weights: each value stands for a block of equal size along each axis.

    All arguments have one dtype (float16, bfloat16, float32 or float64) and one device. ``torch.autocast`` casts them
    as a convolution's. A ``channels_last`` input gives a ``channels_last`` output. The batch may be empty.

    Args:
        input: shape (N, C1, H, W).
        weight: shape (C2, C1/groups, h, w).
        attention: shape (N, a2, a1, ah, aw), each a divisor of the weight's size along its axis: 1 is the usual
            broadcast, and C2/r_C2, (C1/groups)/r_C1, h/r_hw, w/r_hw are the rates of the paper.
        bias: shape (C2,), or None. Attention does not touch it.
        stride: distance between two positions of the window, one number or two.
        padding: zeros on both sides, one number or two, or ``"same"`` or ``"valid"``.
        dilation: distance between the taps of the kernel, one number or two.
        groups: number of groups of channels; C1 for a depthwise convolution.
        residual: weights K + A * K if true, A * K otherwise.
        algorithm: ``"auto"`` picks the fastest exact algorithm for the shapes at hand, or the one that
            :func:`awconv.use_algorithm` names around the call. A name takes that one: see docs/operator.md.

    Returns:
        Shape (N, C2, H', W'), with the dtype of ``input`` (autocast's where it is on).

    Raises:
        TypeError: an argument is of the wrong type, or dtypes are mixed or not floating-point.
        ValueError: sizes or devices do not fit together, or ``algorithm`` is unknown or cannot run this problem.

    Examples:
        >>> import torch
        >>> from awconv import aw_conv2d
        >>> attention = torch.full((2, 4, 1, 3, 3), 0.5)  # a value for each sample, output channel and tap
        >>> output = aw_conv2d(torch.ones(2, 3, 8, 8), torch.ones(4, 3, 3, 3), attention)
        >>> output.shape, output[0, 0, 0, 0].item()  # 27 weights of 1 + 0.5
        (torch.Size([2, 4, 6, 6]), 40.5)
    """
    return _aw_conv(
        2, input, weight, attention, bias, stride, padding, dilation, groups, residual=residual, algorithm=algorithm
    )


def aw_conv3d(
    input: Tensor,
    weight: Tensor,
    attention: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    residual: bool = True,
    algorithm: str = "auto",
) -> Tensor:
    """AW-convolution over volumes: :func:`aw_conv2d` with three spatial axes.

    Args:
        input: shape (N, C1, D, H, W).
        weight: shape (C2, C1/groups, d, h, w).
        attention: shape (N, a2, a1, ad, ah, aw), each a divisor of the weight's size along its axis.
        bias: shape (C2,), or None.
        stride: distance between two positions of the window, one number or three.
        padding: zeros on both sides, one number or three, or ``"same"`` or ``"valid"``.
        dilation: distance between the taps of the kernel, one number or three.
        groups: number of groups of channels.
        residual: weights K + A * K if true, A * K otherwise.
        algorithm: as for :func:`aw_conv2d`.

    Returns:
        Shape (N, C2, D', H', W'), with the dtype of ``input``.

    Raises:
        TypeError, ValueError: as for :func:`aw_conv2d`.

    Examples:
        >>> import torch
        >>> from awconv import aw_conv3d
        >>> attention = torch.full((2, 4, 1, 3, 3, 3), 0.5)
        >>> aw_conv3d(torch.ones(2, 3, 8, 8, 8), torch.ones(4, 3, 3, 3, 3), attention).shape
        torch.Size([2, 4, 6, 6, 6])
    """
    return _aw_conv(
        3, input, weight, attention, bias, stride, padding, dilation, groups, residual=residual, algorithm=algorithm
    )
