"""The fused algorithm's C code: built anew for other processors, not built at all, and beyond one block of channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from awconv.ops import aw_conv2d, build, functional
from tests.ops.conftest import INSTRUCTIONS
from tests.ops.problems import TYPICAL, Case

# Whole and partial vectors and blocks of channels, tiles of all widths, several phases of a stride, each way to share a
# gain among input channels.
CASES = {
    "two blocks": Case(2, 3, (15, 16), (40, 24, 3, 3), (40, 1, 3, 3), padding=1),
    "a partial vector": Case(2, 2, (9, 29), (17, 5, 3, 3), (17, 1, 3, 3), padding=1),
    "strides": Case(2, 2, (12, 31), (18, 20, 3, 3), (18, 1, 3, 3), stride=(2, 3), padding=(1, 0)),
    "a stride that skips pixels": Case(2, 2, (9, 9), (8, 8, 2, 1), (8, 1, 2, 1), stride=3),
    "padding before in the place of what the stride leaves": Case(
        2, 2, (27, 27), (32, 32, 3, 3), (32, 1, 3, 3), stride=3, padding=1
    ),
    "the same along one of three axes": Case(3, 2, (2, 8, 3), (12, 4, 1, 3, 1), (12, 2, 1, 3, 1), stride=(1, 4, 1)),
    "a stride beyond the padded input": Case(2, 2, (5, 6), (16, 8, 3, 3), (16, 1, 3, 3), stride=9, padding=2),
    "padding beyond what a stride leaves": Case(2, 2, (5, 6), (16, 8, 3, 3), (16, 1, 3, 3), stride=12, padding=4),
    "dilation": Case(2, 2, (13, 12), (16, 16, 3, 3), (16, 1, 3, 3), padding=2, dilation=2, stride=2),
    "padding beyond the kernel": Case(2, 2, (5, 4), (8, 8, 2, 2), (8, 1, 2, 2), padding=3),
    "input channels in blocks": Case(2, 2, (8, 8), (12, 36, 3, 3), (12, 4, 3, 3), padding=1),
    "every input channel": Case(2, 2, (8, 8), (20, 18, 3, 3), (20, 18, 3, 3), padding=1),
    "groups": Case(2, 3, (7, 7), (72, 12, 3, 3), (72, 1, 3, 3), padding=1, groups=3),
    "groups of three channels": Case(2, 2, (9, 9), (36, 3, 3, 3), (36, 1, 3, 3), padding=1, groups=12),
    "a few channels": Case(2, 2, (17, 9), (4, 3, 3, 3), (4, 1, 3, 3), padding=1, stride=2),
    "images of one pixel": Case(2, 3, (1, 1), (20, 24, 1, 1), (20, 1, 1, 1)),
    "depthwise": Case(2, 2, (20, 19), (24, 1, 3, 3), (24, 1, 3, 3), padding=1, groups=24),
    "depthwise, rows shorter than a vector": Case(2, 2, (7, 5), (37, 1, 3, 3), (37, 1, 3, 3), padding=1, groups=37),
    "depthwise, many rows in a vector": Case(2, 1, (9, 1), (16, 1, 3, 1), (16, 1, 3, 1), padding=(1, 0), groups=16),
    "depthwise, strides that leave rows": Case(
        2, 3, (12, 38), (33, 1, 3, 2), (33, 1, 3, 2), stride=(2, 3), padding=(1, 0), groups=33
    ),
    "depthwise, dilation and much padding": Case(
        2, 2, (6, 21), (19, 1, 3, 3), (19, 1, 3, 3), dilation=(3, 2), padding=(5, 4), groups=19
    ),
    "depthwise, one axis": Case(1, 2, (45,), (18, 1, 5), (18, 1, 5), padding=2, groups=18),
    "depthwise, two outputs a channel": Case(
        2, 2, (9, 8), (20, 1, 3, 3), (20, 1, 3, 3), padding=1, groups=10, stride=2
    ),
    "one axis": Case(1, 4, (50,), (33, 8, 5), (33, 1, 5), padding=2, stride=2),
    "three axes": Case(3, 2, (5, 6, 7), (10, 4, 3, 2, 3), (10, 1, 3, 2, 3), padding=1, stride=(1, 2, 2)),
    "more samples than are held at once": Case(2, 40, (16, 16), (8, 24, 3, 3), (8, 1, 3, 3), padding=1),
}


FIRST, LAST = torch.contiguous_format, torch.channels_last
# Of the input, and of the output's gradient: where channels lie last, the C code reads and writes them so.
LAYOUTS = {"channels first": (FIRST, FIRST), "channels last": (LAST, LAST), "mixed": (LAST, FIRST)}


def layouts_of(case: Case) -> dict[str, tuple[torch.memory_format, torch.memory_format]]:
    """Those that differ for it."""
    return LAYOUTS if case.tensors["input"].dim() == 4 else {"channels first": (FIRST, FIRST)}


def results(case: Case, algorithm: str, dtype: torch.dtype, layout: str = "channels first") -> tuple[Tensor, ...]:
    """The output, and the gradients of a fixed sum of it."""
    of_input, of_grad = LAYOUTS[layout]
    tensors = {name: tensor.to(dtype) for name, tensor in case.tensors.items()}
    tensors["input"] = tensors["input"].clone(memory_format=of_input)
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    output = case.run(algorithm, **tensors)
    weights = torch.linspace(-1, 1, output.numel(), dtype=dtype).reshape(output.shape).contiguous(memory_format=of_grad)
    return (output, *torch.autograd.grad((output * weights).sum(), tuple(tensors.values())))


@pytest.mark.parametrize("instructions", INSTRUCTIONS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_definition_with_vectors_of_every_length(instructions: None, dtype: torch.dtype) -> None:
    # Sums of up to 10,000 products of order one, each rounded once: with random signs the roundings add up to some 100
    # of the type's eps, relative to the largest sums.
    tolerance = 100 * torch.finfo(dtype).eps
    for name, case in CASES.items():
        expected = results(case, "naive", torch.float64)
        for layout in layouts_of(case):
            for value, right in zip(results(case, "fused", dtype, layout), expected, strict=True):
                torch.testing.assert_close(
                    value.double(),
                    right,
                    rtol=0,
                    atol=tolerance * float(right.abs().max()),
                    msg=lambda text, name=name, layout=layout: f"{name}, {layout}: {text}",
                )


def test_the_input_says_where_the_channels_lie() -> None:
    """Of the output and the input's gradient, whatever the layout of the output's gradient is."""
    for name, case in CASES.items():
        for layout in layouts_of(case):
            output, grad_input, *_ = results(case, "fused", torch.float32, layout)
            for image in (output, grad_input):
                assert image.is_contiguous(memory_format=LAYOUTS[layout][0]), (name, layout)


def test_the_number_of_threads_does_not_change_a_bit() -> None:
    threads = torch.get_num_threads()
    once = {}
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            once[number] = [
                results(case, "fused", torch.float32, layout) for case in CASES.values() for layout in layouts_of(case)
            ]
    finally:
        torch.set_num_threads(threads)
    for number in (2, 3):
        for alone, together in zip(once[1], once[number], strict=True):
            assert all(torch.equal(first, second) for first, second in zip(alone, together, strict=True))


def _without_compiler(compiler: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(functional, "_remembered_plan", functional._remembered_plan.__wrapped__)
    build.library.cache_clear()


@pytest.mark.parametrize(
    ("compiler", "reason"), [("no-such-compiler", "there is no 'no-such-compiler'"), ("false", "could not be built")]
)
def test_without_a_compiler_other_algorithms_give_the_same(
    compiler: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case = TYPICAL["fused"]
    expected = case.run("fused")
    try:
        _without_compiler(compiler, monkeypatch, tmp_path)
        torch.testing.assert_close(case.run(), expected)
        with pytest.raises(ValueError, match=reason):
            case.run("fused")
    finally:
        monkeypatch.undo()
        build.library.cache_clear()


def test_what_was_built_is_used_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    builds = []
    built = build._build

    def counted(*arguments: Any) -> bytes:
        builds.append(arguments)
        return built(*arguments)

    monkeypatch.setattr(build, "_build", counted)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        build.library.cache_clear()
        TYPICAL["fused"].run("fused")
    build.library.cache_clear()
    assert len(builds) == 1
    assert [file.suffix for file in (tmp_path / "awconv").iterdir()] == [".so"]


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    build.library.cache_clear()
    torch.testing.assert_close(TYPICAL["fused"].run("fused"), TYPICAL["fused"].run("naive"))
    build.library.cache_clear()


def test_a_compiled_graph_sees_one_operator_each_way() -> None:
    names: list[str] = []

    def note(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        names.extend(str(node.target) for node in graph.graph.nodes if "awconv" in str(node.target))
        return graph

    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    input, weight = torch.randn(2, 4, 6, 6), torch.randn(6, 4, 3, 3, requires_grad=True)
    attention = torch.rand(2, 6, 1, 3, 3)
    compiled = torch.compile(aw_conv2d, fullgraph=True, backend=aot_autograd(fw_compiler=note))
    compiled(input, weight, attention, algorithm="fused").sum().backward()
    assert names == ["awconv.fused.default", "awconv.fused_backward.default"]


def test_an_exported_program_can_hold_the_operator_and_be_trained() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(6, 4, 3, 3))

        def forward(self, input: Tensor, attention: Tensor) -> Tensor:
            return aw_conv2d(input, self.weight, attention, algorithm="fused")

    layer, inputs = Layer(), (torch.randn(2, 4, 6, 6), torch.rand(2, 6, 1, 3, 3))
    exported = torch.export.export(layer, inputs)
    assert "awconv.fused.default" in [str(node.target) for node in exported.graph.nodes]
    again = exported.module()
    gradients = [
        torch.autograd.grad(module(*inputs).square().sum(), tuple(module.parameters())) for module in (again, layer)
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("case", TYPICAL.values(), ids=TYPICAL)
def test_an_exported_program_does_not_hold_it_unasked(case: Case) -> None:
    class Layer(torch.nn.Module):
        def forward(self, input: Tensor, weight: Tensor, attention: Tensor) -> Tensor:
            return case.run(input=input, weight=weight, attention=attention)

    inputs = tuple(case.tensors[name] for name in ("input", "weight", "attention"))
    exported = torch.export.export(Layer(), inputs, strict=False)
    assert not [node for node in exported.graph.nodes if "awconv" in str(node.target)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_operators_keep_pytorchs_rules(layout: torch.memory_format) -> None:
    case = TYPICAL["fused"]
    tensors = [case.tensors[name].clone(memory_format=layout).requires_grad_() for name in ("input", "weight")]
    gain = torch.rand(case.batch, 4, 2, 6, dtype=torch.float64, requires_grad=True)
    arguments = (*tensors, gain, [2, 1], [1, 1, 2, 2], [1, 2], 2)
    torch.library.opcheck(torch.ops.awconv.fused, arguments)
