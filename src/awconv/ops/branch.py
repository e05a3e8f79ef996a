"""The attention branch after its pooling on a GPU, in a few kernels. Its tensors are small: one kernel for each of
its modules costs more to launch than to run.

The kernels run branches of plain modules (pointwise convolutions, BatchNorms, ReLU, an activation) that nothing
watches, in training and for inference; all others run module by module. They multiply in the dtype in which the modules
would, and keep single precision between.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awconv.ops import branch_launches as launches
from awconv.ops.branch_launches import LEAST, MOST_HIDDEN, PLANS, Facts
from awconv.ops.gpu import precision_of_products, triton_obstacle
from awconv.ops.problem import product
from awconv.ops.tracing import autocasting, eager, function_obstacle, without_autocast

_KINDS: dict[int, tuple[type[nn.Module], type[nn.Module], Callable[..., Tensor]]] = {  # by axes of pooled
    3: (nn.Conv1d, nn.BatchNorm1d, F.conv1d),
    4: (nn.Conv2d, nn.BatchNorm2d, F.conv2d),
    5: (nn.Conv3d, nn.BatchNorm3d, F.conv3d),
}
ACTIVATIONS: dict[type[nn.Module], tuple[str, Callable[[Tensor], Tensor]]] = {
    nn.Sigmoid: ("sigmoid", torch.sigmoid),
    nn.Tanh: ("tanh", torch.tanh),
    nn.ReLU: ("relu", torch.relu),
}
_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


class Norm(NamedTuple):
    """A BatchNorm; what it lacks is None, and the kernels do not take it then."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    variance: Tensor
    batches: Tensor
    epsilon: float
    momentum: float
    training: bool

    @property
    def floats(self) -> tuple[float, float]:
        return float(self.epsilon), float(self.momentum)

    @classmethod
    def of(cls, norm: Any) -> Norm:
        parameter, buffer = norm._parameters.get, norm._buffers.get  # in half the time of attributes
        tensors = (buffer("running_mean"), buffer("running_var"), buffer("num_batches_tracked"))
        return cls(parameter("weight"), parameter("bias"), *tensors, norm.eps, norm.momentum, norm.training)


class Form(NamedTuple):
    """What a branch computes with, but its tensors and epsilons."""

    activation: type[nn.Module]
    size: tuple[int, ...]  # of one sample's attention
    dtype: torch.dtype  # of products and of the attention
    constant: float  # to which the attention is relative
    gain: float


class Branch(NamedTuple):
    """What the kernels know of a branch."""

    weight1: Tensor
    norm1: Norm
    weight2: Tensor
    norm2: Norm
    form: Form

    @classmethod
    def of(
        cls,
        modules: Sequence[Any],
        size: tuple[int, ...],
        dtype: torch.dtype,
        constant: float = 0.0,
        gain: float = 1.0,
    ) -> Branch:
        conv1, norm1, _, conv2, norm2, act2 = modules
        weight1, weight2 = conv1._parameters.get("weight"), conv2._parameters.get("weight")
        return cls(weight1, Norm.of(norm1), weight2, Norm.of(norm2), Form(type(act2), size, dtype, constant, gain))

    def parameters(self) -> tuple[Tensor, ...]:
        return (self.weight1, *self.norm1[:2], self.weight2, *self.norm2[:2])


def attend(
    modules: Sequence[nn.Module], pooled: Tensor, size: tuple[int, ...], constant: float, gain: float
) -> Tensor | None:
    r"""What the modules make of a pooled input one after another, or None where the kernels do not run them.

    Args:
        modules: of the branch, the six in their order.
        pooled: shape (N, C1, \*kernel).
        size: (C2/r_C2, (C1/groups)/r_C1, \*kernel).
        constant: what is subtracted from what the modules give.
        gain: by what the difference is divided.

    Returns:
        The attention, shape (N, \*size), in the dtype that the modules give.
    """
    if not isinstance(pooled, Tensor) or not pooled.is_cuda:  # torch.fx comes with what is no tensor
        return None
    if function_obstacle() is not None or triton_obstacle() is not None:
        return None
    if not unwatched_plain(modules, pooled.dim()):
        return None
    cast = autocasting("cuda")
    branch = Branch.of(modules, size, torch.get_autocast_dtype("cuda") if cast else pooled.dtype, constant, gain)
    if not _takes(branch, pooled, cast):
        return None
    if branch.norm1.training:
        attention: Tensor = Train.apply(pooled, *branch.parameters(), branch)
        return attention
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (pooled, *branch.parameters())):
        return None
    return infer(pooled, branch)


def unwatched_plain(modules: Sequence[Any], axes: int) -> bool:
    """Whether :func:`plain` and :func:`unwatched` both say yes, with so many axes of the pooled tensor."""
    return axes in _KINDS and plain(modules, axes) and unwatched(modules)


def plain(modules: Sequence[Any], axes: int) -> bool:
    """Whether these are PyTorch's own modules, whose forwards the kernels compute."""
    conv1, norm1, act1, conv2, norm2, act2 = modules
    conv, norm, _ = _KINDS[axes]
    return (
        type(conv1) is type(conv2) is conv
        and type(norm1) is type(norm2) is norm
        and type(act1) is nn.ReLU
        and type(act2) in ACTIVATIONS
        and _pointwise(conv1)
        and _pointwise(conv2)
        and norm1.training == norm2.training
        and bool(norm1.track_running_stats and norm2.track_running_stats)
    )


def unwatched(modules: Sequence[nn.Module]) -> bool:
    """Whether the forward of their types is all that runs when these are called."""
    if torch.nn.modules.module._has_any_global_hook():
        return False
    for module in modules:
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
        ):
            return False
    return True


def _pointwise(conv: Any) -> bool:
    ones = (1,) * len(conv.kernel_size)
    padded = conv.padding not in ("same", "valid") and any(conv.padding)
    return conv.bias is None and conv.groups == 1 and conv.kernel_size == conv.stride == ones and not padded


def _takes(branch: Branch, pooled: Tensor, cast: bool) -> bool:
    """Whether the kernels take these tensors."""
    tensors = (pooled, branch.weight1, *branch.norm1[:5], branch.weight2, *branch.norm2[:5])
    device = pooled.get_device()
    return (
        eager(*tensors)  # so that none is None
        and branch.norm1.momentum is not None
        and branch.norm2.momentum is not None
        and all(tensor.get_device() == device and tensor.is_contiguous() for tensor in tensors[1:])
        and fits(branch, pooled, cast)
    )


def fits(branch: Branch, pooled: Tensor, cast: bool) -> bool:
    """Whether the kernels take a branch of these sizes and dtypes. What the modules refuse is left to their errors."""
    tensors = (pooled, branch.weight1, *branch.norm1[:5], branch.weight2, *branch.norm2[:5])
    shapes, dtypes = tuple(tensor.shape for tensor in tensors), tuple(tensor.dtype for tensor in tensors)
    return _fits(shapes, dtypes, branch.form.size, branch.form.dtype, cast)


def sizes_fit(
    shapes: tuple[tuple[int, ...], ...],
    dtypes: tuple[torch.dtype, ...],
    size: tuple[int, ...],
    dtype: torch.dtype,
    cast: bool,
) -> bool:
    """:func:`fits` for the shapes and dtypes of its tensors: pooled, then weight, norm and statistics of each half."""
    (samples, channels, *kernel), weight1, weight2 = shapes[0], shapes[1], shapes[7]
    hidden, columns = weight1[0], weight2[0]
    multiplied, normed = (dtypes[0], dtypes[1], dtypes[7]), (*dtypes[2:6], *dtypes[8:12])
    return (
        all(one in _DTYPES for one in (dtype, *multiplied))
        and (cast or all(one == dtype for one in multiplied))
        and (all(one == torch.float32 for one in normed) or all(one == dtype for one in normed))
        and dtypes[6] == dtypes[12] == torch.int64
        and weight1[1] == channels
        and weight2[1] == hidden
        and shapes[2:6] == ((hidden,),) * 4
        and shapes[8:12] == ((columns,),) * 4
        and size == (*size[:2], *kernel)
        and columns == size[0] * size[1]
        and channels >= LEAST
        and hidden <= MOST_HIDDEN
        and samples > 0
        and Facts(samples * product(kernel), channels, hidden, columns).largest() < 2**31
    )


_fits = functools.lru_cache(maxsize=PLANS)(sizes_fit)


def infer(pooled: Tensor, branch: Branch) -> Tensor:
    """The attention from running statistics, without gradients. Tiles of rows do not depend on the batch size, and so
    the result of a sample does not either."""
    pooled, taps = by_rows(pooled)
    attention = empty_attention(pooled, branch.form.size, branch.form.dtype)
    launch = launches.inference(facts_of(pooled, branch, taps))
    norm1, norm2 = branch.norm1, branch.norm2
    tensors = (pooled, branch.weight1, *norm1[:4], branch.weight2, *norm2[:4], attention, None)
    launch.run(*tensors, floats=(norm1.floats[0], norm2.floats[0]))
    return attention


def train(pooled: Tensor, branch: Branch) -> tuple[Tensor, Tensor]:
    """The attention from the statistics of the batch, and what its gradients need."""
    source, taps = by_rows(pooled)
    attention = empty_attention(source, branch.form.size, branch.form.dtype)
    (project, measure, finish), elements, handed_on = launches.forward(facts_of(source, branch, taps))
    kept = source.new_empty(elements, dtype=torch.float32)
    scratch = source.new_empty(handed_on, dtype=torch.float32)
    norm1, norm2, weight2 = branch.norm1, branch.norm2, branch.weight2
    project.run(source, branch.weight1, kept, scratch)
    measure.run(kept, scratch, weight2, *norm1[:5], floats=norm1.floats)
    finish.run(kept, scratch, weight2, *norm1[:2], *norm2[:5], attention, None, floats=norm2.floats)
    return attention, kept


class Train(torch.autograd.Function):
    """The attention from the statistics of the batch, which are added to the running ones."""

    @staticmethod
    def forward(ctx: Any, pooled: Tensor, *arguments: Any) -> Tensor:
        branch: Branch = arguments[-1]
        attention, kept = train(pooled, branch)
        ctx.save_for_backward(pooled, *arguments[:-1], kept)
        ctx.branch = branch
        return attention

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, kept = ctx.saved_tensors
        needs = ctx.needs_input_grad[: len(inputs)]
        if torch.is_grad_enabled() or not eager(grad):
            grads = _by_modules(inputs, grad, ctx.branch, needs)
        else:
            grads = gradients(inputs, grad, kept, ctx.branch)
        return (*(value if needed else None for value, needed in zip(grads, needs, strict=True)), None)


def gradients(inputs: Sequence[Tensor], grad: Tensor, kept: Tensor, branch: Branch) -> tuple[Tensor, ...]:
    """The gradients of the inputs, each in the layout and dtype of what it belongs to."""
    pooled, weight1, norm_weight1, norm_bias1, weight2, norm_weight2, norm_bias2 = inputs
    pooled, taps = by_rows(pooled)
    last = grad.permute(0, *range(3, grad.dim()), 1, 2)
    grad_taps = 1
    if not last.is_contiguous():
        grad, grad_taps = grad.contiguous(), product(branch.form.size[2:])
    (sum_grads, grad_second, grad_first, add), elements = launches.backward(facts_of(pooled, branch, taps), grad_taps)
    scratch = pooled.new_empty(elements, dtype=torch.float32)
    grads = tuple(map(torch.empty_like, (pooled, *inputs[1:])))
    norms = (norm_weight1, norm_bias1, norm_weight2, norm_bias2)
    sum_grads.run(grad, kept, scratch, weight2, *norms)
    grad_second.run(grad, kept, scratch, weight2, *norms, grads[5], grads[6])
    grad_first.run(pooled, kept, scratch, weight1, norm_weight1, grads[2], grads[3], grads[0])
    add.run(scratch, grads[1], grads[4])
    return grads


def _by_modules(
    inputs: Sequence[Tensor], grad: Tensor, branch: Branch, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients by operations that have derivatives themselves."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), without_autocast(grad.device.type):
        inputs = [tensor.view_as(tensor) for tensor in inputs]  # not what they were made of
        attention = by_operations(inputs, branch.form, branch.norm1.epsilon, branch.norm2.epsilon)
        wanted = [tensor for tensor, needed in zip(inputs, needs, strict=True) if needed]
        grads = iter(torch.autograd.grad(attention, wanted, grad, create_graph=create_graph))
    return tuple(next(grads) if needed else None for needed in needs)


def by_operations(inputs: Sequence[Tensor], form: Form, epsilon1: float, epsilon2: float) -> Tensor:
    """The attention in training, of pooled and the parameters, by operations that have derivatives."""
    pooled, weight1, norm_weight1, norm_bias1, weight2, norm_weight2, norm_bias2 = inputs
    convolve = _KINDS[pooled.dim()][2]
    hidden = convolve(pooled.to(form.dtype), weight1.to(form.dtype))
    value = torch.relu(F.batch_norm(hidden, None, None, norm_weight1, norm_bias1, True, 0, epsilon1))
    score = convolve(value, weight2.to(form.dtype))
    normed = F.batch_norm(score, None, None, norm_weight2, norm_bias2, True, 0, epsilon2)
    attention = ACTIVATIONS[form.activation][1](normed).reshape(-1, *form.size)
    return (attention - form.constant) / form.gain


def facts_of(pooled: Tensor, branch: Branch, taps: int) -> Facts:
    samples, channels, *kernel = pooled.shape
    sizes = (samples * product(kernel), channels, branch.weight1.shape[0], branch.weight2.shape[0])
    activation, _, dtype, constant, gain = branch.form
    precision = "tf32"  # of no meaning for other dtypes
    if dtype == torch.float32:
        precision = precision_of_products()
    return Facts(*sizes, taps, ACTIVATIONS[activation][0], constant, gain, _DTYPES[dtype], precision)


def by_rows(pooled: Tensor) -> tuple[Tensor, int]:
    """The tensor, copied if the kernels cannot read it, and how many elements two channels of a row are apart."""
    if pooled.dim() == 4 and pooled.is_contiguous(memory_format=torch.channels_last):
        return pooled, 1
    return pooled.contiguous(), product(pooled.shape[2:])


def empty_attention(pooled: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Uninitialised, its rows one after another."""
    out_blocks, in_blocks, *kernel = size
    rows = torch.empty((pooled.shape[0], *kernel, out_blocks, in_blocks), dtype=dtype, device=pooled.device)
    return rows.permute(0, -2, -1, *range(1, 1 + len(kernel)))
