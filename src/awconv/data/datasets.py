"""Data sets of pictures, decoded once or at each access."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from awconv.data.images import MODES, BrokenImageError, Encoded
from awconv.data.order import Draw, derive_seed, seed_all
from awconv.terminal import printable

_log = logging.getLogger(__name__)


Indices = Sequence[int] | np.ndarray[Any, np.dtype[np.integer[Any]]]


class LabelledImages(Protocol):
    """torchvision's convention for classification data: pairs of a picture and a class index.

    ``targets`` lists the class indices without decoding an image. A large data set keeps them in an array: processes
    that read a list write to its memory, by Python's counts of references, and so each gets a copy of its own.

    A data set of encoded images may have a method ``encoded``, which gives the image of an index as an
    :class:`~awconv.data.images.Encoded`. Training images then need not pass through Pillow.
    """

    @property
    def targets(self) -> Indices: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, int]: ...


class ArrayImages(Dataset[tuple[Image.Image, int]]):
    """Decoded images.

    Args:
        images: uint8, shape (N, H, W) or (N, H, W, 3).
        targets: N class indices.
    """

    def __init__(self, images: np.ndarray[Any, np.dtype[np.uint8]], targets: list[int]) -> None:
        self.images = images
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), self.targets[index]


class InMemoryImages(Dataset[tuple[Tensor, Tensor]]):
    """A data set decoded once, by threads, and kept as one uint8 tensor. A batch is one indexing of it.

    Args:
        dataset: pictures and class indices.
        indices: of the images to keep.
        transform: from a PIL image to a uint8 tensor of shape (channels, size, size).
        channels: 1 for grey, 3 for colour.
        size: height and width, in pixels.
        skip_broken: leave out images that cannot be decoded, and log their names.
        threads: number of threads that decode.

    Raises:
        BrokenImageError: an image cannot be decoded, or none can.
    """

    def __init__(
        self,
        dataset: LabelledImages,
        indices: Indices,
        transform: Callable[[Image.Image], Tensor],
        channels: int,
        size: int,
        skip_broken: bool = False,
        threads: int = 4,
    ) -> None:
        images = np.empty((len(indices), channels, size, size), np.uint8)
        targets = torch.from_numpy(np.asarray(dataset.targets, np.int64)[np.asarray(indices, np.int64)])

        def decode(position: int) -> bool:
            try:
                image: Image.Image = dataset[int(indices[position])][0]
            except BrokenImageError as error:
                log_skipped(error, skip_broken)
                return False
            images[position] = transform(image).numpy()
            return True

        with ThreadPoolExecutor(threads) as pool:
            decoded = torch.tensor(list(pool.map(decode, range(len(indices)))))
        if not decoded.any():
            raise BrokenImageError(f"none of {len(indices)} images can be decoded")
        self.images, self.targets = torch.from_numpy(images), targets
        if not decoded.all():
            self.images, self.targets = self.images[decoded], targets[decoded]

    @classmethod
    def of(cls, images: Tensor, targets: Tensor) -> InMemoryImages:
        """A data set of images that are decoded already.

        Args:
            images: uint8, shape (N, channels, size, size).
            targets: int64, shape (N,).
        """
        made = cls.__new__(cls)
        made.images, made.targets = images, targets
        return made

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.targets[index]

    def __getitems__(self, indices: Sequence[int | Draw]) -> tuple[Tensor, Tensor]:
        """A whole batch at once. PyTorch's DataLoader calls this, and nothing is left to collate."""
        chosen = torch.tensor([i.image if isinstance(i, Draw) else i for i in indices], dtype=torch.long)
        chosen = chosen.to(self.device)
        return self.images[chosen], self.targets[chosen]

    @property
    def device(self) -> torch.device:
        """Where the images are, and their batches."""
        return self.images.device

    def on(self, device: torch.device) -> InMemoryImages:
        """The same images on a device."""
        there = copy.copy(self)
        there.images, there.targets = self.images.to(device), self.targets.to(device)
        return there


class TransformedImages(Dataset[tuple[Tensor, int] | None]):
    """A data set too large for memory. Each access decodes and transforms an image.

    The item of a skipped broken image is None.

    Args:
        dataset: pictures and class indices.
        indices: of the images to use.
        transform: from a PIL image to a uint8 tensor of shape (channels, H, W).
        channels: 1 for grey, 3 for colour.
        skip_broken: leave out images that cannot be decoded, and log their names.
        from_encoded: does what ``transform`` does from an encoded image, if the data set has the method ``encoded``.
    """

    def __init__(
        self,
        dataset: LabelledImages,
        indices: Indices,
        transform: Callable[[Image.Image], Tensor],
        channels: int,
        skip_broken: bool = False,
        from_encoded: Callable[[Encoded], Tensor] | None = None,
    ) -> None:
        self.dataset, self.transform = dataset, transform
        self.indices = np.asarray(indices, np.int64)
        self.channels, self.skip_broken = channels, skip_broken
        self._encoded: Callable[[int], Encoded] | None = getattr(dataset, "encoded", None)
        self._from_encoded = from_encoded

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int | Draw) -> tuple[Tensor, int] | None:
        if isinstance(index, Draw):
            seed_all(derive_seed(index.seed, index.epoch, index.image))
            index = index.image
        place = int(self.indices[index])
        try:
            if self._from_encoded is not None and self._encoded is not None:
                return self._from_encoded(self._encoded(place)), int(self.dataset.targets[place])
            image = self.dataset[place][0]
        except BrokenImageError as error:
            log_skipped(error, self.skip_broken)
            return None
        return self.transform(image.convert(MODES[self.channels])), int(self.dataset.targets[place])


def log_skipped(error: Exception, skip_broken: bool) -> None:
    """Logs the error of a broken image, if broken images are skipped.

    Raises:
        BrokenImageError: broken images are not skipped.
    """
    if not skip_broken:
        raise BrokenImageError(f"{error}; --data.broken_images=skip leaves broken images out") from error
    _log.warning("left out a broken image: %s", printable(str(error)))
