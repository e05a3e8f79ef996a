"""Conversion of networks."""

from __future__ import annotations

import copy
import functools
import logging
import pickle
import re
from typing import Any

import pytest
import timm
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision.ops import FrozenBatchNorm2d

from awconv import AWConv1d, AWConv2d, AWConv3d, convert
from awconv.layers import AWConv2dSame


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, groups=2, bias=False)),
        nn.Conv2d(8, 4, (1, 3), padding=(0, 1), padding_mode="circular"),
    )


def kinds(model: nn.Module) -> dict[str, str]:
    names = {name: type(module).__name__ for name, module in model.named_modules()}
    return {name: kind for name, kind in names.items() if "Conv" in kind and "attention" not in name}


def converted(model: nn.Module) -> set[str]:
    return {name for name, kind in kinds(model).items() if kind.startswith("AW")}


def test_every_spatial_convolution_but_the_stem_is_converted_in_place() -> None:
    model = network()
    assert convert(model) is model
    assert kinds(model) == {"0": "Conv2d", "2.0": "Conv2d", "2.2": "AWConv2d", "3": "AWConv2d"}
    assert model(torch.randn(2, 3, 9, 9)).shape == (2, 4, 4, 4)


@pytest.mark.parametrize("init", ["fresh", "identity"])
def test_parameters_are_taken_over_not_copied(init: Any) -> None:
    model = network().double()
    model[3].weight.requires_grad_(False)
    model[2].eval()
    old = [model[2][2], model[3]]
    convert(model, init=init)
    for before, after in zip(old, [model[2][2], model[3]], strict=True):
        assert after.weight is before.weight
        assert after.bias is before.bias
        assert after.attention.conv1.weight.dtype == torch.float64
        for name in ("stride", "padding", "dilation", "groups", "padding_mode", "kernel_size"):
            assert getattr(after, name) == getattr(before, name)
    assert not model[3].weight.requires_grad
    assert all(parameter.requires_grad for parameter in model[3].attention.parameters())
    assert not model[2][2].attention.norm1.training
    assert model[3].attention.norm1.training


@pytest.mark.parametrize(
    ("select", "names"),
    [
        ("3", {"3"}),
        ("2.*", {"2.0", "2.2"}),
        ("[23]*", {"2.0", "2.2", "3"}),
        (re.compile(r"\d\.\d|0"), {"0", "2.0", "2.2"}),
        (["0", re.compile(r"2\.2")], {"0", "2.2"}),
        (("2.0", lambda name, layer: layer.padding_mode == "circular"), {"2.0", "3"}),
        (lambda name, layer: name == "0" or layer.kernel_size == (1, 1), {"0", "2.0"}),
    ],
)
def test_names_globs_expressions_and_functions_select(select: Any, names: set[str]) -> None:
    model = convert(network(), select, reduction=2)
    assert converted(model) == names
    assert {m.reduction for m in model.modules() if isinstance(m, AWConv2d)} == {2}


def test_the_stem_is_known_after_it_was_converted() -> None:
    model = convert(network(), "0")
    assert converted(convert(model)) == {"0", "2.2", "3"}


def test_a_shared_module_is_converted_once() -> None:
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), shared, nn.ReLU(), shared)
    images = torch.randn(2, 3, 9, 9)
    expected = model(images)
    convert(model, "3", init="identity")  # by its second name
    assert isinstance(model[1], AWConv2d)
    assert model[1] is model[3]
    torch.testing.assert_close(model(images), expected)


def test_one_and_three_dimensional_convolutions_are_converted() -> None:
    assert isinstance(convert(nn.Conv1d(4, 4, 3)), AWConv1d)
    assert isinstance(convert(nn.Conv3d(4, 4, 3)), AWConv3d)


def test_a_second_conversion_finds_nothing_left() -> None:
    model = convert(network())
    with pytest.raises(ValueError, match="no convolution of Sequential was selected"):
        convert(model)
    convert(model, lambda name, module: module.kernel_size == (1, 1))  # the branches have such, too
    assert kinds(model)["2.0"] == "AWConv2d"
    assert not any(isinstance(part, AWConv2d) for part in model[3].attention.modules())


class OwnForward(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight * 2, bias)


class OnlyAnotherConstructor(nn.Conv2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3)


def hooked(method: str) -> nn.Module:
    layer = nn.Conv2d(4, 4, 3)
    getattr(layer, method)(lambda *_: None)
    return layer


def patched(method: str) -> nn.Module:
    layer = nn.Conv2d(4, 4, 3)
    setattr(layer, method, lambda input, *_: input)
    return layer


def with_a_weight_of_another_shape() -> nn.Module:
    layer = nn.Conv2d(4, 4, 3)
    layer.weight = nn.Parameter(layer.weight[:, :1].detach())
    return layer


def with_a_buffer_for_a_weight() -> nn.Module:
    layer = nn.Conv2d(4, 4, 3)
    weight = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", weight)
    return layer


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: OwnForward(4, 4, 3), "OwnForward computes something of its own"),
        (lambda: OwnConvolution(4, 4, 3), "OwnConvolution computes something of its own"),
        (lambda: ScaledStdConv2d(4, 4, 3), "ScaledStdConv2d computes something of its own"),
        (lambda: patched("forward"), "Conv2d computes something of its own"),
        (lambda: patched("_conv_forward"), "Conv2d computes something of its own"),
        (lambda: hooked("register_forward_hook"), "it has hooks"),
        (lambda: hooked("register_full_backward_hook"), "it has hooks"),
        (lambda: hooked("register_load_state_dict_pre_hook"), "it has hooks"),
        (with_a_weight_of_another_shape, "its weight has shape (4, 1, 3, 3), and its arguments say (4, 4, 3, 3)"),
        (lambda: nn.Conv2d(4, 4, 3).to(torch.float8_e4m3fn), "its weights are torch.float8_e4m3fn"),
        (lambda: weight_norm(nn.Conv2d(4, 4, 3)), "it is parametrised"),
        (lambda: nn.LazyConv2d(4, 3), "LazyConv2d is not initialised; call the model once"),
        (with_a_buffer_for_a_weight, "its weight is a Tensor, not a parameter"),
        (lambda: nn.Conv2d(4, 4, 3, dtype=torch.complex64), "its weights are torch.complex64"),
    ],
)
@pytest.mark.parametrize("init", ["fresh", "identity"])
def test_what_cannot_be_converted_exactly_is_left_and_logged(
    build: Any, reason: str, init: Any, caplog: pytest.LogCaptureFixture
) -> None:
    left = build()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), left)
    with caplog.at_level(logging.WARNING, logger="awconv"):
        convert(model, init=init)
    assert model[2] is left
    assert isinstance(model[1], AWConv2d)
    assert f"convert: 2 is left as it is: {reason}" in caplog.text


def test_layers_that_share_a_weight_are_left(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4)), nn.ConvTranspose2d(4, 4, 3))
    model[2].weight = model[1].weight
    model[4].weight = model[3].weight
    model.append(nn.Conv2d(4, 4, 3))
    images = torch.randn(2, 4, 9, 9)
    expected = model(images)
    convert(model, init="identity")
    assert converted(model) == {"5"}
    assert "convert: 1 is left as it is: its weight is shared by 1 and 2" in caplog.text
    assert "convert: 3 is left as it is: its weight is shared by 3 and 4" in caplog.text
    torch.testing.assert_close(model(images), expected)


def test_weights_that_share_storage_are_divided_once_each() -> None:
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4)))
    model[2].weight = nn.Parameter(model[1].weight.data)
    model[3].weight = nn.Parameter(model[1].weight.data[:, :])
    images = torch.randn(2, 4, 9, 9)
    expected = model(images)
    convert(model, ["1", "2"], init="identity")
    torch.testing.assert_close(model(images), expected)


def test_padding_that_was_changed_afterwards_stays() -> None:
    plain = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"))
    plain[1].padding = (2, 2)  # which such a convolution does not look at
    model = convert(copy.deepcopy(plain), init="identity")
    images = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(model(images), plain(images))


def test_the_default_device_does_not_matter() -> None:
    model = network()
    with torch.device("meta"):
        convert(model, init="identity")
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    model(torch.randn(2, 3, 9, 9))


def test_a_subclass_that_computes_the_same_is_converted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), OnlyAnotherConstructor(4))
    images = torch.randn(2, 3, 9, 9)
    expected = model(images)
    convert(model, init="identity")
    assert isinstance(model[1], AWConv2d)
    torch.testing.assert_close(model(images), expected)


# --- init="identity"


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu"])
def test_identity_keeps_the_output_and_every_branch_learns(activation: str, residual: bool) -> None:
    plain = network()
    model = convert(copy.deepcopy(plain), init="identity", activation=activation, residual=residual)
    images = torch.randn(4, 3, 12, 12)
    for train in (True, False):
        expected, output = plain.train(train)(images), model.train(train)(images)
        # A few roundings of single precision (6e-8) in sums of at most 72 terms of order 1.
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    model.train()(images).square().sum().backward()
    for layer in (model[2][2], model[3]):
        assert layer.attention.norm2.weight.grad.abs().min() > 0


@pytest.mark.parametrize(
    ("activation", "residual"), [("tanh", True), ("relu", True), ("sigmoid", False), ("relu", False)]
)
def test_the_attentional_weights_are_the_old_ones_bit_for_bit_where_the_constant_allows(
    activation: str, residual: bool
) -> None:
    plain = network()
    model = convert(copy.deepcopy(plain), init="identity", activation=activation, residual=residual)
    for old, layer in ((plain[2][2], model[2][2]), (plain[3], model[3])):
        attention = layer.attention(torch.randn(2, 8, 12, 12))[0]
        weight = layer.weight + attention * layer.weight if residual else attention * layer.weight
        assert torch.equal(weight, old.weight)


def test_the_gradient_of_the_branch_is_that_of_finite_differences() -> None:
    model = convert(network(), init="identity").double()
    images = torch.randn(4, 3, 12, 12).double()
    gain = model[3].attention.norm2.weight

    def loss() -> Tensor:
        return model(images).square().sum()

    loss().backward()
    step = 1e-5
    with torch.no_grad():
        gain[1] += step
        above = loss()
        gain[1] -= 2 * step
        below = loss()
    # Central differences of a smooth function in double precision: errors of step squared, and 1e-16 / step.
    torch.testing.assert_close(gain.grad[1], (above - below) / (2 * step), rtol=1e-6, atol=1e-6)


def test_identity_divides_nothing_before_all_layers_are_known_to_fit() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    norms = iter([nn.BatchNorm2d] * 2 + [functools.partial(nn.BatchNorm2d, affine=False)] * 2)
    with pytest.raises(ValueError, match="layer '3': init=\"identity\" needs a branch whose norm_layer has a weight"):
        convert(model, init="identity", norm_layer=lambda channels: next(norms)(channels))
    assert converted(model) == set()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_an_activation_that_starts_above_zero_needs_a_bias() -> None:
    def without_shift(channels: int) -> nn.Module:
        norm = nn.GroupNorm(1, channels)
        norm.bias = None
        return norm

    with pytest.raises(ValueError, match=r"layer '2.2': .*needs a norm_layer with a bias"):
        convert(network(), init="identity", activation="relu", norm_layer=without_shift)
    convert(network(), init="identity", activation="sigmoid", norm_layer=without_shift)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_identity_rounds_as_the_weights_do(dtype: torch.dtype) -> None:
    plain = network().to(dtype)
    model = convert(copy.deepcopy(plain), init="identity")
    layer, old = model[2][2], plain[2][2]
    attention = layer.attention.act2(layer.attention.norm2.bias.detach())[:1]
    # Dividing by 1.5 and multiplying by 1.5 rounds twice.
    torch.testing.assert_close(layer.weight * (1 + attention), old.weight, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_tensorflows_padding_is_kept() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), Conv2dSame(4, 8, 3, stride=2), Conv2dSame(8, 8, 5, stride=2, groups=8))
    model = convert(copy.deepcopy(plain), init="identity")
    assert [type(layer) for layer in model[1:]] == [AWConv2dSame, AWConv2dSame]
    for size in (15, 16, 17, 18):  # pads by 0 to 3, and unevenly
        images = torch.randn(2, 3, size, size + 1)
        torch.testing.assert_close(model(images), plain(images), rtol=1e-5, atol=1e-5)  # as above


def test_a_meta_network_is_converted_without_values() -> None:
    with torch.device("meta"):
        model = convert(network(), init="identity")
    assert model(torch.empty(2, 3, 9, 9, device="meta")).shape == (2, 4, 4, 4)


# --- the branch's norm


def with_norm(norm: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3))


@pytest.mark.parametrize(
    ("norm", "kind"),
    [
        (nn.BatchNorm2d(8), nn.BatchNorm2d),
        (timm.layers.BatchNormAct2d(8), nn.BatchNorm2d),
        (nn.SyncBatchNorm(8), nn.SyncBatchNorm),
        (nn.GroupNorm(4, 8), nn.GroupNorm),
        (timm.layers.LayerNorm2d(8), nn.GroupNorm),
        (nn.InstanceNorm2d(8), nn.GroupNorm),
        (FrozenBatchNorm2d(8), FrozenBatchNorm2d),
        (timm.layers.FrozenBatchNormAct2d(8), FrozenBatchNorm2d),
        (nn.Identity(), nn.BatchNorm2d),
    ],
)
def test_the_branchs_norm_is_of_the_networks_kind(norm: nn.Module, kind: type[nn.Module]) -> None:
    plain = with_norm(norm).eval()
    model = convert(copy.deepcopy(plain), init="identity")
    assert {
        type(part) for layer in (model[2], model[4]) for part in (layer.attention.norm1, layer.attention.norm2)
    } == {kind}
    images = torch.randn(2, 3, 12, 12)
    output = model(images)
    torch.testing.assert_close(output, plain(images), rtol=1e-5, atol=1e-5)  # single precision, as above
    output.square().sum().backward()
    for layer in (model[2], model[4]):
        assert any(p.grad is not None and p.grad.any() for p in layer.attention.parameters())


def test_a_branch_with_group_norm_learns_even_where_it_sees_one_position() -> None:
    model = convert(with_norm(nn.GroupNorm(8, 8)), lambda name, layer: name == "2", kernel_expansion=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images = torch.randn(4, 3, 12, 12)
    model(images).square().mean().backward()
    assert model[2].attention.attention_size[2:] == (1, 1)
    for name, parameter in model[2].attention.named_parameters():
        assert parameter.grad.abs().max() > 1e-8, name
    optimizer.step()


@pytest.mark.parametrize(("batch_norms", "kind"), [(2, nn.GroupNorm), (4, nn.BatchNorm2d)])
def test_the_kind_that_a_network_has_most_of_decides(batch_norms: int, kind: type[nn.Module]) -> None:
    groups = nn.Sequential(nn.GroupNorm(1, 8), nn.GroupNorm(2, 8))
    model = nn.Sequential(with_norm(nn.GroupNorm(4, 8)), groups, *(nn.BatchNorm2d(12) for _ in range(batch_norms)))
    assert isinstance(convert(model)[0][2].attention.norm1, kind)


def test_branches_do_not_decide_the_norm_of_later_ones() -> None:
    model = convert(with_norm(nn.GroupNorm(2, 8)), "2", norm_layer=nn.BatchNorm2d)
    assert isinstance(convert(model, "4")[4].attention.norm1, nn.GroupNorm)


def test_a_frozen_backbone_trains_its_branches_alone() -> None:
    model = with_norm(FrozenBatchNorm2d(8)).requires_grad_(False)
    convert(model, init="identity")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{layer}.attention.conv{index}.weight" for layer in (2, 4) for index in (1, 2)}


def test_the_norm_can_be_chosen_or_left_out() -> None:
    assert isinstance(convert(network(), norm_layer=nn.InstanceNorm2d)[3].attention.norm1, nn.InstanceNorm2d)
    plain = network()
    model = convert(copy.deepcopy(plain), norm_layer=None, init="identity", activation="relu")
    assert isinstance(model[3].attention.norm1, nn.Identity)
    images = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(model(images), plain(images), rtol=1e-5, atol=1e-5)  # single precision, as above


# --- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(select=lambda name, module: False), r"no convolution of Sequential was selected.*'0' \(Conv2d\(3, 8"),
        (dict(select="2"), r"no convolution is called '2'; near it: '2\.\*', '2\.0', '2\.2'"),
        (dict(select="2.3"), r"no convolution is called '2\.3'; near it: '2\.[02]'"),
        (dict(select=["0", "layer4.*"]), r"no convolution is called 'layer4\.\*'; near it: '0', '2\.0'"),
        (dict(select=re.compile("2")), r"no convolution is called '2'; near it: '2\.\*'"),
        (dict(select=[]), r"no convolution of Sequential was selected"),
        (dict(activation="gelu"), r"layer '2.2': AWConv2d: activation must be one of"),
        (dict(out_expansion=8), r"layer '3': AWConv2d: out_expansion must divide out_channels, 4, got 8"),
        (dict(init="zero"), r"init must be 'fresh' or 'identity', got 'zero'"),
    ],
)
def test_an_error_names_the_layer_and_leaves_the_model(arguments: dict[str, Any], message: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=message):
        convert(model, **arguments)
    assert set(kinds(model).values()) == {"Conv2d"}


def test_a_selection_that_cannot_be_converted_says_why() -> None:
    model = nn.Sequential(OwnForward(3, 4, 3))
    with pytest.raises(ValueError, match="can be converted exactly: '0': OwnForward computes something of its own"):
        convert(model, "0")


def test_near_names_are_those_spelt_alike() -> None:
    model = timm.create_model("resnet18")
    with pytest.raises(ValueError, match=r"near it: .*'layer4.1.conv2'"):
        convert(model, "layer4.1.cnv2")


def test_a_layer_that_was_converted_before_is_known() -> None:
    model = convert(network(), "3")
    with pytest.raises(ValueError, match="'3' is an AW-convolution already"):
        convert(model, "3")
    with pytest.raises(ValueError, match=r"'\[3\]' is an AW-convolution already; leave it out"):
        convert(model, re.compile("[3]"))
    with pytest.raises(ValueError, match="it has AW-convolutions only"):
        convert(AWConv2d(4, 4, 3))


def test_an_argument_that_no_layer_has_is_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'reductoin'"):
        convert(network(), reductoin=4)


def test_arguments_of_other_types_are_named() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got 'resnet18'"):
        convert("resnet18")
    for select in (3, ["0", 3], nn.Conv2d):
        with pytest.raises(TypeError, match=r"select must be a layer's name, a glob .*got (3|<class)"):
            convert(network(), select)
    for norm_layer in ("batch", nn.BatchNorm2d(4)):
        with pytest.raises(TypeError, match=r"norm_layer must be 'match', None or something called .*got"):
            convert(network(), norm_layer=norm_layer)


def test_a_model_without_convolutions_is_refused() -> None:
    for select in (None, "layer4"):
        with pytest.raises(ValueError, match="no convolution of Linear was selected for conversion; it has none"):
            convert(nn.Linear(3, 4), select)


FOLDED = ["repvgg_a0", "mobileone_s0", "repvit_m0_9", "fastvit_t8"]


@pytest.mark.parametrize("name", FOLDED)
def test_folding_a_converted_network_is_an_error_that_loses_nothing(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = convert(timm.create_model(name, num_classes=3)).eval()
    assert "would lose the attention" in caplog.text
    layers = converted(model)
    for network in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match=r"lose their attention\. Fold the plain network first"):
            timm.utils.reparameterize_model(network)
        assert converted(network) == layers


def test_folding_around_a_layer_is_noticed_if_it_was_selected_by_name() -> None:
    model = convert(timm.create_model("repvgg_a0", num_classes=3), "stages.0.0.conv_kxk.conv").eval()
    with pytest.raises(ValueError, match=r"lose their attention\. Fold the plain network first"):
        timm.utils.reparameterize_model(model)
    by_hand = timm.create_model("repvgg_a0", num_classes=3).eval()
    block = by_hand.stages[0][0].conv_kxk
    block.conv = convert(block.conv)
    assert not converted(timm.utils.reparameterize_model(by_hand))  # as the documentation warns


@pytest.mark.parametrize("name", FOLDED)
def test_a_folded_network_is_converted_exactly(name: str) -> None:
    model = timm.create_model(name, num_classes=3).train()
    images = torch.randn(8, 3, 64, 64)
    with torch.no_grad():
        model(images)  # statistics other than 0 and 1
        folded = timm.utils.reparameterize_model(model.eval())
        expected = folded(images)
        convert(folded, init="identity")
        assert len(converted(folded)) > 5
        torch.testing.assert_close(folded(images), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_a_method_that_only_has_the_name_of_folding_is_left_alone() -> None:
    class Fusion(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def fuse(self, first: Tensor, second: Tensor) -> Tensor:
            return first + second

        def forward(self, input: Tensor) -> Tensor:
            return self.fuse(input, self.conv(input))

    model = convert(Fusion(), "conv")
    assert model(torch.randn(2, 4, 5, 5)).shape == (2, 4, 5, 5)
    outside = nn.Sequential(nn.Conv2d(3, 4, 3), timm.create_model("repvgg_a0", num_classes=3).stages[0][0])
    convert(outside, "0")
    outside[1].reparameterize()  # which folds no AW-convolution
    assert isinstance(outside[1].conv_kxk if hasattr(outside[1], "conv_kxk") else outside[1].reparam_conv, nn.Module)


def test_a_norm_after_the_layer_is_folded_into_it_exactly() -> None:
    model = convert(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)), "0")
    images = torch.randn(8, 4, 9, 9)
    with torch.no_grad():
        model.train()(images)
        model.eval()
        fused = torch.nn.utils.fusion.fuse_conv_bn_eval(model[0], model[1])
        assert isinstance(fused, AWConv2d)
        torch.testing.assert_close(fused(images), model(images), rtol=1e-4, atol=1e-5)


def test_lora_beside_a_layer_is_exact_and_merged_before_conversion() -> None:
    class LoRA(nn.Module):
        """As peft's: beside its layer, until it is merged into the layer's weight."""

        def __init__(self, layer: nn.Conv2d) -> None:
            super().__init__()
            self.base_layer, self.merged = layer, False
            self.register_buffer("delta", torch.randn_like(layer.weight))

        def merge(self, safe_merge: bool = False) -> None:
            self.base_layer.weight.data += self.delta
            self.merged = True

        def forward(self, input: Tensor) -> Tensor:
            output = self.base_layer(input)
            return output if self.merged else output + nn.functional.conv2d(input, self.delta)

    model, images = LoRA(nn.Conv2d(4, 8, 3)), torch.randn(2, 4, 6, 6)
    merged = copy.deepcopy(model)
    expected = model(images)
    convert(model, "base_layer", init="identity")
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"LoRA\.merge\(\) would make"):
        model.merge(safe_merge=True)
    merged.merge()
    convert(merged, "base_layer", init="identity")
    torch.testing.assert_close(merged(images), expected, rtol=1e-4, atol=1e-4)
