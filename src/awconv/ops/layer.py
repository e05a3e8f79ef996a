"""A whole AW layer on a GPU, where kernels run all of it: pooling, branch and convolution, in one sequence of launches.
In training it is one node of autograd, with another sequence for the way back.

It launches the kernels that the parts launch one after another (``average_pool.py``, ``branch.py``, ``fused/cuda.py``)
and gives the same numbers, to a rounding. In small layers what lies between these, in Python and in PyTorch, takes
longer than they do: here it follows from shapes alone, and is remembered.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from awconv.ops import fused
from awconv.ops.average_pool import average_pool
from awconv.ops.branch import Branch, by_operations, plain, unwatched
from awconv.ops.choose import wanted
from awconv.ops.gpu import precision_of_products
from awconv.ops.layer_plans import Convolution, Plan, problem_of
from awconv.ops.tracing import autocasting, eager, in_forward_mode, without_autocast

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # it is no public part of PyTorch
    TensorGuards = None  # type: ignore[assignment,misc]

_CALLS = 4096  # of different kinds, that are remembered
_ALIKE = 16  # calls of a kind, whose tensors differ
_OF_CONV = attrgetter("__class__", "kernel_size", "stride", "padding", "groups")
_OF_NORM = attrgetter("__class__", "training", "track_running_stats")
_AFFINE = itemgetter("weight", "bias")
_STATISTICS = itemgetter("running_mean", "running_var", "num_batches_tracked")


class _Call(NamedTuple):
    """What was found out for a call: its plan, or None where the parts of the layer run one after another."""

    planned: Plan | None
    guards: Any  # whether tensors have the types, dtypes, sizes, strides and devices that these had


_KNOWN: dict[tuple[Any, ...], tuple[_Call, ...]] = {}  # by all that is not of tensors


def run_layer(
    image: Tensor,
    weight: Tensor | None,
    branch: nn.Module,
    modules: tuple[Any, ...],
    size: tuple[int, ...],
    start: tuple[float, float],
    convolution: Convolution,
) -> Tensor | None:
    """What a layer makes of an input, or None where its parts have to run one after another.

    Each call looks at all that this depends on, since a module may have changed in any way since the last one.

    Args:
        image: the layer's input, on a GPU.
        weight: of the convolution; None where the layer has no such parameter.
        branch: of which the modules are, whose own forward does not run.
        modules: the six in their order.
        size: (C2/r_C2, (C1/groups)/r_C1, h/r_hw, w/r_hw).
        start: the constant to which the attention is relative, and the gain there.
        convolution: stride, padding, dilation and groups, as ``aw_conv2d`` takes them, and residual.
    """
    if weight is None or not eager() or in_forward_mode() or not unwatched((branch, *modules)):
        return None
    read = _read(modules)
    if read is None:
        return None
    tensors, structure, floats = read
    training = modules[1].training
    cast = autocasting("cuda")
    dtype = torch.get_autocast_dtype("cuda") if cast else image.dtype
    precision = precision_of_products() if dtype == torch.float32 else ""
    around = (cast, dtype, precision, torch.is_grad_enabled(), wanted("auto"))
    key = (image.shape, *around, size, start, convolution, *structure)
    try:
        calls = _KNOWN.get(key, ())
    except TypeError:  # a list has no hash
        return None
    for call in calls:
        if call.guards.check(image, weight, *tensors):
            planned = call.planned
            break
    else:
        if not eager(image, weight, *tensors):
            return None
        planned = _find_out(image, weight, modules, tensors, (dtype, cast, size, start, convolution))
        if planned is not None and image.is_cuda:
            needs = _needs(image, weight, tensors) if training and torch.is_grad_enabled() else (False, False, False)
            planned.compile(image.get_device(), weight.dtype, tensors, floats, needs)
        if len(_KNOWN) >= _CALLS:
            _KNOWN.clear()
        _KNOWN[key] = (*calls[1 - _ALIKE :], _Call(planned, _guards(image, weight, *tensors)))
    if planned is None:
        return None
    if not training:
        kept = image.new_empty(planned.kept_bytes, dtype=torch.uint8)
        return planned.run(image, weight, tensors, kept, floats)
    output: Tensor = _Layer.apply(image, weight, *tensors[:6], planned, tensors[6:], floats)
    return output


def _needs(image: Tensor, weight: Tensor, tensors: list[Tensor]) -> tuple[bool, bool, bool]:
    """Whether gradients of the input, the weight and the gain will be needed."""
    for_gain = image.requires_grad or any(tensor.requires_grad for tensor in tensors)
    return image.requires_grad, weight.requires_grad, for_gain


def _read(modules: tuple[Any, ...]) -> tuple[list[Any], tuple[Any, ...], tuple[float, ...]] | None:
    """Of a branch, the tensors, all else that ``plain`` asks for, and the epsilon and momentum of each norm; None where
    the modules have no such things."""
    norm1, norm2 = modules[1], modules[4]
    try:
        tensors, structure = _tensors(modules), _structure(modules)
        momentum1, momentum2 = (norm1.momentum, norm2.momentum) if norm1.training else (0, 0)
        floats = (float(norm1.eps), float(momentum1), float(norm2.eps), float(momentum2))
    except (AttributeError, KeyError, TypeError):  # other modules than kernels run, a momentum of None
        return None
    return tensors, structure, floats


def _tensors(modules: tuple[Any, ...]) -> list[Any]:
    """Six parameters, then three buffers of each norm, any of which may be None."""
    conv1, norm1, _, conv2, norm2, _ = modules
    return [
        *(conv1._parameters["weight"], *_AFFINE(norm1._parameters)),
        *(conv2._parameters["weight"], *_AFFINE(norm2._parameters)),
        *(*_STATISTICS(norm1._buffers), *_STATISTICS(norm2._buffers)),
    ]


def _structure(modules: tuple[Any, ...]) -> tuple[Any, ...]:
    """What ``plain`` asks of the modules."""
    conv1, norm1, act1, conv2, norm2, act2 = modules
    biases = conv1._parameters.get("bias", conv1) is None, conv2._parameters.get("bias", conv2) is None
    return biases, _OF_CONV(conv1), _OF_NORM(norm1), type(act1), _OF_CONV(conv2), _OF_NORM(norm2), type(act2)


class _Facts:
    """What ``TensorGuards`` does, in twenty times as long."""

    def __init__(self, *tensors: Tensor) -> None:
        self._facts = self._of(tensors)

    def check(self, *tensors: Tensor) -> bool:
        return eager(*tensors) and self._of(tensors) == self._facts

    @staticmethod
    def _of(tensors: Sequence[Tensor]) -> list[Any]:
        facts = attrgetter("dtype", "shape", "device", "requires_grad")
        return [(type(tensor), *facts(tensor), tensor.stride()) for tensor in tensors]


def _guards(*tensors: Tensor) -> Any:
    """By which ``torch.compile`` tells calls apart, in one call of C++; it takes no tensor twice."""
    if TensorGuards is None or len(set(map(id, tensors))) < len(tensors):
        return _Facts(*tensors)
    sizes: list[Any] = [list(tensor.shape) for tensor in tensors]
    strides: list[Any] = [list(tensor.stride()) for tensor in tensors]
    return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)


def _find_out(
    image: Tensor, weight: Tensor, modules: tuple[Any, ...], tensors: list[Tensor], arguments: tuple[Any, ...]
) -> Plan | None:
    """A plan for a call with these tensors, or None where the parts have to run one by one."""
    if not plain(modules, 4) or len({tensor.get_device() for tensor in (image, weight, *tensors)}) > 1:
        return None
    learnt = (image, weight, *tensors[:6])
    graded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in learnt)
    if (graded and not modules[1].training) or not all(tensor.is_contiguous() for tensor in tensors):
        return None
    return _plan(image, weight, modules, tensors, *arguments)


def _plan(
    image: Tensor,
    weight: Tensor,
    modules: tuple[nn.Module, ...],
    tensors: list[Tensor],
    dtype: torch.dtype,
    cast: bool,
    size: tuple[int, ...],
    start: tuple[float, float],
    convolution: Convolution,
) -> Plan | None:
    """A plan for tensors like these in the dtype of products, or None where the parts have to run one by one."""
    branch = Branch.of(modules, size, dtype, *start)
    training, of_branch = branch.norm1.training, (*tensors[:3], *tensors[6:9], *tensors[3:6], *tensors[9:])
    problem = problem_of(image, weight, of_branch, size, convolution, dtype, cast, training)
    if problem is None:
        return None
    made = Plan(problem, branch, image, weight)
    return None if training and made.needs_units() else made


class _Layer(torch.autograd.Function):
    """The tensors of the launches are, forward: image, kept, the branch's six parameters and six buffers, the image
    with its channels last, weight, output; backward: the output's gradient, kept, the six parameters, scratch, the
    image with its channels last, weight, the gradients of the image, of the weight with its channels last and of the
    parameters."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
        *parameters, planned, buffers, floats = arguments
        kept = image.new_empty(planned.kept_bytes, dtype=torch.uint8)
        output: Tensor = planned.run(image, weight, [*parameters, *buffers], kept, floats)
        ctx.save_for_backward(image, weight, *parameters, kept)
        ctx.plan, ctx.floats = planned, floats
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        image, weight, *parameters, kept = ctx.saved_tensors
        needs = ctx.needs_input_grad[:8]
        grads: Sequence[Tensor | None]
        if torch.is_grad_enabled() or not eager(grad):
            grads = _by_operations(ctx.plan, ctx.floats, grad, [image, weight, *parameters], needs)
        else:
            for_gain = needs[0] or any(needs[2:])
            grads = ctx.plan.gradients(grad, image, weight, parameters, kept, (*needs[:2], for_gain))
        return (*[value if needed else None for value, needed in zip(grads, needs, strict=True)], None, None, None)


def _by_operations(
    planned: Plan, floats: tuple[float, ...], grad: Tensor, inputs: list[Tensor], needs: tuple[bool, ...]
) -> list[Tensor | None]:
    """The gradients by operations that have derivatives themselves."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), without_autocast(grad.device.type):
        inputs = [tensor.view_as(tensor) for tensor in inputs]  # not what they were made of
        image, weight, *parameters = inputs
        problem = planned.problem
        pooled = average_pool(image, problem.kernel)
        attention = by_operations([pooled, *parameters], planned.form, floats[0], floats[2])
        output = fused.ALGORITHM.run(problem, image, weight.to(problem.dtype), attention)
        wanted = [tensor for tensor, needed in zip(inputs, needs, strict=True) if needed]
        grads = iter(torch.autograd.grad(output, wanted, grad, create_graph=create_graph))
    return [next(grads) if needed else None for needed in needs]
