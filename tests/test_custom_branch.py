"""Attention branches of one's own: in layers and networks, by themselves and shared by several layers."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import symbolic_trace

from awconv import (
    AWConv1d,
    AWConv2d,
    AWConv3d,
    BranchSpec,
    convert,
    load_adapter,
    parameter_groups,
    save_adapter,
    summary,
    train_only,
)
from awconv.branch import AttentionBranch
from awconv.parameter_groups import branch_parameters
from awconv.selection import convolutions, parts_of_branches

IMAGES = (2, 3, 16, 16)


class OneConvolution(nn.Module):
    """A pool, a pointwise convolution, a sigmoid, for any number of axes."""

    def __init__(self, spec: BranchSpec) -> None:
        super().__init__()
        self.size = spec.attention_size
        self.linear = nn.Linear(spec.in_channels, self.size[0] * self.size[1])

    def forward(self, input: Tensor) -> Tensor:
        scores = self.linear(input.flatten(2).mean(2)).sigmoid()
        kernel = self.size[2:]
        return scores.unflatten(1, self.size[:2])[(..., *(None,) * len(kernel))].expand(-1, -1, -1, *kernel)

    def start_constant(self) -> float:
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        return 0.5

    def is_constant(self) -> bool:
        return not self.linear.weight.any() and not self.linear.bias.any()


def network(**arguments: Any) -> nn.Module:
    return convert(timm.create_model("resnet8_cifar"), **{"branch": OneConvolution} | arguments).eval()


def shared() -> dict[str, Any]:
    """Arguments by which layers that are alike have one branch."""
    return {"branch": functools.cache(OneConvolution)}


def trained(model: nn.Module) -> nn.Module:
    for parameter in branch_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    return model


def branches(model: nn.Module) -> list[Any]:
    return [module.attention for module in model.modules() if isinstance(module, AWConv2d)]


@pytest.mark.parametrize(("layer", "dims"), [(AWConv1d, 1), (AWConv2d, 2), (AWConv3d, 3)])
@pytest.mark.parametrize("residual", [True, False])
def test_the_layer_convolves_with_the_map_of_the_branch(layer: Any, dims: int, residual: bool) -> None:
    made = layer(4, 6, 3, stride=2, padding=1, groups=2, residual=residual, branch=OneConvolution)
    images = torch.randn(3, 4, *(7,) * dims)
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    for image, attention in zip(images, made.attention.branch(images), strict=True):
        weight = made.weight * (1 + attention if residual else attention)
        expected = convolve(image[None], weight, made.bias, stride=2, padding=1, groups=2)
        torch.testing.assert_close(made(image[None]), expected)


def test_a_branch_learns_all_that_a_layer_knows() -> None:
    seen: list[BranchSpec] = []

    def make(spec: BranchSpec) -> nn.Module:
        seen.append(spec)
        return OneConvolution(spec)

    norm = functools.partial(nn.GroupNorm, 1)
    arguments = dict(in_expansion=1, out_expansion=3, reduction=2, activation="tanh", norm_layer=norm)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, (3, 5), 2, (1, 2), 1, 2))
    convert(model, pool=nn.AdaptiveMaxPool2d, residual=False, branch=make, **arguments)
    assert seen == [
        BranchSpec(
            in_channels=4,
            out_channels=6,
            kernel_size=(3, 5),
            stride=(2, 2),
            padding=(1, 2),
            dilation=(1, 1),
            groups=2,
            attention_size=(2, 2, 3, 5),
            reduction=2,
            activation="tanh",
            residual=False,
            norm_layer=norm,
            pool=nn.AdaptiveMaxPool2d,
        )
    ]
    assert seen[0].name == "1"


@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize("residual", [True, False])
def test_identity_keeps_the_output_and_the_branches_learn(residual: bool, sharing: bool) -> None:
    plain, images = timm.create_model("resnet8_cifar").eval(), torch.randn(IMAGES)
    arguments = {"branch": OneConvolution} | (shared() if sharing else {})
    model = convert(copy.deepcopy(plain), init="identity", residual=residual, **arguments).eval()
    torch.testing.assert_close(model(images), plain(images), rtol=1e-5, atol=1e-5)  # another order of sums
    assert all(branch.is_identity() for branch in branches(model))
    F.cross_entropy(model.train()(images), torch.tensor([1, 2])).backward()
    for branch in branches(model):
        assert branch.branch.linear.weight.grad.abs().sum() > 0
    with torch.no_grad():
        branches(model)[0].branch.linear.weight[0, 0] = 1
    assert not branches(model)[0].is_identity()


def test_a_trained_branchs_map_is_relative_to_its_start() -> None:
    relative = trained(network(init="identity")).layer1[0].conv1
    images = torch.randn(2, 16, 8, 8)
    map_ = relative.attention.branch(images)
    torch.testing.assert_close(relative.attention(images), (1 + map_) / 1.5 - 1)


@pytest.mark.filterwarnings("ignore:weights without relative_to")  # they have no statistics to tell them by
@pytest.mark.parametrize("into", ["fresh", "identity"])
@pytest.mark.parametrize("source", ["fresh", "identity"])
@pytest.mark.parametrize("sharing", [False, True])
def test_a_state_dict_says_in_which_form_its_branches_were_trained(into: Any, source: Any, sharing: bool) -> None:
    def make(init: Any) -> nn.Module:
        return network(init=init, **(shared() if sharing else {}))

    first, second, images = trained(make(source)), make(into), torch.randn(IMAGES)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(images), first(images))
    assert [branch.relative for branch in branches(second)] == [source == "identity"] * 6


def test_a_state_of_a_branch_that_starts_elsewhere_is_refused() -> None:
    class Other(OneConvolution):
        def start_constant(self) -> float:
            super().start_constant()
            nn.init.ones_(self.linear.bias)
            return torch.sigmoid(torch.ones(())).item()

    state = network(init="identity", branch=Other).state_dict()
    with pytest.raises(RuntimeError, match=r"relative_to is 0\.731059, and this branch, .* starts at 0\.5"):
        network(init="identity").load_state_dict(state)


def test_a_branch_without_parameters_keeps_its_form_when_plain_weights_are_loaded() -> None:
    class Constant(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            return input.new_full((len(input), 4, 1, 3, 3), 0.5)

        def start_constant(self) -> float:
            return 0.5

        def is_constant(self) -> bool:
            return True

    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    model = convert(copy.deepcopy(plain), init="identity", branch=lambda spec: Constant())
    model.load_state_dict(plain.state_dict(), strict=False)
    images = torch.randn(IMAGES)
    torch.testing.assert_close(model(images), plain(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_and_pickles_compute_the_same(way: str, sharing: bool) -> None:
    model = trained(network(init="identity", **(shared() if sharing else {})))
    if way == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    images = torch.randn(IMAGES)
    assert torch.equal(other(images), model(images))
    assert len({id(branch) for branch in branches(other)}) == len({id(branch) for branch in branches(model)})


@pytest.mark.parametrize("init", [pytest.param("fresh", marks=pytest.mark.campaign), "identity"])
def test_compiled_traced_and_exported_networks_compute_the_same(init: Any) -> None:
    arguments = dict(init=init, activation=nn.Hardsigmoid, pool=nn.AdaptiveMaxPool2d, branch=None)
    for model in (trained(network(init=init)), trained(network(**arguments))):
        images = torch.randn(IMAGES)
        expected = model(images)
        compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), expected)
        torch.testing.assert_close(symbolic_trace(model)(images), expected)
        batch = torch.export.Dim("batch", max=64)
        exported = torch.export.export(model, (images,), dynamic_shapes={"x": {0: batch}}).module()
        more = torch.randn(5, *IMAGES[1:])
        torch.testing.assert_close(exported(more), model(more), rtol=1e-4, atol=1e-5)  # another algorithm


def test_the_network_and_its_layers_share_one_branch() -> None:
    model = network(**shared())
    stages = [[block.conv1.attention, block.conv2.attention] for block in (model.layer1[0], model.layer2[0])]
    assert stages[0][0] is stages[0][1]  # both convolutions of the first stage are alike
    assert stages[1][0] is not stages[1][1]  # the stride differs, and the channels
    distinct = set(branches(model))
    assert len(distinct) == 5
    numbers = sum(parameter.numel() for branch in distinct for parameter in branch.parameters())
    found = summary(model)
    assert found.parameters_added == numbers == sum(parameter.numel() for parameter in branch_parameters(model))
    assert [layer.shares for layer in found.converted] == [None, "layer1.0.conv1", None, None, None, None]
    assert "has the branch of layer1.0.conv1" in str(found)
    groups = {group["name"]: group["params"] for group in parameter_groups(model)}
    assert len(groups["branch"]) == len(set(groups["branch"])) == 10
    assert train_only(model, "branch").parts == {"branch": numbers}
    assert all(parameter.requires_grad == (parameter in branch_parameters(model)) for parameter in model.parameters())


def test_a_shared_branch_starts_once() -> None:
    started: list[nn.Module] = []

    class Counting(OneConvolution):
        def start_constant(self) -> float:
            started.append(self)
            return super().start_constant()

    network(init="identity", branch=functools.cache(Counting))
    assert len(started) == len(set(started)) == 5


@pytest.mark.parametrize("make", [OneConvolution, AttentionBranch.of])
def test_a_shared_branch_gets_the_gradients_of_all_its_layers(make: Callable[[BranchSpec], nn.Module]) -> None:
    made = []

    def sharing(spec: BranchSpec) -> nn.Module:
        made[:] = made or [make(spec)]
        return made[0]

    def alike(branch: Any) -> nn.Module:
        torch.manual_seed(1)
        plain = nn.Sequential(nn.Conv2d(3, 8, 3), *(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2)))
        return convert(plain, branch=branch).double()

    one, apart = alike(sharing), alike(make)
    for layer in apart[1:]:
        layer.attention.load_state_dict(one[1].attention.state_dict())
    images = torch.randn(4, 3, 9, 9).double()
    torch.testing.assert_close(one(images), apart(images))
    for model in (one, apart):
        model(images).square().sum().backward()
    for name, parameter in one[1].attention.named_parameters():
        grads = [layer.attention.get_parameter(name).grad for layer in apart[1:]]
        torch.testing.assert_close(parameter.grad, grads[0] + grads[1])


def test_summary_counts_the_multiply_adds_of_the_branch() -> None:
    images = torch.zeros(2, 8, 6, 6)
    model = nn.Sequential(AWConv2d(8, 4, 3, branch=OneConvolution))
    (layer,) = summary(model, images).converted
    assert layer.parameters == 8 * 4 + 4
    assert layer.operations == 2 * (8 * 4 + min(8 * 4 * 9, 4 * 9 * 16))
    plain = 2 * 8 * 4 * 9 * 16
    assert summary(model, images).operations == plain + layer.operations


def test_parts_of_the_branch_are_parts_of_branches() -> None:
    def convolution(spec: BranchSpec) -> nn.Module:
        return nn.Sequential(
            nn.AdaptiveAvgPool2d(spec.attention_size[2:]),
            nn.Conv2d(spec.in_channels, spec.attention_size[0], 1),
            nn.Unflatten(1, spec.attention_size[:2]),
        )

    model = network(branch=convolution)
    assert len(parts_of_branches(model)) == 6 * 5
    assert not [name for name in convolutions(model) if "attention" in name]


def test_an_adapter_holds_the_branches_and_knows_their_kind(tmp_path: Path) -> None:
    torch.manual_seed(1)
    plain = timm.create_model("resnet8_cifar")

    def base(branch: Any, **arguments: Any) -> nn.Module:
        return convert(copy.deepcopy(plain), init="identity", branch=branch, **arguments).eval()

    source = base(OneConvolution)
    train_only(source, "branch", "head")
    save_adapter(trained(source), tmp_path / "adapter.safetensors")
    images = torch.randn(IMAGES)
    loaded = load_adapter(base(OneConvolution), tmp_path / "adapter.safetensors")
    assert torch.equal(loaded(images), source(images))
    with pytest.raises(ValueError, match="branch='OneConvolution', and the model's branch=None"):
        load_adapter(base(None), tmp_path / "adapter.safetensors")


@pytest.mark.parametrize(
    ("map_", "error", "message"),
    [
        (lambda input: input.mean((2, 3)), ValueError, r"\(2, 4, 1, 3, 3\), got \(2, 3\)"),
        (lambda input: input.new_zeros(1, 4, 1, 3, 3), ValueError, r"\(2, 4, 1, 3, 3\), got \(1, 4, 1, 3, 3\)"),
        (lambda input: input.new_zeros(2, 4, 1, 3, 3).double(), TypeError, r"input, torch.float32, got torch.float64"),
        (lambda input: None, TypeError, "a tensor, the attention map, got NoneType"),
    ],
)
def test_a_wrong_map_is_named_with_its_layer(map_: Any, error: type[Exception], message: str) -> None:
    class Wrong(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            return map_(input)

    model = convert(nn.Sequential(nn.Conv2d(3, 4, 3)), "0", branch=lambda spec: Wrong())
    with pytest.raises(error, match="AWConv2d '0': the branch Wrong must return .*" + message):
        model(torch.zeros(2, 3, 5, 5))


def test_identity_says_what_a_branch_lacks() -> None:
    lacking = nn.Sequential
    with pytest.raises(ValueError, match=r"layer 'layer1.0.conv1': .* two methods .* start_constant\(\).* is_constant"):
        network(init="identity", branch=lambda spec: lacking(OneConvolution(spec)))

    class Half(OneConvolution):
        def start_constant(self) -> Any:
            return torch.tensor(0.5)

    with pytest.raises(ValueError, match=r"start_constant\(\) of the branch Half must return a number"):
        network(init="identity", branch=Half)

    class Nothing(OneConvolution):
        def start_constant(self) -> float:
            return -1.0

    with pytest.raises(ValueError, match=r"Nothing must leave weights, and with the constant -1 1 \+ a0 is 0"):
        network(init="identity", branch=Nothing)


def test_what_makes_no_branch_is_refused() -> None:
    module = nn.Conv2d(3, 3, 1)
    with pytest.raises(TypeError, match=r"convert: branch must be None or a function .* branch=lambda spec: module"):
        network(branch=module)
    with pytest.raises(TypeError, match=r"AWConv2d 'layer1.0.conv1': branch must return an nn.Module, got 3"):
        network(branch=lambda spec: 3)
    one = AttentionBranch(16, (16, 1, 3, 3), 16, "sigmoid", None)
    with pytest.raises(ValueError, match=r"'layer2.0.conv1'.* attention_size \(32, 1, 3, 3\) and residual=True, got"):
        network(branch=lambda spec: one)


def test_the_branch_takes_the_layers_dtype() -> None:
    before = OneConvolution(AWConv2d(3, 4, 3)._spec(16, "sigmoid", True, None, None))
    layer = AWConv2d(3, 4, 3, dtype=torch.float64, branch=lambda spec: before)
    assert layer(torch.randn(2, 3, 5, 5).double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert AWConv2d(3, 4, 3, branch=OneConvolution)(torch.randn(2, 3, 5, 5)).dtype == torch.bfloat16
