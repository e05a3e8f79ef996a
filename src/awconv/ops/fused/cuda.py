"""The CUDA half of the fused algorithm: lays tensors out for the Triton kernels beside this file, and launches them.

The kernels read images and weights with their channels last; others are copied. The output and the input's gradient get
the layout of the input, the gradients of weight and gain those of weight and gain. The first call of a size compiles,
which a CUDA graph cannot capture: run once before the capture.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from awconv.ops.fused import cuda_plans, tiles
from awconv.ops.geometry import Geometry
from awconv.ops.gpu import empty_like_image, is_channels_last, precision_of_products, triton_obstacle
from awconv.ops.problem import Problem
from awconv.ops.tracing import written

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_INTERPRETED = 3  # programs that share the sums in Triton's interpreter: enough that a tile is in pieces


def obstacle(problem: Problem) -> str | None:
    """Why the kernels cannot run a problem."""
    if problem.dims > 2:
        return "its kernels for GPUs take one or two spatial axes"
    if problem.dtype not in _DTYPES:
        return f"its kernels for GPUs take {', '.join(map(str, _DTYPES))}, not {problem.dtype}"
    block_channels = problem.group_in_channels // problem.attention_blocks[1]
    group_out = problem.out_channels // problem.geometry.groups
    if problem.group_in_channels > 1 and min(block_channels, group_out) < tiles.LEAST:
        return (
            f"its kernels for GPUs take depthwise convolutions, and others with at least {tiles.LEAST} input "
            f"channels in a group that share their attention, here {written(block_channels)}, and as many output "
            f"channels in a group, here {written(group_out)}"
        )
    for name, elements in (("input", problem.in_elements), ("output", problem.out_elements)):
        if statically_known_true(elements >= 2**31):
            count = written(elements)
            return f"its kernels for GPUs count in 32 bits within a sample, whose {name} has {count} elements"
    found: str | None = triton_obstacle()
    return found


def forward(input: Tensor, weight: Tensor, gain: Tensor, geometry: Geometry) -> Tensor:
    """The output, in the layout of the input."""
    size = geometry.output_size(input.shape[2:], weight.shape[2:])
    output = empty_like_image((input.shape[0], weight.shape[0], *size), input)
    if output.numel():
        if len(size) == 1:
            _forward(input.unsqueeze(2), weight.unsqueeze(2), gain, output.unsqueeze(2), _with_two_axes(geometry))
        else:
            _forward(input, weight, gain, output, geometry)
    return output


def _forward(input: Tensor, weight: Tensor, gain: Tensor, output: Tensor, geometry: Geometry) -> None:
    facts = (input.dtype, precision_of_products(), is_channels_last(output))
    launch, wide = cuda_plans.forward(tuple(input.shape), tuple(weight.shape), gain.shape[2], geometry, facts)
    unit = () if weight.shape[1] == 1 else (None,)
    launch.run(_last(input), _last(weight), _gains(gain, wide), output, *unit)


def backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, gain: Tensor, geometry: Geometry, needs: list[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of input, weight and gain, each in the layout of what it belongs to, None where not needed."""
    if len(geometry.stride) == 1:
        above, image, kernel = (tensor.unsqueeze(2) for tensor in (grad_output, input, weight))
        grad_input, grad_weight, grad_gain = backward(above, image, kernel, gain, _with_two_axes(geometry), needs)
        if grad_input is not None:
            grad_input = grad_input.squeeze(2).contiguous()
        if grad_weight is not None:
            grad_weight = _laid_out(grad_weight.squeeze(2), weight)
        return grad_input, grad_weight, grad_gain
    if not grad_output.numel():
        return tuple(
            torch.zeros_like(tensor) if needed else None
            for tensor, needed in zip((input, weight, gain), needs, strict=True)
        )
    above, weights, gains = _last(grad_output), _last(weight), _gains(gain, False)
    grad_input = grad_weight = grad_gain = None
    if needs[0]:
        grad_input = _grad_input(above, input, weights, gains, geometry)
    if needs[1] or needs[2]:
        products = _depthwise_products if weight.shape[1] == 1 else _products
        grad_weight, grad_gain = products(above, _last(input), weights, gains, geometry, needs[1], needs[2])
    return grad_input, _laid_out(grad_weight, weight), _laid_out(grad_gain, gain)


def _with_two_axes(geometry: Geometry) -> Geometry:
    """A convolution over one axis as one over two, of which the first has size 1."""
    stride, padding, dilation, groups = geometry
    return Geometry((1, *stride), ((0, 0), *padding), (1, *dilation), groups)


def _last(image: Tensor) -> Tensor:
    """The tensor with its channels last, copied only if they are not."""
    return image.contiguous(memory_format=torch.channels_last)


def _gains(gain: Tensor, wide: bool) -> Tensor:
    """Shape (N, C2, blocks, taps) to (N, blocks, taps, C2), in single precision or its own."""
    gains = gain.permute(0, 2, 3, 1)
    if wide:
        gains = gains.to(torch.float32, memory_format=torch.contiguous_format)
    return gains.contiguous()


def _laid_out(grad: Tensor | None, like: Tensor) -> Tensor | None:
    """A gradient with the strides that ``torch.empty_like`` gives it."""
    if grad is None or grad.stride() == like.stride():
        return grad
    return torch.empty_like(like).copy_(grad)


def _grad_input(above: Tensor, input: Tensor, weights: Tensor, gains: Tensor, geometry: Geometry) -> Tensor:
    grad = empty_like_image(tuple(input.shape), input)
    facts = (input.dtype, precision_of_products(), is_channels_last(grad))
    launches, whole = cuda_plans.grad_input(tuple(input.shape), tuple(weights.shape), gains.shape[1], geometry, facts)
    if not whole:
        grad.zero_()
    unit = None
    if input.dtype == torch.float16 and any(launch.kernel.name == "scaled_sums" for launch, _ in launches):
        largest = gains.abs().nan_to_num(nan=0, posinf=0).flatten(1).amax(1).float()
        unit = torch.ldexp(torch.ones_like(largest), -torch.frexp(largest.clamp(min=1)).exponent)
    if any(wide for _, wide in launches):
        gains = gains.float()
    depthwise = weights.shape[1] == 1
    for launch, _ in launches:
        launch.run(above, weights, gains, grad, *(() if depthwise else (unit,)))
    return grad


def processors(tensor: Tensor) -> int:
    """How many the tensor's device has."""
    if not tensor.is_cuda:
        return _INTERPRETED
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def _products(
    above: Tensor, input: Tensor, weights: Tensor, gains: Tensor, geometry: Geometry, for_weight: bool, for_gain: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the weight, with its channels last, and of the gain."""
    facts = (input.dtype, precision_of_products(), processors(input))
    shapes = tuple(input.shape), tuple(weights.shape)
    sums = cuda_plans.sums(*shapes, gains.shape[1], geometry, facts, (for_weight, for_gain))
    dtype = input.dtype if sums.parts == 1 else torch.float32
    grad_gains = gains.new_empty(sums.parts if for_gain else 0, *gains.shape, dtype=dtype)
    pieces = gains.new_empty(sums.pieces if for_weight else 0, dtype=torch.float32)
    sums.products.run(above, input, weights, gains, pieces, grad_gains)
    grad_weight = None
    if for_weight:
        grad_weight = torch.empty_like(weights)
        sums.add.run(pieces, grad_weight)
    if not for_gain:
        return grad_weight, None
    grad_gain = grad_gains[0] if sums.parts == 1 else grad_gains.sum(0).to(input.dtype)
    return grad_weight, grad_gain.permute(0, 3, 1, 2)


def _depthwise_products(
    above: Tensor, input: Tensor, weights: Tensor, gains: Tensor, geometry: Geometry, for_weight: bool, for_gain: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The same where a group has one input channel."""
    gains = gains.squeeze(1)
    sums = torch.empty_like(gains, dtype=torch.float32)
    cuda_plans.depthwise_sums(tuple(input.shape), tuple(weights.shape), geometry).run(above, input, sums)
    grad_weight = grad_gain = None
    if for_weight:
        summed = (sums * gains).sum(0).T.reshape(weights.shape)
        grad_weight = torch.empty_like(weights).copy_(summed)
    if for_gain:
        scaled = sums * weights.reshape(weights.shape[0], -1).T
        grad_gain = scaled.to(weights.dtype).transpose(1, 2).unsqueeze(2)
    return grad_weight, grad_gain
