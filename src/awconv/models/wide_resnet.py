"""Wide residual networks for 32x32 images: "Wide Residual Networks", 2016, arXiv 1605.07146; with attention-augmented
convolutions as in "Attention Augmented Convolutional Networks", 2019, arXiv 1904.09925, section 4.1."""

from __future__ import annotations

from timm.layers import get_attn
from torch import Tensor, nn

from awconv.models.attention_augmented import AugmentedConv2d
from awconv.models.cifar import CifarNetwork

# N_h, kappa, upsilon and the least number of key channels a head, which arXiv 1904.09925 takes for this network.
_HEADS, _KEYS, _VALUES, _MIN_HEAD_KEYS = 8, 0.2, 0.1, 20


class PreactBlock(nn.Module):
    """Two 3x3 convolutions, each after its norm and ReLU, and a shortcut.

    Args:
        in_channels: channels of the input.
        channels: channels of the output.
        stride: of the first convolution, and of the shortcut.
        augmented_size: height and width of the input, if the first convolution is augmented by attention; None if not.
        attn_layer: attention on the activations before the sum, as timm names it; None for none.
    """

    def __init__(
        self, in_channels: int, channels: int, stride: int, augmented_size: int | None, attn_layer: str | None = None
    ) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.act1 = nn.ReLU(inplace=True)
        self.conv1: nn.Module
        if augmented_size is None:
            self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        else:
            self.conv1 = AugmentedConv2d(
                in_channels,
                channels,
                3,
                stride,
                input_size=(augmented_size, augmented_size),
                num_heads=_HEADS,
                key_channels=max(_MIN_HEAD_KEYS * _HEADS, round(_KEYS * channels)),
                value_channels=round(_VALUES * channels),
                bias=False,
            )
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.se = nn.Identity() if attn_layer is None else get_attn(attn_layer)(channels)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (N, in_channels, H, W) to (N, channels, ceil(H/stride), ceil(W/stride))."""
        out: Tensor = self.act1(self.bn1(x))
        if self.shortcut is not None:
            x = self.shortcut(out)
        out = self.se(self.conv2(self.act2(self.bn2(self.conv1(out)))))
        output: Tensor = x + out
        return output


class WideResNet(CifarNetwork):
    """A 3x3 stem, three stages of pre-activation blocks at full, half and quarter resolution, and a linear classifier.

    Args:
        depth: 6n + 4 convolutions.
        widen_factor: the stages have 16, 32 and 64 channels times this.
        augmented: augment the first convolution of each block by attention, whose relative positions fix the size of
            the images.
        attn_layer: attention on the activations at the end of each block, as timm names it: ``"se"``, ``"cbam"``,
            ``"eca"``.
        img_size: height and width of the images that an augmented network takes.
        num_classes: 0 for none, which returns the pooled features.
        in_chans: channels of the images.
        global_pool: as in timm, ``"avg"`` by default.
        drop_rate: dropout before the classifier.
    """

    def __init__(
        self,
        depth: int,
        widen_factor: int,
        augmented: bool = False,
        attn_layer: str | None = None,
        img_size: int = 32,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, drop_rate)
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"WideResNet: depth must be 6n + 4, such as 10, 16, 22, 28 or 40, got {depth}")
        widths = [16 * 2**stage * widen_factor for stage in range(3)]
        half = (img_size + 1) // 2
        sizes: list[tuple[int | None, int | None]] = [(None, None)] * 3
        if augmented:
            sizes = [(img_size, img_size), (img_size, half), (half, (half + 1) // 2)]
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.layer1 = _stage(16, widths[0], 1, blocks, *sizes[0], attn_layer)
        self.layer2 = _stage(widths[0], widths[1], 2, blocks, *sizes[1], attn_layer)
        self.layer3 = _stage(widths[1], widths[2], 2, blocks, *sizes[2], attn_layer)
        self.norm = nn.BatchNorm2d(widths[2])
        self.act = nn.ReLU(inplace=True)
        self.complete(widths, global_pool)

    def stem(self, x: Tensor) -> Tensor:
        """Shape (N, in_chans, H, W) to (N, 16, H, W)."""
        stem: Tensor = self.conv1(x)
        return stem

    def tail(self, x: Tensor) -> Tensor:
        """The last norm and activation; keeps the shape."""
        tail: Tensor = self.act(self.norm(x))
        return tail


def _stage(
    in_channels: int,
    channels: int,
    stride: int,
    blocks: int,
    first_size: int | None,
    size: int | None,
    attn_layer: str | None,
) -> nn.Sequential:
    first = PreactBlock(in_channels, channels, stride, first_size, attn_layer)
    return nn.Sequential(first, *(PreactBlock(channels, channels, 1, size, attn_layer) for _ in range(blocks - 1)))
