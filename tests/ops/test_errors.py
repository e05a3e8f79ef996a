"""Each wrong argument gives an error that names the argument, what was expected and what came."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from awconv.ops import aw_conv1d, aw_conv2d, aw_conv3d, functional
from awconv.ops.choose import ALGORITHMS


def call(**changes: Any) -> torch.Tensor:
    arguments: dict[str, Any] = dict(
        input=torch.randn(2, 4, 8, 8),
        weight=torch.randn(6, 2, 3, 3),
        attention=torch.rand(2, 6, 1, 3, 3),
        bias=torch.randn(6),
        groups=2,
    )
    return aw_conv2d(**(arguments | changes))


def test_the_unchanged_call_is_right() -> None:
    assert call().shape == (2, 6, 6, 6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(input=[1.0]), TypeError, r"input must be a Tensor, got list"),
        (dict(bias=3), TypeError, r"bias must be a Tensor, got int"),
        (dict(input=torch.ones(2, 4, 8, 8, dtype=torch.long)), TypeError, r"input must be floating-point, got .*int64"),
        (dict(weight=torch.randn(6, 2, 3, 3).double()), TypeError, r"weight must have the dtype of input, .*float32"),
        (dict(attention=torch.rand(2, 6, 1, 3, 3).half()), TypeError, r"attention must have the dtype.*got .*float16"),
        (dict(bias=torch.randn(6).bfloat16()), TypeError, r"bias must have the dtype of input"),
        (dict(weight=torch.empty(6, 2, 3, 3, device="meta")), ValueError, r"weight must be on the device .*got meta"),
        (dict(input=torch.randn(4, 8, 8)), ValueError, r"input must have 4 axes \(N, C1, H, W\).*input\[None\]"),
        (dict(input=torch.randn(2, 2, 4, 8, 8)), ValueError, r"input must have 4 axes.*got shape \(2, 2, 4, 8, 8\)"),
        (dict(weight=torch.randn(6, 2, 3)), ValueError, r"weight must have 4 axes \(C2, C1/groups, kH, kW\)"),
        (dict(weight=torch.randn(6, 0, 3, 3), input=torch.randn(2, 0, 8, 8)), ValueError, r"weight must not be empty"),
        (dict(input=torch.randn(2, 5, 8, 8)), ValueError, r"input must have 4 channels .*got 5"),
        (dict(groups=0), ValueError, r"groups must be a positive integer, got 0"),
        (dict(groups=2.0), ValueError, r"groups must be a positive integer, got 2.0"),
        (dict(weight=torch.randn(5, 2, 3, 3)), ValueError, r"divisible by groups = 2, got 5"),
        (dict(bias=torch.randn(5)), ValueError, r"bias must have shape \(6,\).*got \(5,\)"),
        (
            dict(attention=torch.rand(2, 6, 3, 3)),
            ValueError,
            r"attention must have 5 axes .*kH/r_hw.*got shape \(2, 6, 3, 3\)",
        ),
        (
            dict(attention=torch.rand(1, 6, 1, 3, 3)),
            ValueError,
            r"attention must have the batch size of input, 2, got 1",
        ),
        (dict(attention=torch.rand(2, 4, 1, 3, 3)), ValueError, r"along out_channels: a divisor of 6, got 4"),
        (dict(attention=torch.rand(2, 6, 4, 3, 3)), ValueError, r"along in_channels / groups: a divisor of 2, got 4"),
        (dict(attention=torch.rand(2, 6, 1, 2, 3)), ValueError, r"along kH: a divisor of 3, got 2"),
        (dict(attention=torch.rand(2, 6, 1, 3, 0)), ValueError, r"along kW: a divisor of 3, got 0"),
        (dict(stride=0), ValueError, r"stride must be at least 1, got 0"),
        (dict(stride=(1, 2, 3)), ValueError, r"stride must have 2 numbers.*got \(1, 2, 3\)"),
        (dict(stride=1.5), TypeError, r"stride must be an integer or 2 of them, got 1.5"),
        (dict(dilation="big"), TypeError, r"dilation must be an integer or 2 of them, got 'big'"),
        (dict(padding=-1), ValueError, r"padding must be at least 0, got -1"),
        (dict(padding="full"), ValueError, r"padding must be 'same', 'valid' or numbers, got 'full'"),
        (dict(padding="same", stride=2), ValueError, r"padding='same' needs stride 1, got \(2, 2\)"),
        (dict(dilation=4), ValueError, r"input is too small along axis H: 8 .* spans 9"),
        (dict(algorithm="fastest"), ValueError, r"algorithm must be 'auto' or one of \['output_gain', .*got 'fastest'"),
        (dict(algorithm="output_gain"), ValueError, r"'output_gain' cannot run this problem: .*\(6, 1, 3, 3\)"),
        (dict(algorithm="input_gain"), ValueError, r"'input_gain' cannot run this problem: .*groups = 2"),
        (
            dict(algorithm="per_tap", attention=torch.rand(2, 6, 2, 3, 3)),
            ValueError,
            r"'per_tap' cannot run this problem: the attention must have size 1 along the input channels",
        ),
        (
            dict(algorithm="per_sample", input=torch.randn(0, 4, 8, 8), attention=torch.rand(0, 6, 1, 3, 3)),
            ValueError,
            r"'per_sample' cannot run this problem: the batch is empty",
        ),
    ],
)
def test_a_wrong_argument_is_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=r"aw_conv2d: .*" + message):
        call(**changes)


def test_nothing_is_computed_before_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("an algorithm ran")

    monkeypatch.setattr(functional, "_remembered_plan", functional._remembered_plan.__wrapped__)
    for name, algorithm in list(ALGORITHMS.items()):
        monkeypatch.setitem(ALGORITHMS, name, algorithm._replace(run=fail))
    with pytest.raises(AssertionError):
        call()
    with pytest.raises(ValueError, match="bias"):
        call(bias=torch.randn(5))


def test_errors_name_the_function_that_was_called() -> None:
    with pytest.raises(ValueError, match=r"aw_conv1d: input must have 3 axes \(N, C1, L\)"):
        aw_conv1d(torch.randn(2, 4, 8, 8), torch.randn(6, 4, 3), torch.rand(2, 6, 1, 3))
    with pytest.raises(ValueError, match=r"aw_conv3d: weight must have 5 axes \(C2, C1/groups, kD, kH, kW\)"):
        aw_conv3d(torch.randn(2, 4, 8, 8, 8), torch.randn(6, 4, 3, 3), torch.rand(2, 6, 1, 3, 3))
