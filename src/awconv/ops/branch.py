"""The attention branch after its pooling on a GPU, in a few kernels. Its tensors are small: one kernel for each step of
its modules costs more to launch than to run.

The kernels run branches of plain modules (pointwise convolutions, BatchNorms, ReLU, an activation) that nothing watches,
in training and for inference; all others run module by module. They multiply in the dtype in which the modules would,
and keep single precision between.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awconv.ops.fused.cuda import _precision
from awconv.ops.gpu import Kernel, power_of_two, triton_obstacle
from awconv.ops.problem import product
from awconv.ops.tracing import autocasting, eager, in_forward_mode, without_autocast

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVOLVE: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_ACTIVATIONS: dict[type[nn.Module], tuple[str, Callable[[Tensor], Tensor]]] = {
    nn.Sigmoid: ("sigmoid", torch.sigmoid),
    nn.Tanh: ("tanh", torch.tanh),
    nn.ReLU: ("relu", torch.relu),
}
_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
_LEAST = 16  # that a product of matrices takes, of each size
_MOST_HIDDEN = 128  # channels, of which a program has all
_COLUMNS, _CHANNELS = 64, 64  # of a tile
_PARTS = 64  # that the rows are in, about
_SHARES = 8  # that the columns are in, at most, where each program of the backward adds up its share
_ROWS = 32  # of a tile for inference
_MERGED = 32  # parts that are loaded at once
_ADDED = 128  # elements of a weight's gradient that a program adds
_PLANS = 4096  # that are remembered


class Norm(NamedTuple):
    """A BatchNorm that has all of this."""

    gain: Tensor
    shift: Tensor
    mean: Tensor
    variance: Tensor
    batches: Tensor
    epsilon: float
    momentum: float
    training: bool

    @property
    def floats(self) -> tuple[float, float]:
        return self.epsilon, self.momentum

    @classmethod
    def of(cls, norm: Any) -> Norm:
        tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked)
        return cls(*tensors, norm.eps, norm.momentum, norm.training)


class Branch(NamedTuple):
    """What the kernels know of a branch."""

    weight1: Tensor
    norm1: Norm
    weight2: Tensor
    norm2: Norm
    activation: type[nn.Module]
    size: tuple[int, ...]  # of one sample's attention
    dtype: torch.dtype  # of products and of the attention

    def parameters(self) -> tuple[Tensor, ...]:
        return (self.weight1, *self.norm1[:2], self.weight2, *self.norm2[:2])


def attend(modules: Sequence[nn.Module], pooled: Tensor, size: tuple[int, ...]) -> Tensor | None:
    r"""What the modules make of a pooled input one after another, or None where the kernels do not run them.

    Args:
        modules: of the branch, the six in their order.
        pooled: shape (N, C1, \*kernel).
        size: (C2/r_C2, (C1/groups)/r_C1, \*kernel).

    Returns:
        The attention, shape (N, \*size), in the dtype that the modules give.
    """
    if not eager(pooled) or not pooled.is_cuda or in_forward_mode() or triton_obstacle() is not None:
        return None
    if not _plain(modules):
        return None
    conv1, norm1, _, conv2, norm2, act2 = modules
    cast = autocasting("cuda")
    dtype = torch.get_autocast_dtype("cuda") if cast else pooled.dtype
    branch = Branch(conv1.weight, Norm.of(norm1), conv2.weight, Norm.of(norm2), type(act2), size, dtype)  # type: ignore[arg-type]
    if not _takes(branch, pooled, cast):
        return None
    if branch.norm1.training:
        attention: Tensor = Train.apply(pooled, *branch.parameters(), branch)
        return attention
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (pooled, *branch.parameters())):
        return None
    return infer(pooled, branch)


def _plain(modules: Sequence[nn.Module]) -> bool:
    """Whether these are PyTorch's own modules, and their forward is all that runs when they are called."""
    conv1, norm1, act1, conv2, norm2, act2 = modules
    return (
        type(conv1) in _CONVS
        and type(conv2) in _CONVS
        and type(norm1) in _NORMS
        and type(norm2) in _NORMS
        and type(act1) is nn.ReLU
        and type(act2) in _ACTIVATIONS
        and _pointwise(conv1)
        and _pointwise(conv2)
        and norm1.training == norm2.training
        and not torch.nn.modules.module._has_any_global_hook()
        and not any(
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
            for module in modules
        )
    )


def _pointwise(conv: Any) -> bool:
    ones = (1,) * len(conv.kernel_size)
    padded = conv.padding not in ("same", "valid") and any(conv.padding)
    return conv.bias is None and conv.groups == 1 and conv.kernel_size == conv.stride == ones and not padded


def _takes(branch: Branch, pooled: Tensor, cast: bool) -> bool:
    """Whether the kernels take these tensors."""
    tensors = (pooled, branch.weight1, *branch.norm1[:5], branch.weight2, *branch.norm2[:5])
    device = pooled.device
    return (
        eager(*tensors)  # so that none is None
        and branch.norm1.momentum is not None
        and branch.norm2.momentum is not None
        and all(tensor.device == device and tensor.is_contiguous() for tensor in tensors[1:])
        and _fits(
            tuple(tuple(tensor.shape) for tensor in tensors),
            tuple(tensor.dtype for tensor in tensors),
            branch.size,
            branch.dtype,
            cast,
        )
    )


@functools.lru_cache(maxsize=_PLANS)
def _fits(
    shapes: tuple[tuple[int, ...], ...],
    dtypes: tuple[torch.dtype, ...],
    size: tuple[int, ...],
    dtype: torch.dtype,
    cast: bool,
) -> bool:
    """Whether the kernels take tensors like these. What the modules refuse is left to them, to say so."""
    (samples, channels, *kernel), weight1, weight2 = shapes[0], shapes[1], shapes[7]
    hidden, columns = weight1[0], weight2[0]
    multiplied, normed = {dtypes[0], dtypes[1], dtypes[7]}, {*dtypes[2:6], *dtypes[8:12]}
    return (
        {dtype, *multiplied} <= _DTYPES.keys()
        and (cast or multiplied == {dtype})
        and normed in ({torch.float32}, {dtype})
        and weight1[1] == channels
        and weight2[1] == hidden
        and len(weight1) == len(weight2) == len(kernel) + 2
        and shapes[2:6] == ((hidden,),) * 4
        and shapes[8:12] == ((columns,),) * 4
        and size == (*size[:2], *kernel)
        and columns == size[0] * size[1]
        and channels >= _LEAST
        and hidden <= _MOST_HIDDEN
        and samples > 0
        and _Sizes(samples * product(kernel), channels, hidden, columns).largest() < 2**31
    )


class _Sizes(NamedTuple):
    rows: int
    channels: int
    hidden: int
    columns: int

    @property
    def block_rows(self) -> int:
        """Rows of a part."""
        return power_of_two(-(-self.rows // _PARTS), 128, 32)

    @property
    def parts(self) -> int:
        return -(-self.rows // self.block_rows)

    @property
    def share(self) -> int:
        """Columns of a share."""
        block = power_of_two(self.columns, _COLUMNS, _LEAST)
        return -(-self.columns // (block * _SHARES)) * block

    @property
    def shares(self) -> int:
        return -(-self.columns // self.share)

    def scratch(self) -> tuple[int, ...]:
        """Where the backward's kernels put what they hand on: sums2, sums1, grads, pieces2, pieces1; and the end."""
        elements = (
            self.parts * 2 * self.columns,
            self.parts * self.shares * 2 * self.hidden,
            self.shares * self.rows * self.hidden,
            self.parts * self.columns * self.hidden,
            self.parts * self.hidden * self.channels,
        )
        return tuple(itertools.accumulate((-(-number // 4) * 4 for number in elements), initial=0))

    def largest(self) -> int:
        """Elements of the largest tensor."""
        return max(self.rows * max(self.channels, self.columns), self.scratch()[-1])


class _Launch(NamedTuple):
    kernel: Kernel
    programs: int
    integers: tuple[int, ...]

    def run(self, *tensors: Tensor, floats: tuple[float, ...] = ()) -> None:
        scalars: tuple[Any, ...] = (*self.integers, *floats)
        self.kernel.launch(self.programs, tensors, scalars)


class _Facts(NamedTuple):
    """All that decides how the kernels are launched."""

    sizes: _Sizes
    taps: int  # between two channels of a row of pooled; of the attention's gradient where that is what a kernel reads
    activation: str
    low: str
    precision: str

    @classmethod
    def of(cls, pooled: Tensor, branch: Branch, taps: int) -> _Facts:
        samples, channels, *kernel = pooled.shape
        sizes = _Sizes(samples * product(kernel), channels, branch.weight1.shape[0], branch.weight2.shape[0])
        precision = _precision() if branch.dtype == torch.float32 else "ieee"
        return cls(sizes, taps, _ACTIVATIONS[branch.activation][0], _DTYPES[branch.dtype], precision)

    def launch(self, module: str, kernel: str, constants: str, programs: int, *integers: int, **other: int) -> _Launch:
        """A launch of a kernel whose constants have these names."""
        sizes = self.sizes
        known = {**sizes._asdict(), **self._asdict(), "shares": sizes.shares, "share": sizes.share}
        known |= dict(
            block_rows=sizes.block_rows,
            block_hidden=power_of_two(sizes.hidden, _MOST_HIDDEN, _LEAST),
            block_columns=power_of_two(sizes.columns, _COLUMNS, _LEAST),
            block_channels=power_of_two(sizes.channels, _CHANNELS, _LEAST),
            block_parts=_MERGED,
            size1=sizes.hidden * sizes.channels,
            size2=sizes.columns * sizes.hidden,
            block=_ADDED,
        )
        known |= other
        warps = 8 if sizes.hidden > 64 else 4
        chosen = {name: known[name] for name in constants.split()}
        return _Launch(Kernel(f"awconv.ops.{module}", kernel, chosen, warps), programs, integers)

    def tiles(self, width: str) -> int:
        """Of the columns or channels."""
        size: int = getattr(self.sizes, width)
        return -(-size // power_of_two(size, _COLUMNS, _LEAST))


def infer(pooled: Tensor, branch: Branch) -> Tensor:
    """The attention from running statistics, without gradients. Tiles of rows depend on no batch size, so that what a
    network says of a sample does not either."""
    pooled, taps = _by_rows(pooled)
    attention = _empty_attention(pooled, branch)
    launch = _inference(_Facts.of(pooled, branch, taps))
    norm1, norm2 = branch.norm1, branch.norm2
    tensors = (pooled, branch.weight1, *norm1[:4], branch.weight2, *norm2[:4], attention)
    launch.run(*tensors, floats=(norm1.epsilon, norm2.epsilon))
    return attention


class Train(torch.autograd.Function):
    """The attention from the statistics of the batch, which are added to the running ones."""

    @staticmethod
    def forward(ctx: Any, pooled: Tensor, *arguments: Any) -> Tensor:
        branch: Branch = arguments[-1]
        source, taps = _by_rows(pooled)
        attention = _empty_attention(source, branch)
        launches, elements, scratch_elements = _forward(_Facts.of(source, branch, taps))
        kept = source.new_empty(elements, dtype=torch.float32)
        scratch = source.new_empty(scratch_elements, dtype=torch.float32)
        project, measure, finish = launches
        norm1, norm2, weight2 = branch.norm1, branch.norm2, branch.weight2
        project.run(source, branch.weight1, kept, scratch)
        measure.run(kept, scratch, weight2, *norm1[:5], floats=norm1.floats)
        finish.run(kept, scratch, weight2, *norm1[:2], *norm2[:5], attention, floats=norm2.floats)
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
            grads = _grads(inputs, grad, kept, ctx.branch)
        return (*(value if needed else None for value, needed in zip(grads, needs, strict=True)), None)


def _grads(inputs: Sequence[Tensor], grad: Tensor, kept: Tensor, branch: Branch) -> tuple[Tensor, ...]:
    pooled, weight1, gain1, shift1, weight2, gain2, shift2 = inputs
    pooled, taps = _by_rows(pooled)
    last = grad.permute(0, *range(3, grad.dim()), 1, 2)
    grad_taps = 1
    if not last.is_contiguous():
        grad, grad_taps = grad.contiguous(), product(branch.size[2:])
    (sum_grads, grad_second, grad_first, add), elements = _backward(_Facts.of(pooled, branch, taps), grad_taps)
    scratch = pooled.new_empty(elements, dtype=torch.float32)
    grads = tuple(map(torch.empty_like, (pooled, *inputs[1:])))
    norms = (gain1, shift1, gain2, shift2)
    sum_grads.run(grad, kept, scratch, weight2, *norms)
    grad_second.run(grad, kept, scratch, weight2, *norms, grads[5], grads[6])
    grad_first.run(pooled, kept, scratch, weight1, gain1, grads[2], grads[3], grads[0])
    add.run(scratch, grads[1], grads[4])
    return grads


def _by_modules(
    inputs: Sequence[Tensor], grad: Tensor, branch: Branch, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients by operations that have derivatives themselves."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), without_autocast(grad.device.type):
        pooled, weight1, gain1, shift1, weight2, gain2, shift2 = inputs
        convolve = _CONVOLVE[pooled.dim() - 3]
        hidden = convolve(pooled.to(branch.dtype), weight1.to(branch.dtype))
        value = torch.relu(F.batch_norm(hidden, None, None, gain1, shift1, True, 0, branch.norm1.epsilon))
        score = convolve(value, weight2.to(branch.dtype))
        normed = F.batch_norm(score, None, None, gain2, shift2, True, 0, branch.norm2.epsilon)
        attention = _ACTIVATIONS[branch.activation][1](normed).reshape(grad.shape)
        wanted = [tensor for tensor, needed in zip(inputs, needs, strict=True) if needed]
        grads = iter(torch.autograd.grad(attention, wanted, grad, create_graph=create_graph))
    return tuple(next(grads) if needed else None for needed in needs)


def _by_rows(pooled: Tensor) -> tuple[Tensor, int]:
    """The tensor, copied if the kernels cannot read it, and how many elements two channels of a row are apart."""
    if pooled.dim() == 4 and pooled.is_contiguous(memory_format=torch.channels_last):
        return pooled, 1
    return pooled.contiguous(), product(pooled.shape[2:])


def _empty_attention(pooled: Tensor, branch: Branch) -> Tensor:
    """Uninitialised, its rows one after another."""
    out_blocks, in_blocks, *kernel = branch.size
    rows = torch.empty((pooled.shape[0], *kernel, out_blocks, in_blocks), dtype=branch.dtype, device=pooled.device)
    return rows.permute(0, -2, -1, *range(1, 1 + len(kernel)))


@functools.lru_cache(maxsize=_PLANS)
def _inference(facts: _Facts) -> _Launch:
    rows = facts.sizes.rows
    names = "channels hidden columns taps activation low precision block_rows block_hidden block_columns block_channels"
    programs = -(-rows // _ROWS) * facts.tiles("columns")
    return facts.launch("triton_branch", "infer", names, programs, rows, block_rows=_ROWS)


@functools.lru_cache(maxsize=_PLANS)
def _forward(facts: _Facts) -> tuple[tuple[_Launch, ...], int, int]:
    """The launches, and the elements of the buffers that they hand on: what is kept for the backward, and the rest."""
    rows, _, hidden, columns = facts.sizes
    parts, programs = facts.sizes.parts, facts.sizes.parts * facts.tiles("columns")
    statistics1, statistics2, end = 0, parts * 2 * hidden, parts * 2 * (hidden + columns)
    first = "channels hidden columns taps low precision block_rows block_hidden block_channels"
    second = "low precision block_rows block_hidden block_columns block_parts"
    launches = (
        facts.launch("triton_branch", "project", first, parts, rows, statistics1),
        facts.launch("triton_branch", "measure", f"hidden columns {second}", programs, rows, statistics1, statistics2),
        facts.launch("triton_branch", "finish", f"hidden columns activation {second}", programs, rows, statistics2),
    )
    return launches, -(-2 * (hidden + columns) // 4) * 4 + rows * hidden, end


@functools.lru_cache(maxsize=_PLANS)
def _backward(facts: _Facts, grad_taps: int) -> tuple[tuple[_Launch, ...], int]:
    """The launches, and the elements of the buffer that they hand on."""
    sizes = facts.sizes
    sums2, sums1, grads, pieces2, pieces1, end = sizes.scratch()
    above = facts._replace(taps=grad_taps)
    module, read = "triton_branch_grads", "hidden columns taps activation low precision"
    second = f"{read} shares share block_rows block_hidden block_columns block_parts"
    first = "channels hidden columns taps low precision shares block_rows block_hidden block_channels block_parts"
    added = sum(-(-size // _ADDED) for size in (sizes.hidden * sizes.channels, sizes.columns * sizes.hidden))
    launches = (
        above.launch(
            *(module, "sum_grads", f"{read} block_rows block_hidden block_columns"),
            *(sizes.parts * facts.tiles("columns"), sizes.rows, sums2),
        ),
        above.launch(
            *(module, "grad_second", second, sizes.parts * sizes.shares),
            *(sizes.rows, sums2, sums1, grads, pieces2),
        ),
        facts.launch(
            *(module, "grad_first", first, sizes.parts * facts.tiles("channels")),
            *(sizes.rows, sums1, grads, pieces1),
        ),
        facts.launch(module, "add_pieces", "size1 size2 block block_parts", added, sizes.parts, pieces1, pieces2),
    )
    return launches, end
