"""What an exported graph is made of: PyTorch's own operators, in the form that its runtime is fastest with.

The order of preference was measured layer by layer and over whole networks (docs/deployment.md). No convolution gets
weights that depend on the input, but where the runtime is known to take them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, NamedTuple

import torch

from awconv.ops import tracing
from awconv.ops.problem import Problem, product

Runtime = Literal["onnxruntime", "onnxruntime_operator", "openvino", "quantized"]

_SMALL = 8  # times as many input channels of a group as pixels, or the height of a map of channels by themselves
_MOST_COLUMNS = 2**24  # elements of what the taps of a sample see: 64 MiB in single precision


class Target(NamedTuple):
    """What an export is for.

    Attributes:
        runtime: that will run the graph, if it is known.
        batch: the fixed batch size, or None.
    """

    runtime: Runtime | None = None
    batch: int | None = None


_target: ContextVar[Target] = ContextVar("awconv.exporting_for", default=Target())  # noqa: B039 - a tuple


@contextmanager
def exporting_for(runtime: Runtime | None, batch: int | None = None) -> Iterator[None]:
    """Exports and traces inside choose each layer's form for a runtime.

    Args:
        runtime: ``"onnxruntime"``, the same with awconv's operator as ``"onnxruntime_operator"``, ``"openvino"``,
            ``"quantized"`` for weights that shall all be constants of their own convolutions, or None for any.
        batch: the batch size, if the graph takes no other.
    """
    token = _target.set(Target(runtime, batch))
    try:
        yield
    finally:
        _target.reset(token)


def target() -> Target:
    """What the export that runs is for."""
    return Target(_runtime(), _batch())


# Asked of Python, one constant each: Dynamo of torch 2.11 reads neither a ContextVar nor the tuple that is in it.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _runtime() -> Runtime | None:
    return _target.get().runtime


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _batch() -> int | None:
    return _target.get().batch


def preferred(problem: Problem) -> list[str]:
    """Names of algorithms in the order in which an exported graph should have them."""
    runtime, batch = target()
    names = ["output_gain", "input_gain"]
    if runtime == "onnxruntime_operator":
        names.append("fused")
    if batch == 1 and (runtime == "openvino" or (runtime == "onnxruntime" and problem.depthwise)):
        names.append("per_sample")
    if runtime != "quantized" and tracing.has_numbers(problem.size):
        pixels = product(problem.size)
        if pixels <= (_SMALL**2 if problem.depthwise else problem.group_in_channels // _SMALL):
            names.append("shifted")
        columns = problem.in_channels * problem.taps * product(problem.out_size)
        if runtime != "openvino" and columns <= _MOST_COLUMNS:
            names.append("matmul")
    return [*names, "per_tap", "matmul", "per_sample", "naive"]
