"""Which calls of a layer run as a whole, and what is found out anew for them."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from awconv import AWConv2d
from awconv.ops import layer as whole
from tests.ops.layer_cases import CASES, Case, assert_close, exact, run, step

pytestmark = pytest.mark.usefixtures("forgotten_plans")


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
