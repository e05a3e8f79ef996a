"""The images that an explanation is about: files, or some of a data set's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awconv.data import BrokenImageError, ImageDataModule, to_uint8
from awconv.data.classification import IN_MEMORY_BYTES
from awconv.data.datasets import InMemoryImages
from awconv.data.images import read_image
from awconv.data.loading import Split
from awconv.tasks import ClassificationTask
from awconv.terminal import say


@dataclass(frozen=True)
class Images:
    """Images as a network gets them, before normalisation.

    Attributes:
        pixels: uint8, shape (N, channels, H, W).
        names: of each, for people.
        targets: the class of each, shape (N,); None where they are not known.
        source: where they come from, in words.
    """

    pixels: Tensor
    names: list[str]
    targets: Tensor | None
    source: str

    def __len__(self) -> int:
        return len(self.names)

    def batches(self, task: ClassificationTask, size: int) -> Iterator[Tensor]:
        """Normalised images, one batch at a time.

        Args:
            task: which normalises them.
            size: images a batch.
        """
        for part in self.parts(size):
            yield task.normalised(self.pixels[part.start : part.stop].to(task.device))

    def parts(self, size: int) -> list[range]:
        """The indices of each batch, at least two, so that each image has another one beside it."""
        starts = [start for start in range(0, len(self), size) if start == 0 or len(self) - start > 1]
        return [range(start, end) for start, end in zip(starts, [*starts[1:], len(self)], strict=True)]


def images_of_files(task: ClassificationTask, files: Sequence[Path], most: int, max_pixels: int) -> Images:
    """Image files, prepared as in the network's evaluation. Broken ones are reported and left out.

    Raises:
        ValueError: fewer than two can be decoded, or they would take too much memory.
    """
    chosen = [files[index] for index in _chosen(len(files), most)]
    channels, size, _ = task.input_size
    _check_memory(len(chosen), channels * size**2)
    pixels, names = [], []
    for file in chosen:
        try:
            image = read_image(str(file), str(file), max_pixels=max_pixels)
        except BrokenImageError as error:
            say(f"broken image: {error}")
            continue
        pixels.append(to_uint8(image, channels, size, task.crop_pct, task.interpolation))
        names.append(str(file))
    _check_count(len(names))
    return Images(torch.stack(pixels), names, None, _told(len(names), len(files), "image files"))


def images_of_data(data: ImageDataModule, split: Split, most: int) -> tuple[Images, int]:
    """A random choice of a split's images, the same each time, with their classes; and how many were to be read.

    Raises:
        ValueError: the data have no such split, or its images would be augmented, or are fewer than two or too many.
    """
    dataset: Any = data.dataset(split)
    if dataset is None:
        raise ValueError(f"the data have no {split} split; name one, give another --split, or data.val_fraction")
    if split == "test" and data.test_split == "val":
        say("awconv explain: the data have no test split; this is their validation split")
    if split == "train" and not isinstance(dataset, InMemoryImages):
        raise ValueError(
            "training images that are not kept in memory are augmented; give --data.in_memory=true without "
            "data.transform, or explain images that are held out, --split=val"
        )
    _check_memory(min(most, len(dataset)), data.channels * data.image_size**2)
    chosen = _chosen(len(dataset), most)
    found = {index: item for index in chosen if (item := dataset[index]) is not None}
    _check_count(len(found))
    images = Images(
        torch.stack([pixels for pixels, _ in found.values()]),
        [f"image {index} of the {split} split" for index in found],
        torch.tensor([int(target) for _, target in found.values()]),
        _told(len(found), len(dataset), f"images of the {split} split of {type(data).__name__}"),
    )
    return images, len(chosen)


def _chosen(count: int, most: int) -> list[int]:
    """Indices in a random order, so that neighbours are not of one class because a folder is."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:most].tolist()  # type: ignore[no-any-return]


def _told(count: int, of: int, what: str) -> str:
    return f"{count:,} {what}" if count == of else f"{count:,} of {of:,} {what}, chosen at random"


def _check_memory(count: int, size: int) -> None:
    if count * size > IN_MEMORY_BYTES:
        raise ValueError(
            f"{count:,} images of {size:,} bytes are kept in memory, and may take at most "
            f"{IN_MEMORY_BYTES / 2**30:.0f} GiB; give --images={IN_MEMORY_BYTES // size} or fewer"
        )


def _check_count(count: int) -> None:
    if count < 2:
        raise ValueError(f"an explanation shows how images differ, and needs at least 2 that can be read; got {count}")
