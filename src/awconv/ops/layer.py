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
from torch._C._dynamo.guards import TensorGuards

from awconv.ops import branch_launches, fused
from awconv.ops.average_pool import average_pool, has_kernel, pool_launch
from awconv.ops.branch import Branch, by_operations, facts_of, fits, plain, unwatched
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
from awconv.ops.tracing import autocasting, eager, in_forward_mode, without_autocast

_CALLS = 4096  # of different kinds, that are remembered
_ALIKE = 16  # calls of a kind, whose tensors differ
_BLOCK = 1024  # elements of a weight, that a program lays out
_LAST = torch.channels_last
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # of weights, which autocast casts
_OF_CONV = attrgetter("__class__", "kernel_size", "stride", "padding", "groups")
_OF_NORM = attrgetter("__class__", "training", "track_running_stats")
_AFFINE = itemgetter("weight", "bias")
_STATISTICS = itemgetter("running_mean", "running_var", "num_batches_tracked")

Convolution = tuple[Any, Any, Any, int, bool]


class _Call(NamedTuple):
    """What was found out for a call: its plan, or None where the parts of the layer run one after another."""

    planned: _Plan | None
    guards: TensorGuards  # whether tensors have the types, dtypes, sizes, strides and devices that these had


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
    tensors = _tensors(modules)
    if tensors is None:
        return None
    norm1, norm2 = modules[1], modules[4]
    training = norm1.training
    momentum1, momentum2 = (norm1.momentum, norm2.momentum) if training else (0, 0)
    if momentum1 is None or momentum2 is None:
        return None
    floats = (float(norm1.eps), float(momentum1), float(norm2.eps), float(momentum2))
    cast = autocasting("cuda")
    dtype = torch.get_autocast_dtype("cuda") if cast else image.dtype
    precision = precision_of_products() if dtype == torch.float32 else ""
    around = (cast, dtype, precision, torch.is_grad_enabled(), wanted("auto"))
    key = (image.shape, *around, size, start, convolution, *_structure(modules))
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
            planned.compile(image, weight, tensors, floats)
        if len(_KNOWN) == _CALLS:
            _KNOWN.clear()
        _KNOWN[key] = (*calls[1 - _ALIKE :], _Call(planned, _guards(image, weight, *tensors)))
    if planned is None:
        return None
    if not training:
        return _forward(planned, image, weight, tensors, floats)[0]
    output: Tensor = _Layer.apply(image, weight, *tensors[:6], planned, tensors[6:], floats)
    return output


def _tensors(modules: tuple[Any, ...]) -> list[Any] | None:
    """Six parameters, then three buffers of each norm, any of which may be None; None if a module has no such name."""
    conv1, norm1, _, conv2, norm2, _ = modules
    try:
        return [
            *(conv1._parameters["weight"], *_AFFINE(norm1._parameters)),
            *(conv2._parameters["weight"], *_AFFINE(norm2._parameters)),
            *(*_STATISTICS(norm1._buffers), *_STATISTICS(norm2._buffers)),
        ]
    except KeyError:
        return None


def _structure(modules: tuple[Any, ...]) -> tuple[Any, ...]:
    """What ``plain`` asks of the modules."""
    conv1, norm1, act1, conv2, norm2, act2 = modules
    biases = conv1._parameters.get("bias", conv1) is None, conv2._parameters.get("bias", conv2) is None
    return biases, _OF_CONV(conv1), _OF_NORM(norm1), type(act1), _OF_CONV(conv2), _OF_NORM(norm2), type(act2)


def _guards(*tensors: Tensor) -> TensorGuards:
    """By which ``torch.compile`` tells calls apart, in one call of C++."""
    sizes: list[Any] = [list(tensor.shape) for tensor in tensors]
    strides: list[Any] = [list(tensor.stride()) for tensor in tensors]
    return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)


def _find_out(
    image: Tensor, weight: Tensor, modules: tuple[Any, ...], tensors: list[Tensor], arguments: tuple[Any, ...]
) -> _Plan | None:
    """A plan for a call with these tensors, or None where the parts have to run one by one."""
    if not plain(modules, 4) or len({tensor.get_device() for tensor in (image, weight, *tensors)}) > 1:
        return None
    learnt = (image, weight, *tensors[:6])
    graded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in learnt)
    if (graded and not modules[1].training) or not all(tensor.is_contiguous() for tensor in tensors):
        return None
    return _plan(image, weight, modules, *arguments)


def _plan(
    image: Tensor,
    weight: Tensor,
    modules: tuple[nn.Module, ...],
    dtype: torch.dtype,
    cast: bool,
    size: tuple[int, ...],
    start: tuple[float, float],
    convolution: Convolution,
) -> _Plan | None:
    """A plan for tensors like these in the dtype of products, or None where the parts have to run one by one."""
    if image.dtype != dtype or not (cast or weight.dtype == dtype) or weight.dtype not in _DTYPES:
        return None
    if image.dim() != 4 or weight.dim() != 4 or image.shape[1] != weight.shape[1] * convolution[3]:
        return None
    if not (is_channels_last(image) or image.is_contiguous()) or weight.shape[1] == 1:
        return None
    if not (weight.is_contiguous(memory_format=_LAST) or weight.is_contiguous()):
        return None
    if size != (weight.shape[0], 1, *weight.shape[2:]) or not has_kernel(image, size[2:]):
        return None
    branch = Branch.of(modules, size, dtype, *start)
    pooled = image.new_empty((*image.shape[:2], *size[2:]), device="meta")
    training = branch.norm1.training
    if not fits(branch, pooled, cast) or (training and pooled.shape[0] * product(size[2:]) < 2):
        return None
    facts = (
        TensorFacts(image.shape, dtype, image.device, image.requires_grad),
        TensorFacts(weight.shape, dtype, image.device, weight.requires_grad),
        TensorFacts(torch.Size((image.shape[0], *size)), dtype, image.device, True),
    )
    problem, chosen = plan(wanted("auto"), 2, *facts, None, *convolution)
    if chosen is not fused.ALGORITHM or any(pair != (0, 0) for pair in problem.unseeing):
        return None
    made = _Plan(problem, branch, image, weight)
    return None if training and made.needs_units() else made


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
    """The launches of a backward.

    Attributes:
        first: all of them, or those of the convolution where the gain's gradient is summed by PyTorch.
        second: those of the branch then.
        scratch: bytes of their buffer.
        whole: whether they write all of the input's gradient.
        parts: sums that PyTorch adds to each element of the gain's gradient.
    """

    first: Launches
    second: Launches | None
    scratch: int
    whole: bool
    parts: int


class _Plan:
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

    def compile(self, image: Tensor, weight: Tensor, tensors: Sequence[Tensor], floats: tuple[float, ...]) -> None:
        """Compiles the kernels of a step side by side; the step would wait for one after another.

        Args:
            image: the layer's input.
            weight: of the convolution.
            tensors: of the branch, six parameters and six buffers.
            floats: of the launches.
        """
        low, raw, own = self.problem.dtype, torch.uint8, weight.dtype
        parameters, buffers = ([tensor.dtype for tensor in some] for some in (tensors[:6], tensors[6:]))
        for_gain = image.requires_grad or any(tensor.requires_grad for tensor in tensors)
        needs = (image.requires_grad, weight.requires_grad, for_gain)
        with on_device(image.get_device()), compiling_side_by_side():
            self.forward.compile([low, raw, *parameters, *buffers, low, own, low], floats)
            if self._training and torch.is_grad_enabled() and any(needs):
                made = self.backward(needs)
                for launches in filter(None, (made.first, made.second)):
                    launches.compile([low, raw, *parameters, raw, low, own, low, own, *parameters, torch.float32, low])

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
        above, source, weight, grad_input, grad_weight = map(Operand, (0, 9, 10, 11, 12))
        low = self._low or weight
        scratch, dtype = _Parts(8), self.problem.dtype
        steps = []
        if for_input:
            read = self._read_gain(any(wide for _, wide in self._grad_input))
            steps += [Step(launch, (above, low, read, grad_input, None)) for launch, _ in self._grad_input]
        facts = (dtype, self._precision, self._processors)
        sums = cuda_plans.sums(*self._arguments, facts, (for_weight, for_gain))
        summed = for_gain and sums.parts > 1
        grad_gains = Operand(19) if summed else scratch.part(self.gains, dtype)
        pieces = scratch.part(product(sums.pieces), torch.float32)
        if for_weight or for_gain:
            steps.append(Step(sums.products, (above, source, low, self._gain, pieces, grad_gains)))
        if for_weight:
            steps.append(Step(sums.add, (pieces, grad_weight)))
        of_branch = []
        if for_gain:
            of_branch = self._of_branch(Operand(20) if summed else grad_gains, scratch)
            if for_input:
                of_branch.append(Step(self._launch_pool("spread", True), (of_branch[2].operands[-1], grad_input)))
        first = Launches(steps if summed else steps + of_branch)
        second = Launches(of_branch) if summed else None
        return _Backward(first, second, scratch.bytes, self._whole, sums.parts)

    def _of_branch(self, grad_gain: Operand, scratch: _Parts) -> list[Step]:
        (sum_grads, grad_second, grad_first, add), elements = branch_launches.backward(self._facts, 1)
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


def _forward(
    planned: _Plan, image: Tensor, weight: Tensor, tensors: list[Tensor], floats: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """The output, and the buffer that is kept."""
    kept = image.new_empty(planned.kept_bytes, dtype=torch.uint8)
    output = image.new_empty_strided(planned.out_shape, planned.out_stride)
    source = image if planned.image_is_last else image.contiguous(memory_format=_LAST)
    planned.forward.run([image, kept, *tensors, source, weight, output], floats)
    return output, kept


class _Layer(torch.autograd.Function):
    """The tensors of the launches are, forward: image, kept, the branch's six parameters and six buffers, the image
    with its channels last, weight, output; backward: the output's gradient, kept, the six parameters, scratch, the
    image with its channels last, weight, the gradients of the image, of the weight with its channels last and of the
    parameters, and the parts and the sum of the gain's where PyTorch adds them."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
        *parameters, planned, buffers, floats = arguments
        output, kept = _forward(planned, image, weight, [*parameters, *buffers], floats)
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
            grads = _grads(ctx.plan, grad, image, weight, parameters, kept, needs)
        return (*[value if needed else None for value, needed in zip(grads, needs, strict=True)], None, None, None)


def _grads(
    planned: _Plan,
    grad: Tensor,
    image: Tensor,
    weight: Tensor,
    parameters: list[Tensor],
    kept: Tensor,
    needs: tuple[bool, ...],
) -> list[Tensor]:
    """The gradients of image, weight and parameters, whatever is in those that are not needed."""
    made = planned.backward((needs[0], needs[1], needs[0] or any(needs[2:])))
    # Hooks of saved tensors may have changed their strides.
    above, source = grad.contiguous(memory_format=_LAST), image.contiguous(memory_format=_LAST)
    read = weight.contiguous(memory_format=_LAST) if planned.weight_is_ready else weight
    scratch = image.new_empty(made.scratch, dtype=torch.uint8)
    grad_input = image
    if needs[0]:
        grad_input = torch.empty_like(source) if planned.image_is_last else image.new_empty(planned.shape)
    grad_weight = weight
    if needs[1]:
        last = weight.is_contiguous(memory_format=_LAST)
        grad_weight = torch.empty_like(weight, memory_format=torch.preserve_format if last else _LAST)
    grads = [torch.empty_like(parameter) for parameter in parameters]
    if needs[0] and not made.whole:
        grad_input.zero_()
    tensors = [above, kept, *parameters, scratch, source, read, grad_input, grad_weight, *grads]
    if made.second is None:
        made.first.run(tensors)
    else:
        sums = image.new_empty((made.parts, planned.gains), dtype=torch.float32)
        made.first.run([*tensors, sums])
        made.second.run([*tensors, sums, sums.sum(0).to(grad.dtype)])
    if needs[1] and not last:
        grad_weight = torch.empty_like(weight).copy_(grad_weight)
    return [grad_input, grad_weight, *grads]


def _by_operations(
    planned: _Plan, floats: tuple[float, ...], grad: Tensor, inputs: list[Tensor], needs: tuple[bool, ...]
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
