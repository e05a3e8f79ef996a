"""The kernels of ``branch.py`` as operators of PyTorch, ``awconv::branch``, ``awconv::branch_backward`` and
``awconv::branch_inference``, which torch.compile sees as one node each.

An operator with a gradient changes no tensor: in training it returns the statistics of the batch, and what was traced
adds them to the running ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from awconv.ops.branch import (
    ACTIVATIONS,
    Branch,
    Form,
    Norm,
    by_rows,
    empty_attention,
    gradients,
    infer,
    sizes_fit,
    train,
    unwatched_plain,
)
from awconv.ops.branch_launches import kept_elements
from awconv.ops.gpu import triton_obstacle
from awconv.ops.problem import product
from awconv.ops.tracing import autocasting, exporting

PARAMETERS = (
    "Tensor weight1, Tensor norm_weight1, Tensor norm_bias1, Tensor weight2, Tensor norm_weight2, Tensor norm_bias2"
)
_FORM = "float epsilon1, float epsilon2, str activation, int[] size, ScalarType dtype, float constant, float gain"
LIBRARY = torch.library.Library("awconv", "FRAGMENT")
for _schema in (
    # the attention, what the backward needs, and means and inverse deviations of the norms one after another
    f"branch(Tensor pooled, {PARAMETERS}, {_FORM}) -> (Tensor, Tensor, Tensor)",
    f"branch_backward(Tensor grad, Tensor pooled, {PARAMETERS}, Tensor kept, {_FORM}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    f"branch_inference(Tensor pooled, {PARAMETERS}, Tensor mean1, Tensor variance1, Tensor mean2, Tensor variance2, "
    f"{_FORM}) -> Tensor",
):
    LIBRARY.define(_schema, tags=torch.Tag.pt2_compliant_tag)
BY_NAME = {name: kind for kind, (name, _) in ACTIVATIONS.items()}


def attend_compiled(
    modules: Sequence[Any], pooled: Tensor, size: tuple[int, ...], constant: float, gain: float
) -> Tensor | None:
    """:func:`awconv.ops.branch.attend` for what ``torch.compile`` traces."""
    if exporting() or triton_obstacle() is not None or not unwatched_plain(modules, pooled.dim()):
        return None
    conv1, norm1, _, conv2, norm2, activation = modules
    halves = [
        (conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked)
        for conv, norm in ((conv1, norm1), (conv2, norm2))
    ]
    tensors = [pooled, *halves[0], *halves[1]]
    if norm1.momentum is None or norm2.momentum is None or any(tensor is None for tensor in tensors):
        return None
    cast = autocasting(pooled.device.type)
    dtype = torch.get_autocast_dtype(pooled.device.type) if cast else pooled.dtype
    shapes, dtypes = tuple(tensor.shape for tensor in tensors), tuple(tensor.dtype for tensor in tensors)
    readable = all(tensor.device == pooled.device and tensor.is_contiguous() for tensor in tensors[1:])
    if not readable or not sizes_fit(shapes, dtypes, size, dtype, cast):
        return None
    parameters, statistics = (*halves[0][:3], *halves[1][:3]), (*halves[0][3:5], *halves[1][3:5])
    form = (norm1.eps, norm2.eps, ACTIVATIONS[type(activation)][0], list(size), dtype, constant, gain)
    attention: Tensor
    if not norm1.training:
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (pooled, *parameters)):
            return None
        attention = torch.ops.awconv.branch_inference(pooled, *parameters, *statistics, *form)
        return attention
    attention, _, found = torch.ops.awconv.branch(pooled, *parameters, *form)
    with torch.no_grad():
        hidden, columns = conv1.weight.shape[0], conv2.weight.shape[0]
        mean1, inverse1, mean2, inverse2 = found.split([hidden, hidden, columns, columns])
        rows = pooled.shape[0] * product(size[2:])
        for norm, mean, inverse in ((norm1, mean1, inverse1), (norm2, mean2, inverse2)):
            follow(norm, mean, (inverse**-2 - norm.eps) * (rows / (rows - 1)))
    return attention


def follow(norm: Any, mean: Tensor, variance: Tensor) -> None:
    """Adds the mean and the unbiased variance of a batch to the running statistics."""
    norm.num_batches_tracked.add_(1)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
    norm.running_var.lerp_(variance.to(norm.running_var.dtype), norm.momentum)


def register(name: str, run: Callable[..., Any], shapes: Callable[..., Any]) -> None:
    """Implements an operator of awconv, and says what its results are without running it."""
    LIBRARY.impl(name, run, "CUDA")
    LIBRARY.impl(name, run, "CPU")  # by Triton's interpreter
    torch.library.register_fake(f"awconv::{name}", shapes, lib=LIBRARY)


def _branch(parameters: Sequence[Tensor], statistics: Sequence[Tensor], form: Sequence[Any]) -> Branch:
    """Of the arguments of an operator; momenta of 0 leave the statistics as they are."""
    weight1, norm_weight1, norm_bias1, weight2, norm_weight2, norm_bias2 = parameters
    epsilon1, epsilon2, activation, size, *rest = form
    mean1, variance1, mean2, variance2, batches = statistics
    norm1 = Norm(norm_weight1, norm_bias1, mean1, variance1, batches, epsilon1, 0.0, True)
    norm2 = Norm(norm_weight2, norm_bias2, mean2, variance2, batches, epsilon2, 0.0, True)
    return Branch(weight1, norm1, weight2, norm2, Form(BY_NAME[activation], tuple(size), *rest))


def _forward(pooled: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    parameters, form = arguments[:6], arguments[6:]
    hidden, columns = parameters[0].shape[0], parameters[3].shape[0]
    unused = pooled.new_empty(max(hidden, columns), dtype=torch.float32)
    batches = pooled.new_empty((), dtype=torch.int64)
    attention, kept = train(pooled, _branch(parameters, [*[unused] * 4, batches], form))
    return attention, kept, kept[: 2 * (hidden + columns)].clone()


def _fake(pooled: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    size, dtype = arguments[9:11]
    hidden, columns = arguments[0].shape[0], arguments[3].shape[0]
    rows = pooled.shape[0] * product(pooled.shape[2:])
    kept = pooled.new_empty(kept_elements(rows, hidden, columns), dtype=torch.float32)
    statistics = pooled.new_empty(2 * (hidden + columns), dtype=torch.float32)
    return empty_attention(pooled, size, dtype), kept, statistics


def _backward(grad: Tensor, pooled: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    parameters, kept, form = arguments[:6], arguments[6], arguments[7:]
    branch = _branch(parameters, [kept] * 5, form)
    return gradients((pooled, *parameters), grad, kept, branch)


def _fake_backward(grad: Tensor, pooled: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    pooled, _ = by_rows(pooled)
    return tuple(map(torch.empty_like, (pooled, *arguments[:6])))


def _infer(pooled: Tensor, *arguments: Any) -> Tensor:
    return infer(pooled, _branch(arguments[:6], [*arguments[6:10], arguments[6]], arguments[10:]))


def _fake_inference(pooled: Tensor, *arguments: Any) -> Tensor:
    size, dtype = arguments[13:15]
    return empty_attention(pooled, size, dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7], output[1])
    ctx.form = inputs[7:]


def _grads(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:7]
    grads = torch.ops.awconv.branch_backward(grad, *ctx.saved_tensors, *ctx.form)
    return (*(one if needed else None for one, needed in zip(grads, needs, strict=True)), *[None] * len(ctx.form))


register("branch", _forward, _fake)
register("branch_backward", _backward, _fake_backward)
register("branch_inference", _infer, _fake_inference)
torch.library.register_autograd("awconv::branch", _grads, setup_context=_save, lib=LIBRARY)
