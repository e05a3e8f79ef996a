"""scikit-learn's scanned digits: real images that a dependency ships, for demonstrations and tests."""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from awconv.data.classification import ImageDataModule
from awconv.data.datasets import ArrayImages
from awconv.data.loading import Split

_TEST_IMAGES = 360
_SPLIT_SEED = 0


class Digits(ImageDataModule):
    """1,797 scanned handwritten digits, 8x8 pixels, grey (``sklearn.datasets.load_digits``).

    The test split is a fifth of them, 360 images, evenly over the classes and always the same. The arguments are those
    of :class:`ImageDataModule`.
    """

    channels = 1
    default_image_size = 8
    default_crop_padding = 1
    default_horizontal_flip = False
    default_mean = (0.305,)
    default_std = (0.376,)

    @property
    def classes(self) -> list[str]:
        return [str(digit) for digit in range(10)]

    def open(self, split: Split) -> ArrayImages | None:
        return None if split == "val" else grey_digits(split)


def grey_digits(split: Literal["train", "test"]) -> ArrayImages:
    """The digits of a split: uint8, shape (N, 8, 8)."""
    return _splits()[split]


@cache
def _splits() -> dict[str, ArrayImages]:
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)  # 17 shades, 0 to 16
    train, test = train_test_split(
        np.arange(len(images)), test_size=_TEST_IMAGES, random_state=_SPLIT_SEED, stratify=digits.target
    )
    return {
        "train": ArrayImages(images[train], digits.target[train].tolist()),
        "test": ArrayImages(images[test], digits.target[test].tolist()),
    }
