"""All that launching a whole layer (``layer.py``) needs but its tensors: which problems kernels run as a whole, the
sequences of launches, the layout of buffers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from awconv.ops import branch_launches, fused
from awconv.ops.average_pool import fits_gpu, pool_launch
from awconv.ops.branch import Branch, facts_of, sizes_fit
from awconv.ops.choose import wanted
from awconv.ops.functional import plan
from awconv.ops.fused import cuda, cuda_plans
from awconv.ops.gpu import (
    Kernel,
    Launch,
    Launches,
    Operand,
    Step,
    compiling_side_by_side,
    empty_like_image,
    is_channels_last,
    on_device,
    precision_of_products,
)
from awconv.ops.launcher import ALIGNMENT
from awconv.ops.problem import Problem, TensorFacts, product

_BLOCK = 1024  # elements of a weight, that a program lays out
_LAST = torch.channels_last
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # of weights, which autocast casts

Convolution = tuple[Any, Any, Any, int, bool]  # stride, padding, dilation, groups, residual


def problem_of(
    image: Tensor,
    weight: Tensor,
    of_branch: Sequence[Tensor],
    size: tuple[int, ...],
    convolution: Convolution,
    dtype: torch.dtype,
    cast: bool,
    training: bool,
) -> Problem | None:
    """The convolution of a layer, or None where its parts have to run one by one.

    Args:
        image: the layer's input.
        weight: of the convolution.
        of_branch: weight, norm's weight and bias, and its three buffers, of each half.
        size: of one sample's attention.
        convolution: as ``aw_conv2d`` takes it.
        dtype: of products.
        cast: whether autocast casts to it.
        training: whether the norms take the statistics of the batch.
    """
    if image.dtype != dtype or not (cast or weight.dtype == dtype) or weight.dtype not in _DTYPES:
        return None
    if image.dim() != 4 or weight.dim() != 4 or image.shape[1] != weight.shape[1] * convolution[3]:
        return None
    if not (is_channels_last(image) or image.is_contiguous()) or weight.shape[1] == 1:
        return None
    if not (weight.is_contiguous(memory_format=_LAST) or weight.is_contiguous()):
        return None
    if size != (weight.shape[0], 1, *weight.shape[2:]) or not fits_gpu(image, size[2:]):
        return None
    pooled = (*image.shape[:2], *size[2:])
    shapes, dtypes = tuple(tensor.shape for tensor in of_branch), tuple(tensor.dtype for tensor in of_branch)
    if not sizes_fit((pooled, *shapes), (dtype, *dtypes), size, dtype, cast):
        return None
    if training and image.shape[0] * product(size[2:]) < 2:
        return None
    facts = (
        TensorFacts(image.shape, dtype, image.device, image.requires_grad),
        TensorFacts(weight.shape, dtype, image.device, weight.requires_grad),
        TensorFacts(torch.Size((image.shape[0], *size)), dtype, image.device, True),
    )
    problem, chosen = plan(wanted("auto"), 2, *facts, None, *convolution)
    unseeing = any(pair != (0, 0) for pair in problem.unseeing)
    # By name: to Dynamo of torch 2.9, a named tuple that it finds in two places is two.
    return None if unseeing or chosen.name != fused.ALGORITHM.name else problem


def _lay_out(weight: Tensor) -> Launch:
    """Of a weight, with its channels last and in another dtype."""
    channels, taps = weight.shape[1], product(weight.shape[2:])
    if weight.is_contiguous(memory_format=_LAST):
        channels = taps = 1
    kernel = Kernel("awconv.ops.triton_weight", "lay_out", dict(channels=channels, taps=taps, block=_BLOCK))
    return Launch(kernel, -(-weight.numel() // _BLOCK), (weight.numel(),))


class _Parts:
    """Lays out what lies in a buffer of bytes, which is one of the tensors of some launches."""

    def __init__(self, tensor: int) -> None:
        self._tensor, self.bytes = tensor, 0

    def part(self, elements: int, dtype: torch.dtype) -> Operand:
        made = Operand(self._tensor, self.bytes, dtype)
        self.bytes += -(-elements * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        return made


class _Backward(NamedTuple):
    """The launches of a backward, and the bytes of their buffer."""

    launches: Launches
    scratch: int


class Plan:
    """All of a step, or of a forward with running statistics, that follows from shapes, dtypes and arguments.

    The buffer that is kept for the backward holds what the branch keeps, the pooled input, the gain, and the weight
    where the convolution reads it in another dtype or order; the gain in single precision too where a kernel reads it
    so; and what the kernels of the forward hand on, which is less than a buffer of its own would cost.
    """

    def __init__(self, problem: Problem, branch: Branch, image: Tensor, weight: Tensor) -> None:
        self.problem, self.form, self.shape = problem, branch.form, tuple(image.shape)
        self.image_is_last = is_channels_last(image)
        self.weight_is_ready = weight.dtype == problem.dtype and weight.is_contiguous(memory_format=_LAST)
        self._lay_out_weight, self._weights = _lay_out(weight), weight.numel()
        output = empty_like_image((self.shape[0], problem.out_channels, *problem.out_size), image.to("meta"))
        self.out_shape, self.out_stride = tuple(output.shape), output.stride()
        self._processors, self._precision = cuda.processors(image), precision_of_products()
        pooled = image.new_empty((*self.shape[:2], *problem.kernel), device="meta")
        self._facts = facts_of(pooled, branch, 1 if self.image_is_last else problem.taps)
        self.gains = self._facts.rows * problem.out_channels
        arguments = (self.shape, tuple(weight.shape), 1, problem.geometry)
        dtype, precision = problem.dtype, self._precision
        self._convolve = cuda_plans.forward(*arguments, (dtype, precision, is_channels_last(output)))
        self._grad_input, self._whole = cuda_plans.grad_input(*arguments, (dtype, precision, self.image_is_last))
        self._arguments, self._training = arguments, branch.norm1.training
        self._lay_out()
        self.forward = self._make_forward()
        self._backwards: dict[tuple[bool, bool, bool], _Backward] = {}

    def compile(
        self,
        device: int,
        weight: torch.dtype,
        tensors: Sequence[Tensor],
        floats: tuple[float, ...],
        needs: tuple[bool, bool, bool],
    ) -> None:
        """Compiles the kernels of a step side by side; the step would wait for one after another.

        Args:
            device: the index of the GPU.
            weight: the dtype of the convolution's.
            tensors: of the branch, six parameters and six buffers.
            floats: of the launches.
            needs: whether gradients of the input, the weight and the gain will be needed.
        """
        low, raw = self.problem.dtype, torch.uint8
        parameters, buffers = ([tensor.dtype for tensor in some] for some in (tensors[:6], tensors[6:]))
        with on_device(device), compiling_side_by_side():
            self.forward.compile([low, raw, *parameters, *buffers, low, weight, low], floats)
            if any(needs):
                dtypes = [low, raw, *parameters, raw, low, weight, low, weight, *parameters]
                self.backward(needs).launches.compile(dtypes)

    def needs_units(self) -> bool:
        """Whether a kernel takes a number for each sample that PyTorch makes of the gain."""
        return self.problem.dtype == torch.float16 and any(
            launch.kernel.name == "scaled_sums" for launch, _ in self._grad_input
        )

    def backward(self, needs: tuple[bool, bool, bool]) -> _Backward:
        """The launches of a backward: see ``_Layer``.

        Args:
            needs: whether gradients of the input, the weight and the gain are needed.
        """
        if needs not in self._backwards:
            self._backwards[needs] = self._make_backward(*needs)
        return self._backwards[needs]

    def _lay_out(self) -> None:
        dtype, parts = self.problem.dtype, _Parts(1)
        _, kept, handed_on = branch_launches.forward(self._facts) if self._training else (None, 0, 0)
        self._kept = parts.part(kept, torch.float32)
        self._pooled = parts.part(self._facts.rows * self._facts.channels, dtype)
        self._gain = parts.part(self.gains, dtype)
        self._low = None if self.weight_is_ready else parts.part(self._weights, dtype)
        self._wide_gain = None
        correlations = (self._convolve, *self._grad_input) if self._training else (self._convolve,)
        if dtype != torch.float32 and any(correlation.wide_gains for correlation in correlations):
            self._wide_gain = parts.part(self.gains, torch.float32)
        self._scratch = parts.part(handed_on, torch.float32)
        self.kept_bytes = parts.bytes

    def _read_gain(self, wide: bool) -> Operand:
        return self._wide_gain if wide and self._wide_gain is not None else self._gain

    def _launch_pool(self, kernel: str, added: bool) -> Launch:
        return pool_launch(kernel, *self.shape[:2], self.problem.size, self.problem.kernel, self.image_is_last, added)

    def _make_forward(self) -> Launches:
        facts = self._facts._replace(residual=self.problem.residual)
        image, weight1, weight2, source, weight, output = map(Operand, (0, 2, 5, 14, 15, 16))
        norm1, norm2 = [Operand(3), Operand(4)], [Operand(6), Operand(7)]
        buffers1, buffers2 = list(map(Operand, range(8, 11))), list(map(Operand, range(11, 14)))
        convolve, wide = self._convolve
        first = [Step(self._launch_pool("pool", False), (image, self._pooled))]
        if self._low is not None:
            first.append(Step(self._lay_out_weight, (weight, self._low)))
        last = Step(convolve, (source, self._low or weight, self._read_gain(wide), output, None))
        gains = (self._gain, self._wide_gain)
        if not self._training:
            halves = (weight1, *norm1, *buffers1[:2], weight2, *norm2, *buffers2[:2])
            infer = Step(branch_launches.inference(facts), (self._pooled, *halves, *gains), (0, 2))
            return Launches([*first, infer, last])
        project, measure, finish = branch_launches.forward(facts)[0]
        passed = (self._kept, self._scratch, weight2, *norm1)
        of_branch = [
            Step(project, (self._pooled, weight1, self._kept, self._scratch)),
            Step(measure, (*passed, *buffers1), (0, 1)),
            Step(finish, (*passed, *norm2, *buffers2, *gains), (2, 3)),
        ]
        return Launches([*first, *of_branch, last])

    def _make_backward(self, for_input: bool, for_weight: bool, for_gain: bool) -> _Backward:
        above, source, weight, grad_weight = map(Operand, (0, 9, 10, 12))
        scratch, dtype = _Parts(8), self.problem.dtype
        facts = (dtype, self._precision, self._processors)
        sums = cuda_plans.sums(*self._arguments, facts, (for_weight, for_gain))
        grad_gains = scratch.part(sums.parts * self.gains, dtype if sums.parts == 1 else torch.float32)
        pieces = scratch.part(product(sums.pieces), torch.float32)
        steps = []
        if for_weight or for_gain:
            steps.append(Step(sums.products, (above, source, self._low or weight, self._gain, pieces, grad_gains)))
        if for_weight:
            steps.append(Step(sums.add, (pieces, grad_weight)))
        if for_gain:
            of_branch = self._of_branch(grad_gains, sums.parts, scratch)
            steps += of_branch
            if for_input:
                steps += self._of_input(of_branch[2].operands[-1])
        return _Backward(Launches(steps), scratch.bytes)

    def _of_input(self, grad_pooled: Operand | None) -> list[Step]:
        """The gradient of the input: of the convolution's, to which that of the pooling is added in place."""
        above, weight, grad_input = map(Operand, (0, 10, 11))
        read = self._read_gain(any(wide for _, wide in self._grad_input))
        operands = (above, self._low or weight, read, grad_input, None)
        steps = [Step(launch, operands) for launch, _ in self._grad_input]
        return [*steps, Step(self._launch_pool("spread", True), (grad_pooled, grad_input))]

    def _of_branch(self, grad_gain: Operand, parts: int, scratch: _Parts) -> list[Step]:
        (sum_grads, grad_second, grad_first, add), elements = branch_launches.backward(self._facts, 1, parts)
        handed_on = scratch.part(elements, torch.float32)
        grad_pooled = scratch.part(self._facts.rows * self._facts.channels, self.problem.dtype)
        weight1, norm_weight1, norm_bias1, weight2, *norm2 = map(Operand, range(2, 8))
        grad_weight1, grad_norm_weight1, grad_norm_bias1, grad_weight2, *grad_norm2 = map(Operand, range(13, 19))
        passed = (grad_gain, self._kept, handed_on, weight2, norm_weight1, norm_bias1, *norm2)
        grads1 = (grad_norm_weight1, grad_norm_bias1, grad_pooled)
        return [
            Step(sum_grads, passed),
            Step(grad_second, (*passed, *grad_norm2)),
            Step(grad_first, (self._pooled, self._kept, handed_on, weight1, norm_weight1, *grads1)),
            Step(add, (handed_on, grad_weight1, grad_weight2)),
        ]

    def run(
        self, image: Tensor, weight: Tensor, tensors: Sequence[Tensor], kept: Tensor, floats: tuple[float, ...]
    ) -> Tensor:
        """The output.

        Args:
            image: the layer's input.
            weight: of the convolution.
            tensors: of the branch, six parameters and six buffers.
            kept: a buffer of at least ``kept_bytes``.
            floats: epsilon and momentum of each norm.
        """
        output = image.new_empty_strided(self.out_shape, self.out_stride)
        source = image if self.image_is_last else image.contiguous(memory_format=_LAST)
        self.forward.run([image, kept, *tensors, source, weight, output], floats)
        return output

    def gradients(
        self,
        grad: Tensor,
        image: Tensor,
        weight: Tensor,
        parameters: Sequence[Tensor],
        kept: Tensor,
        needs: tuple[bool, bool, bool],
    ) -> list[Tensor]:
        """Of image, weight and parameters, whatever is in those that are not needed.

        Args:
            grad: that of the output.
            image: the layer's input.
            weight: of the convolution.
            parameters: of the branch.
            kept: the buffer that the forward filled.
            needs: whether gradients of the input, the weight and the gain are needed.
        """
        made = self.backward(needs)
        # Hooks of saved tensors may have changed their strides.
        above, source = grad.contiguous(memory_format=_LAST), image.contiguous(memory_format=_LAST)
        read = weight.contiguous(memory_format=_LAST) if self.weight_is_ready else weight
        scratch = image.new_empty(made.scratch, dtype=torch.uint8)
        grad_input = image
        if needs[0]:
            grad_input = torch.empty_like(source) if self.image_is_last else image.new_empty(self.shape)
            if not self._whole:
                grad_input.zero_()
        grad_weight = weight
        if needs[1]:
            last = weight.is_contiguous(memory_format=_LAST)
            grad_weight = torch.empty_like(weight, memory_format=torch.preserve_format if last else _LAST)
        grads = [torch.empty_like(parameter) for parameter in parameters]
        made.launches.run([above, kept, *parameters, scratch, source, read, grad_input, grad_weight, *grads])
        if needs[1] and not last:
            grad_weight = torch.empty_like(weight).copy_(grad_weight)
        return [grad_input, grad_weight, *grads]
