"""Scenes of digits: what differs from scene to scene, and what is kept apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from awconv.data import Digits, DigitScenes
from awconv.data import scenes as module
from awconv.data.loading import Split


def images(vary: str, split: Split = "train") -> np.ndarray:
    opened = DigitScenes(vary=vary).open(split)  # type: ignore[arg-type]
    assert opened is not None
    return opened.images.astype(np.float64)


def test_no_digit_is_in_two_splits_and_the_test_digits_are_those_of_digits() -> None:
    found = {split: [digit.tobytes() for digit in module.digits_of(split).images] for split in ("train", "val", "test")}
    assert {split: len(digits) for split, digits in found.items()} == {"train": 1077, "val": 360, "test": 360}
    assert len(set().union(*found.values())) == 1797
    test = Digits().open("test")
    assert test is not None
    assert found["test"] == [digit.tobytes() for digit in test.images]


@pytest.mark.parametrize("vary", ["contrast", "scale", "clutter", "all"])
def test_scenes_are_the_same_each_time_and_each_digit_has_its_label(vary: str) -> None:
    data = DigitScenes(vary=vary)  # type: ignore[arg-type]
    opened = data.open("val")
    assert opened is not None
    assert opened.targets == np.repeat(module.digits_of("val").targets, module.SCENES["val"]).tolist()
    before = opened.images.copy()
    module.scenes_of.cache_clear()
    again = DigitScenes(vary=vary).open("val")  # type: ignore[arg-type]
    assert again is not None
    assert (again.images == before).all()
    pixels, target = data.dataset("val")[0]  # type: ignore[index]
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (1, 24, 24)
    assert int(target) == opened.targets[0]


def test_contrast_is_turned_round_in_half_of_the_scenes_and_differs_in_strength() -> None:
    found = images("contrast")
    ground = np.median(np.concatenate([found[:, 0], found[:, -1]], 1), 1)[:, None, None]
    middle = found[:, 6:18, 6:18]
    difference = np.take_along_axis(
        (middle - ground).reshape(len(found), -1), np.abs(middle - ground).reshape(len(found), -1).argmax(1)[:, None], 1
    )
    assert 0.45 < (difference > 0).mean() < 0.55  # 5,385 fair coins have a standard deviation of 0.007
    assert np.quantile(np.abs(difference), 0.9) > 2.5 * np.quantile(np.abs(difference), 0.1)


def test_scales_are_from_8_to_24_pixels() -> None:
    ink = images("scale") > 60  # the ground is 51
    heights = np.array([np.ptp(np.flatnonzero(scene.any(1))) + 1 for scene in ink])
    assert heights.min() <= 8
    assert heights.max() >= 23


def test_clutter_is_pieces_around_the_digit_and_noise_of_a_strength_of_its_own() -> None:
    found = images("clutter")
    noise = np.median(np.abs(np.diff(found, axis=2)), (1, 2))
    assert np.quantile(noise, 0.9) > 5 * np.quantile(noise, 0.1) > 0
    quiet = found[noise < np.quantile(noise, 0.1)] > 90
    plain = images("scale") > 90
    inked_rows = [scene.any(1).mean() for scene in quiet]
    assert np.mean(inked_rows) > np.mean([scene.any(1).mean() for scene in plain])  # a digit of 14 fills 0.58 at most


def test_something_else_cannot_vary() -> None:
    with pytest.raises(ValueError, match="vary must be one of contrast, scale, clutter, all, got 'colour'"):
        DigitScenes(vary="colour")  # type: ignore[arg-type]
