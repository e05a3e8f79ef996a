"""One AW-convolution, described and checked: what every algorithm is asked to run.

Words that mean one thing each in this folder, in Python and in C:

- **position**: of the window, one for each pixel of the output; **tap**: of the kernel.
- **kernel extent**: how many pixels of an axis a dilated kernel spans, from its first tap to its last.
- **gain**: what a weight is multiplied by: 1 + a with the residual and a without.
- **block**: weights that share a gain. A number of blocks is that along one axis: of the input channels of a group,
  where none is named.
- **rate**: how many weights along an axis are in a block (r_C2, r_C1, r_hw).
- **stride**: from one position to the next, in pixels; a **tap stride** is from one tap to the next. A pitch, or what
  is called ``position_stride`` in C, is in elements of memory.
- **tile**: what a kernel computes at once; **workspace**: scratch memory of the C code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from awconv.ops import tracing
from awconv.ops.geometry import Geometry

# What an algorithm that makes the padding explicit may hold for a sample: this many elements (16 MiB in single
# precision), or this many times the input and the output.
_MOST_PADDED = 2**22
_MOST_TIMES = 4

SPATIAL_NAMES = {1: ("L",), 2: ("H", "W"), 3: ("D", "H", "W")}


@dataclass(frozen=True)
class Problem:
    """The sizes and arguments of one AW-convolution, already checked.

    Sizes that only the batch decides are left out on purpose: the choice of an algorithm must not depend on the batch
    size, so that a model exported or compiled with a dynamic batch has one answer.

    Attributes:
        empty: the batch holds no sample.
        out_channels: C2.
        in_channels: C1.
        kernel: kernel size along each spatial axis.
        size: input size along each spatial axis, before padding.
        out_size: output size along each spatial axis, without positions that see nothing but padding.
        unseeing: positions ``(before, after)`` along each spatial axis that see nothing but padding; their output is
            zero.
        geometry: of the other positions, without padding that they do not see; where there is one position, its stride
            is at most as long as the input.
        rates: how often ``Expand`` repeats the attention along C2, C1/groups and each kernel axis (r_C2, r_C1, r_hw).
        residual: K + A * K if true, A * K otherwise.
        device: the type of the device, such as ``"cpu"``.
        dtype: of all tensors.
        function_obstacle: why the derivatives of an ``autograd.Function`` cannot be had; None if they can.
        differentiated: a backward may follow.
    """

    empty: bool
    out_channels: int
    in_channels: int
    kernel: tuple[int, ...]
    size: tuple[int, ...]
    out_size: tuple[int, ...]
    unseeing: tuple[tuple[int, int], ...]
    geometry: Geometry
    rates: tuple[int, ...]
    residual: bool
    device: str
    dtype: torch.dtype
    function_obstacle: str | None
    differentiated: bool

    @property
    def dims(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel)

    @property
    def group_in_channels(self) -> int:
        """Input channels that one output channel sees: C1/groups."""
        return self.in_channels // self.geometry.groups

    @property
    def depthwise(self) -> bool:
        """Whether each output channel sees an input channel of its own."""
        return self.out_channels == self.in_channels == self.geometry.groups

    @property
    def taps(self) -> int:
        """Number of positions of the kernel: h * w in two dimensions."""
        return product(self.kernel)

    @property
    def out_elements(self) -> int:
        """Elements of the output of one sample."""
        return self.out_channels * product(self.out_size)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of the plain convolution of one sample."""
        return self.out_elements * self.group_in_channels * self.taps

    @property
    def in_elements(self) -> int:
        """Elements of the input of one sample."""
        return self.in_channels * product(self.size)

    @property
    def padded_elements(self) -> int:
        """Elements of the input of one sample with as much of its padding as the kernel sees."""
        return self.in_channels * product(self.geometry.seen_size(self.out_size, self.kernel))

    @property
    def padding_obstacle(self) -> str | None:
        """Why an algorithm that makes the padding explicit should not run; None if it may.

        A plain convolution skips its padding, which can be any multiple of the input.
        """
        padded, plain = self.padded_elements, self.in_elements + self.out_elements
        # Sizes that are symbols pass: a bound would narrow what an exported graph takes.
        if statically_known_true(padded > _MOST_PADDED) and statically_known_true(padded > _MOST_TIMES * plain):
            return f"{tracing.written(padded)} elements a sample where input and output have {tracing.written(plain)}"
        return None

    @property
    def attention_blocks(self) -> tuple[int, ...]:
        """The sizes of the attention map before Expand, without the batch."""
        return tuple(
            size // rate
            for size, rate in zip((self.out_channels, self.group_in_channels, *self.kernel), self.rates, strict=True)
        )

    def gain(self, attention: Tensor) -> Tensor:
        """What the weights are multiplied with: 1 + A, since K + A * K = (1 + A) * K, or A without the residual."""
        return 1 + attention if self.residual else attention

    def gain_of_taps(self, attention: Tensor) -> Tensor:
        """The gain of each output channel, block of input channels and tap: (N, C2, blocks, \\*kernel)."""
        gain = self.gain(attention)
        for axis, rate in enumerate(self.rates, start=1):
            if rate > 1 and axis != 2:
                gain = gain.repeat_interleave(rate, dim=axis)
        return gain

    def with_unseeing(self, output: Tensor) -> Tensor:
        """The whole output, from that of the positions that see some of the input."""
        if all(pair == (0, 0) for pair in self.unseeing):
            return output
        return F.pad(output, [positions for pair in reversed(self.unseeing) for positions in pair])


def product(sizes: Sequence[int]) -> int:
    """The product of some sizes, symbolic ones too (``math.prod`` cannot be traced with those)."""
    result = 1
    for size in sizes:
        result = result * size
    return result


class TensorFacts(NamedTuple):
    """All that a problem follows from of a tensor. Unlike the tensor it has a hash by value, and holds no memory."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool


def describe(
    dims: int,
    input: Tensor | TensorFacts,
    weight: Tensor | TensorFacts,
    attention: Tensor | TensorFacts,
    bias: Tensor | TensorFacts | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
    residual: bool,
) -> Problem:
    """Checks the arguments of ``aw_conv{dims}d`` and returns the problem they state.

    Raises:
        TypeError: an argument is of the wrong type, or the dtypes differ or are not floating-point.
        ValueError: sizes, devices or numbers do not fit together. The message names the argument, what was expected
            and what came.
    """
    name = f"aw_conv{dims}d"
    tensors = {"input": input, "weight": weight, "attention": attention}
    _check_tensors(name, tensors if bias is None else tensors | {"bias": bias})
    _check_axes(name, dims, input.shape, weight.shape)
    _check_channels(name, input.shape[1], weight.shape, groups)
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(
            f"{name}: bias must have shape ({weight.shape[0]},), one value for each output channel, "
            f"got {tuple(bias.shape)}"
        )
    rates = _rates(name, dims, input.shape[0], weight.shape, attention.shape)
    size = tuple(input.shape[2:])
    kernel = tuple(int(taps) for taps in weight.shape[2:])  # a compiled or exported graph has one kernel size
    geometry, unseeing = _geometry(name, size, kernel, stride, padding, dilation, groups).seeing(size, kernel)
    return Problem(
        empty=bool(input.shape[0] == 0),
        out_channels=weight.shape[0],
        in_channels=input.shape[1],
        kernel=kernel,
        size=size,
        out_size=geometry.output_size(size, kernel),
        unseeing=unseeing,
        geometry=geometry,
        rates=rates,
        residual=residual,
        device=input.device.type,
        dtype=input.dtype,
        function_obstacle=tracing.function_obstacle(),
        differentiated=torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (input, weight, attention)),
    )


def _check_tensors(name: str, tensors: dict[str, Tensor | TensorFacts]) -> None:
    for argument, tensor in tensors.items():
        if not isinstance(tensor, (Tensor, TensorFacts)):
            raise TypeError(f"{name}: {argument} must be a Tensor, got {type(tensor).__name__}")
    input = tensors["input"]
    for argument, tensor in tensors.items():
        if not tensor.dtype.is_floating_point:
            raise TypeError(
                f"{name}: {argument} must be floating-point, got {tensor.dtype}; convert it with .to(torch.float32)"
            )
        if tensor.dtype != input.dtype:
            raise TypeError(
                f"{name}: {argument} must have the dtype of input, {input.dtype}, got {tensor.dtype}; "
                f"convert one of them or run under torch.autocast"
            )
        if tensor.device != input.device:
            raise ValueError(
                f"{name}: {argument} must be on the device of input, {input.device}, got {tensor.device}; "
                f"move it with .to(input.device)"
            )


def _check_axes(name: str, dims: int, input: torch.Size, weight: torch.Size) -> None:
    if len(input) != dims + 2:
        axes = ", ".join(SPATIAL_NAMES[dims])
        remedy = "; add the batch axis with input[None] if it is one sample" if len(input) == dims + 1 else ""
        raise ValueError(f"{name}: input must have {dims + 2} axes (N, C1, {axes}), got shape {tuple(input)}{remedy}")
    if len(weight) != dims + 2:
        axes = ", ".join(_kernel_names(dims))
        raise ValueError(f"{name}: weight must have {dims + 2} axes (C2, C1/groups, {axes}), got shape {tuple(weight)}")


def _check_channels(name: str, in_channels: int, weight: torch.Size, groups: int) -> None:
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise ValueError(f"{name}: groups must be a positive integer, got {groups!r}")
    out_channels, group_in_channels = weight[:2]
    if in_channels != group_in_channels * groups:
        raise ValueError(
            f"{name}: input must have {group_in_channels * groups} channels (weight.shape[1] = {group_in_channels} "
            f"times groups = {groups}), got {in_channels}"
        )
    if out_channels % groups:
        raise ValueError(
            f"{name}: weight must have a number of output channels divisible by groups = {groups}, got {out_channels}"
        )
    if product(weight) == 0:
        raise ValueError(f"{name}: weight must not be empty, got shape {tuple(weight)}")


def _kernel_names(dims: int) -> list[str]:
    return ["k" + axis for axis in SPATIAL_NAMES[dims]]


def _geometry(
    name: str, size: Sequence[int], kernel: tuple[int, ...], stride: Any, padding: Any, dilation: Any, groups: int
) -> Geometry:
    dims = len(kernel)
    strides = _per_axis(name, "stride", stride, dims, least=1)
    dilations = _per_axis(name, "dilation", dilation, dims, least=1)
    geometry = Geometry(strides, _paddings(name, padding, kernel, strides, dilations), dilations, groups)
    axes = zip(SPATIAL_NAMES[dims], size, geometry.padding, geometry.kernel_extent(kernel), strict=True)
    for axis, length, pair, extent in axes:
        padded = length + sum(pair)
        if padded < extent:
            raise ValueError(
                f"{name}: input is too small along axis {axis}: {length} with padding {pair} makes {padded}, and the "
                f"dilated kernel spans {extent}; pad the input"
            )
    return geometry


def _rates(name: str, dims: int, batch: int, weight: torch.Size, attention: torch.Size) -> tuple[int, ...]:
    if len(attention) != dims + 3:
        kernel = ", ".join(f"{axis}/r_hw" for axis in _kernel_names(dims))
        raise ValueError(
            f"{name}: attention must have {dims + 3} axes (N, C2/r_C2, (C1/groups)/r_C1, {kernel}), "
            f"got shape {tuple(attention)}"
        )
    if attention[0] != batch:
        raise ValueError(
            f"{name}: attention must have the batch size of input, {batch}, got {attention[0]}; "
            f"share one map among all samples with attention.expand({batch}, ...)"
        )
    rates = []
    axes = ["out_channels", "in_channels / groups", *_kernel_names(dims)]
    for axis, whole, part in zip(axes, weight, attention[1:], strict=True):
        if part < 1 or whole % part:
            raise ValueError(
                f"{name}: attention must have a size that divides the weight's along {axis}: a divisor of {whole}, "
                f"got {part} (attention {tuple(attention)}, weight {tuple(weight)})"
            )
        rates.append(whole // part)
    return tuple(rates)


def _per_axis(name: str, argument: str, value: Any, dims: int, least: int) -> tuple[int, ...]:
    values = (value,) * dims if isinstance(value, int) else value
    if (
        isinstance(value, (bool, str))
        or not isinstance(values, Sequence)
        or not all(isinstance(v, int) and not isinstance(v, bool) for v in values)
    ):
        raise TypeError(f"{name}: {argument} must be an integer or {dims} of them, got {value!r}")
    if len(values) != dims:
        raise ValueError(f"{name}: {argument} must have {dims} numbers, one for each spatial axis, got {value!r}")
    if any(v < least for v in values):
        raise ValueError(f"{name}: {argument} must be at least {least}, got {value!r}")
    return tuple(values)


def _paddings(
    name: str, padding: Any, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    if not isinstance(padding, str):
        return tuple((amount, amount) for amount in _per_axis(name, "padding", padding, len(kernel), least=0))
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if padding != "same":
        raise ValueError(f"{name}: padding must be 'same', 'valid' or numbers, got {padding!r}")
    if any(distance != 1 for distance in stride):
        raise ValueError(f"{name}: padding='same' needs stride 1, got {tuple(stride)}; give the padding as numbers")
    totals = [rate * (extent - 1) for rate, extent in zip(dilation, kernel, strict=True)]
    return tuple((total // 2, total - total // 2) for total in totals)
