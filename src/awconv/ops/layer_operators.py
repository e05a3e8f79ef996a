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

from awconv.ops import fused
from awconv.ops.average_pool import fits_gpu
from awconv.ops.branch import ACTIVATIONS, Branch, Form, Norm, plain, sizes_fit, unwatched
from awconv.ops.branch_launches import kept_elements
from awconv.ops.choose import wanted
from awconv.ops.functional import plan
from awconv.ops.geometry import Geometry
from awconv.ops.gpu import empty_like_image, is_channels_last, precision_of_products, triton_obstacle
from awconv.ops.launcher import ALIGNMENT
from awconv.ops.layer import Convolution, _grads, _Plan
from awconv.ops.problem import Problem, TensorFacts, product
from awconv.ops.tracing import autocasting, exporting

_LAST = torch.channels_last
_PARAMETERS = (
    "Tensor weight1, Tensor norm_weight1, Tensor norm_bias1, Tensor weight2, Tensor norm_weight2, Tensor norm_bias2"
)
_FORM = (
    "float epsilon1, float epsilon2, str activation, int[] size, float constant, float gain, "
    "int[] stride, int[] padding, int[] dilation, int groups, bool residual"
)
_LIBRARY = torch.library.Library("awconv", "FRAGMENT")
for _schema in (
    # the output, what the backward needs, and the statistics of the batch: means and unbiased variances of the norms
    f"layer(Tensor image, Tensor weight, {_PARAMETERS}, {_FORM}) -> (Tensor, Tensor, Tensor)",
    f"layer_backward(Tensor grad, Tensor image, Tensor weight, {_PARAMETERS}, Tensor kept, {_FORM}, bool[3] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    f"layer_inference(Tensor image, Tensor weight, {_PARAMETERS}, Tensor mean1, Tensor variance1, Tensor mean2, "
    f"Tensor variance2, {_FORM}) -> Tensor",
):
    _LIBRARY.define(_schema, tags=torch.Tag.pt2_compliant_tag)
_BY_NAME = {name: kind for kind, (name, _) in ACTIVATIONS.items()}
_LEAST_ROWS = 32  # of a tile of the branch's kernels
_MOST_PLANS = 1024
_PLANS: dict[tuple[Any, ...], _Plan] = {}


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
    if weight is None or image.dim() != 4 or exporting() or triton_obstacle() is not None:
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
    problem = _problem(image, weight, tensors[1:], size, convolution, training)
    if problem is None:
        return None
    low = weight.to(image.dtype).contiguous(memory_format=_LAST)
    of_branch = (norm1.eps, norm2.eps, ACTIVATIONS[type(activation)][0], list(size), *start)
    form = (*of_branch, *problem.geometry.arguments(), problem.residual)
    output: Tensor
    if not training:
        output = torch.ops.awconv.layer_inference(image, low, *parameters, *half1[3:5], *half2[3:5], *form)
        return output
    output, _, found = torch.ops.awconv.layer(image, low, *parameters, *form)
    with torch.no_grad():
        mean1, variance1, mean2, variance2 = _split(found, conv1.weight.shape[0], conv2.weight.shape[0])
        for norm, mean, variance in ((norm1, mean1, variance1), (norm2, mean2, variance2)):
            norm.num_batches_tracked.add_(1)
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
            norm.running_var.lerp_(variance.to(norm.running_var.dtype), norm.momentum)
    return output


def _problem(
    image: Tensor,
    weight: Tensor,
    of_branch: tuple[Tensor, ...],
    size: tuple[int, ...],
    convolution: Convolution,
    training: bool,
) -> Problem | None:
    """The convolution, where the kernels run it and the branch."""
    cast = autocasting(image.device.type)
    dtype = torch.get_autocast_dtype(image.device.type) if cast else image.dtype
    if image.dtype != dtype or not (cast or weight.dtype == dtype) or (training and dtype == torch.float16):
        return None  # in float16, a kernel of the backward can take a number for each sample that PyTorch makes
    if weight.shape[1] == 1 or image.shape[1] != weight.shape[1] * convolution[3]:
        return None
    if size != (weight.shape[0], 1, *weight.shape[2:]) or not fits_gpu(image, size[2:]):
        return None
    if not (is_channels_last(image) or image.is_contiguous()) or (training and image.shape[0] * product(size[2:]) < 2):
        return None
    pooled = (*image.shape[:2], *size[2:])
    shapes, dtypes = tuple(tensor.shape for tensor in of_branch), tuple(tensor.dtype for tensor in of_branch)
    if not sizes_fit((pooled, *shapes), (dtype, *dtypes), size, dtype, cast):
        return None
    facts = (
        TensorFacts(image.shape, dtype, image.device, image.requires_grad),
        TensorFacts(weight.shape, dtype, image.device, weight.requires_grad),
        TensorFacts(torch.Size((image.shape[0], *size)), dtype, image.device, True),
    )
    problem, chosen = plan(wanted("auto"), 2, *facts, None, *convolution)
    unseeing = any(pair != (0, 0) for pair in problem.unseeing)
    return None if unseeing or chosen is not fused.ALGORITHM else problem


def _split(statistics: Tensor, hidden: int, columns: int) -> list[Tensor]:
    """Mean and variance of each norm."""
    sizes = [hidden, hidden, columns, columns]
    parts = statistics.split([_aligned(size) for size in sizes])
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]


def _aligned(floats: int) -> int:
    """So many that what comes after them is aligned, too."""
    return -(-floats * 4 // ALIGNMENT) * (ALIGNMENT // 4)


def _planned(image: Tensor, weight: Tensor, parameters: Sequence[Tensor], form: Sequence[Any], training: bool) -> _Plan:
    """The launches for arguments of an operator, made at the first call."""
    epsilon1, epsilon2, activation, size, constant, gain, stride, padding, dilation, groups, residual = form
    precision = precision_of_products() if image.dtype == torch.float32 else ""
    facts = (image.shape, is_channels_last(image), image.dtype, image.device, weight.shape, parameters[0].shape[0])
    numbers = (activation, constant, gain, *map(tuple, (size, stride, padding, dilation)), groups, residual)
    key = (*facts, *(parameter.dtype for parameter in parameters), precision, training, *numbers)
    planned = _PLANS.get(key)
    if planned is None:
        geometry = Geometry.of(stride, padding, dilation, groups)
        out_channels, group_in, *kernel = weight.shape
        problem = Problem(
            empty=False,
            out_channels=out_channels,
            in_channels=group_in * groups,
            kernel=tuple(kernel),
            size=tuple(image.shape[2:]),
            out_size=geometry.output_size(image.shape[2:], kernel),
            unseeing=((0, 0), (0, 0)),
            geometry=geometry,
            rates=(1, group_in, 1, 1),
            residual=residual,
            device=image.device.type,
            dtype=image.dtype,
            forward_mode=False,
            differentiated=training,
        )
        weight1, norm_weight1, norm_bias1, weight2, norm_weight2, norm_bias2 = parameters
        unused = norm_bias1.new_empty(0)
        norm1 = Norm(norm_weight1, norm_bias1, unused, unused, unused, epsilon1, 0.0, training)
        norm2 = Norm(norm_weight2, norm_bias2, unused, unused, unused, epsilon2, 0.0, training)
        made = Form(_BY_NAME[activation], tuple(size), image.dtype, constant, gain)
        if len(_PLANS) == _MOST_PLANS:
            _PLANS.clear()
        planned = _PLANS[key] = _Plan(problem, Branch(weight1, norm1, weight2, norm2, made), image, weight)
    return planned


def _kept_bytes(image: Tensor, hidden: int, columns: int, size: Sequence[int]) -> int:
    """At least what any plan keeps: the sizes of tiles, which decide that, cannot be told for symbols."""
    rows, channels, bytes = image.shape[0] * product(size[2:]), image.shape[1], image.dtype.itemsize
    parts = rows // _LEAST_ROWS + 1
    floats = kept_elements(rows, hidden, columns) + rows * columns + 2 * parts * (hidden + columns)
    return 4 * floats + rows * (channels + columns) * bytes + 5 * ALIGNMENT


def _forward(image: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    parameters, form = arguments[:6], arguments[6:]
    hidden, columns = parameters[0].shape[0], parameters[3].shape[0]
    planned = _planned(image, weight, parameters, form, True)
    # Running statistics of 0 with a momentum of 1 become those of the batch.
    statistics = image.new_zeros(2 * (_aligned(hidden) + _aligned(columns)), dtype=torch.float32)
    mean1, variance1, mean2, variance2 = _split(statistics, hidden, columns)
    batches = image.new_empty((), dtype=torch.int64)
    buffers = [mean1, variance1, batches, mean2, variance2, batches]
    kept = image.new_empty(_kept_bytes(image, hidden, columns, form[3]), dtype=torch.uint8)
    output = _run(planned, image, weight, [*parameters, *buffers], kept, (form[0], 1.0, form[1], 1.0))
    return output, kept, statistics


def _run(
    planned: _Plan,
    image: Tensor,
    weight: Tensor,
    tensors: Sequence[Tensor],
    kept: Tensor,
    floats: tuple[float, ...],
) -> Tensor:
    source, low = (tensor.contiguous(memory_format=_LAST) for tensor in (image, weight))
    output = image.new_empty_strided(planned.out_shape, planned.out_stride)
    planned.forward.run([image, kept, *tensors, source, low, output], floats)
    return output


def _output(image: Tensor, weight: Tensor, form: Sequence[Any]) -> Tensor:
    size = Geometry.of(*form[6:10]).output_size(image.shape[2:], weight.shape[2:])
    return empty_like_image((image.shape[0], weight.shape[0], *size), image)


def _fake(image: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    form, hidden, columns = arguments[6:], arguments[0].shape[0], arguments[3].shape[0]
    kept = image.new_empty(_kept_bytes(image, hidden, columns, form[3]), dtype=torch.uint8)
    statistics = image.new_empty(2 * (_aligned(hidden) + _aligned(columns)), dtype=torch.float32)
    return _output(image, weight, form), kept, statistics


def _backward(grad: Tensor, image: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    parameters, kept, form, needs = arguments[:6], arguments[6], arguments[7:-1], arguments[-1]
    planned = _planned(image, weight, parameters, form, True)
    low = weight.contiguous(memory_format=_LAST)
    grads = _grads(planned, grad, image, weight, list(parameters), kept, low, (*needs[:2], *[needs[2]] * 6))
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
    return _run(planned, image, weight, [*parameters, *buffers], kept, (form[0], 0.0, form[1], 0.0))


def _fake_inference(image: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    return _output(image, weight, arguments[10:])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:8], output[1])
    ctx.form = inputs[8:]


def _autograd(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:8]
    needed = [needs[0], needs[1], any(needs[2:])]
    grads = torch.ops.awconv.layer_backward(grad, *ctx.saved_tensors, *ctx.form, needed)
    return (*(one if needed else None for one, needed in zip(grads, needs, strict=True)), *[None] * len(ctx.form))


for _name, _kernel, _shapes in (
    ("layer", _forward, _fake),
    ("layer_backward", _backward, _fake_backward),
    ("layer_inference", _infer, _fake_inference),
):
    _LIBRARY.impl(_name, _kernel, "CUDA")
    _LIBRARY.impl(_name, _kernel, "CPU")  # by Triton's interpreter
    torch.library.register_fake(f"awconv::{_name}", _shapes, lib=_LIBRARY)
torch.library.register_autograd("awconv::layer", _autograd, setup_context=_save, lib=_LIBRARY)
