"""Real images to calibrate with, and to compare with PyTorch on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor

from awconv.data.files import composed, is_leftover, walk
from awconv.data.images import ENDINGS, BrokenImageError, read_image
from awconv.data.parquet import ParquetImages
from awconv.data.transforms import to_uint8
from awconv.tasks import ClassificationTask
from awconv.terminal import printable, say

_DIGITS = 16


class Images:
    """Images of a folder or of a Parquet file, with or without labels.

    Args:
        pictures: gives the image of an index, in Pillow's form.
        labels: the class of each image, an index; None if there are none that fit the network.
        name: what they are, in words.
    """

    def __init__(self, pictures: Any, count: int, labels: Sequence[int] | None, name: str) -> None:
        self._pictures, self.count, self.labels, self.name = pictures, count, labels, name

    def chosen(self, most: int) -> list[int]:
        """The indices of at most so many images, evenly spread."""
        return [int(index) for index in np.linspace(0, self.count - 1, min(most, self.count)).round()]

    def pictures(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """The images of these indices that can be decoded, grey or in colour."""
        for index in indices:
            try:
                yield self._pictures(index)
            except BrokenImageError as error:
                say(f"broken image, left out: {error}")

    def batches(
        self, indices: Sequence[int], batch: int, size: Sequence[int], task: ClassificationTask
    ) -> Iterator[tuple[Tensor, list[int]]]:
        """Batches of images that can be decoded, with their indices.

        Args:
            indices: of images.
            batch: the number of images in a batch.
            size: channels, height and width.
            task: how they are cropped.

        Yields:
            uint8, shape (N, channels, H, W), and N indices.

        Raises:
            ValueError: none of the images can be decoded.
        """
        decoded = 0
        for start in range(0, len(indices), batch):
            images, numbers = [], []
            for index in indices[start : start + batch]:
                try:
                    images.append(_fitted(self._pictures(index), size, task))
                    numbers.append(index)
                except BrokenImageError as error:
                    say(f"broken image, left out: {error}")
            decoded += len(images)
            if images:
                yield torch.stack(images), numbers
        if not decoded:
            raise ValueError(f"none of the {len(indices)} images of {self.name} can be decoded")


def _fitted(picture: Image.Image, size: Sequence[int], task: ClassificationTask) -> Tensor:
    channels, height, width = size
    side = max(height, width)
    square = to_uint8(picture, channels, side, task.crop_pct, task.interpolation)
    top, left = (side - height) // 2, (side - width) // 2
    return square[:, top : top + height, left : left + width].contiguous()


def shipped(channels: int) -> Images:
    """Real images that come with scikit-learn: two photographs, whole and in quarters; for one channel, digits."""
    if channels == 1:
        digits = [np.round(digit * (255 / 16)).astype(np.uint8) for digit in load_digits().images[:_DIGITS]]
        return _of_arrays(digits, "scikit-learn's digits")
    parts = []
    for whole in load_sample_images().images:
        height, width = whole.shape[0] // 2, whole.shape[1] // 2
        quarters = [whole[y : y + height, x : x + width] for y in (0, height) for x in (0, width)]
        parts += [whole, *quarters]
    return _of_arrays(parts, "scikit-learn's photographs")


def _of_arrays(arrays: list[Any], name: str) -> Images:
    return Images(lambda index: Image.fromarray(arrays[index]), len(arrays), None, name)


def opened(path: Path, classes: Sequence[str], option: str) -> Images:
    """The images of a folder, or of a Parquet file in the layout of Hugging Face's data sets.

    The images of a folder are labelled if each is in a folder that is named like a class, directly under the given
    one. Those of a Parquet file are labelled if its classes are the network's, or numbers.

    Args:
        path: the folder or the file.
        classes: of the network.
        option: that names it, for errors.

    Raises:
        FileNotFoundError: it is not there, or holds no image.
        ValueError: the Parquet file cannot be read.
    """
    path = Path(os.path.expanduser(path))
    if path.suffix == ".parquet" and path.is_file():
        return _of_parquet(path, classes)
    if not path.is_dir():
        raise FileNotFoundError(f"{option} must be a folder of images or a Parquet file, and {path} is neither")
    files = sorted(file for file in walk(path) if os.path.splitext(file)[1].lower() in ENDINGS and os.path.isfile(file))
    if not files:
        raise FileNotFoundError(f"{option}: folder {path} holds no image file ({', '.join(sorted(ENDINGS))})")
    numbers = {composed(name): number for number, name in enumerate(classes)}
    folders = [composed(Path(file).relative_to(path).parts[0]) for file in files]
    labels = [numbers[folder] for folder in folders] if set(folders) <= set(numbers) else None
    if labels is None and len({folder for folder in folders if not is_leftover(folder)} & set(numbers)) > 0:
        others = sorted(set(folders) - set(numbers))
        raise ValueError(f"{option}: {path} has folders named like classes of the network, and also {others[0]}")
    return Images(lambda index: read_image(files[index], files[index]), len(files), labels, printable(str(path)))


def _of_parquet(path: Path, classes: Sequence[str]) -> Images:
    rows = ParquetImages(str(path), "image", "label")
    if not len(rows):
        raise FileNotFoundError(f"{path} holds no image")
    numbered = rows.classes == [str(number) for number in range(len(rows.classes))] and len(rows.classes) <= len(
        classes
    )
    fits = numbered or rows.classes == list(classes)
    return Images(
        lambda index: rows[index][0], len(rows), rows.targets.tolist() if fits else None, printable(str(path))
    )
