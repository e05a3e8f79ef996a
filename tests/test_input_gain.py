"""Gains over input channels, ``input_gain=True``."""

from __future__ import annotations

import copy
import itertools
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import awconv
from awconv import AWConv1d, AWConv2d, AWConv3d, BranchSpec
from awconv.compare.ablation import arms
from awconv.explain.maps import aw_layers, gain_name, maps_and_gains
from awconv.explain.measure import _kernel
from awconv.explain.worth import logits_of, mean_of, zero
from awconv.fold_layers import gathered
from awconv.fuse import FusedBranch
from awconv.models.pretrained import completed_by_identity
from tests.networks import moved, network

LAYERS = {1: AWConv1d, 2: AWConv2d, 3: AWConv3d}
POOL = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def branch_of(branch: Any, pooled: Tensor) -> Tensor:
    """What the paper's branch makes of a pooled input in evaluation, with one axis of positions."""

    def normalised(values: Tensor, norm: Any) -> Tensor:
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        return (values - norm.running_mean[:, None]) * scale[:, None] + norm.bias[:, None]

    hidden = torch.einsum("hc,nct->nht", branch.conv1.weight.flatten(1), pooled.flatten(2))
    hidden = normalised(hidden, branch.norm1).clamp(min=0)
    last = normalised(torch.einsum("oh,nht->not", branch.conv2.weight.flatten(1), hidden), branch.norm2)
    return 1 / (1 + torch.exp(-last))


def by_loops(layer: Any, input: Tensor) -> Tensor:
    """O[n,p,y] = sum_c,t (1 + a[n,p,t]) (1 + g[n,c]) K[p,c,t] I[n,c,y * stride + t], padded beforehand."""
    dims, unit = input.dim() - 2, 1 if layer.residual else 0
    gain = branch_of(layer.input_attention, input.flatten(2).mean(2)[..., None])[..., 0] + unit
    pooled = POOL[dims](input * gain.reshape(*gain.shape, *[1] * dims), layer.kernel_size)
    attention = branch_of(layer.attention, pooled).reshape(len(input), layer.out_channels, *layer.kernel_size) + unit
    sides = [side for padding in reversed(layer.padding) for side in (padding, padding)]
    padded = F.pad(input, sides, mode={"zeros": "constant"}.get(layer.padding_mode, layer.padding_mode))
    sizes = [
        (length - kernel) // stride + 1
        for length, kernel, stride in zip(padded.shape[2:], layer.kernel_size, layer.stride, strict=True)
    ]
    output = torch.zeros(len(input), layer.out_channels, *sizes, dtype=torch.float64)
    inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    for n, p, c in itertools.product(range(len(input)), range(layer.out_channels), range(inputs)):
        channel = p // outputs * inputs + c
        for place in itertools.product(*map(range, sizes)):
            for tap in itertools.product(*map(range, layer.kernel_size)):
                at = tuple(y * s + t for y, s, t in zip(place, layer.stride, tap, strict=True))
                product = attention[n, p][tap] * gain[n, channel] * layer.weight[p, c][tap] * padded[n, channel][at]
                output[n, p][place] += product
    return output + layer.bias.reshape(-1, *[1] * dims)


@st.composite
def layers_and_inputs(draw: Any) -> tuple[Any, Tensor]:
    dims, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2]))
    kernel = tuple(draw(st.integers(1, 3 if dims < 3 else 2)) for _ in range(dims))
    padding = tuple(draw(st.integers(0, 1)) for _ in range(dims))
    torch.manual_seed(draw(st.integers(0, 1000)))
    layer = LAYERS[dims](
        *(groups * draw(st.integers(1, 2)) for _ in range(2)),
        *(kernel, draw(st.integers(1, 2)), padding),
        groups=groups,
        padding_mode=draw(st.sampled_from(["zeros", "circular", "replicate"])),
        residual=draw(st.booleans()),
        input_gain=True,
        dtype=torch.float64,
    )
    for branch in layer.branches():
        for norm in (branch.norm1, branch.norm2):
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                nn.init.normal_(tensor)
    size = [draw(st.integers(3, 5 if dims < 3 else 3)) for _ in range(dims)]
    return layer.eval(), torch.randn(draw(st.integers(1, 2)), layer.in_channels, *size, dtype=torch.float64)


@settings(max_examples=20, deadline=None)
@given(layers_and_inputs())
@torch.no_grad()
def test_the_layer_is_the_sum_of_its_formula(case: tuple[Any, Tensor]) -> None:
    layer, input = case
    torch.testing.assert_close(layer(input), by_loops(layer, input), rtol=1e-10, atol=1e-10)  # both in float64


@pytest.mark.parametrize("residual", [True, False])
def test_the_gradients_are_those_of_finite_differences(residual: bool) -> None:
    layer = AWConv2d(3, 2, 2, input_gain=True, residual=residual, dtype=torch.float64)  # with batch statistics
    input = torch.randn(3, 3, 4, 3, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def call(input: Tensor, *parameters: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        output: Tensor = torch.func.functional_call(layer, given, (input,))
        return output

    assert torch.autograd.gradcheck(call, (input, *layer.parameters()))


def test_training_leaves_the_tensors_of_others_as_they_were() -> None:
    """The scaling's backward adds in place: an input with a second use, and the gradient that comes in, must not see
    it."""
    layer = AWConv2d(4, 4, 3, padding=1, input_gain=True)
    input = torch.randn(2, 4, 6, 6, requires_grad=True)
    twice = input * 1
    got = torch.autograd.grad((layer(twice) + twice).square().sum(), input)[0]
    with torch.autograd.forward_ad.dual_level():  # where the node is not used
        want = torch.autograd.grad((layer(input) + input).square().sum(), input)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)  # single precision, other orders of sums


@pytest.mark.parametrize("arguments", [{}, dict(residual=False), dict(activation="tanh"), dict(activation=nn.Softplus)])
def test_conversion_by_identity_changes_nothing_until_a_step(arguments: dict[str, Any]) -> None:
    plain = network()
    images = torch.randn(4, 3, 8, 8)
    model = awconv.convert(copy.deepcopy(plain), init="identity", input_gain=True, **arguments)
    for training in (True, False):
        torch.testing.assert_close(model.train(training)(images), plain.train(training)(images), rtol=1e-5, atol=1e-5)
    layer = model[3]
    assert layer.input_gain
    assert layer.is_identity()
    assert "input_gain=True" in repr(layer)
    model.train()(images).square().sum().backward()
    assert all(branch.norm2.weight.grad.abs().max() > 0 for branch in layer.branches())
    nn.init.ones_(layer.input_attention.norm2.weight)
    assert not layer.is_identity()
    with pytest.raises(ValueError, match="the attention of 1 of 2 AW-convolutions is not the identity"):
        awconv.revert(model)


def test_without_a_gain_nothing_is_added() -> None:
    layer = AWConv2d(4, 8, 3)
    assert layer.input_attention is None
    assert not layer.input_gain
    assert not [name for name in layer.state_dict() if name.startswith("input_attention")]
    assert "input_" not in repr(layer)
    old = copy.deepcopy(layer)
    del old.__dict__["input_attention"]  # as pickles of earlier versions are
    input = torch.randn(2, 4, 6, 6)
    assert torch.equal(pickle.loads(pickle.dumps(old)).eval()(input), layer.eval()(input))


def test_the_gain_follows_dtype_memory_format_and_shape_of_the_input() -> None:
    layer = AWConv2d(4, 8, 3, padding=1, input_gain=True).eval()
    images = torch.randn(2, 4, 6, 6)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert layer.scale_input(channels_last).is_contiguous(memory_format=torch.channels_last)
    assert layer(channels_last).is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.scale_input(images).dtype == torch.float32
        assert layer.scale_input(images.bfloat16()).dtype == layer(images).dtype == torch.bfloat16
    torch.testing.assert_close(layer(images[0]), layer(images)[0], rtol=1e-5, atol=1e-5)  # other orders of sums
    assert layer(images[:0]).shape == (0, 8, 6, 6)
    with pytest.raises(ValueError, match=r"input must have shape \(N, 4, H, W\), got \(2, 5, 6, 6\)"):
        layer(torch.randn(2, 5, 6, 6))
    with pytest.raises(ValueError, match="AWConv2d: input_gain must be True or False, got 'yes'"):
        AWConv2d(4, 8, 3, input_gain="yes")  # type: ignore[arg-type]


def test_the_layer_is_traced_and_exported_with_a_dynamic_batch() -> None:
    layer = moved(AWConv2d(4, 8, 3, padding=1, input_gain=True))
    images = torch.randn(5, 4, 6, 6)
    exported = torch.export.export(layer, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for other in (torch.fx.symbolic_trace(layer), exported.module()):
        torch.testing.assert_close(other(images), layer(images), rtol=1e-5, atol=1e-5)


def test_both_branches_are_branches() -> None:
    model = awconv.convert(network(), init="identity", input_gain=True)
    layers = [module for module in model.modules() if isinstance(module, AWConv2d)]
    expected = sum(p.numel() for layer in layers for branch in layer.branches() for p in branch.parameters())
    groups = {group["name"]: group["params"] for group in awconv.parameter_groups(model)}
    assert sum(parameter.numel() for parameter in groups["branch"]) == expected
    with pytest.raises(ValueError, match="24 of attention branches"):
        awconv.check_optimizer(model, torch.optim.SGD(groups["rest"] + groups["weight"], lr=0.1))
    found = awconv.summary(model, torch.zeros(2, 3, 8, 8))
    assert found.parameters_added == expected
    without = awconv.summary(awconv.convert(network()), torch.zeros(2, 3, 8, 8))
    own = [layer.operations - other.operations for layer, other in zip(found.converted, without.converted, strict=True)]  # type: ignore[operator]
    # 8 channels of 8x8 and of 3x3, whose branches have 4 hidden channels; a batch of 2
    assert own == [2 * (8 * 4 + 4 * 8 + 8 * 8 * 8), 2 * (8 * 4 + 4 * 8 + 8 * 3 * 3)]
    assert awconv.train_only(model, "branch").parts == {"branch": expected}


def test_a_fused_network_computes_the_same() -> None:
    model = moved(awconv.convert(network(), input_gain=True))
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(images)
        fused = awconv.fuse(model)
        torch.testing.assert_close(fused(images), expected, rtol=1e-4, atol=1e-4)  # single precision
    assert sum(isinstance(module, FusedBranch) for module in fused.modules()) == 4


def test_folding_multiplies_the_weights_by_the_mean_of_both_gains() -> None:
    layer = moved(AWConv2d(6, 4, 3, groups=2, in_expansion=1, out_expansion=2, input_gain=True, dtype=torch.float64))
    classifier = nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = torch.randn(5, 6, 7, 7, dtype=torch.float64)
    with torch.no_grad():
        attention = layer.attention(layer.scale_input(images)) + 1
        of_input = layer.input_attention(images)[:, 0, :, 0, 0] + 1
    mean = torch.zeros(layer.weight.shape, dtype=torch.float64)
    for n, p, c in itertools.product(range(5), range(4), range(3)):
        mean[p, c] += attention[n, p // 2, c] * of_input[n, p // 2 * 3 + c] / 5
    with gathered({"0": layer}) as gains, torch.no_grad():
        classifier(images)
    effective = torch.stack([attention[n, 0, 1] * of_input[n, 1] for n in range(5)])
    torch.testing.assert_close(gains["0"].mean()[0, 1], effective.mean(0))
    report = awconv.fold(classifier, [(images, torch.zeros(5, dtype=torch.long))], max_drop=100)
    assert report.folded == ("0",)
    assert type(classifier[0]) is nn.Conv2d
    torch.testing.assert_close(classifier[0].weight, layer.weight * mean, rtol=1e-10, atol=1e-10)  # both in float64


def test_explanations_count_the_gain_and_their_maps_leave_it_out() -> None:
    model = nn.Sequential(*moved(awconv.convert(network(), input_gain=True)), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images, layers = torch.randn(4, 3, 8, 8), aw_layers(model)
    maps = awconv.attention_maps(model, images)
    assert {name: tuple(one.shape) for name, one in maps.items()} == {"2.2": (4, 8, 1, 3, 3), "3": (4, 4, 1, 1, 3)}
    both = maps_and_gains(model, layers, images)
    assert both[gain_name("2.2")].shape == (4, 1, 8, 1, 1)
    plain = awconv.revert(copy.deepcopy(model), drop_attention=True)
    # single precision, in another order; a map of 0 and a gain of 0 leave the weights as they stand
    torch.testing.assert_close(logits_of(model, [images], layers, zero), plain(images).detach(), rtol=1e-4, atol=1e-4)
    layer, image = layers["2.2"], 1
    kernel = _kernel(layer, both["2.2"][image], both[gain_name("2.2")][image], 5, image)
    channel = 4 + kernel.input  # channel 5 is of the second group, whose inputs are 4 to 7
    factor = (1 + both["2.2"][image, 5, 0]) * (1 + both[gain_name("2.2")][image, 0, channel, 0, 0])
    torch.testing.assert_close(kernel.effective, layer.weight.detach()[5, kernel.input] * factor)


def test_what_a_layer_is_worth_is_measured_with_the_means_of_both() -> None:
    layer = moved(AWConv2d(6, 4, 3, groups=2, input_gain=True))
    model, images = nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten()), torch.randn(5, 6, 7, 7)
    means = {name: maps.mean(0, keepdim=True) for name, maps in maps_and_gains(model, aw_layers(model), images).items()}
    changed = logits_of(model, [images], aw_layers(model), mean_of(means, "0", gain_name("0")))
    of_input = means["0.input_attention"].reshape(2, 1, 3).expand(2, 2, 3).reshape(4, 3, 1, 1)
    weight = layer.weight * (1 + means["0"][0]) * (1 + of_input)
    plain = F.conv2d(images, weight, layer.bias, groups=2).mean((2, 3))
    torch.testing.assert_close(changed, plain.detach(), rtol=1e-4, atol=1e-4)  # single precision, in another order


def test_adapters_hold_the_gain_and_those_of_before_still_load(tmp_path: Path) -> None:
    base = network()
    model = awconv.convert(copy.deepcopy(base), init="identity", input_gain=True)
    awconv.train_only(model, "branch")
    moved(model)
    awconv.save_adapter(model, tmp_path / "gain.safetensors")
    other = awconv.convert(copy.deepcopy(base), init="identity", input_gain=True)
    awconv.load_adapter(other, tmp_path / "gain.safetensors")
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(other.eval()(images), model(images))
    without = awconv.convert(copy.deepcopy(base), init="identity")
    with pytest.raises(ValueError, match=r"has input_gain=True, and the model's input_gain=False; .*input_gain=True\)"):
        awconv.load_adapter(without, tmp_path / "gain.safetensors")
    awconv.train_only(without, "branch")
    awconv.save_adapter(without, tmp_path / "plain.safetensors")
    assert b"input_gain" not in (tmp_path / "plain.safetensors").read_bytes()  # as in files of earlier versions
    with pytest.raises(ValueError, match=r"input_gain=False, and the model's input_gain=True; .*, input_gain=False\)"):
        awconv.load_adapter(other, tmp_path / "plain.safetensors")


def test_weights_without_the_gain_are_completed_by_identity_and_told_of_else(caplog: pytest.LogCaptureFixture) -> None:
    source = moved(awconv.convert(network(), init="identity")).state_dict()
    model = awconv.convert(network(), init="identity", input_gain=True)
    model.load_state_dict(completed_by_identity(source, model))
    reference = awconv.convert(network(), init="identity")
    reference.load_state_dict(source)
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model.eval()(images), reference.eval()(images), rtol=1e-5, atol=1e-5)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        awconv.convert(network(), input_gain=True).load_state_dict(source, strict=False)
    assert [record.getMessage()[:43] for record in caplog.records] == ["weights without a gain over input channels "]


def test_other_branches_and_pools_are_of_the_map_alone() -> None:
    def make(spec: BranchSpec) -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Conv2d(spec.in_channels, 8, 1), nn.Unflatten(1, (8, 1)))

    layer = AWConv2d(4, 8, 3, branch=make, input_gain=True)
    assert layer(torch.randn(2, 4, 6, 6)).shape == (2, 8, 4, 4)
    pooled = AWConv2d(4, 8, 3, pool=nn.AdaptiveMaxPool2d, input_gain=True).eval()
    images = torch.randn(2, 4, 6, 6)
    means = images.mean((2, 3), keepdim=True).expand_as(images)
    torch.testing.assert_close(pooled.input_attention(images), pooled.input_attention(means), rtol=1e-5, atol=1e-5)


def test_an_ablation_varies_the_gain() -> None:
    *_, change = arms("aw_resnet8_cifar", ["input_gain=true"])
    assert change.arguments == ('--model.network_args={"aw_args": {"input_gain": true}}',)


def test_an_activation_for_the_maps_channels_alone_is_refused() -> None:
    message = (
        r"AWConv2d\(8, 12\): with input_gain, activation must take the gain's 8 channels as well as the map's; PReLU"
    )
    with pytest.raises(ValueError, match=message):
        AWConv2d(8, 12, 3, activation=nn.PReLU(12), input_gain=True)
    AWConv2d(8, 12, 3, activation=nn.PReLU(), input_gain=True)
