"""A whole layer beside its parts, bit for bit; its compilation and capture."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from awconv import AWConv2d, use_algorithm
from awconv.bench.timing import graphed
from awconv.ops import average_pool, fused
from awconv.ops import layer as whole
from awconv.ops.branch import Branch, Train
from awconv.ops.fused import cuda, cuda_plans, tiles
from awconv.ops.gpu import empty_like_image
from awconv.ops.problem import describe
from tests.ops.layer_cases import CASES, run, step

pytestmark = pytest.mark.usefixtures("forgotten_plans")


def part_by_part(layer: AWConv2d, image: Tensor) -> Tensor:
    """The layer by the nodes of its parts, whose kernels are the same."""
    branch, gains = layer.attention, layer.attention.relation()
    passed, pooled = average_pool._PoolBeside.apply(image, branch.attention_size[2:])
    made = Branch.of(branch.modules_in_turn(), branch.attention_size, image.dtype, *gains)
    attention = Train.apply(pooled, *made.parameters(), made)
    residual = layer.residual or branch.relative
    weight = layer.weight.to(image.dtype)
    problem = describe(
        *(2, passed, weight, attention, None),
        *(layer.stride, layer.padding, layer.dilation, layer.groups, residual),
    )
    return fused.ALGORITHM.run(problem, passed, weight, attention)


FEW = ("channels first", "the gain in parts")  # numbers of all cases: test_layer.py
# Seconds each: make campaign runs them.
SLOW = (
    ("groups", "float32"),
    *((name, "float32") for name in ("a stride", "relative to the start")),
    *((name, low) for name in FEW for low in ("autocast", "float16", "wide gains")),
)


@pytest.mark.parametrize(
    ("name", "low"),
    [
        *((name, "float32") for name in FEW),
        *(pytest.param(*case, marks=pytest.mark.campaign) for case in SLOW),
    ],
)
def test_the_same_bits_as_part_by_part_on_a_cpu(name: str, low: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    layer, image = CASES[name].make("cpu")
    if low == "float16":
        layer = layer.half()
    if low != "float32":
        image = image.half()
    monkeypatch.setattr(whole, "autocasting", lambda device: low in ("autocast", "wide gains"))
    if low == "wide gains":
        correlate = tiles.correlate
        monkeypatch.setattr(tiles, "correlate", lambda *sizes: correlate(*sizes)._replace(wide_gains=True))
        for planned in (cuda_plans.forward, cuda_plans.grad_input):
            monkeypatch.setattr(cuda_plans, planned.__name__, planned.__wrapped__)
    copied = copy.deepcopy(layer)
    monkeypatch.setitem(fused._KERNELS, "cpu", cuda)
    monkeypatch.setattr(average_pool, "_pooled", lambda input, bins: empty_like_image((*input.shape[:2], *bins), input))
    found, expected = step(layer, image, run), step(copied, image, part_by_part)
    for key, value in expected.items():
        assert_same_bits(key, found[key], value, image.dtype)


def assert_same_bits(key: str, found: Tensor, by_parts: Tensor, low: torch.dtype) -> None:
    """Where autocast casts the weight, its gradient by parts was rounded to the dtype of products: here it is not."""
    rounded = found.to(low).to(found.dtype) if key == "weight" else found
    assert torch.equal(rounded, by_parts), key
    assert found.stride() == by_parts.stride(), key


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "low"),
    [
        ("a stride", torch.bfloat16),
        ("the gain in parts", torch.float16),
        ("a stride", None),
        ("relative to the start", None),
    ],
)
def test_the_same_bits_as_part_by_part(
    name: str, low: torch.dtype | None, monkeypatch: pytest.MonkeyPatch, launched: list[int]
) -> None:
    original, image = CASES[name].make("cuda")
    image = image.to(low or torch.float32)
    results = []
    for parts in (True, False):
        with monkeypatch.context() as patched, use_algorithm("fused"):
            if parts:
                patched.setattr(AWConv2d, "_run_whole", lambda *arguments: None)
            layer, input = copy.deepcopy(original), image.clone().requires_grad_()
            for _ in range(3):  # compiled; launched by tables; with what these left behind
                layer.zero_grad()
                input.grad = None
                with torch.autocast("cuda", dtype=low) if low else nullcontext():
                    output = layer(input)
                    assert ("_Layer" in type(output.grad_fn).__name__) != parts
                above = torch.linspace(-1, 1, output.numel(), device="cuda").reshape(output.shape).to(output.dtype)
                output.backward(above)
        grads = {key: value.grad for key, value in layer.named_parameters()}
        results.append(dict(output=output.detach(), image=input.grad, **grads, **dict(layer.named_buffers())))
    for key, value in results[0].items():
        if name == "relative to the start":  # the compiler may join a product with the 1 that is added
            torch.testing.assert_close(results[1][key], value, rtol=0, atol=1e-5 * float(value.abs().max()), msg=key)
        else:
            assert_same_bits(key, results[1][key], value, image.dtype)
    assert launched  # without Triton


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Launches of tables."""
    done: list[int] = []
    launch = whole.Launches.run

    def counted(self: Any, tensors: list[Tensor], floats: tuple[float, ...] = ()) -> None:
        if self._tables:
            done.append(len(self._steps))
        launch(self, tensors, floats)

    monkeypatch.setattr(whole.Launches, "run", counted)
    return done


@pytest.mark.gpu
def test_a_cuda_graph_of_a_step() -> None:
    layer, image = CASES["a stride"].make("cuda")
    image.requires_grad_()

    captured: list[Tensor] = []

    def once() -> list[Tensor]:
        with use_algorithm("fused"):
            output = layer(image)
        captured[:] = output, *torch.autograd.grad(output.square().sum(), (image, *layer.parameters()))
        return captured

    replay = graphed(once)
    image.data.normal_()
    replay()
    assert layer.attention.norm1.num_batches_tracked == 3
    assert all(map(torch.equal, [tensor.clone() for tensor in captured], once()))


def test_a_plan_compiles_what_a_step_launches() -> None:
    """Side by side, for the dtypes that the step comes with: it compiles no other kernel, forward or backward."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ops.compiled_layer"]
    lines = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 14 + 4  # of a step, and of inference
    assert all(line.endswith(" was compiled") for line in lines), lines
