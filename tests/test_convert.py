"""Conversion of networks: which layers are converted, kept or refused."""

from __future__ import annotations

import copy
import logging
import re
from typing import Any

import pytest
import timm
import torch
from timm.layers import ScaledStdConv2d
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from awconv import AWConv1d, AWConv2d, AWConv3d, convert, revert
from tests.networks import converted, kinds, network


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
    with pytest.raises(ValueError, match="Sequential is converted already: its 2 AW-convolutions"):
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
    with pytest.raises(
        TypeError, match="there is no argument reductoin; there are select, init, norm_layer, reduction, in_expansion"
    ):
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


def test_a_network_that_is_converted_already_says_so() -> None:
    model = timm.create_model("aw_resnet8_cifar")
    with pytest.raises(
        ValueError, match=r"CifarResNet is converted already: its 6 .*select=.*there are 'conv1' .*awconv\.revert"
    ):
        convert(model)
    with pytest.raises(
        ValueError, match=r"no convolution of .* it has 'conv1' .* 6 others are AW-convolutions already"
    ):
        convert(model, lambda name, layer: False)


def test_attributes_that_a_user_put_on_a_layer_stay_on_it_there_and_back() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    model[1].f, model[1].type, model[1].reduction = -1, "a layer of a YAML", "not the branch's"
    convert(model, init="identity")
    assert (model[1].f, model[1].type, model[1].reduction) == (-1, "a layer of a YAML", 16)
    plain = revert(model)[1]
    assert (plain.f, plain.type) == (-1, "a layer of a YAML")
    assert vars(plain).keys() - vars(nn.Conv2d(4, 4, 3)).keys() == {"f", "type"}


class TestAttributesThatWouldShadow:
    def test_a_layer_that_was_compiled_gets_its_attention(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)).eval()
        model[1].compile(backend="eager")
        convert(model)
        model(torch.randn(4, 3, 9, 9)).sum().backward()
        assert all(parameter.grad is not None for parameter in model[1].attention.parameters())

    def test_a_compiled_layer_is_plain_again_where_its_attention_is_dropped(self) -> None:
        model = convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))).eval()
        model[1].compile(backend="eager")
        images = torch.randn(2, 8, 9, 9)
        for layer in (model[1].to_conv(torch.zeros(8, 1, 3, 3)), revert(model, drop_attention=True)[1]):
            assert torch.equal(layer(images), nn.functional.conv2d(images, layer.weight, layer.bias))

    def test_a_forward_of_a_users_own_is_not_lost(self) -> None:
        model = convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), init="identity")
        forward = model[1].forward
        model[1].forward = lambda input: 2 * forward(input)
        with pytest.raises(ValueError, match="the layer '1' has a forward of its own"):
            revert(model)
        with pytest.raises(ValueError, match="has a forward of its own"):
            model[1].to_conv()

    @pytest.mark.parametrize("name", ["attention", "input_attention", "branches", "is_identity", "to_conv"])
    def test_names_that_the_layer_uses_are_left_behind(self, name: str) -> None:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)).eval()
        setattr(model[1], name, "a user's")
        images = torch.randn(2, 3, 9, 9)
        before = model(images)
        convert(model, init="identity", input_gain=True)
        torch.testing.assert_close(model(images), before, rtol=1e-5, atol=1e-6)  # float32; another order of sums
        assert model[1].is_identity()
