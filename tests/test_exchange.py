"""One convolution to one AW-convolution, and back."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import Tensor, nn

import awconv
from awconv import AWConv1d, AWConv2d, AWConv3d, convert, is_converted
from awconv.layers import AWConv2dSame
from awconv.ops.naive import expand
from tests.networks import moved

KINDS = [
    (AWConv1d, nn.Conv1d(4, 6, 3, padding=1), torch.randn(2, 4, 9)),
    (AWConv2d, nn.Conv2d(4, 6, 3, 2, 1, groups=2, bias=False, padding_mode="reflect"), torch.randn(2, 4, 9, 9)),
    (AWConv2dSame, Conv2dSame(4, 6, 3, stride=2), torch.randn(2, 4, 9, 9)),
    (AWConv3d, nn.Conv3d(4, 6, (1, 2, 3), dilation=(1, 1, 2)), torch.randn(2, 4, 3, 5, 9)),
]
OF_EACH_KIND = pytest.mark.parametrize(
    ("layer", "conv", "images"), KINDS, ids=lambda value: getattr(value, "__name__", "")
)


@OF_EACH_KIND
def test_the_layer_takes_a_convolutions_place_and_gives_it_back(layer: type, conv: nn.Module, images: Tensor) -> None:
    conv = copy.deepcopy(conv).double().eval()
    made = layer.from_conv(conv, init="identity", reduction=2)
    assert type(made) is layer
    assert (made.weight, made.bias) == (conv.weight, conv.bias)
    assert not made.training
    # float64; an algorithm may add in another order
    torch.testing.assert_close(made(images.double()), conv(images.double()), rtol=1e-12, atol=1e-12)
    back = made.to_conv()
    assert type(back) is type(conv)
    assert back.weight is conv.weight
    assert str(back) == str(conv)
    assert torch.equal(back(images.double()), conv(images.double()))


@OF_EACH_KIND
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("init", ["fresh", "identity"])
def test_a_layer_of_constant_attention_is_the_plain_convolution_of_its_map(
    layer: type, conv: nn.Module, images: Tensor, residual: bool, init: str
) -> None:
    made = layer.from_conv(copy.deepcopy(conv).double(), init=init, residual=residual)
    made = moved(made).eval()
    images = images.double()
    for image in images.split(1):
        attention = made.attention(image)
        plain = made.to_conv(attention[0])
        rates = [size // part for size, part in zip(made.weight.shape, attention.shape[1:], strict=True)]
        map_of_weights = expand(attention, rates)[0]
        added = made.weight if residual or init == "identity" else 0  # a relative map is of the residual form
        torch.testing.assert_close(plain.weight, added + map_of_weights * made.weight, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(plain(image), made(image), rtol=1e-11, atol=1e-11)  # float64, as above
        assert plain.bias is made.bias


def test_the_mean_map_makes_the_mean_output_where_the_images_are_alike_otherwise() -> None:
    layer = AWConv2d(4, 6, 3, bias=False).double().eval()
    attention = torch.rand(3, 6, 1, 3, 3).double()
    image = torch.randn(1, 4, 5, 5).double()
    outputs = awconv.aw_conv2d(image.expand(3, -1, -1, -1), layer.weight, attention)
    # float64; the convolution is linear in its weights
    torch.testing.assert_close(layer.to_conv(attention.mean(0))(image)[0], outputs.mean(0), rtol=1e-10, atol=1e-10)


def test_a_layer_that_has_learnt_is_not_made_plain_by_mistake() -> None:
    layer = moved(AWConv2d.from_conv(nn.Conv2d(4, 6, 3), init="identity"))
    with pytest.raises(ValueError, match=r"AWConv2d\.to_conv: the attention of this layer is not the identity"):
        layer.to_conv()
    gained = moved(AWConv2d.from_conv(nn.Conv2d(4, 6, 3), init="identity", input_gain=True))
    with pytest.raises(ValueError, match="says nothing of the layer's gain over input channels"):
        gained.to_conv(torch.zeros(6, 1, 3, 3))


@pytest.mark.parametrize(
    ("attention", "error", "message"),
    [
        (torch.zeros(2, 6, 1, 3, 3), ValueError, r"shape \(6, 1, 3, 3\), got \(2, 6, 1, 3, 3\); take its mean"),
        (torch.zeros(6, 1, 3, 2), ValueError, r"shape \(6, 1, 3, 3\), got \(6, 1, 3, 2\)$"),
        (torch.full((6, 1, 3, 3), float("nan")), ValueError, "must be finite"),
        (0.5, TypeError, "must be a Tensor, got float"),
    ],
)
def test_a_map_that_is_none_is_named(attention: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AWConv2d(4, 6, 3).to_conv(attention)


class Own(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


def test_what_is_no_convolution_of_the_kind_is_named() -> None:
    with pytest.raises(TypeError, match=r"AWConv2d\.from_conv: conv must be an nn\.Conv2d, got Conv1d"):
        AWConv2d.from_conv(nn.Conv1d(3, 4, 3))
    with pytest.raises(TypeError, match=r"must be an nn\.Conv2d, got AWConv2d"):
        AWConv2d.from_conv(AWConv2d(3, 4, 3))
    with pytest.raises(TypeError, match=r"got Sequential; awconv\.convert replaces"):
        AWConv2d.from_conv(nn.Sequential(nn.Conv2d(3, 4, 3)))
    with pytest.raises(TypeError, match=r"counterpart of a Conv2d is an AWConv2d, .*AWConv2d\.from_conv"):
        AWConv2dSame.from_conv(nn.Conv2d(3, 4, 3))
    with pytest.raises(TypeError, match="there is no argument ratio"):
        AWConv2d.from_conv(nn.Conv2d(3, 4, 3), ratio=2)
    with pytest.raises(ValueError, match="computes something of its own"):
        AWConv2d.from_conv(Own(3, 4, 3))


def test_a_converted_network_is_told_from_a_plain_one() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 3)))
    assert not is_converted(model)
    assert is_converted(convert(model, init="identity"))
    assert is_converted(model[1][0])
    assert not is_converted(awconv.revert(model))
    assert not is_converted(convert(model, layer="odconv"))
    with pytest.raises(TypeError, match=r"is_converted: model must be an nn\.Module, got 'resnet18'"):
        is_converted("resnet18")
