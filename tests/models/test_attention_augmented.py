"""Attention-augmented convolution against loops over positions, heads and channels."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from awconv.models import AugmentedConv2d


def attended_by_loops(layer: AugmentedConv2d, input: torch.Tensor) -> np.ndarray:
    """Self-attention with two-dimensional relative positions, one query and one head at a time (before projection)."""
    qkv = layer.qkv(input).detach().numpy()
    batch, _, height, width = qkv.shape
    key_channels, _, value_channels = layer.channels
    rows, columns = layer.relative_height.detach().numpy(), layer.relative_width.detach().numpy()
    output = np.zeros((batch, value_channels, height, width))
    positions = [(y, x) for y in range(height) for x in range(width)]
    for n in range(batch):
        for head in range(layer.num_heads):
            d, v = key_channels // layer.num_heads, value_channels // layer.num_heads
            query = qkv[n, head * d : (head + 1) * d]
            key = qkv[n, key_channels + head * d : key_channels + (head + 1) * d]
            value = qkv[n, 2 * key_channels + head * v : 2 * key_channels + (head + 1) * v]
            for y, x in positions:
                q = query[:, y, x]
                logits = np.array(
                    [
                        (q @ key[:, b, a] + q @ columns[a - x + width - 1] + q @ rows[b - y + height - 1]) / d**0.5
                        for b, a in positions
                    ]
                )
                weights = np.exp(logits - logits.max())
                weights /= weights.sum()
                output[n, head * v : (head + 1) * v, y, x] = sum(
                    weight * value[:, b, a] for weight, (b, a) in zip(weights, positions, strict=True)
                )
    return output


@pytest.mark.parametrize("stride", [1, 2])
def test_it_is_a_convolution_beside_relative_self_attention(stride: int) -> None:
    layer = AugmentedConv2d(5, 12, 3, stride, input_size=(5, 4), num_heads=2, key_channels=6, value_channels=4).double()
    input = torch.randn(2, 5, 5, 4).double()
    output = layer(input)
    assert output.shape == (2, 12, -(-5 // stride), -(-4 // stride))
    torch.testing.assert_close(output[:, :8], layer.conv(input))
    pooled = input
    if stride == 2:  # means over windows of 3x3 that end at the border
        pooled = torch.stack(
            [
                torch.stack(
                    [input[:, :, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].mean((2, 3)) for x in (0, 2)], -1
                )
                for y in (0, 2, 4)
            ],
            -2,
        )
    attended = torch.from_numpy(attended_by_loops(layer, pooled))
    expected = F.conv2d(attended, layer.proj.weight, layer.proj.bias)
    torch.testing.assert_close(output[:, 8:], expected, rtol=1e-9, atol=1e-9)  # double precision, sums of few terms


def test_gradients_are_those_of_finite_differences() -> None:
    layer = AugmentedConv2d(3, 6, 3, input_size=(3, 2), num_heads=2, key_channels=4, value_channels=2).double()
    names = [name for name, _ in layer.named_parameters()]
    input = torch.randn(1, 3, 3, 2).double().requires_grad_()
    parameters = [parameter.detach().clone().requires_grad_() for parameter in layer.parameters()]

    def function(input: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (input,))

    assert torch.autograd.gradcheck(function, (input, *parameters))


def test_wrong_sizes_are_named() -> None:
    layer = AugmentedConv2d(3, 8, 3, input_size=(8, 8), num_heads=2, key_channels=4, value_channels=4)
    with pytest.raises(ValueError, match=r"height and width \(8, 8\).*got \(9, 8\).*img_size"):
        layer(torch.zeros(1, 3, 9, 8))
    for arguments, message in (
        (dict(key_channels=5, value_channels=4), "num_heads, 2, must divide key_channels, got 5"),
        (dict(key_channels=4, value_channels=0), "num_heads, 2, must divide value_channels, got 0"),
        (dict(key_channels=4, value_channels=8), "value_channels must be less than out_channels, 8, got 8"),
    ):
        with pytest.raises(ValueError, match=message):
            AugmentedConv2d(3, 8, 3, input_size=(8, 8), num_heads=2, **arguments)
    with pytest.raises(ValueError, match="kernel_size must be odd, got 4"):
        AugmentedConv2d(3, 8, 4, input_size=(8, 8), num_heads=2, key_channels=4, value_channels=4)


def test_the_size_may_be_a_list() -> None:
    layer = AugmentedConv2d(3, 8, 3, input_size=[4, 4], num_heads=2, key_channels=4, value_channels=4)
    assert layer(torch.zeros(1, 3, 4, 4)).shape == (1, 8, 4, 4)


def test_an_augmented_network_is_built_for_other_images() -> None:
    model = timm.create_model("aw_aa_wide_resnet28_10_cifar", img_size=16, num_classes=3)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 3)
