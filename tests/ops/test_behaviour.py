"""The operator beyond its numbers: layouts, dtypes, compilation, export, choice."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from awconv.ops import aw_conv2d, aw_conv3d, fused
from awconv.ops.choose import ALGORITHMS, choose
from awconv.ops.exports import exporting_for
from awconv.ops.fused import cuda
from awconv.ops.problem import describe
from tests.ops.problems import TYPICAL, Case, skip_other_kernels


class Operator(nn.Module):
    """An operator with weights of its own, as torch.compile and torch.export want it."""

    def __init__(self, case: Case, algorithm: str) -> None:
        super().__init__()
        self.case, self.algorithm = case, algorithm
        self.weight = nn.Parameter(case.tensors["weight"].float())
        self.bias = nn.Parameter(case.tensors["bias"].float())

    def forward(self, input: Tensor, attention: Tensor) -> Tensor:
        return aw_conv2d(
            input,
            self.weight,
            attention,
            self.bias,
            **self.case.arguments,
            residual=self.case.residual,
            algorithm=self.algorithm,
        )

    def inputs(self, batch: int) -> tuple[Tensor, Tensor]:
        shapes = (self.case.tensors["input"].shape[1:], self.case.attention_shape)
        return tuple(torch.randn(batch, *shape, requires_grad=True) for shape in shapes)


MODES = [*((name, name) for name in ALGORITHMS), ("auto", "per_tap"), ("auto", "per_sample"), ("auto", "output_gain")]


WITHOUT_KERNELS = "xla"  # a type of device for which the fused algorithm has none


def close(output: Tensor, expected: Tensor) -> None:
    # The same float32 operations in another order or fused: a few roundings on values of order ten.
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-4)


# With symbols for sizes, these take five seconds each to trace.
TRACED = [
    pytest.param(*mode, dynamic, marks=pytest.mark.campaign if dynamic and mode[1] in ("per_tap", "matmul") else ())
    for mode in MODES
    for dynamic in (False, True)
]


@pytest.mark.parametrize(("algorithm", "case", "dynamic"), TRACED)
def test_compiles_as_one_graph_with_its_gradients(algorithm: str, case: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    module = Operator(TYPICAL[case], algorithm)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    inputs = module.inputs(4)
    output, expected = compiled(*inputs), module(*inputs)
    close(output, expected)
    wanted = (*inputs, *module.parameters())
    for gradient, reference in zip(
        torch.autograd.grad(output.square().sum(), wanted),
        torch.autograd.grad(expected.square().sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("algorithm", ["fused", pytest.param("per_tap", marks=pytest.mark.campaign), "per_sample"])
def test_compiles_with_the_default_backend(algorithm: str) -> None:
    torch._dynamo.reset()
    module = Operator(TYPICAL[algorithm], algorithm)
    inputs = module.inputs(4)
    close(torch.compile(module, fullgraph=True)(*inputs), module(*inputs))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("algorithm", "case"), MODES)
def test_exports_with_a_dynamic_batch(algorithm: str, case: str, strict: bool) -> None:
    module = Operator(TYPICAL[case], algorithm)
    batch = torch.export.Dim("batch", max=4096)  # torch 2.9 wants a bound for a convolution with the samples as groups
    example = tuple(tensor.detach() for tensor in module.inputs(4))
    exported = torch.export.export(module, example, dynamic_shapes=({0: batch}, {0: batch}), strict=strict)
    for size in (1, 3, 8):
        inputs = module.inputs(size)
        close(exported.module()(*inputs), module(*inputs))


@pytest.mark.parametrize(
    ("case", "runtime"),
    [("output_gain", None), ("input_gain", None), ("per_tap", "openvino"), ("shifted", None), ("matmul", None)],
)
def test_an_exported_graph_has_constant_weights(case: str, runtime: str | None) -> None:
    module = Operator(TYPICAL[case], "shifted" if case == "shifted" else "auto")
    batch = torch.export.Dim("batch")
    example = tuple(tensor.detach() for tensor in module.inputs(4))
    with exporting_for(runtime):
        exported = torch.export.export(module, example, dynamic_shapes=({0: batch}, {0: batch})).run_decompositions()
    parameters = {
        spec.arg.name for spec in exported.graph_signature.input_specs if spec.kind.name in ("PARAMETER", "BUFFER")
    }

    def placeholders(node: torch.fx.Node) -> set[str]:
        """The inputs of the graph that a node is made of."""
        return {node.name} if node.op == "placeholder" else set().union(*map(placeholders, node.all_input_nodes))

    weights = [
        node.args[1]
        for node in exported.graph.nodes
        if node.op == "call_function" and "convolution" in str(node.target)
    ]
    assert bool(weights) == (case != "matmul")  # which has no convolution left
    for weight in weights:
        assert placeholders(weight) <= parameters


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_channels_last_input_gives_a_channels_last_output(algorithm: str) -> None:
    case = TYPICAL[algorithm]
    output = case.run(algorithm, input=case.tensors["input"].contiguous(memory_format=torch.channels_last))
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, case.run("naive"))
    assert case.run(algorithm).is_contiguous()


def test_channels_last_in_three_dimensions() -> None:
    input = torch.randn(2, 4, 5, 4, 3).contiguous(memory_format=torch.channels_last_3d)
    output = aw_conv3d(input, torch.randn(6, 4, 2, 2, 2), torch.rand(2, 6, 1, 2, 2, 2))
    assert output.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_tensors_need_not_be_contiguous(algorithm: str) -> None:
    case = TYPICAL[algorithm]

    def scattered(tensor: Tensor) -> Tensor:
        wide = torch.zeros(*(2 * size for size in tensor.shape), dtype=tensor.dtype)
        view = wide[(slice(None, None, 2),) * tensor.dim()]
        view.copy_(tensor)
        return view

    output = case.run(algorithm, **{name: scattered(tensor) for name, tensor in case.tensors.items()})
    torch.testing.assert_close(output, case.run("naive"))


@pytest.mark.parametrize("name", ["output_gain", "input_gain", "fused", "per_tap", "per_sample"])
def test_an_empty_batch_gives_an_empty_output_and_zero_gradients(name: str) -> None:
    case = TYPICAL[name]
    weight = case.tensors["weight"].clone().requires_grad_()
    output = case.run(input=case.tensors["input"][:0], attention=case.tensors["attention"][:0], weight=weight)
    assert output.shape == (0, *case.run().shape[1:])
    output.sum().backward()
    assert torch.count_nonzero(weight.grad) == 0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_sample_does_not_see_the_others(algorithm: str) -> None:
    case = TYPICAL[algorithm]
    alone = case.run(algorithm, input=case.tensors["input"][1:2], attention=case.tensors["attention"][1:2])
    torch.testing.assert_close(alone, case.run(algorithm)[1:2])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_autocast_computes_in_its_dtype(algorithm: str, device: str) -> None:
    skip_other_kernels(algorithm, device)
    case = TYPICAL[algorithm]
    tensors = {name: tensor.to(device, torch.float32).requires_grad_() for name, tensor in case.tensors.items()}
    with torch.autocast(device, dtype=torch.bfloat16):
        output = case.run(algorithm, **tensors)
    assert output.dtype == torch.bfloat16
    expected = case.run(algorithm, **{name: tensor.bfloat16() for name, tensor in tensors.items()})
    assert torch.equal(output, expected)
    output.float().sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in tensors.values())


def test_autocast_leaves_float64_alone() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert TYPICAL["per_tap"].run().dtype == torch.float64


def test_autocast_mends_mixed_dtypes() -> None:
    case = TYPICAL["per_tap"]
    mixed = {"input": case.tensors["input"].bfloat16(), "weight": case.tensors["weight"].float()}
    mixed |= {"attention": case.tensors["attention"].half(), "bias": case.tensors["bias"].float()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert case.run(**mixed).dtype == torch.bfloat16


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_functional_transforms_give_gradients_for_each_sample(algorithm: str) -> None:
    case = TYPICAL[algorithm]
    weight = case.tensors["weight"]

    def loss(weight: Tensor, input: Tensor, attention: Tensor) -> Tensor:
        return case.run(algorithm, weight=weight, input=input[None], attention=attention[None]).square().sum()

    data = (case.tensors["input"], case.tensors["attention"])
    together = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weight, *data)
    each = torch.stack([torch.func.grad(loss)(weight, *sample) for sample in zip(*data, strict=True)])
    torch.testing.assert_close(together, each)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("wanted", ["input", "weight", "attention"])
def test_jacobians_agree_with_the_definition(algorithm: str, wanted: str) -> None:
    case = TYPICAL[algorithm]
    rest = {name: tensor for name, tensor in case.tensors.items() if name != wanted}

    def run(value: Tensor, algorithm: str = algorithm) -> Tensor:
        return case.run(algorithm, **rest, **{wanted: value})[0, 0, :2]

    value = case.tensors[wanted]
    expected = torch.autograd.functional.jacobian(lambda value: run(value, "naive"), value)
    torch.testing.assert_close(torch.func.jacrev(run)(value), expected)
    torch.testing.assert_close(torch.autograd.functional.jacobian(run, value, vectorize=True), expected)
    if algorithm not in ("per_tap", "fused"):  # which have no forward-mode derivative
        torch.testing.assert_close(torch.func.jacfwd(run)(value), expected)


@pytest.mark.parametrize("case", TYPICAL.values(), ids=TYPICAL)
def test_forward_mode_derivatives_take_an_algorithm_that_has_them(case: Case) -> None:
    value, direction = case.tensors["input"], torch.randn_like(case.tensors["input"])
    output, change = torch.func.jvp(lambda input: case.run(input=input), (value,), (direction,))
    torch.testing.assert_close(output, case.run("naive"))
    torch.testing.assert_close(change, case.run("naive", input=direction, bias=torch.zeros(4, dtype=torch.float64)))


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name not in ("naive", "shifted", "matmul")])
def test_a_backward_inside_autocast_keeps_the_precision(algorithm: str) -> None:
    # As a convolution does. The others are products of matrices, whose backward autocast reaches.
    case = TYPICAL[algorithm]
    tensors = {name: tensor.float().requires_grad_() for name, tensor in case.tensors.items()}
    loss = case.run(algorithm, **tensors).square().sum()
    expected = torch.autograd.grad(loss, tuple(tensors.values()), retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradients = torch.autograd.grad(loss, tuple(tensors.values()))
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_shapes_are_inferred_on_the_meta_device(algorithm: str) -> None:
    case = TYPICAL[algorithm]
    output = case.run(algorithm, **{name: tensor.to("meta") for name, tensor in case.tensors.items()})
    assert (output.device.type, output.shape) == ("meta", case.run().shape)


@pytest.mark.parametrize("algorithm", ["auto", pytest.param("per_tap", marks=pytest.mark.campaign)])
def test_compiles_with_the_weight_as_an_argument_and_other_kernel_sizes(algorithm: str) -> None:
    # Small kernels: with every size symbolic, tracing the taps takes seconds each.
    torch._dynamo.reset()
    compiled = torch.compile(aw_conv2d, fullgraph=True, dynamic=True, backend="aot_eager")
    for kernel in (1, 2):
        tensors = (torch.randn(2, 4, 9, 8), torch.randn(6, 4, kernel, kernel), torch.rand(2, 6, 1, kernel, kernel))
        close(compiled(*tensors, padding=1, algorithm=algorithm), aw_conv2d(*tensors, padding=1))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_stands_in_an_algorithms_way_is_said_where_sizes_are_symbols(dtype: torch.dtype, dynamic: bool) -> None:
    def obstacles(input: Tensor, weight: Tensor, attention: Tensor, padding: int, groups: int) -> tuple[Tensor, Any]:
        problem = describe(2, input, weight, attention, None, 1, padding, 1, groups, True)
        said = [algorithm.obstacle(problem) for algorithm in ALGORITHMS.values()]
        return input + 1, [*said, cuda.obstacle(problem)]

    torch._dynamo.reset()
    compiled = torch.compile(obstacles, fullgraph=True, dynamic=dynamic, backend="eager")
    for size, attention, padding in ((8, (3, 1, 3, 3), 1), (80, (6, 2, 3, 3), 2000)):
        shapes = ((2, 4, size, size), (6, 2, 3, 3), (2, *attention))
        tensors = [torch.zeros(shape, dtype=dtype) for shape in shapes]
        expected, traced = (function(*tensors, padding, 2)[1] for function in (obstacles, compiled))
        for obstacle, with_numbers in zip(traced, expected, strict=True):
            if obstacle is None:  # of a symbol, a limit is not known to be passed
                assert with_numbers is None or dynamic
            else:
                assert re.fullmatch(re.escape(obstacle).replace("…", r"[\d,]+"), with_numbers)


def test_taps_in_several_chunks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = TYPICAL["per_tap"]
    tensors = {name: tensor.clone().requires_grad_() for name, tensor in case.tensors.items()}

    def results() -> tuple[Tensor, ...]:
        output = case.run("per_tap", **tensors)
        return (output, *torch.autograd.grad(output.square().sum(), tuple(tensors.values())))

    at_once = results()
    for elements in (1, 4 * output_and_input_of_a_tap(case)):
        monkeypatch.setattr("awconv.ops.per_tap._CHUNK_ELEMENTS", elements)
        torch.testing.assert_close(results(), at_once)


def output_and_input_of_a_tap(case: Case) -> int:
    output = case.run()
    return output.numel() // output.shape[1] * (output.shape[1] + case.tensors["input"].shape[1])


class _LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_per_tap_never_holds_weights_for_every_sample() -> None:
    batch, channels, size = 16, 64, 4
    input = torch.randn(batch, channels, size, size, requires_grad=True)
    weight = torch.randn(channels, channels, 3, 3, requires_grad=True)
    attention = torch.rand(batch, channels, 1, 3, 3, requires_grad=True)
    largest = {}
    for algorithm in ("per_tap", "per_sample"):
        with _LargestTensor() as mode:
            aw_conv2d(input, weight, attention, padding=1, algorithm=algorithm).sum().backward()
        largest[algorithm] = mode.elements
    assert largest["per_sample"] >= batch * weight.numel()
    assert largest["per_tap"] < batch * weight.numel() / 2


@pytest.mark.parametrize(
    ("attention", "groups", "chosen", "size"),
    [
        *(
            case
            for size in (2, 28, 56)
            for case in (
                ((1, 1, 1, 1), 1, "output_gain", size),
                ((64, 1, 1, 1), 1, "output_gain", size),
                ((16, 1, 1, 1), 1, "output_gain", size),
                ((64, 1, 1, 1), 64, "output_gain", size),
                ((1, 64, 1, 1), 1, "input_gain", size),
                ((64, 64, 3, 3), 1, "per_sample", size),
                ((64, 64, 1, 1), 1, "per_sample", size),
                ((64, 1, 3, 3), 64, "per_sample", size),  # depthwise: a sample's weights are small
            )
        ),
        ((64, 1, 3, 3), 1, "per_tap", 2),
        ((1, 1, 3, 3), 1, "per_tap", 2),
    ],
)
def test_the_choice_follows_the_structure_of_the_attention(
    attention: tuple[int, ...], groups: int, chosen: str, size: int
) -> None:
    # per_tap where a layer is so small that constant weights pay, gains at every size.
    problem = describe(
        2,
        torch.empty(8, 64, size, size),
        torch.empty(64, 64 // groups, 3, 3),
        torch.empty(8, attention[0], min(attention[1], 64 // groups), *attention[2:]),
        None,
        1,
        1,
        1,
        groups,
        True,
    )
    assert choose(replace(problem, device=WITHOUT_KERNELS), "auto", "").name == chosen
    small = groups == 64 and size == 2  # to set up a channel takes longer than its 4 pixels
    if chosen.startswith("per_") and not small and fused.ALGORITHM.obstacle(problem) is None:
        assert choose(problem, "auto", "").name == "fused"


def test_a_small_depthwise_convolution_is_fused_where_no_gradient_may_follow() -> None:
    def chosen(**options: bool) -> str:
        shapes = ((2, 64, 7, 7), (64, 1, 3, 3), (2, 64, 1, 3, 3))
        tensors = (torch.empty(shape, **options) for shape in shapes)
        return choose(describe(2, *tensors, None, 1, 1, 1, 64, True), "auto", "").name

    assert chosen() == "fused"
    assert chosen(requires_grad=True) == "per_sample"
    with torch.no_grad():
        assert chosen(requires_grad=True) == "fused"


def test_the_choice_weighs_the_cost() -> None:
    def chosen(channels: int, size: int) -> str:
        shapes = ((8, channels, size, size), (channels, channels, 3, 3), (8, channels, 1, 3, 3))
        problem = describe(2, *map(torch.empty, shapes), None, 1, 1, 1, 1, True)
        return choose(replace(problem, device=WITHOUT_KERNELS), "auto", "").name

    assert chosen(channels=512, size=7) == "per_tap"
    assert chosen(channels=64, size=56) == "per_sample"
