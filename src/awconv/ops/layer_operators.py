"""A whole layer on a GPU (``layer.py``) as operators of PyTorch, ``awconv::layer``, ``awconv::layer_backward`` and
``awconv::layer_inference``, which torch.compile sees as one node each.

Beside its kernels, each node costs a call of Python, and what lies between two nodes is written and read: a layer in
parts takes several times as long to launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from awconv.ops.branch import ACTIVATIONS, Branch, Form, Norm, plain, unwatched
from awconv.ops.branch_launches import kept_elements
from awconv.ops.branch_operators import BY_NAME, LIBRARY, PARAMETERS, follow, register
from awconv.ops.geometry import Geometry
from awconv.ops.gpu import empty_like_image, is_channels_last, precision_of_products, triton_obstacle
from awconv.ops.launcher import ALIGNMENT
from awconv.ops.layer_plans import Convolution, Plan, problem_of
from awconv.ops.problem import Problem, product
from awconv.ops.tracing import autocasting, exporting, transforming

_FORM = (
    "float epsilon1, float epsilon2, str activation, int[] size, float constant, float gain, "
    "int[] stride, int[] padding, int[] dilation, int groups, bool residual"
)
for _schema in (
    # the output, what the backward needs, and the statistics of the batch: means and unbiased variances of the norms
    f"layer(Tensor image, Tensor weight, {PARAMETERS}, {_FORM}) -> (Tensor, Tensor, Tensor)",
    f"layer_backward(Tensor grad, Tensor image, Tensor weight, {PARAMETERS}, Tensor kept, {_FORM}, bool[3] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    f"layer_inference(Tensor image, Tensor weight, {PARAMETERS}, Tensor mean1, Tensor variance1, Tensor mean2, "
    f"Tensor variance2, {_FORM}) -> Tensor",
):
    LIBRARY.define(_schema, tags=torch.Tag.pt2_compliant_tag)
_LEAST_ROWS = 32  # of a tile of the branch's kernels
_MOST_PLANS = 1024
_PLANS: dict[tuple[Any, ...], Plan] = {}


def run_layer_compiled(
    image: Tensor,
    weight: Tensor | None,
    branch: nn.Module,
    modules: tuple[Any, ...],
    size: tuple[int, ...],
    start: tuple[float, float],
    convolution: Convolution,
) -> Tensor | None:
    """:func:`awconv.ops.layer.run_layer` for what ``torch.compile`` traces."""
    if weight is None or image.dim() != 4 or exporting() or transforming() or triton_obstacle() is not None:
        return None
    if not plain(modules, 4) or not unwatched((branch, *modules)):
        return None
    conv1, norm1, _, conv2, norm2, activation = modules
    half1, half2 = (
        (conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked)
        for conv, norm in ((conv1, norm1), (conv2, norm2))
    )
    tensors = (weight, *half1, *half2)
    if any(tensor is None for tensor in tensors) or norm1.momentum is None or norm2.momentum is None:
        return None
    parameters, training = (*half1[:3], *half2[:3]), norm1.training
    graded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (image, weight, *parameters))
    if graded and not training:
        return None
    readable = all(tensor.is_contiguous() for tensor in tensors[1:])
    if not readable or not all(tensor.device == image.device for tensor in tensors):
        return None
    cast = autocasting(image.device.type)
    dtype = torch.get_autocast_dtype(image.device.type) if cast else image.dtype
    if training and dtype == torch.float16:  # a kernel of the backward may take a number of each sample from PyTorch
        return None
    problem = problem_of(image, weight, tensors[1:], size, convolution, dtype, cast, training)
    if problem is None:
        return None
    of_branch = (norm1.eps, norm2.eps, ACTIVATIONS[type(activation)][0], list(size), *start)
    form = (*of_branch, *problem.geometry.arguments(), problem.residual)
    output: Tensor
    if not training:
        output = torch.ops.awconv.layer_inference(image, weight, *parameters, *half1[3:5], *half2[3:5], *form)
        return output
    output, _, found = torch.ops.awconv.layer(image, weight, *parameters, *form)
    with torch.no_grad():
        mean1, variance1, mean2, variance2 = _split(found, conv1.weight.shape[0], conv2.weight.shape[0])
        for norm, mean, variance in ((norm1, mean1, variance1), (norm2, mean2, variance2)):
            follow(norm, mean, variance)
    return output


def _split(statistics: Tensor, hidden: int, columns: int) -> Sequence[Tensor]:
    """Mean and variance of each norm."""
    sizes = [hidden, hidden, columns, columns]
    aligned = [_aligned(size) for size in sizes]
    parts: tuple[Tensor, ...] = statistics.split(aligned)
    return parts if sizes == aligned else [part[:size] for part, size in zip(parts, sizes, strict=True)]


def _aligned(floats: int) -> int:
    """So many that what comes after them is aligned, too."""
    return -(-floats * 4 // ALIGNMENT) * (ALIGNMENT // 4)


def _planned(image: Tensor, weight: Tensor, parameters: Sequence[Tensor], form: Sequence[Any], training: bool) -> Plan:
    """The launches for arguments of an operator, made and compiled at the first call."""
    epsilon1, epsilon2, activation, size, constant, gain, *geometry, residual = form
    precision = precision_of_products() if image.dtype == torch.float32 else ""
    facts = (image.shape, is_channels_last(image), image.dtype, image.device, parameters[0].shape[0], precision)
    of_weight = (weight.shape, weight.dtype, weight.is_contiguous(memory_format=torch.channels_last))
    stride, padding, dilation, groups = geometry
    numbers = (activation, constant, gain, *map(tuple, (size, stride, padding, dilation)), groups, residual)
    key = (*facts, *of_weight, *(parameter.dtype for parameter in parameters), training, *numbers)
    planned = _PLANS.get(key)
    if planned is None:
        if len(_PLANS) >= _MOST_PLANS:
            _PLANS.clear()
        problem = _problem(image, weight, Geometry.of(*geometry), residual, training)
        norm1, norm2 = (_norm(parameters[index : index + 2], training) for index in (1, 4))
        branch_form = Form(BY_NAME[activation], tuple(size), image.dtype, constant, gain)
        branch = Branch(parameters[0], norm1, parameters[3], norm2, branch_form)
        planned = _PLANS[key] = Plan(problem, branch, image, weight)
        if image.is_cuda:  # for the statistics of a batch, and most likely all gradients
            tensors = (*parameters, *norm1[2:5], *norm2[2:5])
            needs = (True, True, True) if training else (False, False, False)
            planned.compile(image.get_device(), weight.dtype, tensors, (epsilon1, 1.0, epsilon2, 1.0), needs)
    return planned


def _problem(image: Tensor, weight: Tensor, geometry: Geometry, residual: bool, training: bool) -> Problem:
    out_channels, group_in, *kernel = weight.shape
    return Problem(
        empty=False,
        out_channels=out_channels,
        in_channels=group_in * geometry.groups,
        kernel=tuple(kernel),
        size=tuple(image.shape[2:]),
        out_size=geometry.output_size(image.shape[2:], kernel),
        unseeing=((0, 0), (0, 0)),
        geometry=geometry,
        rates=(1, group_in, 1, 1),
        residual=residual,
        device=image.device.type,
        dtype=image.dtype,
        function_obstacle=None,
        differentiated=training,
    )


def _norm(affine: Sequence[Tensor], training: bool) -> Norm:
    """A norm with buffers of their dtypes and of no size."""
    weight, bias = affine
    statistics = bias.new_empty(0, dtype=torch.float32 if training else bias.dtype)
    return Norm(weight, bias, statistics, statistics, bias.new_empty(0, dtype=torch.int64), 0.0, 0.0, training)


def _kept_bytes(image: Tensor, weight: Tensor, hidden: int, columns: int, size: Sequence[int]) -> int:
    """At least what any plan keeps: the sizes of tiles, which decide that, cannot be told for symbols."""
    rows, channels, bytes = image.shape[0] * product(size[2:]), image.shape[1], image.dtype.itemsize
    parts = rows // _LEAST_ROWS + 1
    floats = kept_elements(rows, hidden, columns) + rows * columns + 2 * parts * (hidden + columns)
    return 4 * floats + (rows * (channels + columns) + weight.numel()) * bytes + 6 * ALIGNMENT


def _forward(image: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    parameters, form = arguments[:6], arguments[6:]
    hidden, columns = parameters[0].shape[0], parameters[3].shape[0]
    planned = _planned(image, weight, parameters, form, True)
    # Running statistics of 0 with a momentum of 1 become those of the batch.
    statistics = image.new_zeros(2 * (_aligned(hidden) + _aligned(columns)), dtype=torch.float32)
    mean1, variance1, mean2, variance2 = _split(statistics, hidden, columns)
    batches = image.new_empty((), dtype=torch.int64)
    buffers = [mean1, variance1, batches, mean2, variance2, batches]
    kept = image.new_empty(_kept_bytes(image, weight, hidden, columns, form[3]), dtype=torch.uint8)
    output = planned.run(image, weight, [*parameters, *buffers], kept, (form[0], 1.0, form[1], 1.0))
    return output, kept, statistics


def _output(image: Tensor, weight: Tensor, form: Sequence[Any]) -> Tensor:
    size = Geometry.of(*form[6:10]).output_size(image.shape[2:], weight.shape[2:])
    return empty_like_image((image.shape[0], weight.shape[0], *size), image)


def _fake(image: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    form, hidden, columns = arguments[6:], arguments[0].shape[0], arguments[3].shape[0]
    kept = image.new_empty(_kept_bytes(image, weight, hidden, columns, form[3]), dtype=torch.uint8)
    statistics = image.new_empty(2 * (_aligned(hidden) + _aligned(columns)), dtype=torch.float32)
    return _output(image, weight, form), kept, statistics


def _backward(grad: Tensor, image: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    parameters, kept, form, needs = arguments[:6], arguments[6], arguments[7:-1], arguments[-1]
    planned = _planned(image, weight, parameters, form, True)
    grads = planned.gradients(grad, image, weight, parameters, kept, (needs[0], needs[1], needs[0] or needs[2]))
    return _only(grads, needs)


def _fake_backward(grad: Tensor, image: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    grads = [empty_like_image(tuple(image.shape), image), *map(torch.empty_like, (weight, *arguments[:6]))]
    return _only(grads, arguments[-1])


def _only(grads: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Nothing in the place of those that are not needed."""
    needed = (*needs[:2], *[needs[2]] * 6)
    return tuple(grad if one else grad.new_empty(0) for grad, one in zip(grads, needed, strict=True))


def _infer(image: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    parameters, (mean1, variance1, mean2, variance2), form = arguments[:6], arguments[6:10], arguments[10:]
    planned = _planned(image, weight, parameters, form, False)
    kept, batches = image.new_empty(planned.kept_bytes, dtype=torch.uint8), image.new_empty((), dtype=torch.int64)
    buffers = [mean1, variance1, batches, mean2, variance2, batches]
    return planned.run(image, weight, [*parameters, *buffers], kept, (form[0], 0.0, form[1], 0.0))


def _fake_inference(image: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    return _output(image, weight, arguments[10:])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:8], output[1])
    ctx.form = inputs[8:]


def _autograd(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "gradients of gradients cannot be taken through a compiled AW layer on a GPU: the operator awconv::layer "
            "has none. Call the network without torch.compile where you need them"
        )
    needs = ctx.needs_input_grad[:8]
    needed = [needs[0], needs[1], any(needs[2:])]
    grads = torch.ops.awconv.layer_backward(grad, *ctx.saved_tensors, *ctx.form, needed)
    return (*(one if needed else None for one, needed in zip(grads, needs, strict=True)), *[None] * len(ctx.form))


register("layer", _forward, _fake)
register("layer_backward", _backward, _fake_backward)
register("layer_inference", _infer, _fake_inference)
torch.library.register_autograd("awconv::layer", _autograd, setup_context=_save, lib=LIBRARY)
