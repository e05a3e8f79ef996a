"""A layer's step in one node of autograd: by Triton's interpreter on a CPU, and on a GPU if there is one."""

from __future__ import annotations

import copy
import gc
import importlib
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from awconv import AWConv2d, use_algorithm
from awconv.bench.timing import graphed
from awconv.ops import average_pool, fused
from awconv.ops import layer as whole
from awconv.ops.branch import Branch, Train
from awconv.ops.fused import cuda, cuda_plans, tiles
from awconv.ops.gpu import compiling_side_by_side, empty_like_image
from awconv.ops.layer import run_layer
from awconv.ops.problem import describe


class Case(NamedTuple):
    layer: dict[str, Any]
    samples: int = 2
    size: tuple[int, int] = (5, 6)
    channels_last: bool = True
    identity: bool = False

    def make(self, device: str) -> tuple[AWConv2d, Tensor]:
        """The layer and an input."""
        torch.manual_seed(0)
        arguments = dict(in_channels=16, out_channels=16, kernel_size=3, padding=1, bias=False) | self.layer
        layer, format = AWConv2d(**arguments), torch.channels_last if self.channels_last else torch.contiguous_format
        if self.identity:
            layer.attention.start_as_identity()
        for norm in (layer.attention.norm1, layer.attention.norm2):
            for tensor, low, high in (
                (norm.weight, -1.0, 2.0),
                (norm.bias, -0.5, 0.5),
                (norm.running_mean, -0.5, 0.5),
                (norm.running_var, 0.5, 2.0),
            ):
                nn.init.uniform_(tensor, low, high)
        image = torch.randn(self.samples, layer.in_channels, *self.size).to(memory_format=format)
        return layer.to(device, memory_format=format), image.to(device)


CASES = {
    "a tile": Case({}),
    "channels first": Case(dict(out_channels=24), channels_last=False),
    "a stride": Case(dict(stride=2, padding="valid")),
    "a stride that skips pixels": Case(dict(stride=3, kernel_size=2, padding=0), size=(7, 8)),
    "a hidden width of no multiple of four": Case(dict(in_channels=20, out_channels=20, reduction=4)),
    "groups": Case(dict(in_channels=32, out_channels=32, groups=2)),
    "dilation": Case(dict(dilation=2, padding=2)),
    "the gain in parts": Case(dict(in_channels=80, kernel_size=(1, 2), padding=0), size=(3, 4)),
    "one tap": Case(dict(kernel_size=1, padding=0), samples=5, size=(3, 3)),
    "one position": Case(dict(padding=0), samples=3, size=(3, 3)),
    "relative to the start": Case({}, identity=True),
    "without the residual form": Case(dict(residual=False, activation="tanh")),
    "relative, without the residual form": Case(dict(residual=False, activation="relu"), identity=True),
}


ON_GPU = ("a tile", "a stride")


@pytest.fixture(autouse=True)
def known() -> None:
    """A test may change what a plan is made by."""
    whole._KNOWN.clear()


@pytest.fixture
def device(triton_device: str) -> str:
    return triton_device


def run(layer: AWConv2d, image: Tensor) -> Tensor | None:
    """The layer in one node; None where it is not run so."""
    branch = layer.attention
    convolution = (layer.stride, layer.padding, layer.dilation, layer.groups, layer.residual or branch.relative)
    with use_algorithm("fused"):
        return run_layer(
            image,
            layer._parameters.get("weight"),
            branch,
            branch.modules_in_turn(),
            branch.attention_size,
            branch.relation(),
            convolution,
        )


@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize("name", ["a tile", "a stride", "the gain in parts", "relative to the start"])
def test_inference_equals_that_of_the_modules_in_double_precision(name: str, samples: int, device: str) -> None:
    layer, image = CASES[name]._replace(samples=samples).make(device)
    before = copy.deepcopy(dict(layer.named_buffers()))
    reference = exact(layer).eval()
    with torch.inference_mode():
        output = run(layer.eval(), image)
        expected = reference(image.cpu().double())
    assert output is not None
    assert output.stride() == layer(image).stride()
    torch.testing.assert_close(output.cpu().double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert all(torch.equal(value, before[key]) for key, value in layer.named_buffers())


def test_a_sample_of_any_batch_gets_the_same_bits(device: str) -> None:
    layer, image = CASES["a tile"]._replace(samples=70).make(device)
    with torch.no_grad():
        together = run(layer.eval(), image)
        assert together is not None
        for index in (0, 33, 69):
            assert torch.equal(run(layer, image[index : index + 1]), together[index : index + 1])


def test_saved_tensors_may_lose_their_strides(device: str) -> None:
    layer, image = CASES["a tile"].make(device)
    expected = step(exact(layer), image.cpu().double(), AWConv2d.forward)

    def pack(tensor: Tensor) -> Tensor:  # as save_on_cpu does with pinned memory
        return torch.empty(tensor.size(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        found = step(layer, image, run)
    for key, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(found[key].cpu().to(value.dtype), value, rtol=0, atol=2e-5 * scale, msg=key)
    assert found["image"].stride() == image.stride()


def test_gradients_that_have_gradients_where_a_layer_is_applied_twice(device: str) -> None:
    layer, image = CASES["a tile"].make(device)
    image.requires_grad_()
    inputs = [image, *layer.parameters()]
    expected = torch.autograd.grad(run(layer, run(layer, image)).square().sum(), inputs)
    found = torch.autograd.grad(run(layer, run(layer, image)).square().sum(), inputs, create_graph=True)
    for index, (value, reference) in enumerate(zip(found, expected, strict=True)):
        atol = 1e-4 * float(reference.abs().max())
        torch.testing.assert_close(value, reference, rtol=0, atol=atol, msg=str(index))


def test_tensors_may_be_swapped_after_a_step() -> None:
    layer, image = CASES["a tile"].make("cpu")
    with torch.no_grad():
        assert run(layer, image) is not None
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert layer.weight.dtype == torch.float64


def test_a_compilation_that_fails_leaves_others_alone() -> None:
    mode = importlib.import_module("triton.runtime._async_compile").active_mode

    def fail() -> None:
        raise OSError("no space")

    for _ in range(2):
        with pytest.raises(OSError, match="no space"), compiling_side_by_side():
            mode.get().submit("kernel", fail, lambda kernel: None)
        assert mode.get() is None


def exact(layer: AWConv2d) -> AWConv2d:
    return copy.deepcopy(layer).cpu().double()


def step(layer: AWConv2d, image: Tensor, run: Callable[[AWConv2d, Tensor], Tensor | None]) -> dict[str, Tensor | None]:
    """The output, its gradients for a fixed gradient of it, and the buffers then."""
    image = image.detach().requires_grad_()
    output = run(layer, image)
    assert output is not None
    above = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape)
    output.backward(above.to(output.device, output.dtype))
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return dict(output=output.detach(), image=image.grad, **grads, **dict(layer.named_buffers()))


def assert_close(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    """Relative to the largest number of each."""
    for name, reference in expected.items():
        if reference is None:
            assert found[name] is None, name
            continue
        scale = max(float(reference.double().abs().max()), 1e-3)
        message = f"{name}: {{}}"
        torch.testing.assert_close(
            found[name].double().cpu(),
            reference.double().cpu(),
            rtol=0,
            atol=tolerance * scale,
            msg=message.format,
        )


@pytest.mark.parametrize("name", CASES)
def test_a_step_equals_that_of_the_parts_in_double_precision(name: str, device: str) -> None:
    if device == "cuda" and name not in ON_GPU:
        pytest.skip("a case takes a dozen kernels, which are compiled")
    layer, image = CASES[name].make(device)
    expected = step(exact(layer), image.cpu().double(), AWConv2d.__call__)
    found = step(layer, image, run)
    assert_close(found, expected, 5e-5)
    assert found["output"].is_contiguous(memory_format=torch.channels_last) or not CASES[name].channels_last
    assert found["image"].stride() == image.stride()
    assert found["weight"].stride() == layer.weight.stride()


@pytest.mark.parametrize("samples", [1, 3, 5])
@pytest.mark.parametrize("name", ["a tile", "a stride", "groups", "dilation"])
def test_tiles_of_several_samples(name: str, samples: int, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    if device == "cuda":
        pytest.skip("the plans for a GPU are remembered")

    def correlate(rows: int, inner: int, *rest: int) -> tiles.Tile:
        sizes = dict(tile_rows=16, tile_pixels=64, tile_inner=16)
        return tiles.Tile("scaled_sums", sizes, 4, 3)

    monkeypatch.setattr(tiles, "correlate", correlate)
    for planned in (cuda_plans.forward, cuda_plans.grad_input):
        monkeypatch.setattr(cuda_plans, planned.__name__, planned.__wrapped__)
    layer, image = CASES[name]._replace(samples=samples).make(device)
    expected = step(exact(layer), image.cpu().double(), AWConv2d.__call__)
    assert_close(step(layer, image, run), expected, 5e-5)


@pytest.mark.parametrize(
    "frozen",
    [["weight"], ["image"], ["image", "weight"], ["attention"], ["attention.norm2.bias", "attention.conv1.weight"]],
)
def test_only_what_requires_a_gradient_gets_one(frozen: list[str], device: str) -> None:
    layer, image = CASES["a tile"].make(device)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(not any(name.startswith(prefix) for prefix in frozen))
    reference, results = exact(layer), []
    for made, input, through in ((layer, image, run), (reference, image.cpu().double(), AWConv2d.__call__)):
        input = input.detach().requires_grad_("image" not in frozen)
        through(made, input).square().sum().backward()
        results.append(dict(image=input.grad, **{key: value.grad for key, value in made.named_parameters()}))
    assert_close(*results, 5e-5)


def test_only_the_weight(device: str) -> None:
    layer, image = CASES["a tile"].make(device)
    layer.attention.requires_grad_(False)
    reference = exact(layer)
    run(layer, image).square().sum().backward()
    reference(image.cpu().double()).square().sum().backward()
    assert_close(dict(weight=layer.weight.grad), dict(weight=reference.weight.grad), 5e-5)
    assert not run(layer.requires_grad_(False), image).requires_grad


def test_without_gradients_statistics_are_gathered_too(device: str) -> None:
    layer, image = CASES["a tile"].make(device)
    reference = exact(layer)
    with torch.no_grad():
        found, expected = run(layer, image), reference(image.cpu().double())
    assert not found.requires_grad
    assert_close(dict(layer.named_buffers(), output=found), dict(reference.named_buffers(), output=expected), 1e-5)


def test_the_same_bits_twice(device: str) -> None:
    layer, image = CASES["a stride"].make(device)
    first, second = (step(copy.deepcopy(layer), image, run) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def second_derivatives(layer: AWConv2d, image: Tensor, run: Callable[[AWConv2d, Tensor], Any]) -> dict[str, Tensor]:
    image = image.detach().requires_grad_()
    inputs = [image, *layer.parameters()]
    firsts = torch.autograd.grad(run(layer, image).square().sum(), inputs, create_graph=True)
    penalty = sum(first.square().sum() for first in firsts)
    found = [*(first.detach() for first in firsts), *torch.autograd.grad(penalty, inputs)]
    return {str(index): value for index, value in enumerate(found)}


@pytest.mark.parametrize("name", ["a tile", "relative, without the residual form"])
def test_second_derivatives(name: str, device: str) -> None:
    layer, image = CASES[name].make(device)
    expected = second_derivatives(exact(layer), image.cpu().double(), AWConv2d.__call__)
    assert_close(second_derivatives(layer, image, run), expected, 5e-4)


def test_a_backward_that_is_vectorised() -> None:
    layer, image = CASES["a tile"].make("cpu")  # on a GPU, PyTorch's own BatchNorm has none
    image.requires_grad_()
    inputs = [image, *layer.parameters()]
    output = run(layer, image)
    above = torch.randn(2, *output.shape)
    together = torch.autograd.grad(output, inputs, above, is_grads_batched=True, retain_graph=True)
    alone = [torch.autograd.grad(output, inputs, grad, retain_graph=True) for grad in above]
    expected = {str(index): torch.stack(grads) for index, grads in enumerate(zip(*alone, strict=True))}
    assert_close({str(index): value for index, value in enumerate(together)}, expected, 1e-4)


def test_saved_tensors_may_be_packed(device: str) -> None:
    layer, image = CASES["a tile"].make(device)
    expected = step(copy.deepcopy(layer), image, run)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor.clone()):
        found = step(layer, image, run)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_two_layers_may_share_a_branch(device: str) -> None:
    layer, image = CASES["a tile"].make(device)
    other = CASES["a stride"].make(device)[0]
    other.attention = layer.attention
    references = copy.deepcopy([layer, other])
    references = [made.cpu().double() for made in references]
    results = []
    for pair, input, through in (
        ((layer, other), image, run),
        (references, image.cpu().double(), AWConv2d.__call__),
    ):
        (through(pair[0], input).square().sum() + through(pair[1], input).square().sum()).backward()
        results.append({name: value.grad for name, value in pair[0].named_parameters()} | dict(pair[0].named_buffers()))
    assert_close(*results, 5e-5)


def _hook(*arguments: object) -> None: ...


def _set_data(parameter: nn.Parameter, change: Callable[[Tensor], Tensor]) -> None:
    parameter.data = change(parameter.data.flatten(1)).reshape_as(parameter)


UNUSUAL: dict[str, Callable[[AWConv2d], object]] = {
    "a hook": lambda layer: layer.attention.act1.register_forward_hook(_hook),
    "a hook of the branch": lambda layer: layer.attention.register_forward_hook(_hook),
    "a hook before": lambda layer: layer.attention.norm1.register_forward_pre_hook(_hook),
    "a hook of the backward": lambda layer: layer.attention.register_full_backward_hook(_hook),
    "another forward": lambda layer: setattr(layer.attention, "forward", _hook),
    "another norm": lambda layer: setattr(layer.attention, "norm1", nn.GroupNorm(1, 4)),
    "a norm without statistics": lambda layer: setattr(
        layer.attention, "norm2", nn.BatchNorm2d(16, track_running_stats=False)
    ),
    "a norm that averages all batches": lambda layer: setattr(layer.attention.norm2, "momentum", None),
    "a norm that is frozen": lambda layer: layer.attention.norm1.eval(),
    "inference": lambda layer: layer.eval(),
    "a weight that is parametrised": lambda layer: nn.utils.parametrizations.weight_norm(layer),
    "another activation": lambda layer: setattr(layer.attention, "act2", nn.Softplus()),
    "another class of activation": lambda layer: setattr(layer.attention.act2, "__class__", nn.Hardsigmoid),
    "a bias": lambda layer: setattr(layer.attention.conv2, "bias", nn.Parameter(torch.ones(16))),
    "a stride": lambda layer: setattr(layer.attention.conv1, "stride", (2, 2)),
    "statistics that are not tracked": lambda layer: setattr(layer.attention.norm1, "track_running_stats", False),
    "no statistics": lambda layer: setattr(layer.attention.norm1, "running_mean", None),
    "no weight": lambda layer: setattr(layer.attention.norm2, "weight", None),
    "double precision": lambda layer: layer.attention.double(),
    "double precision of a tensor": lambda layer: _set_data(layer.attention.conv2.weight, Tensor.double),
    "strides": lambda layer: _set_data(layer.attention.conv2.weight, lambda data: data.t().contiguous().t()),
    "a name less": lambda layer: delattr(layer.attention.norm2, "num_batches_tracked"),
    "a bias that is no parameter": lambda layer: (
        delattr(layer.attention.conv1, "bias") or setattr(layer.attention.conv1, "bias", torch.ones(4))
    ),
    "a tensor of another kind": lambda layer: setattr(
        layer.attention.conv1, "weight", nn.Parameter(layer.attention.conv1.weight.detach().as_subclass(_Kind))
    ),
}


class _Kind(Tensor):
    pass


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_layers_run_part_by_part(name: str) -> None:
    layer, image = CASES["a tile"].make("cpu")
    assert run(layer, image) is not None
    UNUSUAL[name](layer)
    assert run(layer, image) is None


@pytest.mark.parametrize(
    "arguments",
    [
        dict(out_expansion=2),
        dict(in_expansion=1, in_channels=16),
        dict(kernel_expansion=3),
        dict(groups=16),
        dict(padding=6),
        dict(in_channels=8),
    ],
)
def test_layers_that_are_not_run_so(arguments: dict[str, Any]) -> None:
    layer, image = Case(arguments).make("cpu")
    try:
        found = run(layer, image)
    except ValueError as error:
        assert "cannot run this problem" in str(error)  # noqa: PT017 (fused was asked for)
        return
    assert found is None


def test_inputs_that_are_not_run_so() -> None:
    layer, image = CASES["a tile"].make("cpu")
    assert run(layer, image[0]) is None
    assert run(layer, image[:1, :, :1, :1]) is not None  # nine rows
    assert run(layer, image[:, :, ::2]) is None
    assert run(layer, image[:, :8]) is None
    assert run(layer, image.double()) is None
    assert run(layer, image[:0]) is None
    one, single = CASES["one tap"].make("cpu")
    assert run(one, single[:1]) is None  # no statistics
    with torch.autograd.forward_ad.dual_level():
        assert run(layer, image) is None
    seen = []
    torch.func.vmap(lambda value: seen.append(run(layer, value[None])) or value)(image)
    assert seen == [None]


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer.attention.norm1, "eps", 0.3),
        lambda layer: setattr(layer.attention.norm2, "momentum", 0),
        lambda layer: setattr(layer, "stride", (2, 2)),
        lambda layer: setattr(layer.attention.norm1, "weight", nn.Parameter(torch.ones(4))),
        lambda layer: setattr(layer.attention.conv2.weight, "data", layer.attention.conv2.weight.data * 2),
        lambda layer: (
            setattr(layer.attention, "conv1", nn.Conv2d(16, 7, 1, bias=False))
            or setattr(layer.attention, "norm1", nn.BatchNorm2d(7))
            or setattr(layer.attention, "conv2", nn.Conv2d(7, 16, 1, bias=False))
        ),
        lambda layer: setattr(layer.attention, "act2", nn.Tanh()),
        lambda layer: layer.attention.start_as_identity() or nn.init.ones_(layer.attention.norm2.weight),
        lambda layer: layer.load_state_dict({name: value * 1.5 for name, value in layer.state_dict().items()}),
    ],
)
def test_what_changes_between_two_steps(change: Callable[[AWConv2d], object]) -> None:
    layer, image = CASES["a tile"].make("cpu")
    run(layer, image)
    change(layer)
    expected = step(exact(layer), image.double(), AWConv2d.__call__)
    assert_close(step(layer, image, run), expected, 5e-5)


def test_plans_are_remembered_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, image = CASES["a tile"].make("cpu")
    made: list[whole.Plan] = []
    plan = whole._plan
    monkeypatch.setattr(whole, "_plan", lambda *arguments: made.append(plan(*arguments)) or made[-1])
    monkeypatch.setattr(whole, "_CALLS", 2)
    for samples in (2, 2, 1, 1, 2):
        run(layer, image[:samples])
    assert len(made) == 2
    for stride in (2, 3):
        layer.stride = (stride, stride)
        run(layer, image)
    assert len(made) == 4
    assert len(whole._KNOWN) == 2
    layer.attention.conv1.weight = nn.Parameter(layer.attention.conv1.weight.detach() * 2)
    layer.attention.norm1 = copy.deepcopy(layer.attention.norm1)
    run(layer, image)
    run(pickle.loads(pickle.dumps(layer)), image)
    layer.stride = [3, 3]
    assert run(layer, image) is None
    layer.stride = (3, 3)
    assert len(made) == 4
    layer.attention.norm2.weight.register_hook(lambda grad, layer=layer: grad)
    run(layer, image)
    watched = weakref.ref(layer.attention.conv1)
    del layer
    gc.collect()
    assert watched() is None


@pytest.mark.parametrize("public", [False, True])
def test_calls_that_only_tensors_tell_apart(public: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if public:  # a PyTorch without what tells them apart in C++
        monkeypatch.setattr(whole, "TensorGuards", None)
    layer, image = CASES["a tile"].make("cpu")
    made: list[whole.Plan] = []
    plan = whole._plan
    monkeypatch.setattr(whole, "_plan", lambda *arguments: made.append(plan(*arguments)) or made[-1])
    monkeypatch.setattr(whole, "_ALIKE", 2)
    inputs = (image, image.contiguous(), image.detach().requires_grad_())
    for turn, plans in ((0, 1), (1, 2), (0, 2), (2, 3), (2, 3), (1, 3), (0, 4), (2, 4)):
        run(layer, inputs[turn])
        assert len(made) == plans
    assert [len(calls) for calls in whole._KNOWN.values()] == [2]


class Pointwise(nn.Module):
    """A convolution of somebody's own, with the tensors of PyTorch's."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight = conv.weight
        self.register_parameter("bias", None)


class Normed(nn.BatchNorm2d):
    """A norm that keeps its numbers elsewhere."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm.num_features)
        del self.eps, self.momentum


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "own"), [("conv1", Pointwise), ("conv2", Pointwise), ("norm1", Normed)])
def test_modules_of_ones_own_run_part_by_part(name: str, own: Callable[..., nn.Module], training: bool) -> None:
    layer, image = CASES["a tile"].make("cpu")
    setattr(layer.attention, name, own(getattr(layer.attention, name)))
    with torch.no_grad():
        assert run(layer.train(training), image) is None


def test_a_tensor_that_a_branch_has_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, image = CASES["a tile"].make("cpu")
    layer.attention.norm1.num_batches_tracked = layer.attention.norm2.num_batches_tracked
    made: list[whole.Plan] = []
    plan = whole._plan
    monkeypatch.setattr(whole, "_plan", lambda *arguments: made.append(plan(*arguments)) or made[-1])
    for _ in range(3):
        assert run(layer, image) is not None
    assert len(made) == 1


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


FEW = ("channels first", "a stride", "the gain in parts")


@pytest.mark.parametrize(
    ("name", "low"),
    [
        *((name, "float32") for name in CASES),
        *((name, low) for name in FEW for low in ("float16", "autocast", "wide gains")),
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
    monkeypatch.setattr(fused, "_laid_out", empty_like_image)
    monkeypatch.setattr(
        average_pool, "_resized", lambda input, size: empty_like_image((*input.shape[:2], *size), input)
    )
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
