"""The operator on a GPU as on a CPU: numbers, layouts, autocast, transforms; and streams and graphs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from awconv.ops.choose import ALGORITHMS
from tests.ops.problems import Case

# Sixteen channels and more, which the kernels for GPUs take; attention as each algorithm wants it.
CASES = {
    name: Case(2, 5, (9, 8), (32, 16, 3, 3), attention, padding=1, has_bias=True)
    for name, attention in {
        "output_gain": (32, 1, 1, 1),
        "input_gain": (1, 16, 1, 1),
        "fused": (32, 1, 3, 3),
        "per_tap": (32, 1, 3, 3),
        "per_sample": (32, 16, 3, 3),
        "shifted": (32, 1, 3, 3),
        "matmul": (32, 16, 3, 3),
        "naive": (32, 16, 3, 3),
    }.items()
}
DEPTHWISE = Case(2, 4, (9, 8), (24, 1, 3, 3), (24, 1, 3, 3), groups=24, padding=1, has_bias=True)
TYPICAL = ["fused", "per_tap", "per_sample"]


def placed(
    case: Case, device: str, dtype: torch.dtype = torch.float32, samples: slice = slice(None)
) -> dict[str, Tensor]:
    """The tensors of a case, or those of some samples, as leaves that want gradients."""
    every = {name: t[samples] if name in ("input", "attention") else t for name, t in case.tensors.items()}
    return {name: tensor.to(device, dtype).requires_grad_() for name, tensor in every.items()}


def results(case: Case, algorithm: str, tensors: dict[str, Tensor]) -> list[Tensor]:
    """The output, and the gradients of a fixed sum of it."""
    output = case.run(algorithm, **tensors)
    slope = torch.linspace(-1, 1, output.numel(), device=output.device, dtype=output.dtype).reshape(output.shape)
    return [output, *torch.autograd.grad(output, tuple(tensors.values()), slope)]


def check(case: Case, algorithm: str, tensors: dict[str, Tensor]) -> None:
    """Compares with the definition in float64 on a CPU, of the same rounded numbers.

    The slope, the gain, the weights, their product and partial sums over a tap or a sample may each be rounded once to
    the dtype; sums of some hundred products are kept in single precision.
    """
    exact = {name: tensor.detach().double().cpu().requires_grad_() for name, tensor in tensors.items()}
    dtype = tensors["input"].dtype
    for value, expected in zip(results(case, algorithm, tensors), results(case, "naive", exact), strict=True):
        assert value.dtype == dtype
        atol = (8 * torch.finfo(dtype).eps + 1e-5) * max(1.0, float(expected.detach().abs().max()))
        torch.testing.assert_close(value.double().cpu(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_equals_the_definition(algorithm: str, dtype: torch.dtype, device: str) -> None:
    check(CASES[algorithm], algorithm, placed(CASES[algorithm], device, dtype))


@pytest.mark.parametrize("algorithm", TYPICAL)
def test_depthwise_convolutions_equal_the_definition(algorithm: str, device: str) -> None:
    check(DEPTHWISE, algorithm, placed(DEPTHWISE, device))


@pytest.mark.parametrize("algorithm", ["auto", *TYPICAL])
def test_one_layer_takes_batches_of_any_size(algorithm: str, device: str) -> None:
    case = CASES["fused"]
    for samples in (slice(0, 4), slice(4, 5), slice(0, 5), slice(1, 4)):
        check(case, algorithm, placed(case, device, samples=samples))


def test_an_empty_batch_has_zero_gradients(device: str) -> None:
    for case in (CASES["fused"], DEPTHWISE):
        tensors = placed(case, device, samples=slice(0, 0))
        output, *gradients = results(case, "auto", tensors)
        assert output.shape == (0, *case.run().shape[1:])
        assert all(torch.count_nonzero(gradient) == 0 for gradient in gradients)


@pytest.mark.parametrize("algorithm", TYPICAL)
def test_channels_last_goes_in_and_comes_out(algorithm: str, device: str) -> None:
    for case in (CASES["fused"], DEPTHWISE):
        tensors = placed(case, device)
        expected = results(case, algorithm, tensors)
        for name in ("input", "weight"):
            lying = tensors[name].detach().contiguous(memory_format=torch.channels_last)
            tensors[name] = lying.requires_grad_()
        found = results(case, algorithm, tensors)
        assert found[0].is_contiguous(memory_format=torch.channels_last)
        for value, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-4)  # sums of float32 in another order


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("algorithm", TYPICAL)
def test_autocast_computes_in_its_dtype_and_gives_gradients_in_single(
    algorithm: str, dtype: torch.dtype, device: str
) -> None:
    case = CASES["fused"]
    tensors, rounded = placed(case, device), placed(case, device, dtype)
    with torch.autocast(device, dtype=dtype):
        output = case.run(algorithm, **tensors)
    assert output.dtype == dtype
    expected = case.run(algorithm, **rounded)
    torch.testing.assert_close(output, expected)
    loss, reference = (value.float().square().sum() for value in (output, expected))
    for gradient, low in zip(
        torch.autograd.grad(loss, tuple(tensors.values())),
        torch.autograd.grad(reference, tuple(rounded.values())),
        strict=True,
    ):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, low.float())


@pytest.mark.parametrize("algorithm", TYPICAL)
def test_the_same_bits_twice_in_deterministic_mode(algorithm: str, device: str) -> None:
    case = CASES["fused"]
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (results(case, algorithm, placed(case, device)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("algorithm", TYPICAL)
def test_functional_transforms_give_gradients_for_each_sample(algorithm: str, device: str) -> None:
    case = CASES["fused"]
    tensors = {name: tensor.detach() for name, tensor in placed(case, device).items()}
    data = (tensors["input"], tensors["attention"])

    def loss(weight: Tensor, input: Tensor, attention: Tensor) -> Tensor:
        return case.run(
            algorithm, weight=weight, input=input[None], attention=attention[None], bias=tensors["bias"]
        ).sum()

    together = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(tensors["weight"], *data)
    each = torch.stack([torch.func.grad(loss)(tensors["weight"], *sample) for sample in zip(*data, strict=True)])
    torch.testing.assert_close(together, each, rtol=1e-4, atol=1e-4)  # sums of float32 in another order


@pytest.mark.gpu
@pytest.mark.parametrize("algorithm", TYPICAL)
def test_streams_do_not_disturb_each_other(algorithm: str) -> None:
    case = CASES["fused"]
    inputs = [placed(case, "cuda"), placed(DEPTHWISE, "cuda")]
    expected = [results(each, algorithm, tensors) for each, tensors in zip((case, DEPTHWISE), inputs, strict=True)]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in inputs], [[], []]
    for _ in range(20):
        for index, (each, stream) in enumerate(zip((case, DEPTHWISE), streams, strict=True)):
            with torch.cuda.stream(stream):
                found[index].append(results(each, algorithm, inputs[index]))
    torch.cuda.synchronize()
    for index, many in enumerate(found):
        for values in many:
            for value, reference in zip(values, expected[index], strict=True):
                torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("algorithm", TYPICAL)
@pytest.mark.parametrize("case", [CASES["fused"], DEPTHWISE], ids=["dense", "depthwise"])
def test_a_graph_replays_with_other_numbers(case: Case, algorithm: str) -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        tensors = placed(case, "cuda")
        for _ in range(2):
            results(case, algorithm, tensors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = results(case, algorithm, tensors)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    for value, expected in zip(captured, results(case, algorithm, tensors), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_the_package_works_where_no_gpu_is_seen() -> None:
    code = (
        "import torch, awconv; assert not torch.cuda.is_available();"
        "print(tuple(awconv.AWConv2d(16, 16, 3)(torch.randn(2, 16, 5, 5)).shape))"
    )
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(2, 16, 3, 3)"
