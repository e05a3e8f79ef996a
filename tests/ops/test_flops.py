"""What torch.utils.flop_counter counts of the operators, against PyTorch's own count of plain convolutions."""

from __future__ import annotations

from math import prod

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import awconv
from awconv.branch import AttentionBranch
from awconv.ops.average_pool import average_pool

PLAIN = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def multiply_adds(run, *arguments) -> int:
    with FlopCounterMode(display=False) as counter:
        run(*arguments)
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


def problem(draw: st.DrawFn, groups: int) -> tuple[Tensor, Tensor, Tensor, dict]:
    dims = draw(st.integers(1, 3))
    group_in, group_out = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    kernel = [draw(st.integers(1, 3)) for _ in range(dims)]
    size = [draw(st.integers(3, 6)) for _ in range(dims)]
    padding = draw(st.integers(0, min(1, *[k - 1 for k in kernel], 1)))  # positions that see no pixel are not computed
    arguments = dict(stride=draw(st.integers(1, 2)), padding=padding, groups=groups)
    input = torch.randn(2, group_in * groups, *size)
    weight = torch.randn(group_out * groups, group_in, *kernel)
    blocks = draw(st.sampled_from([d for d in range(1, group_in + 1) if group_in % d == 0]))
    return input, weight, torch.rand(2, len(weight), blocks, *kernel), arguments


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, dict]:
    return problem(draw, draw(st.integers(1, 3)))


@st.composite
def dense(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, dict]:
    return problem(draw, 1)


def plain(input: Tensor, weight: Tensor, arguments: dict) -> Tensor:
    return PLAIN[weight.dim() - 2](input, weight, **arguments)


def attentive(input: Tensor, weight: Tensor, attention: Tensor, arguments: dict) -> Tensor:
    function = getattr(awconv, f"aw_conv{weight.dim() - 2}d")
    return function(input, weight, attention, **arguments, algorithm="fused")


def multiplications_by_attention(weight: Tensor, attention: Tensor, output: Tensor) -> int:
    """Of a sample's weights or, if there are fewer, of what each value of the attention is a factor of."""
    return len(output) * min(weight.numel(), attention[0].numel() * prod(output.shape[2:]))


@settings(max_examples=30, deadline=None)
@given(case=problems())
def test_the_operator_counts_a_convolution_and_the_multiplications_by_the_attention(case) -> None:
    input, weight, attention, arguments = case
    expected = multiply_adds(plain, input, weight, arguments)
    expected += multiplications_by_attention(weight, attention, plain(input, weight, arguments))
    assert multiply_adds(attentive, input, weight, attention, arguments) == expected
    on_meta = [tensor.to("meta") for tensor in (input, weight, attention)]
    assert multiply_adds(attentive, *on_meta, arguments) == expected


@settings(max_examples=30, deadline=None)
@given(case=dense(), wanted=st.sets(st.sampled_from(["input", "weight", "attention"]), min_size=1))
def test_its_backward_counts_what_is_asked_for(case, wanted: set[str]) -> None:
    """PyTorch counts the backward of a convolution without groups; with groups it counts too many."""
    input, weight, attention, arguments = case
    input.requires_grad_("input" in wanted)
    weight.requires_grad_(bool(wanted & {"weight", "attention"}))
    output = plain(input, weight, arguments)
    expected = multiply_adds(output.sum().backward)
    expected += len(wanted) * multiplications_by_attention(weight, attention, output)
    weight = weight.detach().requires_grad_("weight" in wanted)
    attention.requires_grad_("attention" in wanted)
    loss = attentive(input, weight, attention, arguments).sum()
    assert multiply_adds(loss.backward) == expected


def test_pooling_counts_nothing_as_pytorchs_own() -> None:
    for device in ("cpu", "meta"):
        input = torch.zeros(2, 3, 9, 9, device=device, requires_grad=True)
        for pool in (average_pool, F.adaptive_avg_pool2d):
            pooled = pool(input, (3, 3))
            assert multiply_adds(pool, input, (3, 3)) == multiply_adds(pooled.sum().backward) == 0


def of_layer(layer: nn.Module) -> list[Tensor]:
    branch = layer.attention
    halves = ((branch.conv1, branch.norm1), (branch.conv2, branch.norm2))
    return [tensor for conv, norm in halves for tensor in (conv.weight, norm.weight, norm.bias)]


def statistics(layer: nn.Module) -> list[Tensor]:
    norms = (layer.attention.norm1, layer.attention.norm2)
    return [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var)]


@pytest.fixture
def layer() -> nn.Module:
    with torch.device("meta"):
        return awconv.AWConv2d(32, 48, 3, stride=2, padding=1, bias=False)


def test_whole_layers_in_compiled_graphs_count_as_their_parts(layer: nn.Module) -> None:
    image = torch.empty(4, 32, 14, 14, device="meta", requires_grad=True)
    with awconv.use_algorithm("fused"):
        forward = multiply_adds(layer, image)
        output = layer(image)
    backward = multiply_adds(output.sum().backward)
    form = (1e-5, 1e-5, "sigmoid", [48, 1, 3, 3], 0.0, 1.0, [2, 2], [1, 1, 1, 1], [1, 1], 1, True)
    tensors = (image, layer.weight, *of_layer(layer))
    with torch.no_grad():
        assert multiply_adds(torch.ops.awconv.layer_inference, *tensors, *statistics(layer), *form) == forward
        assert multiply_adds(torch.ops.awconv.layer, *tensors, *form) == forward
        _, kept, _ = torch.ops.awconv.layer(*tensors, *form)
        needs = [True, True, True]
        run = torch.ops.awconv.layer_backward
        assert multiply_adds(run, torch.empty_like(output), *tensors, kept, *form, needs) == backward
        of_weight = multiply_adds(run, torch.empty_like(output), *tensors, kept, *form, [False, True, False])
    convolution = multiply_adds(F.conv2d, image, layer.weight, None, 2, 1)
    assert of_weight == convolution + len(image) * layer.weight.numel()


def test_branches_in_compiled_graphs_count_as_their_convolutions(layer: nn.Module) -> None:
    branch = layer.attention
    assert isinstance(branch, AttentionBranch)
    pooled = torch.empty(4, 32, 3, 3, device="meta", requires_grad=True)
    forward = multiply_adds(lambda: branch.conv2(branch.conv1(pooled)))
    hidden = branch.conv2(branch.conv1(pooled))
    backward = multiply_adds(hidden.sum().backward)
    form = (1e-5, 1e-5, "sigmoid", [48, 1, 3, 3], torch.float32, 0.0, 1.0)
    tensors = (pooled, *of_layer(layer))
    with torch.no_grad():
        assert multiply_adds(torch.ops.awconv.branch_inference, *tensors, *statistics(layer), *form) == forward
        assert multiply_adds(torch.ops.awconv.branch, *tensors, *form) == forward
        attention, kept, _ = torch.ops.awconv.branch(*tensors, *form)
        assert multiply_adds(torch.ops.awconv.branch_backward, attention, *tensors, kept, *form) == backward


@pytest.mark.parametrize("name", ["aw_resnet18", "aw_mobilenetv2_100", "aw_seresnet20_cifar"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_network_counts_what_its_summary_says(name: str, device: str) -> None:
    with torch.device(device):
        model, images = timm.create_model(name).eval(), torch.zeros(2, 3, 64, 64)
        with torch.no_grad(), awconv.use_algorithm("fused"):
            counted = multiply_adds(model, images)
    assert counted == awconv.summary(model, images).operations
