"""Scenes made of scikit-learn's scanned digits, which differ from image to image in ways that a kernel can follow."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image
from sklearn.model_selection import train_test_split

from awconv.data.classification import ImageDataModule
from awconv.data.datasets import ArrayImages
from awconv.data.digits import grey_digits
from awconv.data.loading import Split

Vary = Literal["contrast", "scale", "clutter", "all"]
SIZE = 24  # pixels of a scene
SCENES = {"train": 5, "val": 2, "test": 4}  # of each digit, by split
_VAL_DIGITS, _SPLIT_SEED, _SCENES_SEED = 360, 0, 0
_Array = np.ndarray[Any, Any]


class DigitScenes(ImageDataModule):
    """Scenes of 24x24 pixels, grey, each with one scanned digit of scikit-learn's (``load_digits``).

    What differs from scene to scene, and must not matter, is chosen by ``vary``:

    - ``"contrast"``: ink lighter or darker than the ground, by a little or a lot, thin or thick, on an uneven ground.
    - ``"scale"``: digits of 8 to 24 pixels, anywhere.
    - ``"clutter"``: pieces of other digits around the digit, and noise of a strength of its own.
    - ``"all"``: all three.

    Training has five scenes of each of 1,077 digits; validation has two and test four of each of 360 others, always
    the same. The test digits are those of :class:`Digits`. The other arguments are those of :class:`ImageDataModule`.

    Args:
        vary: what differs between the scenes.
        kwargs: of :class:`ImageDataModule`.

    Raises:
        ValueError: ``vary`` is something else.
    """

    channels = 1
    default_image_size = SIZE
    default_horizontal_flip = False
    default_mean = (0.5,)
    default_std = (0.25,)

    def __init__(self, vary: Vary = "all", **kwargs: Any) -> None:
        if vary not in get_args(Vary):
            raise ValueError(f"vary must be one of {', '.join(get_args(Vary))}, got {vary!r}")
        super().__init__(**kwargs)
        self.vary = vary

    @property
    def classes(self) -> list[str]:
        return [str(digit) for digit in range(10)]

    def open(self, split: Split) -> ArrayImages | None:
        return scenes_of(self.vary, split)


def digits_of(split: Split) -> ArrayImages:
    """The digits of a split's scenes: uint8, shape (N, 8, 8). No digit is in two splits."""
    if split == "test":
        return grey_digits("test")
    digits = grey_digits("train")
    train, val = train_test_split(
        np.arange(len(digits)), test_size=_VAL_DIGITS, random_state=_SPLIT_SEED, stratify=digits.targets
    )
    chosen = {"train": train, "val": val}[split]
    return ArrayImages(digits.images[chosen], [digits.targets[index] for index in chosen.tolist()])


@cache
def scenes_of(vary: Vary, split: Split) -> ArrayImages:
    """A split's scenes: uint8, shape (N, SIZE, SIZE). Those of a digit follow each other."""
    digits = digits_of(split)
    seed = np.random.SeedSequence((_SCENES_SEED, get_args(Split).index(split)))
    drawer = _Drawer(digits.images, vary, np.random.Generator(np.random.PCG64(seed)))
    chosen = np.repeat(np.arange(len(digits)), SCENES[split])
    return ArrayImages(
        np.stack([drawer.scene(index) for index in chosen.tolist()]), np.repeat(digits.targets, SCENES[split]).tolist()
    )


@dataclass
class _Drawer:
    """Draws scenes of digits.

    Attributes:
        digits: uint8, shape (N, 8, 8).
        vary: what differs.
        rng: decides it.
    """

    digits: _Array
    vary: Vary
    rng: np.random.Generator

    def scene(self, index: int) -> _Array:
        """A scene with a digit: uint8, shape (SIZE, SIZE)."""
        rng = self.rng
        size = int(rng.integers(8, SIZE + 1)) if self._varies("scale") else 14
        top, left = self._place(size)
        ink = np.zeros((SIZE, SIZE))
        if self._varies("clutter"):
            for _ in range(rng.integers(2, 7)):
                self._add_piece(ink, size)
        digit = _resized(self.digits[index], size)
        ink[top : top + size, left : left + size] = digit
        if self._varies("contrast"):
            ink = 1 / (1 + np.exp(-12 * (ink - rng.uniform(0.25, 0.65))))  # thick to thin
            ground, difference = self._contrast()
        else:
            ground, difference = np.full((SIZE, SIZE), 0.2), 0.6
        scene = ground + difference * ink
        if self._varies("clutter"):
            scene = scene + rng.normal(0, rng.uniform(0, 0.2), scene.shape)
        return np.clip(np.rint(255 * scene), 0, 255).astype(np.uint8)

    def _varies(self, what: Vary) -> bool:
        return self.vary in (what, "all")

    def _place(self, size: int) -> tuple[int, int]:
        """The upper left corner: anywhere, or near the middle if neither the scale differs nor there is clutter."""
        room = SIZE - size
        if self.vary == "contrast":
            return tuple(room // 2 + self.rng.integers(-2, 3, 2))
        return tuple(self.rng.integers(0, room + 1, 2))

    def _add_piece(self, ink: _Array, size: int) -> None:
        """A piece of another digit, as large as a part of it."""
        other = _resized(self.digits[self.rng.integers(len(self.digits))], size)
        part = max(3, size // 2)
        top, left = self.rng.integers(0, size - part + 1, 2)
        row, column = self.rng.integers(0, SIZE - part + 1, 2)
        ink[row : row + part, column : column + part] = other[top : top + part, left : left + part]

    def _contrast(self) -> tuple[_Array, float]:
        """The ground, which rises from one side to another, and how much lighter the ink is."""
        rng = self.rng
        difference = float(rng.uniform(0.15, 0.7) * rng.choice((-1, 1)))
        low, high = max(0.0, -difference), min(1.0, 1 - difference)
        level = rng.uniform(low, high)
        rows, columns = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
        slope, angle = rng.uniform(0, 0.2), rng.uniform(0, 2 * np.pi)
        return level + slope * (np.cos(angle) * rows + np.sin(angle) * columns), difference


def _resized(digit: _Array, size: int) -> _Array:
    """A digit of size x size pixels, from 0 to 1."""
    return np.asarray(Image.fromarray(digit).resize((size, size), Image.Resampling.BICUBIC), np.float64) / 255
