"""What attention is worth, beside its noise."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import timm
import torch
from scipy import stats
from torch import Tensor

import awconv
from awconv.explain.maps import aw_layers
from awconv.explain.worth import Worth, adjusted, another_images, logits_of, mean_of, zero


def logits(*predicted: int) -> Tensor:
    return 3.0 * torch.nn.functional.one_hot(torch.tensor(predicted), 4).float()


def test_images_that_change_sides_are_counted() -> None:
    targets = torch.tensor([0, 1, 2, 3, 0, 1])
    worth = Worth.of(logits(0, 1, 2, 0, 1, 2), logits(0, 2, 3, 3, 2, 2), targets)
    assert (worth.images, worth.changed, worth.lost, worth.gained) == (6, 4, 2, 1)
    assert worth.points == pytest.approx(100 / 6)
    losses = [
        torch.nn.functional.cross_entropy(made, targets, reduction="none").double()
        for made in (logits(0, 2, 3, 3, 2, 2), logits(0, 1, 2, 0, 1, 2))
    ]
    difference = (losses[0] - losses[1]).tolist()
    assert worth.loss == pytest.approx(sum(difference) / 6)
    middle = sum(difference) / 6
    deviation = math.sqrt(sum((one - middle) ** 2 for one in difference) / 5)
    assert worth.loss_margin == pytest.approx(stats.norm.ppf(0.975) * deviation / math.sqrt(6), rel=1e-5)


def test_without_labels_only_changes_are_known() -> None:
    worth = Worth.of(logits(0, 1, 2), logits(0, 1, 3), None)
    assert worth == Worth(3, 1)
    assert worth.points is worth.interval() is worth.p_value() is None


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (9, 5), (2, 30), (700, 800), (20_000, 19_000)])
def test_the_p_value_is_that_of_the_exact_test(lost: int, gained: int) -> None:
    expected = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert Worth(2000, 0, lost, gained).p_value() == pytest.approx(expected)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Over all outcomes of 40 images, each with its probability."""
    images, to_wrong, to_right = 40, 0.15, 0.05
    covered = 0.0
    for lost, gained in product(range(images + 1), repeat=2):
        if lost + gained > images:
            continue
        low, high = Worth(images, 0, lost, gained).interval() or (0.0, 0.0)
        share = stats.multinomial.pmf(
            [lost, gained, images - lost - gained], images, [to_wrong, to_right, 1 - to_wrong - to_right]
        )
        covered += share * (low <= 100 * (to_wrong - to_right) <= high)
    assert 0.94 < covered < 0.99  # of 0.95: the outcomes are whole numbers
    low, high = Worth(100, 0, 0, 0).interval() or (0.0, 0.0)
    assert low < 0 < high  # where nothing changed, much could still have


@pytest.mark.parametrize(
    ("images", "lost", "gained", "low", "high"), [(100, 10, 4, -1.718534, 13.483240), (50, 30, 1, 40.307892, 71.230570)]
)
def test_the_interval_is_the_one_published(images: int, lost: int, gained: int, low: float, high: float) -> None:
    """By hand: p of both with one more in two more images, their difference, and the variance of that."""
    assert Worth(images, 0, lost, gained).interval() == pytest.approx((low, high), abs=1e-5)


def test_p_values_of_several_layers_are_adjusted_by_holm() -> None:
    assert adjusted([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjusted([0.9, 0.6]) == [1.0, 1.0]
    assert adjusted([]) == []


def digits_network() -> Any:
    return timm.create_model("aw_resnet8_cifar.digits", pretrained=True).eval()


def test_the_mean_map_in_a_layer_is_what_fold_makes_of_it() -> None:
    model, images = digits_network(), torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    means = {name: maps.mean(0, keepdim=True) for name, maps in awconv.attention_maps(model, images).items()}
    batches = list(images.split(4))
    everywhere = logits_of(model, batches, aw_layers(model), mean_of(means))
    alone = logits_of(model, batches, aw_layers(model), mean_of(means, "layer2.0.conv1"))
    with torch.no_grad():
        before = model(images)
        torch.testing.assert_close(logits_of(model, batches, aw_layers(model)), before, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(alone, before, atol=1e-3)
    assert not torch.allclose(alone, everywhere, atol=1e-3)
    report = awconv.fold(model, [(images, before.argmax(1))], max_drop=100)
    assert len(report.folded) == 6
    with torch.no_grad():
        torch.testing.assert_close(model(images), everywhere, rtol=1e-3, atol=1e-3)


def test_other_maps_are_those_of_another_image_or_none() -> None:
    maps = torch.randn(3, 2, 1, 3, 3)
    assert torch.equal(another_images("x", maps), maps[[2, 0, 1]])
    assert not zero("x", maps).any()


def test_damaged_weights_are_named() -> None:
    model = digits_network()
    torch.nn.init.constant_(model.fc.bias, math.nan)
    with pytest.raises(ValueError, match="the network's outputs are not finite; its weights are damaged"):
        logits_of(model, [torch.zeros(2, 1, 8, 8)], aw_layers(model))
