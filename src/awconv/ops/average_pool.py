"""Pooling to the size of a kernel, the first part of the attention branch: one pass over the input."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from awconv.ops.build import library
from awconv.ops.gpu import Kernel, Launch, divider, empty_like_image, is_channels_last, power_of_two, triton_obstacle
from awconv.ops.problem import product
from awconv.ops.tracing import compiling, eager, exporting, has_numbers, in_forward_mode, shape_of, transforming

_SOURCE = Path(__file__).with_suffix(".c")
AXES = 3
MAX_BINS = 64  # of the kernels, along an axis
_MOST_SHARES = 2**18  # elements of a matrix that an exported graph holds
_AVERAGE_POOL: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_SIZES = (ctypes.c_int64 * AXES,) * 2
# Of the kernels for GPUs: positions of a bin, up to which a program makes all bins of a sample, and a row of them; and
# elements of a tile, of bins beyond the first and of all else.
_LARGE_BIN, _HUGE_BIN = 64, 144
_LARGE_TILE, _TILE = 8192, 2048
_ROWS = 8  # of an image, that a program of the gradient makes
_STAGES = 4  # of a pipeline of loads


def average_pool(input: Tensor, output_size: Sequence[int]) -> Tensor:
    r"""Adaptive average pooling in one pass over the input: by C code on a CPU, by a Triton kernel on a GPU, or as a
    product with a small matrix. A single bin is a mean on a CPU, but for images whose channels lie last.

    Equal to ``torch.nn.functional.adaptive_avg_pool{1,2,3}d``, and unlike it deterministic in the backward on every
    device (pytorch issue 50198). Sums are kept in single precision at least. A number that is not finite spoils the
    bins that cover it. Exported graphs, ``torch.func`` inside compiled ones, and GPUs with three axes or without Triton
    use the product with a matrix, as do graphs compiled for a CPU in half precision or without a C compiler. There such
    a number spoils every bin of its channel and sample, since zero times infinity is NaN; to avoid that would take one
    more pass over the input for each bin, or fixed sizes.

    Args:
        input: shape (N, C, \*size), with as many spatial axes as ``output_size`` has numbers.
        output_size: bins along each axis. Bin i covers the positions floor(i * size / bins) to
            ceil((i + 1) * size / bins).

    Returns:
        Shape (N, C, \*output_size), with its channels last on a GPU where those of the input are. The gradient of a
        channels-last input is channels last.
    """
    kernel = has_kernel(input, output_size)
    single = max(output_size) == 1 and input.device.type == "cpu" and not exporting()
    if single and not (kernel and is_channels_last(input)):  # the gradient of a mean has its channels first
        return input.mean(list(range(2, input.dim())), keepdim=True)
    if kernel:
        if not (input.requires_grad and torch.is_grad_enabled()) and eager(input):
            return _KERNELS[input.device.type](input, list(output_size))
        pooled: Tensor = torch.ops.awconv.average_pool(input, list(output_size))
        return pooled
    if input.device.type == "meta" and not compiling() and not exporting():
        shapes: Tensor = torch.ops.awconv.average_pool(input, list(output_size))
        return shapes
    if input.device.type == "cpu" and not compiling() and not exporting():
        return _by_slices(input, output_size)
    return _by_matrices(input, output_size)


def pools_beside(input: Tensor, output_size: Sequence[int]) -> bool:
    """Whether :func:`pool_beside` takes a tensor."""
    differentiated = input.is_cuda and input.requires_grad and torch.is_grad_enabled()
    return differentiated and eager(input) and has_kernel(input, output_size)


def pool_beside(input: Tensor, output_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """:func:`average_pool` for a tensor on a GPU that has one more use, a convolution.

    Returns:
        A tensor equal to the input, which the convolution must take in its place, and the pooled tensor. The backward
        adds the pooling's gradient to the convolution's in place, which saves two passes over it; a hook of the
        convolution's node sees that tensor change.
    """
    passed, pooled = _PoolBeside.apply(input, list(output_size))
    return passed, pooled


class _PoolBeside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, output_size: list[int]) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.size = list(input.shape[2:])
        return input.view_as(input), _pool_on_gpu(input, output_size)

    @staticmethod
    def backward(ctx: Any, grad_passed: Tensor | None, grad_pooled: Tensor | None) -> tuple[Tensor | None, None]:
        if grad_passed is None or grad_pooled is None:
            pooled = None if grad_pooled is None else torch.ops.awconv.average_pool_backward(grad_pooled, ctx.size)
            return grad_passed if pooled is None else pooled, None
        dense = eager(grad_passed, grad_pooled) and grad_passed.dtype == grad_pooled.dtype
        dense = dense and (is_channels_last(grad_passed) or grad_passed.is_contiguous())
        if torch.is_grad_enabled() or not dense:
            return grad_passed + torch.ops.awconv.average_pool_backward(grad_pooled, ctx.size), None
        # The convolution made it, and nobody else has it.
        _launch("spread", grad_pooled, grad_passed, ctx.size, grad_pooled.shape[2:], added=True)
        return grad_passed, None


def has_kernel(input: Tensor, output_size: Sequence[int]) -> bool:
    if max(output_size) > MAX_BINS or exporting():
        return False
    if input.device.type == "cuda":
        if not fits_gpu(input, output_size):
            return False
    elif not _in_c(input):
        return False
    return not (transforming() or in_forward_mode())


def _in_c(input: Tensor) -> bool:
    if input.device.type != "cpu":
        return False
    empty = input.numel() == 0
    if statically_known_true(empty) if compiling() else empty:  # compiled code may have a symbol there
        return False
    return input.dtype in (torch.float32, torch.float64) and _is_built(input.dtype)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_built(dtype: torch.dtype) -> bool:
    """Whether there is C code, a constant to torch.compile."""
    return not isinstance(library(_SOURCE, dtype), str)


def fits_gpu(input: Tensor, output_size: Sequence[int]) -> bool:
    """Whether the kernels for GPUs take a tensor: they have two axes, and count in 32 bits within a sample."""
    counted = (product(input.shape[1:]), *(size * (max(output_size) + 1) for size in input.shape[2:]))
    return (
        input.dim() in (3, 4)
        and max(output_size) <= MAX_BINS
        and input.dtype.is_floating_point
        and not any(statically_known_true(number >= 2**31) for number in counted)
        and triton_obstacle() is None
    )


_LIBRARY = torch.library.Library("awconv", "FRAGMENT")
_LIBRARY.define("average_pool(Tensor input, int[] bins) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
_LIBRARY.define(
    "average_pool_backward(Tensor grad, SymInt[] size, bool channels_last=False) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def _pooled(input: Tensor, bins: Sequence[int]) -> Tensor:
    """An uninitialised result."""
    shape = (*input.shape[:2], *bins)
    return empty_like_image(shape, input) if input.device.type == "cuda" else input.new_empty(shape)


def _spread(grad: Tensor, size: Sequence[int], channels_last: bool = False) -> Tensor:
    """An uninitialised gradient, with its channels last if that is said or those of the result's gradient are."""
    shape = (*grad.shape[:2], *size)
    if channels_last:
        return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
    return empty_like_image(shape, grad)


def _pool(input: Tensor, bins: list[int]) -> Tensor:
    last = is_channels_last(input)
    return _call("forward", input, _pooled(input, bins), input.shape[2:], bins, last)


def _pool_backward(grad: Tensor, size: list[int], channels_last: bool = False) -> Tensor:
    target = _spread(grad, size, channels_last)
    return _call("backward", grad, target, size, grad.shape[2:], is_channels_last(target))


def _pool_on_gpu(input: Tensor, bins: list[int]) -> Tensor:
    target = _pooled(input, bins)
    _launch("pool", input, target, input.shape[2:], bins)
    return target


def _pool_backward_on_gpu(grad: Tensor, size: list[int], channels_last: bool = False) -> Tensor:
    target = _spread(grad, size, channels_last)
    _launch("spread", grad, target, size, grad.shape[2:])
    return target


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.size = list(inputs[0].shape[2:])
    # On a CPU, the gradient has the layout of the input, so that nobody must move it to add it to others.
    ctx.last = inputs[0].device.type == "cpu" and is_channels_last(inputs[0])


def _grad(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.awconv.average_pool_backward(grad, ctx.size, ctx.last), None


def _grad_of_grad(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.awconv.average_pool(grad, ctx.size), None, None


_KERNELS = {"cpu": _pool, "cuda": _pool_on_gpu}  # forward

for _name, _run, _run_on_gpu, _fake, _reverse in (
    ("average_pool", _pool, _pool_on_gpu, _pooled, _grad),
    ("average_pool_backward", _pool_backward, _pool_backward_on_gpu, _spread, _grad_of_grad),
):
    _LIBRARY.impl(_name, _run, "CPU")
    _LIBRARY.impl(_name, _run_on_gpu, "CUDA")
    torch.library.register_fake(f"awconv::{_name}", _fake, lib=_LIBRARY)
    # both are linear, and each is the gradient of the other
    torch.library.register_autograd(f"awconv::{_name}", _reverse, setup_context=_save, lib=_LIBRARY)


def _launch(
    kernel: str, source: Tensor, target: Tensor, size: Sequence[int], bins: Sequence[int], added: bool = False
) -> None:
    """Runs a Triton kernel; one axis is the second of two."""
    if target.numel() == 0:
        return
    if len(size) == 1:
        source, target = source.unsqueeze(2), target.unsqueeze(2)
    channels_last = len(size) == 2 and is_channels_last(target if kernel == "spread" else source)
    source = source.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    pool_launch(kernel, *source.shape[:2], _two(size), _two(bins), channels_last, added).run(source, target)


def _two(sizes: Sequence[int]) -> tuple[int, ...]:
    return (1,) * (2 - len(sizes)) + tuple(sizes)


@functools.lru_cache(maxsize=4096)
def pool_launch(
    kernel: str,
    samples: int,
    channels: int,
    size: tuple[int, ...],
    bins: tuple[int, ...],
    channels_last: bool,
    added: bool,
) -> Launch:
    """How a kernel is launched, ``"pool"`` or ``"spread"``."""
    tile_channels = power_of_two(channels, 64 if channels_last else 8)
    layout = dict(channels=channels, channels_last=channels_last)
    constants: dict[str, Any]
    integers = (*size, *bins)
    if kernel == "pool":
        rows, columns = (_most_covered(extent, count) for extent, count in zip(size, bins, strict=True))
        most = (_LARGE_TILE if rows * columns > _LARGE_BIN else _TILE) // tile_channels
        tile_x = power_of_two(columns, most)
        tile_y = power_of_two(rows, most // tile_x)
        each = product(bins)  # of a program: fewer where they are larger
        if rows * columns > _LARGE_BIN:
            each = bins[1] if rows * columns <= _HUGE_BIN else 1
        tiles_y, tiles_x = -(-rows // tile_y), -(-columns // tile_x)
        constants = dict(**layout, each=each, tiles_y=tiles_y, tiles_x=tiles_x, tile_channels=tile_channels)
        constants |= dict(tile_y=tile_y, tile_x=tile_x, stages=_STAGES)
        integers += tuple(itertools.chain(*(divider(number) for number in bins)))
        tiles = -(-product(bins) // each)
        warps = 4 if rows * columns > _LARGE_BIN else 1  # small bins are few instructions, which every warp repeats
    else:
        cover_y, cover_x = (_most_covered(count, extent) for extent, count in zip(size, bins, strict=True))
        tile_x = power_of_two(size[1], _LARGE_TILE // 2 // tile_channels)
        each = min(size[0], _ROWS)
        constants = dict(added=added, cover_y=cover_y, cover_x=cover_x, **layout, each=each)
        constants |= dict(tile_channels=tile_channels, tile_x=tile_x, stages=_STAGES)
        integers += tuple(itertools.chain(*(divider(number) for number in integers)))
        tiles = -(-size[0] // each) * -(-size[1] // tile_x)
        warps = 4 if tile_x * tile_channels >= _TILE else 2
    made = Kernel("awconv.ops.triton_average_pool", kernel, constants, warps)
    return Launch(made, samples * -(-channels // tile_channels) * tiles, integers)


def _most_covered(size: int, bins: int) -> int:
    """Positions that a bin covers at most; with size and bins exchanged, bins that cover a position."""
    return 1 + -(-(size - math.gcd(size, bins)) // bins)


def _call(
    name: str, source: Tensor, result: Tensor, size: Sequence[int], bins: Sequence[int], channels_last: bool
) -> Tensor:
    """Runs a function of the C code: the one for images whose channels lie last, if theirs do."""
    source = source.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    built = library(_SOURCE, source.dtype)
    if isinstance(built, str):  # a traced program can come to a machine without a compiler
        raise RuntimeError(f"awconv::average_pool cannot run here: {built}")
    kind, planes = ("_last", tuple(source.shape[:2])) if channels_last else ("", (product(source.shape[:2]),))
    run, workspace_elements = getattr(built, name + kind), getattr(built, "workspace_elements" + kind)
    if run.argtypes is None:
        counts = [ctypes.c_int64] * len(planes)
        workspace_elements.argtypes = [*counts[1:], *_SIZES, ctypes.c_int64]
        workspace_elements.restype = ctypes.c_int64
        run.argtypes, run.restype = [*counts, *_SIZES, ctypes.c_int64, *[ctypes.c_void_p] * 3], None
    sizes, threads = (axes(size), axes(bins)), torch.get_num_threads()
    workspace = source.new_empty(workspace_elements(*planes[1:], *sizes, threads))
    run(*planes, *sizes, threads, *(tensor.data_ptr() for tensor in (source, result, workspace)))
    return result


def axes(sizes: Sequence[int]) -> Any:
    """One and two axes as the last ones of three."""
    return (ctypes.c_int64 * AXES)(*[1] * (AXES - len(sizes)), *sizes)


def _by_slices(input: Tensor, output_size: Sequence[int]) -> Tensor:
    """Means along one axis after another; the backward writes the input once for each bin of an axis."""
    for axis, bins in enumerate(output_size, start=2):
        size = input.shape[axis]
        means = [input.narrow(axis, start, stop - start).mean(axis, keepdim=True) for start, stop in _edges(size, bins)]
        input = torch.cat(means, axis)
    return input


def _by_matrices(input: Tensor, output_size: Sequence[int]) -> Tensor:
    if exporting() and _has_constants(shape_of(input)[2:], output_size):
        return _by_constants(input, output_size)
    matrices = [_bins(size, bins, input) for size, bins in zip(input.shape[2:], output_size, strict=True)]
    last = matrices[-1]
    if len(matrices) > 1:  # torch.kron of the last two, which torch.export cannot trace with symbolic sizes
        last = (matrices[-2][:, None, :, None] * last[None, :, None, :]).flatten(2, 3).flatten(0, 1)
    pooled = input.flatten(-2) @ last if len(matrices) > 1 else input @ last
    if len(matrices) > 2:  # the matrix for all three at once would be larger than many inputs
        pooled = matrices[0].T @ pooled
    return pooled.reshape(*input.shape[:2], *output_size)


def _has_constants(size: Sequence[int], bins: Sequence[int]) -> bool:
    return has_numbers(size) and product(size) * product(bins) <= _MOST_SHARES


def _by_constants(input: Tensor, output_size: Sequence[int]) -> Tensor:
    """The same in few nodes: a pooling where all bins are alike, or a product with one matrix that the graph holds."""
    channels, *size = shape_of(input)[1:]
    edges = [_edges(length, bins) for length, bins in zip(size, output_size, strict=True)]
    windows = [{stop - start for start, stop in axis} for axis in edges]
    strides = [{after - before for (before, _), (after, _) in itertools.pairwise(axis)} or {1} for axis in edges]
    if all(len(different) == 1 for different in (*windows, *strides)) and {0} not in strides:
        pooled: Tensor = _AVERAGE_POOL[len(size)](input, *([min(one) for one in each] for each in (windows, strides)))
        return pooled
    shares = [
        [[(start <= position < stop) / (stop - start) for start, stop in axis] for position in range(length)]
        for length, axis in zip(size, edges, strict=True)
    ]
    rows = [[math.prod(share) for share in itertools.product(*row)] for row in itertools.product(*shares)]
    matrix = torch.tensor(rows, dtype=input.dtype, device=input.device)
    return (input.reshape(-1, len(rows)) @ matrix).reshape(input.shape[0], channels, *output_size)


def _edges(size: int, bins: int) -> list[tuple[int, int]]:
    return [(index * size // bins, -(-(index + 1) * size // bins)) for index in range(bins)]


def _bins(size: int, bins: int, like: Tensor) -> Tensor:
    """The matrix that takes means over bins along one axis: (size, bins), with the dtype and device of a tensor."""
    position = torch.arange(size, device=like.device)[:, None]
    index = torch.arange(bins, device=like.device)
    start, stop = index * size // bins, -(-(index + 1) * size // bins)
    covered = ((position >= start) & (position < stop)).to(torch.promote_types(like.dtype, torch.float32))
    return (covered / (stop - start)).to(like.dtype)
