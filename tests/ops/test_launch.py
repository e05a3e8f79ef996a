"""How the kernels for GPUs are launched, and the division that they share."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from awconv.ops.gpu import Kernel, divider

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from awconv.ops.triton_arithmetic import divide  # noqa: E402

MOST = 2**31 - 1


@triton.jit(do_not_specialize=["size", "multiplier", "shift"])
def divided(source, target, size, multiplier, shift, added: tl.constexpr, block: tl.constexpr):
    index = tl.program_id(0) * block + tl.arange(0, block)
    number = tl.load(source + index, mask=index < size, other=0)
    tl.store(target + index, divide(number, multiplier, shift) + added, mask=index < size)


def run(kernel: Kernel, source: Tensor, divisor: int) -> Tensor:
    target = torch.full_like(source, -1)
    kernel.launch(
        -(-source.numel() // kernel.constants["block"]), (source, target), (source.numel(), *divider(divisor))
    )
    return target


@st.composite
def divisions(draw: st.DrawFn) -> tuple[int, int]:
    """A number and a divisor, at multiples of it too, where a rounded quotient would be one off."""
    divisor = draw(st.one_of(st.integers(1, 300), st.integers(1, MOST)))
    multiple = draw(st.integers(0, MOST // divisor)) * divisor
    return min(max(multiple + draw(st.integers(-1, 1)), 0), MOST), divisor


@given(divisions())
def test_multiplier_and_shift_divide_exactly(division: tuple[int, int]) -> None:
    number, divisor = division
    multiplier, shift = divider(divisor)
    assert -(2**31) <= multiplier < 2**31
    assert ((2 * number) * (multiplier % 2**32) >> 32) >> shift == number // divisor


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 641, 2**16, 2**30 + 1, MOST])
def test_kernels_divide_exactly(divisor: int, triton_device: str) -> None:
    edges = [edge + near for edge in (divisor, 2**30, MOST // divisor * divisor, MOST) for near in (-1, 0, 1)]
    numbers = torch.tensor([*range(20), *(edge for edge in edges if edge <= MOST)], dtype=torch.int32)
    kernel = Kernel(__name__, "divided", dict(added=0, block=16))
    found = run(kernel, numbers.to(triton_device), divisor)
    assert found.tolist() == [number // divisor for number in numbers.tolist()]


def test_constants_may_come_in_any_order(triton_device: str) -> None:
    numbers = torch.arange(40, dtype=torch.int32, device=triton_device)
    for constants in (dict(added=5, block=16), dict(block=16, added=5)):
        kernel = Kernel(__name__, "divided", constants)
        for _ in range(2):  # compiled, and as it was compiled
            assert torch.equal(run(kernel, numbers, 3), numbers // 3 + 5)


def test_tensors_may_lie_anywhere_and_be_of_any_type(triton_device: str) -> None:
    """What was compiled for addresses that are multiples of 16, and for one type, is not taken for others."""
    kernel = Kernel(__name__, "divided", dict(added=0, block=16))
    for dtype in (torch.int32, torch.int64, torch.int32):
        numbers = torch.arange(60, dtype=dtype, device=triton_device)
        for offset in (0, 1, 0, 3):
            source = numbers[offset:]
            assert (source.data_ptr() % 16 == 0) == (offset == 0)
            assert torch.equal(run(kernel, source, 7), source // 7)
    target = torch.full((61,), -1, dtype=torch.int32, device=triton_device)
    kernel.launch(4, (numbers, target[1:]), (60, *divider(7)))
    assert target.tolist() == [-1, *(number // 7 for number in range(60))]
