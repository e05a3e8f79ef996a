"""The attention branch's kernels for GPUs: by Triton's interpreter on a CPU, and on a GPU if there is one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from awconv import branch as attention_branch
from awconv.bench.timing import graphed
from awconv.branch import AttentionBranch
from awconv.ops import branch, branch_launches
from awconv.ops.branch import Branch, Train, infer
from tests.ops.conftest import interpreter_obstacle

pytest.importorskip("triton")
if not torch.cuda.is_available() and (obstacle := interpreter_obstacle()):
    pytest.skip(obstacle, allow_module_level=True)

KINDS = {1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d)}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    return request.param


class Case(NamedTuple):
    samples: int
    channels: int
    hidden: int
    size: tuple[int, ...]  # of one sample's attention
    activation: type[nn.Module] = nn.Sigmoid
    start: tuple[float, float] = (0.0, 1.0)  # the constant to which the attention is relative, and the gain there

    def modules(self, device: str, training: bool = True) -> nn.Sequential:
        conv, norm = KINDS[len(self.size) - 2]
        columns = self.size[0] * self.size[1]
        first = [conv(self.channels, self.hidden, 1, bias=False), norm(self.hidden), nn.ReLU(inplace=True)]
        second = [conv(self.hidden, columns, 1, bias=False), norm(columns, momentum=0.3, eps=1e-3), self.activation()]
        modules = nn.Sequential(*first, *second)
        for module in (modules[1], modules[4]):
            for tensor, low, high in (
                (module.weight, -1.0, 2.0),
                (module.bias, -0.5, 0.5),
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2.0),
            ):
                nn.init.uniform_(tensor, low, high)
        return modules.to(device).train(training)

    def pooled(self, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
        pooled = torch.randn(self.samples, self.channels, *self.size[2:]).to(device, dtype)
        return pooled.contiguous(memory_format=torch.channels_last) if pooled.dim() == 4 else pooled


# Sizes on both sides of tiles: of 16 to 64 channels and columns, 32 or 64 rows.
CASES = {
    "a tile": Case(7, 16, 4, (16, 1, 3, 3), nn.Sigmoid, (0.5, 1.5)),
    "partial tiles": Case(7, 20, 5, (24, 1, 3, 3), nn.Tanh, (0.5, 0.5)),
    "several parts": Case(40, 20, 5, (24, 1, 3, 3), nn.ReLU, (1.0, 2.0)),
    "several tiles of columns": Case(7, 16, 16, (144, 1, 1, 3)),
    "several tiles of channels": Case(2, 130, 33, (8, 2, 3, 3), nn.Tanh),
    "shares of several tiles": Case(5, 16, 5, (530, 1, 1, 1)),
    "one sample": Case(1, 16, 4, (16, 1, 3, 3)),
    "three rows": Case(3, 16, 4, (16, 1, 1, 1)),
    "one axis": Case(7, 20, 4, (64, 1, 3)),
    "three axes": Case(2, 16, 4, (4, 4, 1, 3, 3)),
}


def exact(modules: nn.Sequential) -> nn.Sequential:
    return copy.deepcopy(modules).cpu().double()


def parameters(modules: nn.Sequential) -> list[Tensor]:
    """In the order of the kernels."""
    return [*modules[0].parameters(), *modules[1].parameters(), *modules[3].parameters(), *modules[4].parameters()]


def buffers(modules: nn.Sequential) -> list[Tensor]:
    return [*modules[1].buffers(), *modules[4].buffers()]


def train(case: Case, modules: nn.Sequential, pooled: Tensor) -> Tensor:
    made = Branch.of(tuple(modules), case.size, pooled.dtype, *case.start)
    return Train.apply(pooled, *made.parameters(), made)


def gradients(
    case: Case, modules: nn.Sequential, pooled: Tensor, run: Callable[..., Tensor], layout: str = "last"
) -> list[Tensor]:
    """The output, and its gradients for a fixed gradient of the output."""
    pooled = pooled.detach().requires_grad_()
    output = run(case, modules, pooled)
    above = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape)
    grad = above.to(output.device, output.dtype)
    if layout == "last":
        grad = grad.movedim((1, 2), (-2, -1)).contiguous().movedim((-2, -1), (1, 2))
    return [output.detach(), *torch.autograd.grad(output, [pooled, *parameters(modules)], grad)]


def by_modules(case: Case, modules: nn.Sequential, pooled: Tensor) -> Tensor:
    constant, gain = case.start
    return ((modules(pooled) - constant) / gain).reshape(-1, *case.size)


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Relative to the largest number of each."""
    for index, (value, reference) in enumerate(zip(found, expected, strict=True)):
        scale = max(float(reference.detach().abs().max()), 1e-3)
        torch.testing.assert_close(
            value.double().cpu(),
            reference.double(),
            rtol=0,
            atol=tolerance * scale,
            msg=lambda text, index=index: f"tensor {index}: {text}",
        )


def check_training(case: Case, device: str, layout: str = "last") -> None:
    modules, pooled = case.modules(device), case.pooled(device)
    if layout != "last":
        pooled = pooled.contiguous()
    reference = exact(modules)
    expected = gradients(case, reference, pooled.cpu().double(), by_modules)
    found = gradients(case, modules, pooled, train, layout)
    assert_close(found, expected, 2e-5)  # some dozen roundings of float32, divided by deviations of a few rows
    assert_close(buffers(modules), buffers(reference), 1e-6)
    assert found[1].stride() == pooled.stride()


@pytest.mark.parametrize("name", CASES)
def test_training_equals_the_modules_in_double_precision(name: str, device: str) -> None:
    check_training(CASES[name], device)


def test_tensors_that_are_contiguous(device: str) -> None:
    check_training(CASES["partial tiles"], device, "contiguous")


@pytest.mark.parametrize("name", ["several parts", "several tiles of channels", "shares of several tiles"])
def test_wide_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As products in TF32 have them, which the interpreter does not round."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    monkeypatch.setattr(branch, "precision_of_products", lambda: "tf32")
    assert branch_launches.Facts(7, 16, 4, 16, precision="tf32").tile() > branch_launches.Facts(7, 16, 4, 16).tile()
    check_training(CASES[name], "cpu")


@pytest.mark.parametrize(
    "name",
    ["a tile", "partial tiles", "several parts", "several tiles of columns", "several tiles of channels", "one axis"],
)
def test_inference_equals_the_modules_in_double_precision(name: str, device: str) -> None:
    case = CASES[name]
    modules, pooled = case.modules(device, training=False), case.pooled(device)
    expected = by_modules(case, exact(modules), pooled.cpu().double())
    before = [tensor.clone() for tensor in buffers(modules)]
    for layout in (pooled, pooled.contiguous()):
        with torch.no_grad():
            found = infer(layout, Branch.of(tuple(modules), case.size, pooled.dtype, *case.start))
        assert_close([found], [expected], 1e-6)
    assert all(map(torch.equal, before, buffers(modules)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_no_worse_than_the_modules(dtype: torch.dtype, device: str) -> None:
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter does not multiply matrices in bfloat16")
    case = CASES["several tiles of columns"]
    modules, pooled = case.modules(device).to(dtype), case.pooled(device, dtype)
    expected = gradients(case, exact(modules), pooled.cpu().double(), by_modules)
    plain = gradients(case, copy.deepcopy(modules), pooled, by_modules)
    found = gradients(case, modules, pooled, train)
    for index, (value, other, reference) in enumerate(zip(found, plain, expected, strict=True)):
        assert value.dtype == dtype
        error, least = ((tensor.double().cpu() - reference).norm() for tensor in (value, other))
        assert error <= 1.2 * least + torch.finfo(dtype).eps * reference.norm(), f"tensor {index}"


def test_statistics_of_numbers_far_from_zero(device: str) -> None:
    case = CASES["several parts"]
    modules, pooled = case.modules(device), case.pooled(device)
    modules[0].weight.data.fill_(1).add_(torch.randn_like(modules[0].weight), alpha=0.01)
    pooled = pooled + 300  # a variance from the mean of squares would have no digit right
    reference = exact(modules)
    expected = gradients(case, reference, pooled.cpu().double(), by_modules)
    found = gradients(case, modules, pooled, train)
    assert_close(found[:1], expected[:1], 5e-3)  # an ulp of 6000 in the deviation, which is about 4
    assert_close(buffers(modules)[:2], buffers(reference)[:2], 1e-4)


def test_what_is_no_number_stays_one(device: str) -> None:
    case = CASES["partial tiles"]
    modules, pooled = case.modules(device, training=False), case.pooled(device)
    pooled[3, 2] = float("nan")
    with torch.no_grad():
        found = infer(pooled, Branch.of(tuple(modules), case.size, pooled.dtype, *case.start))
    assert torch.isnan(found[3]).all()
    assert torch.isfinite(found[[0, 1, 2, 4, 5, 6]]).all()
    assert torch.isnan(train(case, modules.train(), pooled)).all()


def test_the_same_bits_twice(device: str) -> None:
    case = CASES["partial tiles"]
    modules, pooled = case.modules(device), case.pooled(device)
    first, second = (gradients(case, copy.deepcopy(modules), pooled, train) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_only_what_requires_a_gradient_gets_one(device: str) -> None:
    case = CASES["a tile"]
    modules, pooled = case.modules(device), case.pooled(device)
    modules[0].requires_grad_(False)
    modules[4].bias.requires_grad_(False)
    train(case, modules, pooled).square().sum().backward()
    assert pooled.grad is None
    assert [parameter.grad is not None for parameter in parameters(modules)] == [False, True, True, True, True, False]
    assert not train(case, modules.requires_grad_(False), pooled).requires_grad


@pytest.mark.parametrize("name", ["a tile", "partial tiles", "several parts"])
def test_second_derivatives(name: str, device: str) -> None:
    case = CASES[name]
    modules, pooled = case.modules(device), case.pooled(device)

    def of(modules: nn.Sequential, pooled: Tensor, run: Callable[..., Tensor]) -> list[Tensor]:
        pooled = pooled.detach().requires_grad_()
        inputs = [pooled, *parameters(modules)]
        output = run(case, modules, pooled)
        firsts = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)
        penalty = sum(first.square().sum() for first in firsts)
        return [*(first.detach() for first in firsts), *torch.autograd.grad(penalty, inputs)]

    expected = of(exact(modules), pooled.cpu().double(), by_modules)
    assert_close(of(modules, pooled, train), expected, 2e-4)


def test_a_backward_that_is_vectorised() -> None:
    device = "cpu"  # on a GPU, PyTorch's own BatchNorm has none
    case = CASES["a tile"]
    modules, pooled = case.modules(device), case.pooled(device).requires_grad_()
    output = train(case, modules, pooled)
    above = torch.randn(3, *output.shape, device=device)
    inputs = [pooled, *parameters(modules)]
    together = torch.autograd.grad(output, inputs, above, is_grads_batched=True, retain_graph=True)
    alone = [torch.autograd.grad(output, inputs, grad, retain_graph=True) for grad in above]
    assert_close(list(together), [torch.stack(grads).cpu() for grads in zip(*alone, strict=True)], 1e-4)


def _hook(*arguments: object) -> None: ...


UNUSUAL: dict[str, Callable[[list[nn.Module]], object]] = {
    "a hook": lambda modules: modules[2].register_forward_hook(_hook),
    "a hook before": lambda modules: modules[0].register_forward_pre_hook(_hook),
    "a hook of the backward": lambda modules: modules[4].register_full_backward_hook(_hook),
    "another forward": lambda modules: setattr(modules[3], "forward", _hook),
    "a convolution with a bias": lambda modules: modules.__setitem__(0, nn.Conv2d(20, 5, 1)),
    "a convolution that is parametrised": lambda modules: nn.utils.parametrizations.weight_norm(modules[0]),
    "a convolution that is pruned": lambda modules: prune.random_unstructured(modules[3], "weight", 0.5),
    "a larger convolution": lambda modules: modules.__setitem__(0, nn.Conv2d(20, 5, 3, padding=1, bias=False)),
    "no norm": lambda modules: modules.__setitem__(4, nn.Identity()),
    "another norm": lambda modules: modules.__setitem__(1, nn.GroupNorm(1, 5)),
    "a norm of other axes": lambda modules: modules.__setitem__(1, nn.BatchNorm1d(5)),
    "a norm without gain": lambda modules: modules.__setitem__(1, nn.BatchNorm2d(5, affine=False)),
    "a norm without statistics": lambda modules: modules.__setitem__(4, nn.BatchNorm2d(24, track_running_stats=False)),
    "a norm that averages all batches": lambda modules: setattr(modules[4], "momentum", None),
    "a norm of another width": lambda modules: modules.__setitem__(4, nn.BatchNorm2d(23)),
    "a norm that is frozen": lambda modules: modules[1].eval(),
    "another activation": lambda modules: modules.__setitem__(5, nn.Softplus()),
    "double precision": lambda modules: [module.double() for module in modules],
}


def fits(modules: list[nn.Module], case: Case, pooled: Tensor) -> bool:
    made = branch.plain(modules, pooled.dim()) and branch.unwatched(modules)
    return made and branch._takes(Branch.of(tuple(modules), case.size, pooled.dtype), pooled, False)


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_modules_run_one_by_one(name: str) -> None:
    case = CASES["partial tiles"]
    modules, pooled = list(case.modules("cpu")), case.pooled("cpu")
    assert fits(modules, case, pooled)
    UNUSUAL[name](modules)
    assert not fits(modules, case, pooled)


def test_hooks_of_all_modules_are_called() -> None:
    case = CASES["partial tiles"]
    handle = nn.modules.module.register_module_forward_hook(_hook)
    try:
        assert not fits(list(case.modules("cpu")), case, case.pooled("cpu"))
    finally:
        handle.remove()


@pytest.mark.parametrize(("samples", "channels", "hidden"), [(7, 15, 4), (2, 16, 129), (0, 16, 4)])
def test_sizes_that_the_kernels_do_not_take(samples: int, channels: int, hidden: int) -> None:
    case = Case(samples, channels, hidden, (16, 1, 3, 3))
    assert not fits(list(case.modules("cpu")), case, case.pooled("cpu"))


def test_offsets_of_more_than_32_bits_are_refused() -> None:
    case = Case(1, 512, 32, (512, 1, 3, 3))
    modules = list(case.modules("cpu"))
    assert fits(modules, case, torch.zeros(()).expand(40_000, 512, 3, 3))
    assert not fits(modules, case, torch.zeros(()).expand(500_000, 512, 3, 3))


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Switches the kernels off and on."""
    kernels = attention_branch.attend

    def switch(plain: bool) -> None:
        monkeypatch.setattr(attention_branch, "attend", (lambda *arguments: None) if plain else kernels)

    return switch


def whole_branch(training: bool) -> tuple[AttentionBranch, Tensor]:
    made = AttentionBranch(64, (96, 1, 3, 3), 4, "sigmoid", nn.BatchNorm2d).cuda().train(training)
    made.start_as_identity()
    nn.init.normal_(made.norm2.weight)
    nn.init.uniform_(made.norm1.running_var, 0.5, 2)
    pooled = torch.randn(40, 64, 3, 3, device="cuda").contiguous(memory_format=torch.channels_last)
    return made, pooled


@pytest.mark.gpu
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16, None])
def test_a_branch_on_a_gpu_with_kernels_and_without(
    low: torch.dtype | None, training: bool, plainly: Callable[[bool], None]
) -> None:
    original, pooled = whole_branch(training)
    results = {}
    for plain in (False, True):
        plainly(plain)
        made, input = copy.deepcopy(original), pooled.clone().requires_grad_(training)
        with (
            torch.autocast("cuda", dtype=low) if low else nullcontext(),
            torch.set_grad_enabled(training),
            torch.profiler.profile() as profile,
        ):
            attention = made(input, input)
        ran = {event.name for event in profile.events()}
        assert any("batch_norm" in name for name in ran) == plain
        results[plain] = [attention.detach(), *made.buffers()]
        if training:
            loss = (attention.float() * torch.linspace(-1, 1, 96, device="cuda")[:, None, None, None]).square().sum()
            loss.backward()
            results[plain] += [input.grad, *(parameter.grad for parameter in made.parameters())]
        assert attention.dtype == (low or torch.float32)
    expected = [tensor.double().cpu() for tensor in results[True]]
    assert_close(results[False], expected, 16 * torch.finfo(low).eps if low else 1e-4)


@pytest.mark.gpu
def test_a_cuda_graph_of_a_step() -> None:
    made, pooled = whole_branch(True)
    pooled.requires_grad_()
    above = torch.randn(40, 96, 1, 3, 3, device="cuda")

    captured: list[Tensor] = []

    def step() -> list[Tensor]:
        attention = made(pooled, pooled)
        captured[:] = attention, *torch.autograd.grad(attention, (pooled, *made.parameters()), above)
        return captured

    replay = graphed(step)
    pooled.data.normal_()
    before = copy.deepcopy(made)
    replay()
    assert made.norm1.num_batches_tracked == 3
    results = [tensor.clone() for tensor in captured]
    made.load_state_dict(before.state_dict())
    assert all(map(torch.equal, results, step()))


@pytest.mark.gpu
def test_hooks_of_a_branch_on_a_gpu_see_what_passes() -> None:
    made, pooled = whole_branch(True)
    seen = []
    handle = made.norm1.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    made(pooled, pooled)
    handle.remove()
    assert seen == [(40, 16, 3, 3)]
