"""Attention-augmented convolution: "Attention Augmented Convolutional Networks", 2019, arXiv 1904.09925."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AugmentedConv2d(nn.Module):
    """A convolution that leaves some of its output channels to self-attention over all positions.

    ``output = concat(convolution(input), projection(attention(input)))``. A head's logits are
    ``(q . k + q . r_w[x' - x] + q . r_h[y' - y]) / sqrt(d)``, with learned embeddings of the horizontal and the
    vertical distance that all heads of the layer share. They fix the size of the input.

    With a stride, the input of the attention is averaged over windows of 3x3 first, so that it works at the output's
    resolution; the paper's text leaves this open.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, those of the attention included.
        kernel_size: of the convolution, which is odd and padded to keep the size.
        stride: of both parts.
        input_size: height and width of the input.
        num_heads: N_h.
        key_channels: d_k of all heads together; the paper's kappa is ``key_channels / out_channels``.
        value_channels: d_v of all heads together; the paper's upsilon is ``value_channels / out_channels``.
        bias: of the convolutions.

    Raises:
        ValueError: the heads do not divide the channels, no channel is left to the convolution, or the kernel is even.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        *,
        input_size: tuple[int, int],
        num_heads: int,
        key_channels: int,
        value_channels: int,
        bias: bool = True,
    ) -> None:
        super().__init__()
        for name, channels in (("key_channels", key_channels), ("value_channels", value_channels)):
            if channels < 1 or channels % num_heads:
                raise ValueError(f"AugmentedConv2d: num_heads, {num_heads}, must divide {name}, got {channels}")
        if value_channels >= out_channels:
            raise ValueError(
                f"AugmentedConv2d: value_channels must be less than out_channels, {out_channels}, got {value_channels}"
            )
        if kernel_size % 2 == 0:
            raise ValueError(f"AugmentedConv2d: kernel_size must be odd, got {kernel_size}")
        self.input_size = tuple(input_size)
        self.stride = stride
        self.num_heads = num_heads
        self.channels = (key_channels, key_channels, value_channels)
        self.conv = nn.Conv2d(
            in_channels, out_channels - value_channels, kernel_size, stride, padding=kernel_size // 2, bias=bias
        )
        self.qkv = nn.Conv2d(in_channels, sum(self.channels), 1, bias=bias)
        self.proj = nn.Conv2d(value_channels, value_channels, 1, bias=bias)
        height, width = (-(-size // stride) for size in input_size)
        head_channels = key_channels // num_heads
        self.relative_height = nn.Parameter(torch.empty(2 * height - 1, head_channels))
        self.relative_width = nn.Parameter(torch.empty(2 * width - 1, head_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the embeddings anew, with deviation 1 / sqrt(d)."""
        for embedding in (self.relative_height, self.relative_width):
            nn.init.normal_(embedding, std=embedding.shape[1] ** -0.5)

    def forward(self, input: Tensor) -> Tensor:
        """Shape (N, in_channels, \\*input_size) to (N, out_channels, ceil(H/stride), ceil(W/stride)).

        Raises:
            ValueError: the input has another size.
        """
        if tuple(input.shape[2:]) != self.input_size:
            raise ValueError(
                f"AugmentedConv2d: the input must have height and width {self.input_size}, which the relative "
                f"positions fix, got {tuple(input.shape[2:])}; build the network for other images (img_size=)"
            )
        convolved: Tensor = self.conv(input)
        return torch.cat([convolved, self.proj(self._attend(input))], dim=1)

    def _attend(self, input: Tensor) -> Tensor:
        if self.stride > 1:
            input = F.avg_pool2d(input, 3, self.stride, padding=1, count_include_pad=False)
        batch, _, height, width = input.shape
        query, key, value = (
            part.reshape(batch, self.num_heads, -1, height * width).transpose(2, 3)  # (N, heads, positions, channels)
            for part in self.qkv(input).split(self.channels, dim=1)
        )
        scale = query.shape[-1] ** -0.5
        grid = (scale * query).unflatten(2, (height, width))
        rows = torch.einsum("nhyxd,yzd->nhyxz", grid, _by_distance(self.relative_height, height))
        columns = torch.einsum("nhyxd,xzd->nhyxz", grid, _by_distance(self.relative_width, width))
        positions = (rows[..., :, None] + columns[..., None, :]).flatten(4, 5).flatten(2, 3)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=positions, scale=scale)
        return attended.transpose(2, 3).reshape(batch, -1, height, width)


def _by_distance(embedding: Tensor, size: int) -> Tensor:
    """Embeddings of distances -(size - 1) to size - 1 as those of pairs: entry (i, j) is that of j - i."""
    position = torch.arange(size, device=embedding.device)
    return embedding[position[None, :] - position[:, None] + size - 1]
