"""ODConv with one kernel, a peer of AW-convolution."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from timm.layers import Conv2dSame
from torch import Tensor, nn

import awconv
from awconv import ODConv2d
from awconv.bench.model import competitors
from awconv.models import BASELINES, variants
from awconv.models.pretrained import load_weights
from awconv.odconv import ODAttention
from awconv.parameter_groups import branch_parameters
from tests.networks import network


def gains(attention: Any, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In evaluation alpha_c, shape (N, C1), alpha_f, (N, C2) or (N, 1), and alpha_s, (N, h * w) or (N, 1)."""
    pooled = input.sum((2, 3)) / (input.shape[2] * input.shape[3])
    norm = attention.norm
    hidden = pooled @ attention.trunk.weight.flatten(1).T
    hidden = (hidden - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    hidden = hidden.clamp(min=0)

    def head(conv: Any) -> Tensor:
        if conv is None:
            return torch.ones(len(input), 1, dtype=input.dtype)
        return 1 / (1 + torch.exp(-(hidden @ conv.weight.flatten(1).T + conv.bias)))

    return head(attention.channel_head), head(attention.filter_head), head(attention.spatial_head)


def by_loops(layer: Any, input: Tensor) -> Tensor:
    """y[n,p] = sum_c,t alpha_f[n,p] alpha_c[n,c] alpha_s[n,t] W[p,c,t] x[n,c] + bias[p], over all places."""
    of_input, of_output, of_taps = gains(layer.attention, input)
    height, width = layer.kernel_size
    padded = F.pad(input, [layer.padding[1]] * 2 + [layer.padding[0]] * 2)
    sizes = [
        (length - dilation * (kernel - 1) - 1) // stride + 1
        for length, kernel, stride, dilation in zip(
            padded.shape[2:], layer.kernel_size, layer.stride, layer.dilation, strict=True
        )
    ]
    output = torch.zeros(len(input), layer.out_channels, *sizes, dtype=torch.float64)
    inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    for n, p, c in itertools.product(range(len(input)), range(layer.out_channels), range(inputs)):
        channel = p // outputs * inputs + c
        for (y, x), (i, j) in itertools.product(
            itertools.product(*map(range, sizes)), itertools.product(range(height), range(width))
        ):
            gain = of_output[n, p % of_output.shape[1]] * of_input[n, channel]
            gain = gain * of_taps[n, (i * width + j) % of_taps.shape[1]]
            row, column = y * layer.stride[0] + i * layer.dilation[0], x * layer.stride[1] + j * layer.dilation[1]
            output[n, p, y, x] += gain * layer.weight[p, c, i, j] * padded[n, channel, row, column]
    return output + layer.bias[:, None, None]


@st.composite
def layers_and_inputs(draw: Any) -> tuple[Any, Tensor]:
    torch.manual_seed(draw(st.integers(0, 1000)))
    groups, depthwise = draw(st.sampled_from([1, 2])), draw(st.booleans())
    inputs, outputs = (groups * draw(st.integers(1, 2)) for _ in range(2))
    layer = ODConv2d(
        inputs,
        inputs if depthwise else outputs,
        (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        draw(st.integers(1, 2)),
        (draw(st.integers(0, 1)), draw(st.integers(0, 2))),
        draw(st.integers(1, 2)),
        inputs if depthwise else groups,
        dtype=torch.float64,
    )
    for part in layer.attention.modules():
        for name in ("bias", "running_mean"):
            tensor = getattr(part, name, None)
            if isinstance(tensor, Tensor):
                nn.init.normal_(tensor)
    return layer.eval(), torch.randn(2, inputs, *(draw(st.integers(5, 6)) for _ in range(2)), dtype=torch.float64)


@settings(max_examples=20, deadline=None)
@given(layers_and_inputs())
@torch.no_grad()
def test_the_layer_is_the_sum_of_the_papers_equation(case: tuple[Any, Tensor]) -> None:
    layer, input = case
    torch.testing.assert_close(layer(input), by_loops(layer, input), rtol=1e-10, atol=1e-10)  # both in float64


def test_the_gradients_are_those_of_finite_differences() -> None:
    layer = ODConv2d(3, 2, 2, padding=1, dtype=torch.float64)  # with batch statistics
    input = torch.randn(3, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def call(input: Tensor, *parameters: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (input,))
        return output

    assert torch.autograd.gradcheck(call, (input, *layer.parameters()))


def test_it_has_the_authors_heads_and_start() -> None:
    layer = ODConv2d(512, 64, 3)
    attention = layer.attention
    assert attention.trunk.weight.shape == (32, 512, 1, 1)
    assert attention.trunk.bias is None
    heads = (attention.channel_head, attention.filter_head, attention.spatial_head)
    assert [head.out_channels for head in heads if head is not None] == [512, 64, 9]
    assert not any(head.bias.any() for head in heads if head is not None and head.bias is not None)
    # 16,384 normal values: their deviation is within 3 % of sqrt(2 / fan-out) but for one in a billion draws
    assert float(attention.trunk.weight.detach().std()) == pytest.approx((2 / 32) ** 0.5, rel=0.03)
    assert ODConv2d(8, 8, 3, groups=8).attention.filter_head is None
    assert ODConv2d(8, 16, 3, groups=8).attention.filter_head is not None
    assert ODConv2d(8, 16, 1).attention.spatial_head is None
    assert ODConv2d(64, 8, 3, reduction=2).attention.trunk.out_channels == 32


def test_it_takes_what_a_plain_convolution_takes() -> None:
    layer = ODConv2d(4, 8, 3, padding="same", padding_mode="circular").eval()
    images = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(layer(images[0]), layer(images)[0], rtol=1e-5, atol=1e-5)  # other orders of sums
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert ODConv2d(4, 8, 3)(channels_last).is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(images).dtype == torch.bfloat16
    wrapped = nn.Sequential(nn.ConstantPad2d(0, 0.0), layer)
    exported = torch.export.export(layer, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for other in (torch.fx.symbolic_trace(wrapped), exported.module()):
        torch.testing.assert_close(other(images[:1]), layer(images[:1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(reduction=0), ValueError, "ODConv2d: reduction must be a positive integer, got 0"),
        (dict(norm_layer="layer"), TypeError, "ODConv2d: norm_layer must be 'batch', None or something called"),
        (dict(norm_layer=nn.BatchNorm2d(4)), TypeError, "ODConv2d: norm_layer must be 'batch', None or something call"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ODConv2d(4, 8, 3, **arguments)


def test_wrong_inputs_are_named() -> None:
    with pytest.raises(ValueError, match=r"ODConv2d: input must have shape \(N, 4, H, W\), got \(2, 5, 6, 6\)"):
        ODConv2d(4, 8, 3)(torch.randn(2, 5, 6, 6))
    with pytest.raises(ValueError, match="ODConv: the attention branch cannot take batch statistics of one value"):
        ODConv2d(4, 8, 3)(torch.randn(1, 4, 6, 6))


def test_conversion_puts_it_in_the_places_that_aw_takes() -> None:
    plain = network()
    model = awconv.convert(copy.deepcopy(plain), layer="odconv", reduction=4, norm_layer=None)
    assert [name for name, module in model.named_modules() if isinstance(module, ODConv2d)] == ["2.2", "3"]
    assert (model[3].reduction, model[3].padding_mode, type(model[3].attention.norm)) == (4, "circular", nn.Identity)
    assert torch.equal(model[2][2].weight, plain[2][2].weight)
    again = awconv.convert(copy.deepcopy(plain), "3", layer="odconv")
    assert [name for name, module in again.named_modules() if isinstance(module, ODConv2d)] == ["3"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(layer="dynamic"), ValueError, "layer must be 'aw' or 'odconv', got 'dynamic'"),
        (dict(layer="odconv", init="identity"), ValueError, "layer='odconv' takes init='fresh' alone"),
        (
            dict(layer="odconv", activation="tanh", pool=None),
            TypeError,
            "takes reduction, .* alone, got activation, pool",
        ),
        (dict(layer="odconv", reduction=0), ValueError, "layer '2.2': ODConv2d: reduction must be a positive integer"),
    ],
)
def test_conversion_refuses_what_odconv_has_not(arguments: Any, error: type[Exception], message: str) -> None:
    model = network()
    with pytest.raises(error, match=message):
        awconv.convert(model, **arguments)
    assert not any(isinstance(module, ODConv2d) for module in model.modules())


def test_other_kinds_of_convolutions_have_no_such_layer() -> None:
    with pytest.raises(ValueError, match="'0': there is no such layer for Conv2dSame, only for Conv2d"):
        awconv.convert(nn.Sequential(Conv2dSame(3, 4, 3)), "0", layer="odconv")


def test_it_is_a_branch_to_optimisers_and_no_aw_convolution_to_the_rest() -> None:
    model = awconv.convert(network(), layer="odconv")
    images = torch.randn(2, 3, 8, 8)
    own = {p for m in model.modules() if isinstance(m, ODAttention) for p in m.parameters()}
    assert branch_parameters(model) == own
    assert [group["name"] for group in awconv.parameter_groups(model)] == ["branch", "weight", "rest"]
    found = awconv.summary(model, images)
    assert found.parameters_added == sum(parameter.numel() for parameter in own)
    first = found.layers[2]
    assert first.reason == "it is an ODConv2d, which has attention of its own"
    # a batch of 2; the trunk and its heads, the weights, an input of 8 channels of 8x8
    assert first.operations == 2 * (16 * (8 + 8 + 8 + 9) + 8 * 4 * 9 + 8 * 8 * 8)
    assert found.operations == awconv.summary(network(), images).operations + found.operations_added  # type: ignore[operator]
    with pytest.raises(ValueError, match="'3': it is an ODConv2d, which has attention of its own"):
        awconv.convert(model, "3")
    with pytest.raises(ValueError, match="has no AW-convolution, so there is nothing to revert"):
        awconv.revert(model)
    model.eval()
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(awconv.fuse(model)(images), expected, rtol=1e-5, atol=1e-5)
    assert sum(isinstance(module, ODConv2d) for module in model.modules()) == 2


def test_an_adapter_holds_it_with_its_statistics(tmp_path: Path) -> None:
    base = awconv.convert(network(), layer="odconv")
    model = copy.deepcopy(base)
    awconv.train_only(model, "branch")
    model.train()(torch.randn(4, 3, 8, 8))
    awconv.save_adapter(model, tmp_path / "od.safetensors")
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(awconv.load_adapter(base, tmp_path / "od.safetensors").eval()(images), model.eval()(images))


def test_a_converted_network_takes_the_plain_networks_file(tmp_path: Path) -> None:
    plain = timm.create_model("resnet8_cifar")
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    model = awconv.convert(timm.create_model("resnet8_cifar"), layer="odconv")
    load_weights(model, "resnet8_cifar", tmp_path / "plain.pt", converted=True)
    assert torch.equal(model.layer2[0].conv1.weight, plain.layer2[0].conv1.weight)


def test_networks_come_by_name_and_are_variants_of_their_baselines() -> None:
    for baseline in ("resnet8_cifar", "resnet20_cifar", "resnet56_cifar", "resnet18", "resnet50"):
        name = f"od_{baseline}"
        assert variants(baseline)["od"] == name
        assert BASELINES[name] == baseline
        with torch.device("meta"):
            own, aw = timm.create_model(name), timm.create_model(f"aw_{baseline}")
        places = {place for place, module in own.named_modules() if isinstance(module, ODConv2d)}
        assert places == {place for place, module in aw.named_modules() if isinstance(module, awconv.AWConv2d)}
    model = timm.create_model("od_resnet8_cifar", num_classes=7, in_chans=1, od_args=dict(reduction=2))
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert model.layer3[0].conv2.attention.trunk.out_channels == 32


def test_a_network_learns_the_digits() -> None:
    digits = load_digits()
    images = torch.tensor(digits.images[:128], dtype=torch.float32)[:, None] / 16
    targets = torch.tensor(digits.target[:128])
    torch.manual_seed(0)
    model = timm.create_model("od_resnet8_cifar", in_chans=1, num_classes=10)
    optimizer = torch.optim.SGD(awconv.parameter_groups(model), lr=0.1, momentum=0.9)
    awconv.check_optimizer(model, optimizer)
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(model(images), targets)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert model.layer1[0].conv1.attention.spatial_head.bias.any()


def test_plain_weights_in_it_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    network, plain = (timm.create_model(name) for name in ("od_resnet8_cifar", "resnet8_cifar"))
    network.load_state_dict(network.state_dict())
    assert not caplog.messages
    network.load_state_dict(plain.state_dict(), strict=False)
    (message,) = caplog.messages
    assert message.startswith("plain weights were loaded into ODConvs (the first is 'layer1.0.conv1'), which multiply")


def test_it_is_not_converted_again_to_be_timed() -> None:
    with pytest.raises(ValueError, match="od_resnet8_cifar has ODConvs; this compares AW networks"):
        competitors("od_resnet8_cifar", "auto")
