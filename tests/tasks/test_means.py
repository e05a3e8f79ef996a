"""Means of an epoch's losses."""

from __future__ import annotations

import random
from statistics import fmean

import pytest
import torch

from awconv.tasks.means import EpochMeans


@pytest.mark.parametrize("steps", [1, 255, 256, 257, 600])
def test_means_are_over_the_images_not_over_the_steps(steps: int) -> None:
    draw = random.Random(steps)
    figures = [(draw.random(), draw.random(), draw.randint(1, 9)) for _ in range(steps)]
    means = EpochMeans()
    for loss, box, images in figures:
        means.add({"loss": torch.tensor(loss, requires_grad=True), "box": torch.tensor(box)}, images)
    images = sum(count for *_, count in figures)
    loss, box = (sum(one[part] * one[2] for one in figures) / images for part in (0, 1))
    assert means.take() == pytest.approx({"loss": loss, "box": box}, rel=1e-6)  # of figures in single precision
    assert means.take() == {}


def test_no_step_keeps_its_graph_and_the_next_epoch_starts_anew() -> None:
    means, weight = EpochMeans(), torch.ones(1, requires_grad=True)
    means.add({"loss": (2 * weight).sum()}, 3)
    assert not any(value.requires_grad for values in means._waiting.values() for value in values)
    means.clear()
    means.add({"loss": torch.tensor(5.0)}, 1)
    means.add({"loss": torch.tensor(6.0)}, 1)
    assert means.take() == {"loss": fmean([5, 6])}
