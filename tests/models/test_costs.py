"""Parameters and multiply-adds of the models, against formulas and figures of the papers."""

from __future__ import annotations

import functools
from itertools import pairwise

import pytest
import timm
import torch
from timm.layers import make_divisible
from torch import nn

from awconv.model_costs import model_cost
from awconv.models import BASELINES

CIFAR_DEPTHS = (8, 20, 32, 44, 56, 110)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@functools.cache
def counted(name: str) -> int:
    with torch.device("meta"):
        return count(timm.create_model(name))


NARROW = 2  # the reduction of CIFAR ResNets; of all others the paper's 16


def branch_parameters(in_channels: int, out_channels: int, reduction: int = 16) -> int:
    """Two pointwise convolutions and their norms, by the formulas of the paper's branch."""
    hidden = max(in_channels // reduction, 4)
    return in_channels * hidden + hidden * out_channels + 2 * (hidden + out_channels)


def stage_channels(widths: tuple[int, ...], blocks: tuple[int, ...], stem: int) -> list[tuple[int, int]]:
    """Input and output channels of the 3x3 convolutions of stages of basic blocks."""
    pairs, last = [], stem
    for width, number in zip(widths, blocks, strict=True):
        for _ in range(number):
            pairs += [(last, width), (width, width)]
            last = width
    return pairs


def test_aw_resnet50_has_the_papers_parameters() -> None:
    assert counted("aw_resnet50") == 25_722_240


@pytest.mark.parametrize(("depth", "blocks"), [(50, (3, 4, 6, 3)), (101, (3, 4, 23, 3)), (152, (3, 8, 36, 3))])
def test_bottleneck_resnets_gain_their_branches(depth: int, blocks: tuple[int, ...]) -> None:
    added = sum(n * branch_parameters(w, w) for n, w in zip(blocks, (64, 128, 256, 512), strict=True))
    assert counted(f"aw_resnet{depth}") == counted(f"resnet{depth}") + added


@pytest.mark.parametrize(("depth", "blocks"), [(18, (2, 2, 2, 2)), (34, (3, 4, 6, 3))])
def test_basic_resnets_gain_their_branches(depth: int, blocks: tuple[int, ...]) -> None:
    added = sum(branch_parameters(*pair) for pair in stage_channels((64, 128, 256, 512), blocks, 64))
    assert counted(f"aw_resnet{depth}") == counted(f"resnet{depth}") + added


@pytest.mark.parametrize("depth", CIFAR_DEPTHS)
def test_cifar_resnets_have_the_parameters_of_their_formula(depth: int) -> None:
    blocks = (depth - 2) // 6
    pairs = stage_channels((16, 32, 64), (blocks,) * 3, 16)
    plain = 3 * 16 * 9 + 2 * 16 + sum(9 * i * o + 2 * o for i, o in pairs) + 64 * 10 + 10
    assert counted(f"resnet{depth}_cifar") == plain
    assert counted(f"aw_resnet{depth}_cifar") == plain + sum(branch_parameters(*pair, NARROW) for pair in pairs)


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_cifar_resnets_have_the_size_that_their_paper_gives(depth: int, millions: float) -> None:
    # Table 6 of arXiv 1512.03385, which rounds to two digits.
    assert float(f"{counted(f'resnet{depth}_cifar') / 1e6:.2g}") == millions


def test_a_vgg_gains_its_branches() -> None:
    widths = (64, 64, 128, 128, *[256] * 3, *[512] * 6)
    added = sum(branch_parameters(*pair) for pair in pairwise(widths))
    assert counted("aw_vgg16") == counted("vgg16") + added


MOBILENET_V1 = [32, 64, 128, 128, 256, 256, *[512] * 6, 1024]
MOBILENET_V2 = [32, 96, *[144] * 2, *[192] * 3, *[384] * 4, *[576] * 3, *[960] * 3]


@pytest.mark.parametrize(("version", "channels"), [("v1", MOBILENET_V1), ("v2", MOBILENET_V2)])
def test_mobilenets_gain_their_branches(version: str, channels: list[int]) -> None:
    added = sum(branch_parameters(width, width) for width in channels)
    assert counted(f"aw_mobilenet{version}_100") == counted(f"mobilenet{version}_100") + added


@pytest.mark.parametrize("scheme", ["se", "cbam", "eca"])
@pytest.mark.parametrize(("depth", "blocks"), [(50, (3, 4, 6, 3)), (101, (3, 4, 23, 3))])
def test_attention_on_activations_adds_what_its_paper_says(scheme: str, depth: int, blocks: tuple[int, ...]) -> None:
    added = 0
    for number, width in zip(blocks, (256, 512, 1024, 2048), strict=True):
        hidden = width // 16
        added += (
            number
            * {
                "se": 2 * width * hidden + hidden + width,
                "cbam": 2 * width * hidden + 2 * 7 * 7 + 2,  # timm leaves out the biases of the channel gate
                "eca": 7 if width == 2048 else 5,  # the odd number next to (log2 C + 1) / 2
            }[scheme]
        )
    assert counted(f"{scheme}resnet{depth}") == counted(f"resnet{depth}") + added
    branches = sum(n * branch_parameters(w, w) for n, w in zip(blocks, (64, 128, 256, 512), strict=True))
    assert counted(f"aw_{scheme}resnet{depth}") == counted(f"{scheme}resnet{depth}") + branches


@pytest.mark.parametrize(("depth", "blocks"), [(20, 3), (56, 9)])
def test_cifar_resnets_gain_attention_on_activations(depth: int, blocks: int) -> None:
    pairs = stage_channels((16, 32, 64), (blocks,) * 3, 16)
    branches = sum(branch_parameters(*pair, NARROW) for pair in pairs)
    squeezed = sum(blocks * (2 * width * 8 + 8 + width) for width in (16, 32, 64))  # timm's SE keeps 8 channels
    gated = sum(blocks * (2 * width * (width // 16) + 2 * 7 * 7 + 2) for width in (16, 32, 64))
    for scheme, added in (("se", squeezed), ("cbam", gated)):
        plain = counted(f"resnet{depth}_cifar") + added
        assert counted(f"{scheme}resnet{depth}_cifar") == plain
        assert counted(f"aw_{scheme}resnet{depth}_cifar") == plain + branches


def wide_resnet(augmented: bool) -> int:
    """Parameters of WRN-28-10 from its description: 4 blocks a stage, norms before convolutions, 1x1 shortcuts."""
    total, last, size = 3 * 16 * 9, 16, 32
    for stage, width in enumerate((160, 320, 640)):
        size = size // 2 if stage else size
        for block in range(4):
            first = 9 * last * width
            if augmented:
                keys, values = max(8 * 20, round(0.2 * width)), round(0.1 * width)
                first = 9 * last * (width - values) + last * (2 * keys + values) + values * values
                first += 2 * (2 * size - 1) * keys // 8  # relative positions, shared by the heads
            total += 2 * last + first + 2 * width + 9 * width * width + (last * width if block == 0 else 0)
            last = width
    return total + 2 * 640 + 640 * 10 + 10


@pytest.mark.parametrize("prefix", ["", "aa_"])
def test_wide_resnets_have_the_parameters_of_their_formula(prefix: str) -> None:
    plain = wide_resnet(augmented=prefix == "aa_")
    assert counted(f"{prefix}wide_resnet28_10_cifar") == plain
    added, last = 0, 16
    for width in (160, 320, 640):
        for _ in range(4):
            convolved = width - round(0.1 * width) if prefix else width
            added += branch_parameters(last, convolved) + branch_parameters(width, width)
            last = width
    assert counted(f"aw_{prefix}wide_resnet28_10_cifar") == plain + added


# Figures of papers and of torchvision (docs/models.md has the sources): parameters and multiply-adds, in millions, with
# the digits that they are given with.
LITERATURE = {
    "resnet18": (11.69, 1814),
    "resnet34": (21.80, 3664),
    "resnet50": (25.56, 4089),
    "resnet101": (44.55, 7801),
    "resnet152": (60.19, 11514),
    "seresnet50": (28.09, None),
    "seresnet101": (49.33, None),
    "mobilenetv1_100": (4.2, 569),
    "mobilenetv2_100": (3.50, 301),
    "resnet20_cifar": (0.27, None),
    "resnet56_cifar": (0.85, None),
    "resnet110_cifar": (1.7, None),
    "wide_resnet28_10_cifar": (36.5, None),
}


@pytest.mark.parametrize(("name", "parameters", "operations"), [(k, *v) for k, v in LITERATURE.items()])
def test_networks_cost_what_the_literature_says(name: str, parameters: float, operations: float | None) -> None:
    cost = model_cost(name)
    digits = len(str(parameters).split(".")[1])
    # 44,549,160 is given as 44.55; half a unit of the last digit, and the 3.504872 that is given as 3.50.
    assert cost.parameters / 1e6 == pytest.approx(parameters, abs=0.51 * 10**-digits)
    if operations is not None:
        assert cost.operations / 1e6 == pytest.approx(operations, abs=0.51)


def test_attention_augmentation_is_near_its_papers_size() -> None:
    # 36.2 million; the paper does not say all, and docs/models.md what is known.
    assert model_cost("aa_wide_resnet28_10_cifar").parameters / 1e6 == pytest.approx(36.2, abs=0.1)


def attended(in_channels: int, out_channels: int, size: int, depthwise: bool = False, reduction: int = 16) -> int:
    """Multiply-adds of the attention of a 3x3 layer, for an output of size x size."""
    hidden = max(in_channels // reduction, 4)
    weights = 9 * out_channels * (1 if depthwise else in_channels)
    return 9 * hidden * (in_channels + out_channels) + min(weights, 9 * out_channels * size * size)


def added_operations(name: str) -> int:
    return model_cost(name).operations - model_cost(BASELINES[name]).operations


@pytest.mark.parametrize("depth", CIFAR_DEPTHS)
def test_cifar_resnets_have_the_operations_of_their_formula(depth: int) -> None:
    blocks = (depth - 2) // 6
    plain, added, last = 3 * 16 * 9 * 32 * 32 + 640, 0, 16
    for width, size in ((16, 32), (32, 16), (64, 8)):
        for i in [last, *[width] * (2 * blocks - 1)]:
            plain += 9 * i * width * size * size
            added += attended(i, width, size, reduction=NARROW)
        last = width
    assert model_cost(f"resnet{depth}_cifar").operations == plain
    assert added_operations(f"aw_resnet{depth}_cifar") == added
    for scheme in ("se", "cbam") if depth in (8, 20, 56) else ():
        assert added_operations(f"aw_{scheme}resnet{depth}_cifar") == added


@pytest.mark.parametrize("depth", [20, 56])
def test_attention_on_activations_adds_the_operations_of_its_formula(depth: int) -> None:
    squeezed = gated = 0
    for width, size in ((16, 32), (32, 16), (64, 8)):
        squeezed += (depth - 2) // 6 * 2 * width * 8
        # Both pooled vectors go through the channel gate; the spatial gate is a 7x7 convolution of two maps.
        gated += (depth - 2) // 6 * (2 * 2 * width * (width // 16) + 2 * 49 * size * size)
    assert added_operations(f"seresnet{depth}_cifar") == squeezed
    assert added_operations(f"cbamresnet{depth}_cifar") == gated


@pytest.mark.parametrize(
    ("version", "channels", "sizes"),
    [
        ("v1", MOBILENET_V1, [112, 56, 56, 28, 28, 14, *[14] * 5, 7, 7]),
        ("v2", MOBILENET_V2, [112, 56, 56, *[28] * 3, *[14] * 4, *[14] * 3, *[7] * 3, 7]),
    ],
)
def test_mobilenets_gain_the_operations_of_their_branches(version: str, channels: list[int], sizes: list[int]) -> None:
    # The weights of a depthwise layer are always fewer than its outputs, so the sizes do not matter.
    added = sum(attended(c, c, size, depthwise=True) for c, size in zip(channels, sizes, strict=False))
    assert len(channels) == {"v1": 13, "v2": 17}[version]
    assert added_operations(f"aw_mobilenet{version}_100") == added


def test_wide_resnets_have_the_operations_of_their_formula() -> None:
    plain = augmented = 3 * 16 * 9 * 1024
    last, size = 16, 32
    for stage, width in enumerate((160, 320, 640)):
        size = size // 2 if stage else size
        positions, keys, values = size * size, max(160, round(0.2 * width)), round(0.1 * width)
        for block in range(4):
            shortcut = last * width * positions if block == 0 else 0
            plain += 9 * last * width * positions + 9 * width * width * positions + shortcut
            augmented += 9 * last * (width - values) * positions + 9 * width * width * positions + shortcut
            # Projections, logits and values of all heads, and the logits of relative rows and columns.
            augmented += last * (2 * keys + values) * positions + values * values * positions
            augmented += positions * positions * (keys + values) + 2 * positions * size * keys
            last = width
    head = 640 * 10
    assert model_cost("wide_resnet28_10_cifar").operations == plain + head
    assert model_cost("aa_wide_resnet28_10_cifar").operations == augmented + head


IMAGENET_LAYERS = {
    "resnet18": ((2, 2, 2, 2), stage_channels),
    "resnet34": ((3, 4, 6, 3), stage_channels),
    "resnet50": ((3, 4, 6, 3), None),
    "resnet101": ((3, 4, 23, 3), None),
    "resnet152": ((3, 8, 36, 3), None),
}


# The deepest are made of the stages of the others.
DEEPEST = ("resnet101", "resnet152")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.campaign if name in DEEPEST else ()) for name in IMAGENET_LAYERS]
)
def test_imagenet_resnets_gain_the_operations_of_their_branches(name: str) -> None:
    blocks, basic = IMAGENET_LAYERS[name]
    added, last = 0, 64
    for number, width, size in zip(blocks, (64, 128, 256, 512), (56, 28, 14, 7), strict=True):
        pairs = stage_channels((width,), (number,), last) if basic else [(width, width)] * number
        added += sum(attended(*pair, size) for pair in pairs)
        last = width
    assert added_operations("aw_" + name) == added
    for scheme in ("se", "cbam", "eca") if name in ("resnet18", "resnet50", "resnet101") else ("se",):
        assert added_operations(f"aw_{scheme}{name}") == added
    if name == "resnet50":
        assert round(2 * added / 1e9, 2) == 0.01  # GFLOPs, as the method's description says


@pytest.mark.parametrize("prefix", ["", "aa_"])
def test_wide_resnets_gain_the_operations_of_their_branches(prefix: str) -> None:
    added, last = 0, 16
    for width, size in ((160, 32), (320, 16), (640, 8)):
        for _ in range(4):
            convolved = width - round(0.1 * width) if prefix else width
            added += attended(last, convolved, size) + attended(width, width, size)
            last = width
    assert added_operations(f"aw_{prefix}wide_resnet28_10_cifar") == added


@pytest.mark.parametrize("name", ["mobilenetv1_100", "mobilenetv2_100", "wide_resnet28_10_cifar"])
def test_squeeze_and_excitation_has_its_two_convolutions_in_each_block(name: str) -> None:
    plain, attended = timm.create_model(name), timm.create_model(f"se_{name}")
    if "mobilenet" in name:
        channels = [m.out_channels for m in plain.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    else:
        channels = [m.out_channels for n, m in plain.named_modules() if n.endswith("conv2")]
    assert len(channels) == {"mobilenetv1_100": 13, "mobilenetv2_100": 17, "wide_resnet28_10_cifar": 12}[name]
    added = 0
    for width in channels:
        hidden = make_divisible(width / 16, 8, round_limit=0.0)  # timm's rounding
        added += 2 * width * hidden + width + hidden  # with biases
    found = sum(p.numel() for p in attended.parameters()) - sum(p.numel() for p in plain.parameters())
    assert found == added
