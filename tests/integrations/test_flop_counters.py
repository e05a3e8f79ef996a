"""Counters of operations of other libraries: they add to a plain network what the summary says that attention adds."""

from __future__ import annotations

import io
from typing import Any

import pytest
import timm
import torch
from torch import nn

import awconv
from awconv.integrations.flop_counters import count_by_fvcore, ptflops_hooks, thop_ops

SIZE = (3, 32, 32)


def own_branch(spec: awconv.BranchSpec) -> nn.Module:
    out_blocks, in_blocks, *kernel = spec.attention_size
    head = nn.Linear(spec.in_channels, out_blocks * in_blocks * kernel[0] * kernel[1])
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), head, nn.Unflatten(1, spec.attention_size))


def plain() -> nn.Module:
    model: nn.Module = timm.create_model("resnet8_cifar").eval()
    return model


CONVERTED: dict[str, dict[str, Any]] = {
    "the paper's": {},
    "with a gain over input channels": dict(input_gain=True),
    "ODConv": dict(layer="odconv"),
    "a branch of one's own": dict(branch=own_branch),
}
KINDS = pytest.mark.parametrize("kind", CONVERTED)


def converted(kind: str) -> nn.Module:
    return awconv.convert(plain(), **CONVERTED[kind]).eval()


def added(model: nn.Module) -> int:
    operations = awconv.summary(model, torch.zeros(1, *SIZE)).operations_added
    assert operations
    return operations


@KINDS
def test_thop(kind: str) -> None:
    thop = pytest.importorskip("thop", reason="make yolo installs its fork, ultralytics-thop")
    model, images = converted(kind), torch.zeros(1, *SIZE)

    def count(model: nn.Module) -> float:
        total, _ = thop.profile(model, (images,), custom_ops=thop_ops(), verbose=False)
        return float(total)

    assert count(model) - count(plain()) == added(model)


@KINDS
def test_ptflops(kind: str) -> None:
    ptflops = pytest.importorskip("ptflops")

    def count(model: nn.Module, backend: str) -> float:
        total, _ = ptflops.get_model_complexity_info(
            model, SIZE, as_strings=False, print_per_layer_stat=False, backend=backend, ost=io.StringIO(),
            custom_modules_hooks=ptflops_hooks(), backend_specific_config={"count_functional": False},
        )  # fmt: skip
        return float(total)

    model = converted(kind)
    # Without what it calls functional, since it adds the calls inside of a module that it has a rule for.
    assert count(model, "pytorch") - count(plain(), "pytorch") == added(model)
    if kind == "the paper's":  # others multiply the input as well, which is no operator that it knows
        with awconv.use_algorithm("fused"):
            assert count(model, "aten") - count(plain(), "aten") == added(model)


@pytest.mark.parametrize(
    ("library", "analyser"), [("fvcore.nn", "FlopCountAnalysis"), ("mmengine.analysis", "FlopAnalyzer")]
)
def test_fvcore_and_mmengine(library: str, analyser: str) -> None:
    module = pytest.importorskip(library)
    images, model = torch.zeros(1, *SIZE), converted("the paper's")

    def counts(model: nn.Module) -> Any:
        analysis = getattr(module, analyser)(model, (images,)).unsupported_ops_warnings(False)
        return count_by_fvcore(analysis.uncalled_modules_warnings(False))

    before, after = counts(plain()), counts(model)
    norms = after.by_operator()["batch_norm"] - before.by_operator()["batch_norm"]  # of branches; the summary has none
    assert norms > 0
    assert after.total() - before.total() == added(model) + norms
    of_layer = after.by_module()["layer1.0.conv1"]
    assert of_layer > before.by_module()["layer1.0.conv1"]
    model(images)
    exported = torch.jit.trace(model, images)
    assert "awconv::" not in str(exported.inlined_graph)  # a trace that others run has PyTorch's operators as before
