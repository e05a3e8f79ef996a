"""Calls that run now, on data, are told from others: they can skip PyTorch's dispatcher."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from awconv.ops.tracing import eager, exporting


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **kwargs or {})


class Labelled(Tensor):
    pass


def told(input: Tensor) -> Tensor:
    """Ones where a call is eager, zeros where it is not."""
    return torch.ones_like(input) if eager(input) else torch.zeros_like(input)


def test_plain_tensors_and_parameters_are_run_eagerly() -> None:
    input = torch.randn(3)
    assert eager(input, input.requires_grad_(), nn.Parameter(input), input[1:])
    with torch.no_grad(), torch.autocast("cpu"), torch.inference_mode():
        assert eager(input)


def test_tensors_of_another_kind_are_not() -> None:
    input = torch.randn(3)
    assert not eager(input, input.as_subclass(Labelled))
    with FakeTensorMode() as mode:
        assert not eager(torch.empty(3))
    assert not eager(mode.from_tensor(input))


def test_what_traces_transforms_or_watches_sees_operators() -> None:
    input = torch.randn(3)
    assert torch.equal(torch.compile(told, fullgraph=True, backend="eager")(input), torch.zeros(3))
    assert torch.equal(torch.jit.trace(told, input, check_trace=False)(input), torch.zeros(3))
    assert torch.equal(torch.func.vmap(told)(input), torch.zeros(3))
    assert torch.equal(torch.func.grad(lambda input: (input * told(input)).sum())(input), torch.zeros(3))
    with Watching():
        assert not eager(input)
    assert torch.equal(told(input), torch.ones(3))


class Exported(nn.Module):
    """Ones where it is exported, zeros where it is not."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.ones_like(input) if exporting() else torch.zeros_like(input)


def test_only_an_export_is_one() -> None:
    """torch 2.11 says that it is exporting wherever Dynamo asks it."""
    input, model = torch.randn(3), Exported()
    assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(input), torch.zeros(3))
    for strict in (False, True):
        assert torch.equal(torch.export.export(model, (input,), strict=strict).module()(input), torch.ones(3))
    assert torch.equal(torch.jit.trace(model, input, check_trace=False)(input), torch.ones(3))
    assert torch.equal(model(input), torch.zeros(3))
