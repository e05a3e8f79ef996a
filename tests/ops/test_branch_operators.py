"""The branch's kernels in compiled graphs, by Triton's interpreter."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

from tests.ops.test_branch import CASES, Case, assert_close, buffers, by_modules, exact, gradients, parameters

pytest.importorskip("triton")
from awconv.ops.branch_operators import attend_compiled


def compiled(case: Case, modules: nn.Sequential, pooled: Tensor, dynamic: bool | None = None) -> Tensor:
    torch._dynamo.reset()

    def run(pooled: Tensor) -> Tensor:
        attention = attend_compiled(tuple(modules), pooled, case.size, *case.start)
        assert attention is not None
        return attention

    return torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)(pooled)


@pytest.mark.parametrize("name", ["a tile", "several parts", "one axis"])
def test_training_equals_the_modules_in_double_precision(name: str, device: str) -> None:
    case = CASES[name]
    modules, pooled = case.modules(device), case.pooled(device)
    reference = exact(modules)
    expected = gradients(case, reference, pooled.cpu().double(), by_modules)
    found = gradients(case, modules, pooled, compiled)
    assert_close(found, expected, 2e-5)  # some dozen roundings of float32, divided by deviations of a few rows
    assert_close(buffers(modules), buffers(reference), 1e-6)
    assert found[1].stride() == pooled.stride()


def test_inference_equals_the_modules_in_double_precision(device: str) -> None:
    case = CASES["partial tiles"]
    modules, pooled = case.modules(device, training=False), case.pooled(device)
    before = copy.deepcopy(buffers(modules))
    with torch.no_grad():
        expected = by_modules(case, exact(modules), pooled.cpu().double())
        assert_close([compiled(case, modules, pooled)], [expected], 2e-5)
    assert all(map(torch.equal, buffers(modules), before))


def test_a_graph_takes_batches_of_any_size(device: str) -> None:
    case = CASES["a tile"]
    modules = case.modules(device)
    reference = exact(modules)
    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounter()
    run = torch.compile(
        lambda pooled: attend_compiled(tuple(modules), pooled, case.size, *case.start),
        fullgraph=True,
        backend=frames,
        dynamic=True,
    )
    for samples in (5, 9, 6):
        pooled = case._replace(samples=samples).pooled(device)
        assert_close([run(pooled)], [by_modules(case, reference, pooled.cpu().double())], 2e-5)
    assert frames.frame_count == 1
    assert_close(buffers(modules), buffers(reference), 1e-6)


def test_what_a_gradient_follows_from_running_statistics_is_left_to_the_modules(device: str) -> None:
    case = CASES["a tile"]
    modules, pooled = case.modules(device, training=False), case.pooled(device)
    assert attend_compiled(tuple(modules), pooled, case.size, *case.start) is None
    modules[1].momentum = None
    with torch.no_grad():
        assert attend_compiled(tuple(modules.train()), pooled, case.size, *case.start) is None


@pytest.mark.parametrize("training", [True, False])
def test_the_operators_keep_pytorchs_rules(training: bool, device: str) -> None:
    case = CASES["a tile"]
    modules, pooled = case.modules(device), case.pooled(device).requires_grad_(training)
    form = (1e-5, 1e-3, "tanh", list(case.size), torch.float32, *case.start)
    if training:
        torch.library.opcheck(torch.ops.awconv.branch, (pooled, *parameters(modules), *form))
    else:
        statistics = (modules[1].running_mean, modules[1].running_var, modules[4].running_mean, modules[4].running_var)
        arguments = [tensor.detach() for tensor in (pooled, *parameters(modules), *statistics)]
        torch.library.opcheck(torch.ops.awconv.branch_inference, (*arguments, *form))


def test_a_gradient_has_the_strides_that_the_graph_expects(device: str) -> None:
    case = CASES["a tile"]
    modules, pooled = case.modules(device), case.pooled(device).contiguous().transpose(2, 3).requires_grad_()
    form = (1e-5, 1e-3, "tanh", list(case.size), torch.float32, *case.start)
    torch.library.opcheck(torch.ops.awconv.branch, (pooled, *parameters(modules), *form))
