"""Pooling to the size of a kernel, by C code, by matrices and by Triton's kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from awconv.ops import average_pool as module
from awconv.ops.average_pool import average_pool, pool_beside
from awconv.ops.gpu import empty_like_image

POOLS = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def sizes(dims: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*[st.integers(1, 12)] * dims)


@pytest.fixture(params=["c code", "slices", "matrices"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "c code":
        monkeypatch.setattr(module, "library", lambda source, dtype: "there is no compiler")
    if request.param == "matrices":
        monkeypatch.setattr(module, "_by_slices", module._by_matrices)
    way: str = request.param
    return way


SPOILT = [((5,), (3,)), ((7, 7), (3, 3)), ((14, 14), (3, 2)), ((30, 21), (3, 3)), ((6, 5, 4), (3, 3, 3))]


@pytest.mark.parametrize(("size", "bins"), SPOILT)
@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
def test_what_is_not_finite_spoils_the_bins_that_cover_it(
    way: str, layout: torch.memory_format, size: tuple[int, ...], bins: tuple[int, ...], number: float
) -> None:
    if way == "matrices":
        pytest.skip("spoils every bin of a channel and sample, as it says")
    if layout == torch.channels_last and len(size) != 2:
        pytest.skip("a layout of images")
    pool = POOLS[len(size)]
    input = torch.randn(3, 2, *size).contiguous(memory_format=layout).requires_grad_()
    spoilt = input.detach().clone()
    spoilt[1, 0][tuple(extent // 2 for extent in size)] = number
    torch.testing.assert_close(average_pool(spoilt, bins), pool(spoilt, bins), equal_nan=True)
    above = torch.randn(3, 2, *bins)
    above[2, 1].flatten()[1] = number
    (gradient,), (expected,) = (
        torch.autograd.grad(function(input, bins), input, above) for function in (average_pool, pool)
    )
    torch.testing.assert_close(gradient, expected, equal_nan=True)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # the same way for every example
@given(st.integers(1, 3).flatmap(lambda dims: st.tuples(sizes(dims), sizes(dims))))
def test_pooling_equals_adaptive_average_pooling(way: str, shape: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    size, bins = shape
    input = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    pooled, expected = average_pool(input, bins), POOLS[len(size)](input, bins)
    torch.testing.assert_close(pooled, expected)
    weights = torch.randn_like(pooled)
    torch.testing.assert_close(
        *(torch.autograd.grad((output * weights).sum(), input)[0] for output in (pooled, expected))
    )


@given(st.integers(1, 40), sizes(2), sizes(2), st.sampled_from([torch.float32, torch.float64]))
def test_channels_that_lie_last_are_pooled_so(
    channels: int, size: tuple[int, int], bins: tuple[int, int], dtype: torch.dtype
) -> None:
    """On a CPU: fewer channels than a vector has, more, and whole vectors of them. The gradient has their layout."""
    input = torch.randn(2, channels, *size, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    pooled, expected = average_pool(input, bins), F.adaptive_avg_pool2d(input.double(), bins)
    # Means of up to 144 numbers of order one, or sums of as many: a rounding of each.
    tolerance = dict(rtol=0, atol=144 * torch.finfo(dtype).eps)
    torch.testing.assert_close(pooled.double(), expected, **tolerance)
    above = torch.randn(pooled.shape, dtype=dtype)
    gradient, right = (torch.autograd.grad((out * above).sum(), input)[0] for out in (pooled, expected))
    torch.testing.assert_close(gradient.double(), right.double(), **tolerance)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pooling_in_low_precision_neither_overflows_nor_drifts(dtype: torch.dtype) -> None:
    input = torch.full((1, 1, 224, 224), 100.0, dtype=dtype)  # whose sum is 5 million, float16 ending at 65,504
    # The weights of the mean and the result are each rounded once.
    pooled, expected = average_pool(input, (3, 3)), torch.full((1, 1, 3, 3), 100.0, dtype=dtype)
    torch.testing.assert_close(pooled, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_pooling_can_be_differentiated_twice(way: str) -> None:
    input = torch.randn(2, 3, 7, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda input: average_pool(input, (3, 2)), input)
    assert torch.autograd.gradgradcheck(lambda input: average_pool(input, (3, 2)), input)


def test_pooling_takes_functional_transforms_and_tracing(way: str) -> None:
    input = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    expected = average_pool(input, (3, 2))
    jacobian = torch.autograd.functional.jacobian(lambda input: average_pool(input, (3, 2)), input)
    torch.testing.assert_close(torch.func.jacrev(lambda input: average_pool(input, (3, 2)))(input), jacobian)
    torch.testing.assert_close(torch.func.jacfwd(lambda input: average_pool(input, (3, 2)))(input), jacobian)
    traced = torch.jit.trace(lambda input: average_pool(input, (3, 2)), torch.randn_like(input))
    torch.testing.assert_close(traced(input), expected)
    torch._dynamo.reset()  # the graph of another way
    pool = torch.compile(lambda input: average_pool(input, (3, 2)), fullgraph=True, dynamic=True, backend="aot_eager")
    for layout in (torch.contiguous_format, torch.channels_last):
        for size in ((2, 3, 7, 5), (3, 4, 6, 9)):
            input = torch.randn(size, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
            (found,) = torch.autograd.grad(pool(input).square().sum(), input)
            (wanted,) = torch.autograd.grad(F.adaptive_avg_pool2d(input, (3, 2)).square().sum(), input)
            torch.testing.assert_close(found, wanted)


def test_pooling_need_not_be_contiguous_and_the_batch_may_be_empty(way: str) -> None:
    input = torch.randn(2, 3, 7, 5)
    torch.testing.assert_close(average_pool(input.transpose(2, 3), (3, 2)), F.adaptive_avg_pool2d(input.mT, (3, 2)))
    assert average_pool(input[:0], (3, 2)).shape == (0, 3, 3, 2)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_operators_keep_pytorchs_rules(device: str, layout: torch.memory_format) -> None:
    input = torch.randn(2, 3, 7, 5, device=device).contiguous(memory_format=layout).requires_grad_()
    torch.library.opcheck(torch.ops.awconv.average_pool, (input, [3, 2]))
    torch.library.opcheck(torch.ops.awconv.average_pool_backward, (input, [14, 9]))


# Sizes of images and bins for the kernels: partial tiles, several in a bin, overlapping bins, more bins than pixels.
KERNEL_SIZES = [
    ((2, 9, 14, 9), (3, 2)),
    ((1, 5, 7, 7), (3, 3)),
    ((2, 4, 2, 2), (3, 3)),
    ((1, 70, 1, 5), (1, 2)),
    ((1, 3, 1, 2100), (1, 1)),
    ((1, 3, 5, 900), (1, 2)),
    ((1, 5, 22, 30), (3, 3)),
    ((1, 9, 10), (3,)),
    ((0, 4, 5, 5), (3, 3)),
]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
BOTH = pytest.mark.parametrize("channels_last", [False, True])


def image(
    shape: tuple[int, ...], channels_last: bool, device: str = "cpu", dtype: torch.dtype = torch.float64
) -> Tensor:
    """Numbers from 1 to 2, whose means and sums lose nothing by cancellation."""
    made = (torch.rand(shape) + 1).to(device, dtype)
    return made.contiguous(memory_format=LAYOUTS[channels_last]) if len(shape) == 4 else made


def pooled_by_kernel(input: Tensor, bins: tuple[int, ...]) -> Tensor:
    target = empty_like_image((*input.shape[:2], *bins), input)
    module._launch("pool", input, target, input.shape[2:], bins)
    return target


def spread_by_kernel(grad: Tensor, target: Tensor, added: bool) -> Tensor:
    """The gradient of an image like the target, or that and what the target holds."""
    result = target.clone()
    module._launch("spread", grad, result, target.shape[2:], grad.shape[2:], added=added)
    return result


def spread_exactly(grad: Tensor, size: tuple[int, ...]) -> Tensor:
    """The same in float64 by PyTorch's pooling."""
    input = torch.zeros(*grad.shape[:2], *size, dtype=torch.float64, requires_grad=True)
    pooled = POOLS[len(size)](input, grad.shape[2:])
    return torch.autograd.grad(pooled, input, grad.double().cpu())[0]


@BOTH
# The interpreter cuts what it stores in bfloat16 instead of rounding it.
@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float16, *(pytest.param(t, marks=pytest.mark.gpu) for t in (torch.float32, torch.bfloat16))],
)
@pytest.mark.parametrize(("shape", "bins"), KERNEL_SIZES, ids=str)
def test_the_kernels_round_once_to_the_type(
    shape: tuple[int, ...], bins: tuple[int, ...], dtype: torch.dtype, channels_last: bool, triton_device: str
) -> None:
    input = image(shape, channels_last, triton_device, dtype)
    grad = image((*shape[:2], *bins), channels_last, triton_device, dtype)
    size = shape[2:]
    exact = [
        POOLS[len(size)](input.double().cpu(), bins) if len(input) else torch.zeros(0, *grad.shape[1:]).double(),
        spread_exactly(grad, size),
        spread_exactly(grad, size) + input.double().cpu(),
    ]
    found = [pooled_by_kernel(input, bins), *(spread_by_kernel(grad, input, added) for added in (False, True))]
    # Half a step of the type, and some of the single precision in which sums and shares are kept.
    rtol = torch.finfo(dtype).eps / 2 + (1e-15 if dtype == torch.float64 else 5e-7) * sum(size)
    for value, expected in zip(found, exact, strict=True):
        assert value.dtype == dtype
        torch.testing.assert_close(value.double().cpu(), expected, rtol=rtol, atol=0)


def test_one_axis_may_have_its_channels_last(triton_device: str) -> None:
    input = torch.randn(2, 9, 5).to(triton_device).mT
    target = empty_like_image((2, 5, 3), input)
    module._launch("pool", input, target, (9,), (3,))
    torch.testing.assert_close(target, F.adaptive_avg_pool1d(input, 3))


def test_the_kernels_give_the_same_bits_twice(triton_device: str) -> None:
    for shape, bins in [((8, 64, 56, 56), (3, 3)), *KERNEL_SIZES] if triton_device == "cuda" else KERNEL_SIZES[1:2]:
        input, grad = (image(sizes, True, triton_device, torch.float32) for sizes in (shape, (*shape[:2], *bins)))
        assert torch.equal(pooled_by_kernel(input, bins), pooled_by_kernel(input, bins))
        assert torch.equal(spread_by_kernel(grad, input, True), spread_by_kernel(grad, input, True))


@BOTH
@pytest.mark.parametrize("number", [torch.inf, torch.nan])
def test_the_kernels_spoil_only_the_bins_that_cover_what_is_not_finite(
    number: float, channels_last: bool, triton_device: str
) -> None:
    for size, bins in SPOILT[:2]:
        pool = POOLS[len(size)]
        input, grad = image((3, 2, *size), channels_last), image((3, 2, *bins), channels_last)
        input[(1, 0, *(extent // 2 for extent in size))] = number
        grad[(2, 1, *[1] * len(bins))] = number
        found = pooled_by_kernel(input.to(triton_device), bins)
        torch.testing.assert_close(found.cpu(), pool(input, bins), equal_nan=True)
        clean = image((3, 2, *size), channels_last).to(triton_device)
        found = spread_by_kernel(grad.to(triton_device), clean, added=False)
        torch.testing.assert_close(found.cpu(), spread_exactly(grad, size), equal_nan=True)


@pytest.mark.gpu
@BOTH
def test_a_gpu_pools_as_pytorch_does(channels_last: bool) -> None:
    for shape, bins in (*KERNEL_SIZES[:-1], ((8, 64, 56, 56), (3, 3)), ((8, 512, 7, 7), (3, 3))):
        input = image(shape, channels_last, "cuda", torch.float32).requires_grad_()
        exact = input.detach().double().requires_grad_()
        pooled, expected = average_pool(input, bins), POOLS[len(bins)](exact, bins)
        slope = torch.rand_like(pooled)
        found, wanted = (
            torch.autograd.grad(pooled, input, slope)[0],
            torch.autograd.grad(expected, exact, slope.double())[0],
        )
        for value, reference in ((pooled, expected), (found, wanted)):  # sums of float32, of positive numbers
            torch.testing.assert_close(value.double(), reference, rtol=1e-5, atol=0)
        last = channels_last and len(shape) == 4
        assert pooled.is_contiguous(memory_format=LAYOUTS[last])
        assert bins == (1, 1) or found.is_contiguous(memory_format=LAYOUTS[last])  # a 1x1 image has both layouts
        with torch.no_grad():
            assert torch.equal(average_pool(input, bins), pooled)


@pytest.mark.gpu
def test_a_gpu_differentiates_twice() -> None:
    input = torch.randn(2, 3, 7, 5, dtype=torch.float64, device="cuda", requires_grad=True)
    assert torch.autograd.gradcheck(lambda input: average_pool(input, (3, 2)), input)
    assert torch.autograd.gradgradcheck(lambda input: average_pool(input, (3, 2)), input)


Way = Callable[[Tensor, tuple[int, ...]], tuple[Tensor, Tensor]]


@pytest.fixture
def beside(triton_device: str, monkeypatch: pytest.MonkeyPatch) -> Way:
    """``pool_beside`` as a GPU has it."""

    def on_cpu(input: Tensor, bins: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        passed, pooled = module._PoolBeside.apply(input, list(bins))
        return passed, pooled

    def on_gpu(input: Tensor, bins: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        passed, pooled = pool_beside(input, bins)
        assert passed is not input or not torch.is_grad_enabled()
        return passed, pooled

    if triton_device == "cuda":
        return on_gpu
    monkeypatch.setattr(module, "_pool_on_gpu", pooled_by_kernel)
    return on_cpu


def two_paths(input: Tensor, bins: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return input, POOLS[len(bins)](input, bins)


def mixed(passed: Tensor, pooled: Tensor) -> Tensor:
    """What has every gradient that a layer can ask for, of first and second order."""
    return (passed**3).sum() + (pooled.exp() * passed.mean()).sum()


@BOTH
@pytest.mark.parametrize("uses", ["both", "passed", "pooled"])
@pytest.mark.parametrize(("shape", "bins"), [((2, 5, 7, 6), (3, 2)), ((2, 5, 9), (3,))])
def test_pooling_beside_a_use_gives_the_sum_of_both_gradients(
    shape: tuple[int, ...], bins: tuple[int, ...], uses: str, channels_last: bool, triton_device: str, beside: Way
) -> None:
    function = {
        "both": lambda passed, pooled: (passed**3).sum() + pooled.exp().sum(),
        "passed": lambda passed, _: (passed**3).sum(),
        "pooled": lambda _, pooled: pooled.exp().sum(),
    }[uses]
    input = image(shape, channels_last, triton_device).requires_grad_()
    found, expected = (torch.autograd.grad(function(*way(input, bins)), input)[0] for way in (beside, two_paths))
    torch.testing.assert_close(found, expected)
    if triton_device == "cuda" or uses != "pooled":  # whose gradient the C code makes on a CPU, contiguous
        assert found.stride() == input.stride()
    again = torch.autograd.grad(function(*beside(input, bins)), input)[0]
    assert torch.equal(again, found)


def test_pooling_beside_a_use_can_be_differentiated_twice(triton_device: str, beside: Way) -> None:
    input = image((2, 3, 5, 4), True, triton_device).requires_grad_()
    slope = torch.randn_like(input)
    seconds = []
    for way in (beside, two_paths):
        (first,) = torch.autograd.grad(mixed(*way(input, (3, 2))), input, create_graph=True)
        seconds.append(torch.autograd.grad((first * slope).sum(), input)[0])
    torch.testing.assert_close(*seconds)


def test_a_second_backward_changes_nothing_of_the_first(triton_device: str, beside: Way) -> None:
    input = image((2, 3, 5, 4), True, triton_device).requires_grad_()
    passed, pooled = beside(input, (3, 2))
    loss = mixed(passed, pooled)
    (first,) = torch.autograd.grad(loss, input, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, input)
    assert torch.equal(first, kept)
    assert torch.equal(second, kept)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_pooling_beside_a_use_goes_with_checkpointing(use_reentrant: bool, triton_device: str, beside: Way) -> None:
    input = image((2, 3, 5, 4), True, triton_device).requires_grad_()

    def block(input: Tensor) -> Tensor:
        return mixed(*beside(input * 2, (3, 2)))

    checkpoint(block, input, use_reentrant=use_reentrant).backward()
    (expected,) = torch.autograd.grad(mixed(*two_paths(input * 2, (3, 2))), input)
    torch.testing.assert_close(input.grad, expected)


def test_hooks_and_other_uses_of_the_input_get_its_whole_gradient(triton_device: str, beside: Way) -> None:
    leaf = image((2, 3, 5, 4), True, triton_device).requires_grad_()
    seen: dict[str, list[Tensor]] = {}
    grads = {}
    for name, way in {"found": beside, "expected": two_paths}.items():
        input = leaf * 2
        input.retain_grad()
        input.register_hook(seen.setdefault(name, []).append)
        loss = mixed(*way(input, (3, 2))) + (input**2).sum()
        (grads[name],) = torch.autograd.grad(loss, leaf, retain_graph=True)
        loss.backward()
        seen[name].append(input.grad)
    torch.testing.assert_close(grads["found"], grads["expected"])
    torch.testing.assert_close(seen["found"], seen["expected"])


def test_a_backward_of_many_gradients_at_once_is_right(triton_device: str, beside: Way) -> None:
    input = image((2, 3, 5, 4), True, triton_device).requires_grad_()
    passed, pooled = beside(input, (3, 2))
    outputs, slopes = passed * pooled.mean(), torch.randn(4, *input.shape).to(input)
    (found,) = torch.autograd.grad(outputs, input, slopes, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(outputs, input, slope, retain_graph=True)[0] for slope in slopes]
    torch.testing.assert_close(found, torch.stack(each))
