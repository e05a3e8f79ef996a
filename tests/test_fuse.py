"""Networks fused for inference: they compute the same, without norms, and cannot be trained."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.ops.misc import ConvNormActivation

import awconv
from awconv import AWConv1d, AWConv2d, AWConv3d
from awconv.fuse import FusedBranch
from tests.networks import converted


def calibrated(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """In evaluation, with norms that differ from the identity and statistics of real activations."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    with torch.no_grad():
        model.train()(images)
    return model.eval()


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


# Downsampling, squeeze-and-excitation, timm's norms with an activation, Conv2dSame.
@pytest.mark.parametrize("name", ["aw_resnet18", "aw_seresnet18", "aw_mobilenetv2_100", "tf_efficientnet_lite0"])
def test_a_fused_network_computes_the_same_without_norms(name: str) -> None:
    images = torch.randn(4, 3, 64, 64)
    model = timm.create_model(name)
    model = calibrated(model if name.startswith("aw_") else awconv.convert(model, init="identity"), images)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(images.double())
        rounding = float((model(images) - exact).abs().max())
        layers = converted(model)
        fused = awconv.fuse(model)
        assert fused is model
        assert norms(fused) == 0
        assert converted(fused) == layers
        # Another order of the same products and sums: as exact as the network itself, to a small factor.
        assert float((fused(images) - exact).abs().max()) <= 10 * rounding + 1e-6 * float(exact.abs().max())


def test_fusing_twice_is_fusing_once() -> None:
    images = torch.randn(2, 3, 32, 32)
    model = awconv.fuse(calibrated(timm.create_model("aw_resnet8_cifar"), images))
    with torch.no_grad():
        expected = model(images)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        again = awconv.fuse(model)(images)
    assert torch.equal(again, expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_fused_network_refuses_to_train_and_stays_in_evaluation() -> None:
    model = awconv.fuse(timm.create_model("aw_resnet8_cifar"))
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match=r"fused for inference .* cannot be trained"):
            copied.train()
        assert copied.eval() is copied
        assert not any(parameter.requires_grad for parameter in copied.parameters())
    with pytest.raises(ValueError, match="fused for inference"):
        model.train()
    assert not any(module.training for module in model.modules())


def test_a_plain_network_is_fused_too() -> None:
    images = torch.randn(4, 3, 64, 64)
    model = calibrated(timm.create_model("resnet18"), images)
    with torch.no_grad():
        expected = model(images)
        scale = float(expected.abs().max())
        torch.testing.assert_close(awconv.fuse(model)(images), expected, rtol=0, atol=1e-4 * scale)
    assert norms(model) == 0
    with pytest.raises(ValueError, match="ResNet was fused"):
        model.train()
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        awconv.fuse(model.state_dict())  # type: ignore[arg-type]


class Steps(nn.Module):
    """Takes a Sequential in steps, and keeps what is between them."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.sum() > 1e9:
            return input
        kept = []
        for step in self.steps:
            input = step(input)
            kept += [input.mean()]
        return torch.stack(kept)


class Paths(nn.Module):
    """Has one path for what it was not given, one for tensors, and one that reads weights; counts its calls."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.path, self.calls, self.last = path, 0, [torch.zeros(())]

    def forward(self, input: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        self.calls += 1
        output = self.conv(input)
        if (self.path == "default" and mask is None) or (self.path == "tensor" and isinstance(input, torch.Tensor)):
            return output
        if self.path == "kept":
            self.last = [output]
        scale = torch.ones(())
        if self.path == "weight":
            scale = self.conv.weight.abs().sum()
        if self.path == "statistics":
            scale = self.norm.running_var.sum()
        return self.norm(output) * scale + self.last[0].mean()


class Untraceable(nn.Module):
    """Asks for a value, which torch.fx has not; its block can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.block = ConvNormActivation(3, 8, 3, norm_layer=nn.BatchNorm2d)
        self.norm = nn.BatchNorm2d(8)  # outside of what can be traced

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.norm(self.block(input)) if input.sum() < 1e9 else input


class Shared(nn.Module):
    """What must not be folded: a convolution with two uses, a norm that is called twice, a weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.second.weight = self.first.weight
        self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.free = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = self.conv(input)
        output = self.norm(self.norm(output)) + output
        return self.free(self.norm2(self.second(self.norm1(self.first(output)))))


@pytest.mark.parametrize(
    ("model", "channels", "left"),
    [
        (Untraceable(), 3, 1),
        (Shared(), 4, 4),
        (Steps(), 3, 2),
        *((Paths(path), 3, 1) for path in ("default", "tensor", "kept", "weight", "statistics")),
        (Paths("none"), 3, 0),
    ],
)
def test_what_cannot_be_folded_is_left(model: nn.Module, channels: int, left: int) -> None:
    images = torch.randn(4, channels, 12, 12)
    calibrated(model, images)
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(awconv.fuse(model)(images), expected, rtol=1e-4, atol=1e-4)
    assert norms(model) == left


def test_what_was_traced_did_not_run() -> None:
    model = awconv.fuse(Paths("kept"))
    assert model.calls == 0
    assert type(model.last[0]) is torch.Tensor


def double(module: nn.Module) -> None:
    """Gives a module a forward of its own."""
    forward = module.forward
    module.forward = lambda input: 2 * forward(input)  # type: ignore[method-assign]


@pytest.mark.parametrize("place", ["0", "1", "0.attention", "0.attention.conv1"])
def test_a_forward_of_an_instance_is_kept(place: str) -> None:
    images = torch.randn(4, 3, 9, 9)
    model = calibrated(nn.Sequential(AWConv2d(3, 8, 3), nn.BatchNorm2d(8)), images)
    double(model.get_submodule(place))
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(awconv.fuse(model)(images), expected, rtol=1e-4, atol=1e-4)


def test_another_activation_of_a_branch_is_kept() -> None:
    images = torch.randn(4, 3, 9, 9)
    model = calibrated(nn.Sequential(AWConv2d(3, 8, 3)), images)
    model[0].attention.act1 = nn.Identity()
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(awconv.fuse(model)(images), expected)
    assert not isinstance(model[0].attention, FusedBranch)


def test_norms_with_parts_of_their_own_are_kept() -> None:
    images = torch.randn(4, 3, 32, 32)
    model = calibrated(timm.layers.convert_splitbn_model(timm.create_model("aw_resnet8_cifar")), images)
    left = norms(model) - 2 * len(converted(model))  # those of the branches are plain
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(awconv.fuse(model)(images), expected, rtol=1e-4, atol=1e-4)
    assert norms(model) >= left


@pytest.mark.parametrize("hooked", ["container", "everything"])
def test_what_hooks_see_is_kept(hooked: str) -> None:
    images = torch.randn(4, 3, 9, 9)
    model = calibrated(nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8)), images)

    def changed(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        assert type(output) is torch.Tensor  # and not what torch.fx traces with
        return 2 * output if isinstance(module, nn.Conv2d | nn.Sequential) and module is not model else None

    hook = (
        nn.modules.module.register_module_forward_hook(changed)
        if hooked == "everything"
        else model[0].register_forward_hook(changed)
    )
    try:
        with torch.no_grad():
            expected = model(images)
            torch.testing.assert_close(awconv.fuse(model)(images), expected, rtol=1e-4, atol=1e-4)
    finally:
        hook.remove()


def test_other_functions_say_that_a_network_was_fused() -> None:
    model = awconv.fuse(nn.Sequential(AWConv2d(3, 8, 3)))
    functions: dict[str, Any] = dict(
        train_only=lambda: awconv.train_only(model, "branch"),
        parameter_groups=lambda: awconv.parameter_groups(model),
        convert=lambda: awconv.convert(model),
        revert=lambda: awconv.revert(model),
    )
    for name, function in functions.items():
        with pytest.raises(ValueError, match=f"^{name}: Sequential was fused for inference"):
            function()


def test_a_fused_branch_checks_its_input() -> None:
    layer = awconv.fuse(AWConv2d(16, 8, 3))
    for shape in ((1, 17, 5, 5), (1, 3, 5, 5), (16, 5, 5)):
        with pytest.raises(RuntimeError, match="to have 16 channels"), torch.no_grad():
            layer.attention(torch.randn(shape))


def test_a_layer_with_hooks_keeps_its_norm_and_its_branch() -> None:
    model = nn.Sequential(AWConv2d(4, 8, 3), nn.BatchNorm2d(8))
    model[0].register_forward_hook(lambda *_: None)
    model[0].attention.conv1.register_forward_hook(lambda *_: None)
    awconv.fuse(model)
    assert norms(model) == 3
    assert not isinstance(model[0].attention, FusedBranch)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 3, 15, 16, 17, 33]),
    st.sampled_from([1, 8, 63, 64, 65, 130]),
    st.sampled_from(["sigmoid", "tanh", "relu", nn.Hardsigmoid]),
    st.sampled_from(["batch", None]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(1, 3),
)
def test_a_fused_branch_gives_the_same_attention(
    dims: int, inputs: int, outputs: int, activation: Any, norm: Any, residual: bool, identity: bool, dtype: Any, n: int
) -> None:
    kind = {1: AWConv1d, 2: AWConv2d, 3: AWConv3d}[dims]
    layer = kind(
        inputs, outputs, 3, activation=activation, norm_layer=norm, residual=residual, in_expansion=1, reduction=2
    )
    calibrated(layer, torch.randn(8, inputs, *(5, 6, 4)[:dims]))
    if identity:
        layer.attention.start_as_identity()
        with torch.no_grad():
            for parameter in layer.attention.parameters():  # as after a training
                parameter.add_(0.1 * torch.randn_like(parameter))
    layer.to(dtype)
    images = torch.randn(n, inputs, *(5, 6, 4)[:dims], dtype=dtype)
    with torch.no_grad():
        exact = copy.deepcopy(layer).double().attention(images.double())
        awconv.fuse(layer)
        assert isinstance(layer.attention, FusedBranch)
        attention = layer.attention(images)
        assert attention.dtype == dtype
        # Sums of at most 130 products of numbers around 1, in another order.
        tolerance = 1e-4 if dtype == torch.float32 else 1e-10
        torch.testing.assert_close(attention.double(), exact, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(layer.attention(images[-1:])[0], attention[-1])


def test_a_fused_branch_has_gradients_of_its_input_and_compiles_and_is_shared_and_saved() -> None:
    branch = awconv.AWConv2d(8, 8, 3).attention
    model = nn.Sequential(AWConv2d(8, 8, 3, branch=lambda spec: branch), AWConv2d(8, 8, 3, branch=lambda spec: branch))
    images = torch.randn(2, 8, 12, 12, requires_grad=True)
    (expected,) = torch.autograd.grad(model.eval()(images).sum(), images)
    awconv.fuse(model)
    assert model[0].attention is model[1].attention
    (gradient,) = torch.autograd.grad(model(images).sum(), images)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    output = model(images)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(images), output)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file))


def test_without_a_compiler_a_fused_branch_runs_by_pytorchs_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = calibrated(AWConv2d(8, 8, 3), torch.randn(4, 8, 9, 9))
    images = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        expected = awconv.fuse(layer).attention(images)
        monkeypatch.setattr("awconv.ops.folded_branch.library", lambda *_: "there is no compiler")
        torch.testing.assert_close(layer.attention(images), expected)


def test_not_a_number_stays_one() -> None:
    layer = awconv.fuse(calibrated(AWConv2d(8, 8, 3), torch.randn(4, 8, 9, 9)))
    images = torch.randn(2, 8, 9, 9)
    images[1, 3, 0, 0] = torch.nan
    with torch.no_grad():
        attention = layer.attention(images)
    assert attention[0].isfinite().all()
    assert attention[1, :, :, 0, 0].isnan().all()
    assert attention[1, :, :, 2, 2].isfinite().all()
