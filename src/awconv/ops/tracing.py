"""What goes on around a call: compilation, export, transforms, autocast. The operators ask only here: PyTorch has a way
of its own to ask each question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


def compiling() -> bool:
    """Whether ``torch.compile`` or ``torch.export`` is tracing: sizes may be symbols."""
    return torch.compiler.is_compiling()


def compiling_bytecode() -> bool:
    """Whether Dynamo is reading the code instead of Python: it keeps no cache and writes no log."""
    return torch.compiler.is_dynamo_compiling()


_as_called: ContextVar[bool] = ContextVar("awconv.traced_as_called", default=False)


@contextmanager
def traced_as_called() -> Iterator[None]:
    """Inside, ``torch.jit.trace`` records what a call runs: it looks at the graph, and nobody else runs it."""
    token = _as_called.set(True)
    try:
        yield
    finally:
        _as_called.reset(token)


def exporting() -> bool:
    """Whether ``torch.export`` or ``torch.jit.trace`` is at work: others will run the graph, and know PyTorch's own
    operators."""
    return _in_export() or (jit_tracing() and not _as_called.get())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _in_export() -> bool:
    """Asked of Python, since Dynamo of torch 2.11 says yes within ``torch.compile``, too."""
    return torch.compiler.is_exporting()


def jit_tracing() -> bool:
    """Whether ``torch.jit.trace`` is recording: sizes of the example become constants."""
    return torch.jit.is_tracing()  # type: ignore[attr-defined,no-any-return]


def shape_of(tensor: Tensor) -> torch.Size:
    """The shape in numbers or, in a compilation, in symbols. ``torch.jit.trace`` gives tensors, which it records."""
    with numbers():
        return tensor.shape


def numbers() -> AbstractContextManager[None]:
    """Inside, shapes are as :func:`shape_of` gives them, and ``torch.jit.trace`` records nothing."""
    return nullcontext() if compiling() or not jit_tracing() else _jit_tracing_paused()


@contextmanager
def _jit_tracing_paused() -> Iterator[None]:
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def has_numbers(sizes: Sequence[Any]) -> bool:
    """Whether sizes are numbers, and no symbols. Dynamo does not tell."""
    return not compiling_bytecode() and all(isinstance(size, int) for size in sizes)


def written(number: int) -> str:
    """A number in a message. Dynamo gets an ellipsis: to it any may be a symbol, which torch 2.11 cannot write."""
    return "…" if compiling_bytecode() else f"{number:,}"


def eager(*tensors: Tensor) -> bool:
    """Whether a call runs now, on data: nothing traces, transforms or watches it, and no tensor is of another kind.
    What it does need not be an operator then, through whose dispatch a call of Python takes thrice as long."""
    if compiling() or jit_tracing() or transforming() or torch._C._len_torch_dispatch_stack():
        return False
    for tensor in tensors:
        kind = type(tensor)
        if (kind is not Tensor and kind is not Parameter) or not torch._C._has_storage(tensor):
            return False
    return True


def transforming() -> bool:
    """Whether ``torch.func`` is at work (``vmap``, ``grad``, ``jvp``, ...), inside compiled code, too."""
    return _in_transform() if compiling() else torch._C._are_functorch_transforms_active()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _in_transform() -> bool:
    """Asked of Python, since Dynamo cannot: it runs the transforms of what it traces."""
    return torch._C._are_functorch_transforms_active()


def is_batched(tensor: Tensor) -> bool:
    """Whether ``vmap`` is adding an axis to a tensor, or may be, in compiled code: it has no strides to ask for."""
    return transforming() if compiling() else torch._C._functorch.is_batchedtensor(tensor)


def in_forward_mode() -> bool:
    """Whether derivatives are being taken in forward mode. Compiled code has none."""
    return not compiling() and torch.autograd.forward_ad._current_level >= 0


def function_obstacle() -> str | None:
    """Why the derivatives of an ``autograd.Function`` of ours cannot be had here; None if they can."""
    if in_forward_mode():
        return "it has no forward-mode derivative"
    if compiling() and transforming():  # pytorch/pytorch#193279: gradients are wrong, without a word
        return "torch.compile loses its derivatives inside torch.func"
    return None


def autocasting(device: str) -> bool:
    """Whether autocast is on for a type of device (which is_autocast_available asks, and torch 2.9 cannot compile)."""
    return device != "meta" and torch.is_autocast_enabled(device)


def without_autocast(device: str) -> AbstractContextManager[None]:
    """Keeps what is computed inside from being cast."""
    return torch.autocast(device, enabled=False) if autocasting(device) else nullcontext()
