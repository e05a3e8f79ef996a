"""Attention of any structure, one kernel for each direction: C code on a CPU, Triton on a GPU.

The weights of a sample exist for a few channels at a time, in the cache (CPU), or not at all: each tap's partial
product is scaled as it is added up (GPU). Nothing of the size of N sets of weights is made, forward or backward.

The kernels are two operators of PyTorch, ``awconv::fused`` and ``awconv::fused_backward``, which torch.compile and
torch.export see as one node each. A backward that is differentiated itself is made of another algorithm's operations.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from awconv.ops import tracing
from awconv.ops.algorithm import Algorithm, Machine
from awconv.ops.fused import cpu, cuda
from awconv.ops.geometry import Geometry
from awconv.ops.gpu import empty_like_image
from awconv.ops.problem import Problem

_KERNELS: dict[str, Any] = {"cpu": cpu, "cuda": cuda}


def _obstacle(problem: Problem) -> str | None:
    if problem.device == "meta":
        return None  # shapes are all there is
    if problem.device not in _KERNELS:
        return f"it has kernels for {', '.join(_KERNELS)}, not for {problem.device}"
    if problem.function_obstacle is not None:
        return problem.function_obstacle
    found: str | None = _KERNELS[problem.device].obstacle(problem)
    return found


def _fused(problem: Problem, input: Tensor, weight: Tensor, attention: Tensor) -> Tensor:
    gain = problem.gain_of_taps(attention).flatten(3)
    output: Tensor
    if problem.device in _KERNELS and tracing.eager(input, weight, gain):
        output = _Eager.apply(input, weight, gain, problem.geometry)
        return output
    transformed = tracing.compiling() or tracing.transforming()
    run = _Fused.apply if transformed else torch.ops.awconv.fused
    output = run(input, weight, gain, *problem.geometry.arguments())
    return output


# The last four arguments are those of Geometry.of. The gain has shape (N, C2, blocks of input channels, taps).
_ARGUMENTS = "Tensor input, Tensor weight, Tensor gain, int[] stride, int[] padding, int[] dilation, int groups"
_LIBRARY = torch.library.Library("awconv", "DEF")
_LIBRARY.define(f"fused({_ARGUMENTS}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
_LIBRARY.define(
    f"fused_backward(Tensor grad_output, {_ARGUMENTS}, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _output(input: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    size = geometry.output_size(input.shape[2:], weight.shape[2:])
    return empty_like_image((input.shape[0], weight.shape[0], *size), input)


def _gradients(input: Tensor, weight: Tensor, gain: Tensor, needs: list[bool]) -> tuple[Tensor, ...]:
    """Uninitialised gradients in the layout of the kernels, empty where not needed."""
    others = (weight, gain)
    made = map(torch.empty_like, others) if input.is_cuda else (other.new_empty(other.shape) for other in others)
    grads = (empty_like_image(tuple(input.shape), input), *made)
    return tuple(grad if needed else grad.new_empty(0) for grad, needed in zip(grads, needs, strict=True))


def _fake(input: Tensor, weight: Tensor, gain: Tensor, *arguments: Any) -> Tensor:
    return _output(input, weight, Geometry.of(*arguments))


def _fake_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, gain: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    return _gradients(input, weight, gain, arguments[-1])


def _forward(input: Tensor, weight: Tensor, gain: Tensor, *arguments: Any) -> Tensor:
    return _run(input, weight, gain, Geometry.of(*arguments))


def _run(input: Tensor, weight: Tensor, gain: Tensor, geometry: Geometry) -> Tensor:
    if input.shape[0] == 0:
        return _output(input, weight, geometry)
    output: Tensor = _KERNELS[input.device.type].forward(input, weight, gain, geometry)
    return output.to(input.dtype)


def _backward(grad_output: Tensor, input: Tensor, weight: Tensor, gain: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *geometry, needs = arguments
    return _run_backward(grad_output, input, weight, gain, Geometry.of(*geometry), needs)


def _run_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, gain: Tensor, geometry: Geometry, needs: list[bool]
) -> tuple[Tensor, ...]:
    tensors = (input, weight, gain)
    if input.shape[0] == 0:
        return tuple(grad.zero_() for grad in _gradients(*tensors, needs))
    grads = _KERNELS[input.device.type].backward(grad_output, *tensors, geometry, needs)
    return tuple(
        tensor.new_empty(0) if grad is None else grad.to(tensor.dtype)
        for grad, tensor in zip(grads, tensors, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, gain, *ctx.arguments = inputs
    ctx.save_for_backward(input, weight, gain)


def _grads(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    backward: Any = _differentiable_backward if torch.is_grad_enabled() else torch.ops.awconv.fused_backward
    grads = backward(grad_output, *ctx.saved_tensors, *ctx.arguments, needs)
    return (*(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), None, None, None, None)


class _Fused(torch.autograd.Function):
    """The operator for torch.func too, which does not know what register_autograd registers."""

    generate_vmap_rule = True
    setup_context = staticmethod(_save)
    backward = staticmethod(_grads)

    @staticmethod
    def forward(
        input: Tensor, weight: Tensor, gain: Tensor, stride: Any, padding: Any, dilation: Any, groups: int
    ) -> Tensor:
        # No variable arguments: torch.compile would put its context among them.
        output: Tensor = torch.ops.awconv.fused(input, weight, gain, stride, padding, dilation, groups)
        return output


class _Eager(torch.autograd.Function):
    """The same without an operator between."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, gain: Tensor, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(input, weight, gain)
        ctx.geometry = geometry
        return _run(input, weight, gain, geometry)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:3])
        grads: tuple[Tensor, ...]
        if tracing.eager(grad_output) and not torch.is_grad_enabled():
            input, weight, gain = ctx.saved_tensors
            grads = _run_backward(grad_output, input, weight, gain, ctx.geometry, needs)
        else:
            backward: Any = _differentiable_backward if torch.is_grad_enabled() else torch.ops.awconv.fused_backward
            grads = backward(grad_output, *ctx.saved_tensors, *ctx.geometry.arguments(), needs)
        return (*(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), None)


def _differentiable_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, gain: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """The same gradients from the weights of every sample, by operations that have derivatives themselves."""
    *lists, needs = arguments
    geometry = Geometry.of(*lists)
    batch, out_channels, blocks, _ = gain.shape
    blocked = weight.reshape(out_channels, blocks, -1, gain.shape[3])
    scale = gain.unsqueeze(3)
    weights = (blocked * scale).reshape(batch * out_channels, *weight.shape[1:])
    both, rest = geometry.split_padding()
    padded = F.pad(input, rest)
    grad_padded, grad_weights, _ = torch.ops.aten.convolution_backward(
        grad_output.reshape(1, -1, *grad_output.shape[2:]),
        padded.reshape(1, -1, *padded.shape[2:]),
        weights,
        None,
        geometry.stride,
        both,
        geometry.dilation,
        False,
        [0] * len(both),
        batch * geometry.groups,
        [needs[0], needs[1] or needs[2], False],
    )
    empty = gain.new_empty(0)
    if needs[1] or needs[2]:
        grad_weights = grad_weights.reshape(batch, *blocked.shape)
    return (
        F.pad(grad_padded.reshape(padded.shape), [-amount for amount in rest]) if needs[0] else empty,
        (grad_weights * scale).sum(0).reshape(weight.shape) if needs[1] else empty,
        (grad_weights * blocked).sum(3) if needs[2] else empty,
    )


def _vmap(operator: Any, tensors: int, info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
    """An operator over a further axis: what is independent side by side becomes groups of one convolution."""
    folded = []
    for index, (tensor, axis) in enumerate(zip(arguments[:tensors], in_dims, strict=False)):
        moved = tensor.expand(info.batch_size, *tensor.shape) if axis is None else tensor.movedim(axis, 0)
        if index != tensors - 2:  # all but the weight have the samples first
            moved = moved.transpose(0, 1)
            folded.append(moved.flatten(1, 2))
        else:
            folded.append(moved.flatten(0, 1))
    stride, padding, dilation, groups, *rest = arguments[tensors:]
    results = operator(*folded, stride, padding, dilation, groups * info.batch_size, *rest)
    if isinstance(results, Tensor):
        return results.unflatten(1, (info.batch_size, -1)), 1
    grads = []
    for grad, axis in zip(results, (1, 0, 1), strict=True):
        grads.append(grad.unflatten(axis, (info.batch_size, -1)) if grad.numel() else grad)
    return tuple(grads), tuple(axis if grad.numel() else None for grad, axis in zip(results, (1, 0, 1), strict=True))


def _vmap_forward(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
    result: tuple[Tensor, int] = _vmap(torch.ops.awconv.fused, 3, info, in_dims, *arguments)
    return result


def _vmap_backward(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
    return _vmap(torch.ops.awconv.fused_backward, 4, info, in_dims, *arguments)


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("fused", _forward, _device)
    _LIBRARY.impl("fused_backward", _backward, _device)
torch.library.register_fake("awconv::fused", _fake, lib=_LIBRARY)
torch.library.register_fake("awconv::fused_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd("awconv::fused", _grads, setup_context=_save, lib=_LIBRARY)
torch.library.register_vmap("awconv::fused", _vmap_forward, lib=_LIBRARY)
torch.library.register_vmap("awconv::fused_backward", _vmap_backward, lib=_LIBRARY)


_SCALED = 3  # multiply-adds in whose time a weight is packed and scaled
_GROUP = 1000  # multiply-adds in whose time the work of a group of one sample is set up
_GROUP_IN_LANES = 300  # the same for a depthwise convolution's output, of which a vector of groups is set up at once
_PADDED = 1  # multiply-adds in whose time an element of padding is written and read
_BFLOAT16 = 2  # what the C code's single precision costs where a plain convolution has instructions for bfloat16


def _cost(problem: Problem, machine: Machine) -> float:
    multiply_adds = machine.fused * problem.multiply_adds
    if problem.device == "cuda":
        return multiply_adds  # weights are scaled on their way, and padding is not stored
    weights = problem.out_channels * problem.group_in_channels * problem.taps
    if problem.device == "cpu" and problem.dtype == torch.bfloat16:
        multiply_adds = _BFLOAT16 * multiply_adds
    padding = problem.padded_elements - problem.in_elements
    in_lanes = problem.depthwise and problem.dims < 3 and not problem.differentiated  # the gradients go by lines
    group = _GROUP_IN_LANES if in_lanes else _GROUP
    return multiply_adds + _SCALED * weights + group * problem.geometry.groups + _PADDED * padding


ALGORITHM = Algorithm("fused", _fused, _obstacle, _cost)
