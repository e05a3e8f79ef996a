"""Statistics of a layer's maps, beside loops over all of their values."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import awconv
from awconv.explain.statistics import PARTS, LayerStatistics, effective_kernel
from awconv.ops.naive import expand

IMAGES, CHANNELS, INPUTS, ROWS, COLUMNS = 11, 4, 2, 3, 2
TARGETS = torch.tensor([2, 0, 0, 2, 2, 7, 0, 2, 7, 0, 0])


def maps_of_images() -> Tensor:
    """Maps with an effect of every kind."""
    generator = torch.Generator().manual_seed(3)

    def effect(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    parts = (
        effect(IMAGES, 1, 1, 1, 1),
        0.5 * effect(IMAGES, CHANNELS, 1, 1, 1),
        0.7 * effect(IMAGES, 1, 1, ROWS, COLUMNS),
        2 * effect(1, CHANNELS, 1, 1, 1),
        effect(1, 1, 1, ROWS, COLUMNS),
        effect(1, CHANNELS, INPUTS, 1, 1),
        0.3 * effect(IMAGES, CHANNELS, INPUTS, ROWS, COLUMNS),
    )
    return sum(parts[1:], parts[0])


def gathered(maps: Tensor, batch: int = 4, **arguments: Any) -> LayerStatistics:
    found = LayerStatistics(**arguments)
    for start in range(0, len(maps), batch):
        part = range(start, min(start + batch, len(maps)))
        found.add(maps[start : start + batch], part, TARGETS[start : start + batch])
    return found


def mean(values: Any) -> float:
    listed = [float(value) for value in values]
    return sum(listed) / len(listed)


def variance(values: Any) -> float:
    listed = [float(value) for value in values]
    return mean((value - mean(listed)) ** 2 for value in listed)


def test_the_parts_of_the_variance_are_those_of_an_analysis_of_variance_and_add_up_to_the_whole() -> None:
    x = maps_of_images().flatten(3)
    found = gathered(maps_of_images()).variance()
    n, p, c, t = (range(size) for size in x.shape)
    cells = list(itertools.product(p, c, t))
    image = variance(mean(x[i].flatten()) for i in n)
    by_channel = mean(variance(mean(x[i, j].flatten()) for i in n) for j in p) - image
    by_tap = mean(variance(mean(x[i, :, :, k].flatten()) for i in n) for k in t) - image
    between = mean(variance(x[i, j, b, k] for i in n) for j, b, k in cells)
    middle = {cell: mean(x[(i, *cell)] for i in n) for cell in cells}
    channel = variance(mean(middle[j, b, k] for b in c for k in t) for j in p)
    tap = variance(mean(middle[j, b, k] for j in p for b in c) for k in t)
    rest = variance(middle.values()) - channel - tap
    expected = (image, by_channel, by_tap, between - image - by_channel - by_tap, channel, tap, rest)
    assert found == pytest.approx(dict(zip(PARTS, expected, strict=True)), rel=1e-9)
    assert sum(found.values()) == pytest.approx(variance(x.flatten()), rel=1e-9)
    assert min(found.values()) > 0.01  # an effect of every kind is seen


@pytest.mark.parametrize(
    ("kind", "sizes"),
    {
        "image": (IMAGES, 1, 1, 1, 1),
        "image_channel": (IMAGES, CHANNELS, 1, 1, 1),
        "image_tap": (IMAGES, 1, 1, ROWS, COLUMNS),
        "channel": (1, CHANNELS, 1, 1, 1),
        "tap": (1, 1, 1, ROWS, COLUMNS),
        "rest": (1, 1, INPUTS, 1, 1),
    }.items(),
)
def test_an_effect_alone_is_in_its_part_alone(kind: str, sizes: tuple[int, ...]) -> None:
    effect = torch.randn(sizes, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for axis, size in enumerate(sizes[:2]):
        if size > 1:
            effect = effect - effect.mean(axis, keepdim=True)  # else it would hold an effect of one axis less
    if sizes[0] > 1 and sizes[3] > 1:
        effect = effect - effect.mean((3, 4), keepdim=True)
    maps = effect.expand(IMAGES, CHANNELS, INPUTS, ROWS, COLUMNS)
    found = gathered(maps).variance()
    whole = float(maps.var(correction=0))
    assert found == pytest.approx(dict.fromkeys(PARTS, 0.0) | {kind: whole}, abs=1e-12)


def test_how_the_images_are_batched_changes_nothing() -> None:
    ways = [gathered(maps_of_images(), batch) for batch in (1, 3, IMAGES)]
    for one in ways[1:]:
        assert one.variance() == pytest.approx(ways[0].variance(), rel=1e-9)
        assert one.extremes(2, True).images == ways[0].extremes(2, True).images
        torch.testing.assert_close(one.classes()[7].channels, ways[0].classes()[7].channels)


def test_a_layers_variation_is_the_one_of_fold() -> None:
    model = torch.nn.Sequential(
        awconv.AWConv2d(1, 3, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2)
    ).eval()
    torch.nn.init.normal_(model[0].attention.norm2.weight, std=20)
    images = torch.randn(6, 1, 8, 8)
    found = LayerStatistics(unit=1)
    found.add(awconv.attention_maps(model, images)["0"], range(6))
    (trial,) = awconv.fold(model, [(images, torch.arange(6) % 2)], max_drop=100).trials
    assert trial.variation > 0.001
    assert found.variation() == pytest.approx(trial.variation, rel=1e-5)


def test_the_mean_pattern_and_its_spreads() -> None:
    x = maps_of_images().flatten(3)
    pattern, over_images, over_channels = gathered(maps_of_images()).pattern()
    for k in range(ROWS * COLUMNS):
        assert float(pattern[k]) == pytest.approx(mean(x[..., k].flatten()))
        of_images = variance(mean(x[i, :, :, k].flatten()) for i in range(IMAGES))
        assert float(over_images[k]) == pytest.approx(of_images**0.5)
        of_channels = variance(mean(x[:, j, :, k].flatten()) for j in range(CHANNELS))
        assert float(over_channels[k]) == pytest.approx(of_channels**0.5)


def test_the_images_that_move_a_channel_most_are_named() -> None:
    x = maps_of_images()
    found = gathered(x, keep=2)
    for channel in range(CHANNELS):
        values = [mean(x[i, channel].flatten()) for i in range(IMAGES)]
        order = sorted(range(IMAGES), key=lambda i: values[i])
        up, down = found.extremes(channel, True), found.extremes(channel, False)
        assert (up.images, down.images) == (order[:-3:-1], order[:2])
        assert up.distances == pytest.approx([values[i] - mean(values) for i in up.images])
        assert float(found.channel_deviations()[channel]) == pytest.approx(variance(values) ** 0.5)


def test_classes_differ_by_their_means() -> None:
    x = maps_of_images()
    found = gathered(x)
    means = [[mean(x[i, j].flatten()) for j in range(CHANNELS)] for i in range(IMAGES)]
    between = whole = 0.0
    for j in range(CHANNELS):
        all_images = mean(row[j] for row in means)
        whole += variance(row[j] for row in means)
        for target, own in found.classes().items():
            rows = [i for i in range(IMAGES) if TARGETS[i] == target]
            difference = mean(means[i][j] for i in rows) - all_images
            assert (own.images, float(own.channels[j])) == (len(rows), pytest.approx(difference))
            between += len(rows) / IMAGES * difference**2
    assert found.share_of_classes() == pytest.approx(between / whole)
    assert list(found.classes()) == [0, 2, 7]
    taps = mean(x[i, :, :, 1, 1].mean() for i in range(IMAGES) if TARGETS[i] == 7) - mean(x[:, :, :, 1, 1].flatten())
    assert float(found.classes()[7].taps[3]) == pytest.approx(taps)


def test_maps_that_are_all_alike_vary_by_exactly_nothing() -> None:
    found = gathered(torch.full((IMAGES, 2, 1, 3, 3), 0.1))
    assert found.variation() == 0
    assert set(found.variance().values()) == {0.0}
    assert found.share_of_classes() == 0


@pytest.mark.parametrize("unit", [0, 1])
def test_an_effective_kernel_is_the_weight_times_its_expanded_gain(unit: int) -> None:
    weight, attention = torch.randn(6, 4, 4, 2), torch.randn(3, 2, 2, 1)
    whole = weight * (unit + expand(attention[None], (2, 2, 2, 2))[0])
    for channel, input in ((0, 0), (3, 1), (5, 3)):
        static, effective = effective_kernel(weight, attention, unit, channel, input)
        assert torch.equal(static, weight[channel, input])
        torch.testing.assert_close(effective, whole[channel, input])
