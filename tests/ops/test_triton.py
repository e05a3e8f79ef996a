"""The fused algorithm's kernels for GPUs: by Triton's interpreter on a CPU, and on a GPU if there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from awconv.ops.fused import cuda, cuda_plans, tiles
from awconv.ops.fused.tiles import Tile
from awconv.ops.geometry import Geometry
from awconv.ops.problem import describe
from tests.ops.problems import Case

# What the kernels take: 16 channels and more of a block and of a group, or depthwise; partial tiles of each.
# Small ones: by the interpreter, each tap of each tile takes milliseconds.
CASES = {
    "a tile": Case(2, 2, (6, 6), (16, 16, 3, 3), (16, 1, 3, 3), padding=1),
    "partial tiles": Case(2, 2, (5, 7), (24, 20, 2, 3), (24, 1, 2, 3), padding=1),
    "tiles over several samples": Case(2, 5, (3, 3), (17, 16, 2, 1), (17, 1, 2, 1), padding=1),
    "strides": Case(2, 2, (9, 8), (16, 18, 3, 2), (16, 1, 3, 2), stride=(2, 3), padding=(1, 0)),
    "a stride that skips pixels": Case(2, 2, (7, 7), (16, 16, 2, 1), (16, 1, 2, 1), stride=3),
    "dilation and stride": Case(2, 1, (9, 10), (16, 16, 3, 2), (16, 1, 3, 2), padding=2, dilation=2, stride=2),
    "same padding of an even kernel": Case(2, 2, (5, 4), (16, 16, 2, 2), (16, 1, 2, 2), padding="same"),
    "input channels in blocks": Case(2, 2, (5, 5), (16, 32, 2, 2), (16, 2, 2, 2), padding=1),
    "groups": Case(2, 2, (4, 4), (48, 16, 2, 1), (48, 1, 2, 1), padding=1, groups=3),
    "depthwise": Case(2, 2, (7, 6), (20, 1, 3, 3), (20, 1, 3, 3), padding=1, groups=20, stride=2),
    "two outputs a channel": Case(2, 2, (5, 5), (20, 1, 3, 2), (20, 1, 3, 2), padding=1, groups=10),
    "one axis": Case(1, 2, (20,), (18, 16, 5), (18, 1, 5), padding=2, stride=2),
    "more taps than bits": Case(1, 1, (20,), (16, 16, 33), (16, 1, 33), padding=16),
}
QUICK = ("a stride that skips pixels", "two outputs a channel")  # one that multiplies matrices, one that is depthwise
EXAMPLES = 15 if torch.cuda.is_available() else 8

POINTWISE = Geometry((1, 1), ((0, 0), (0, 0)), (1, 1), 1)


@pytest.fixture
def device(triton_device: str) -> str:
    return triton_device


def prepared(case: Case, device: str, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Geometry]:
    """Input, weight, gain (1 + attention), and the geometry, as the operator gets them."""
    input, weight, attention = (case.tensors[name].to(device, dtype) for name in ("input", "weight", "attention"))
    gain = (1 + attention).flatten(3)
    padding = tuple(case.padding_pairs())
    return (input, weight, gain), Geometry(
        case.per_axis(case.stride), padding, case.per_axis(case.dilation), case.groups
    )


def run(case: Case, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The kernels' output, and the gradients of a fixed sum of it."""
    tensors, geometry = prepared(case, device, dtype)
    output = cuda.forward(*tensors, geometry)
    grad = torch.linspace(-1, 1, output.numel(), dtype=dtype).reshape(output.shape).to(device)
    return (output, *cuda.backward(grad, *tensors, geometry, [True, True, True]))


def reference(case: Case, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same by the definition in float64, from the same rounded numbers."""
    exact = [tensor.double().cpu().requires_grad_() for tensor in tensors]
    attention = exact[2].reshape(case.batch, *case.attention_shape) - 1
    output = case.run("naive", input=exact[0], weight=exact[1], attention=attention)
    grad = torch.linspace(-1, 1, output.numel(), dtype=tensors[0].dtype).double().reshape(output.shape)
    return (output, *torch.autograd.grad(output, exact, grad))


def check(case: Case, device: str, dtype: torch.dtype) -> None:
    values = run(case, device, dtype)
    # Sums in single precision of up to some thousand products, rounded once; the gain, scaled gradients and operands
    # may be rounded to the type before: a few eps of it, relative to the largest result.
    tolerance = 4 * torch.finfo(dtype).eps + 1e-5
    for value, expected in zip(values, reference(case, prepared(case, device, dtype)[0]), strict=True):
        assert value.dtype == dtype
        atol = tolerance * max(1.0, float(expected.detach().abs().max()))
        torch.testing.assert_close(value.double().cpu(), expected, rtol=0, atol=atol)


# Triton's interpreter does not multiply matrices in bfloat16.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition(name: str, dtype: torch.dtype, device: str) -> None:
    check(CASES[name], device, dtype)


LARGE = dict(tile_rows=64, tile_pixels=64, tile_inner=32)
SMALL = dict(tile_rows=16, tile_pixels=16, tile_inner=16)
TILES = {
    "weights": Tile("scaled_weights", LARGE, 4, 3, wide_gains=True),
    "weights, small": Tile("scaled_weights", SMALL, 4, 2),
    "sums": Tile("scaled_sums", LARGE, 4, 3),
    "sums, small": Tile("scaled_sums", SMALL, 4, 2),
}
PRODUCTS = {
    "a segment": Tile("sum_products", dict(tile_rows=32, tile_columns=32, tile_segment=32, tile_positions=32), 4, 3),
    "half a segment": Tile(
        "sum_products", dict(tile_rows=64, tile_columns=16, tile_segment=16, tile_positions=16), 4, 2
    ),
    "four segments": Tile(
        "sum_products", dict(tile_rows=16, tile_columns=128, tile_segment=32, tile_positions=16), 4, 3
    ),
}
TILED = {
    "partial tiles": Case(2, 2, (3, 5), (24, 20, 2, 2), (24, 1, 2, 2), padding=1),
    "groups, blocks and strides": Case(2, 2, (6, 5), (36, 40, 2, 1), (36, 2, 2, 1), padding=1, groups=2, stride=2),
}


@pytest.fixture(params=[(tile, list(PRODUCTS)[index % len(PRODUCTS)]) for index, tile in enumerate(TILES)], ids=str)
def tiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Holds the kernels to a tile of each kind, and forgets what was planned by it."""
    tile, products = request.param
    monkeypatch.setattr(tiles, "correlate", lambda *_: TILES[tile])
    monkeypatch.setattr(tiles, "sum_products", lambda *_: PRODUCTS[products])
    planned = (cuda_plans.forward, cuda_plans.grad_input, cuda_plans.sums)
    for cached in planned:
        cached.cache_clear()
    yield
    for cached in planned:
        cached.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", TILED)
def test_equals_the_definition_for_every_tile(name: str, dtype: torch.dtype, device: str, tiled: None) -> None:
    check(TILED[name], device, dtype)


# Input channels, output channels, size, stride of 3x3 convolutions, some with channels on both sides of a tile's.
REAL = [
    *((64, 64, 56, 1), (128, 128, 56, 2), (256, 256, 14, 1), (512, 512, 7, 1), (512, 512, 14, 2)),
    *((16, 16, 32, 1), (16, 32, 32, 2), (32, 64, 16, 2), (129, 65, 28, 1), (48, 272, 9, 1)),
]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "channels_last"),
    [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True), (torch.float32, False)],
)
@pytest.mark.parametrize("shape", REAL)
def test_equals_a_convolution_for_every_sample_at_real_sizes(
    shape: tuple[int, int, int, int], dtype: torch.dtype, channels_last: bool
) -> None:
    columns, rows, size, stride = shape
    layout = torch.channels_last if channels_last else torch.contiguous_format
    make = torch.Generator("cuda").manual_seed(0)

    def random(*sizes: int) -> Tensor:
        image = torch.randn(sizes, generator=make, device="cuda").to(dtype).contiguous(memory_format=layout)
        return image.requires_grad_()

    input, weight, above = random(5, columns, size, size), random(rows, columns, 3, 3), None
    gain = (torch.rand(5, rows, 1, 9, generator=make, device="cuda") + 1).to(dtype)
    geometry = Geometry((stride, stride), ((1, 1), (1, 1)), (1, 1), 1)
    output = cuda.forward(input.detach(), weight.detach(), gain, geometry)
    above = torch.randn(output.shape, generator=make, device="cuda").to(dtype).contiguous(memory_format=layout)
    grads = cuda.backward(above, input.detach(), weight.detach(), gain, geometry, [True] * 3)
    exact = [tensor.detach().double().requires_grad_() for tensor in (input, weight, gain)]
    scaled = exact[1] * exact[2].reshape(5, rows, 1, 3, 3)
    expected = torch.cat(
        [torch.conv2d(image[None], kernel, None, stride, 1) for image, kernel in zip(exact[0], scaled, strict=True)]
    )
    references = (expected, *torch.autograd.grad(expected, exact, above.double()))
    for value, reference, like in zip((output, *grads), references, (input, input, weight, gain), strict=True):
        assert value.is_contiguous(memory_format=layout) or value is grads[2]
        # Weights, gains and results are rounded to the type, at random: some eps, beside sums in single precision.
        error = (value.double() - reference).norm() / reference.norm()
        assert error < torch.finfo(dtype).eps + 1e-5, like.shape


@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_equals_the_definition_over_the_arguments(data: st.DataObject, device: str) -> None:
    depthwise, kernel = data.draw(st.booleans()), data.draw(st.tuples(*[st.integers(1, 3)] * 2))
    stride, dilation = data.draw(st.tuples(*[st.integers(1, 3)] * 2)), data.draw(st.tuples(*[st.integers(1, 2)] * 2))
    padding = data.draw(st.tuples(*[st.integers(0, 2)] * 2))
    extents = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    channels, groups = data.draw(st.integers(16, 20)), data.draw(st.integers(1, 2))
    assume(max(padding) < 2 or min(extents) > 1)
    check(
        Case(
            2,
            data.draw(st.integers(1, 3)),
            tuple(data.draw(st.integers(r, r + 3)) for r in extents),
            (channels, 1, *kernel) if depthwise else (channels * groups, 16, *kernel),
            (channels, 1, *kernel) if depthwise else (channels * groups, 1, *kernel),
            groups=channels if depthwise else groups,
            stride=stride,
            padding=padding,
            dilation=dilation,
            seed=data.draw(st.integers(0, 100)),
        ),
        device,
        torch.float32,
    )


def test_half_precision_does_not_overflow_where_the_result_does_not(device: str) -> None:
    input, weight = torch.full((2, 32, 4, 4), 200.0), torch.full((16, 32, 1, 1), 20.0)
    weight[:, 16:] = -20  # partial sums of 64,000 and the scale of 2 would overflow, the result is 0
    gain = torch.full((2, 16, 1, 1), 2.0)
    tensors = [tensor.to(device, torch.float16) for tensor in (input, weight, gain)]
    output = cuda.forward(*tensors, POINTWISE)
    assert torch.equal(output.cpu(), torch.zeros(2, 16, 4, 4, dtype=torch.float16))


@pytest.mark.parametrize("number", [torch.inf, torch.nan])
def test_a_gain_that_is_not_finite_leaves_other_samples_alone(number: float, device: str) -> None:
    input, weight, gain = torch.randn(2, 16, 4, 4), torch.randn(16, 16, 1, 1), torch.rand(2, 16, 1, 1)
    gain[0, 3] = number
    tensors = [tensor.to(device, torch.float16) for tensor in (input, weight, gain)]
    grad_output = torch.randn(2, 16, 4, 4).to(device, torch.float16)
    grad_input, *_ = cuda.backward(grad_output, *tensors, POINTWISE, [True, False, False])
    assert grad_input[1].isfinite().all()
    assert not grad_input[0].isfinite().any()


def test_one_sample_with_a_large_gain_leaves_small_gradients_of_others(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "correlate", lambda *_: Tile("scaled_sums", SMALL | dict(tile_pixels=16), 4, 2))
    cuda_plans.grad_input.cache_clear()
    weight, gain = torch.ones(16, 16, 1, 1), torch.ones(2, 16, 1, 1)
    gain[1] = 8000
    tensors = [tensor.to(device, torch.float16) for tensor in (torch.ones(2, 16, 1, 1), weight, gain)]
    above = torch.full((2, 16, 1, 1), 6e-6)  # times 1 / 8192 of another sample's gain it would vanish
    above = above.to(device, torch.float16)
    grad, *_ = cuda.backward(above, *tensors, POINTWISE, [True, False, False])
    cuda_plans.grad_input.cache_clear()
    # Small numbers of float16 are a millionth of 16 apart.
    torch.testing.assert_close(grad[0].double().cpu(), 16 * above[0].double().cpu(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("last", [False, True])
def test_one_axis_gives_the_strides_that_a_traced_graph_expects(last: bool, device: str) -> None:
    input, weight, gain = torch.randn(2, 16, 9), torch.randn(16, 16, 3), torch.rand(2, 16, 1, 3)
    if last:
        input, weight = input.mT.contiguous().mT, weight.mT.contiguous().mT
    input, weight, gain = (tensor.to(device).requires_grad_() for tensor in (input, weight, gain))
    geometry = Geometry((1,), ((1, 1),), (1,), 1)
    output = cuda.forward(input.detach(), weight.detach(), gain.detach(), geometry)
    grads = cuda.backward(torch.ones_like(output), *(t.detach() for t in (input, weight, gain)), geometry, [True] * 3)
    assert output._base is None  # a view could not be changed in place
    fakes = (output.contiguous(), input.contiguous(), torch.empty_like(weight), torch.empty_like(gain))
    assert [tensor.stride() for tensor in (output, *grads)] == [fake.stride() for fake in fakes]


def test_the_same_bits_twice(device: str) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        for name in CASES if device == "cuda" else QUICK:
            twice = [run(CASES[name], device, torch.float32) for _ in range(2)]
            for first, second in zip(*twice, strict=True):
                assert torch.equal(first, second)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_a_gradient_can_be_asked_for_alone(needs: tuple[bool, ...], device: str) -> None:
    for name in QUICK:
        tensors, geometry = prepared(CASES[name], device, torch.float32)
        expected = run(CASES[name], device, torch.float32)
        grad = torch.linspace(-1, 1, expected[0].numel()).reshape(expected[0].shape).to(device)
        grads = cuda.backward(grad, *tensors, geometry, list(needs))
        assert [value is not None for value in grads] == list(needs)
        for value, all_three in zip(grads, expected[1:], strict=True):
            assert value is None or torch.equal(value, all_three)


def test_an_empty_batch_has_zero_gradients(device: str) -> None:
    tensors, geometry = prepared(CASES["a tile"], device, torch.float32)
    input, weight, gain = tensors[0][:0], tensors[1], tensors[2][:0]
    output = cuda.forward(input, weight, gain, geometry)
    assert output.shape == (0, 16, 6, 6)
    grads = cuda.backward(output, input, weight, gain, geometry, [True] * 3)
    assert [grad.shape for grad in grads] == [input.shape, weight.shape, gain.shape]
    assert torch.count_nonzero(grads[1]) == 0


@pytest.mark.parametrize(
    ("weight", "blocks", "groups", "dtype", "reason"),
    [
        ((16, 8, 3, 3), 1, 1, torch.float32, "at least 16 input channels"),
        ((8, 16, 3, 3), 1, 1, torch.float32, "at least 16 input channels"),
        ((16, 32, 3, 3), 4, 1, torch.float32, "at least 16 input channels"),
        ((16, 16, 3, 3), 1, 1, torch.float64, "not torch.float64"),
        ((16, 16, 2, 3, 3), 1, 1, torch.float32, "one or two spatial axes"),
    ],
)
def test_what_it_cannot_run_it_says(
    weight: tuple[int, ...], blocks: int, groups: int, dtype: torch.dtype, reason: str
) -> None:
    dims = len(weight) - 2
    shapes = ((2, weight[1] * groups, *[5] * dims), weight, (2, weight[0], blocks, *weight[2:]))
    problem = describe(dims, *(torch.empty(shape, dtype=dtype) for shape in shapes), None, 1, 1, 1, groups, True)
    assert reason in str(cuda.obstacle(problem))


@pytest.mark.parametrize(
    ("height", "out_channels", "stride", "reason"),
    [
        (2**14, 16, 2, "whose input has 2,147,483,648 elements"),
        (2**13, 32, 1, "whose output has 2,147,483,648 elements"),
        (2**13, 16, 1, None),
    ],
)
def test_samples_that_32_bits_do_not_count_are_left_to_others(
    height: int, out_channels: int, stride: int, reason: str | None
) -> None:
    shapes = (3, 16, height, 2**13), (out_channels, 16, 3, 3), (3, out_channels, 1, 3, 3)
    tensors = (torch.zeros(()).expand(shape) for shape in shapes)  # which take no memory
    obstacle = cuda.obstacle(describe(2, *tensors, None, stride, 1, 1, 1, True))
    assert obstacle is None if reason is None else reason in str(obstacle)
