"""From files and arrays to uint8 tensors."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize

from awconv.data.order import Draw, derive_seed, seed_all

_MODES = {1: "L", 3: "RGB"}
_log = logging.getLogger(__name__)


class BrokenImageError(ValueError):
    """An image that cannot be decoded; the message names it."""


class LabelledImages(Protocol):
    """torchvision's convention for data sets in a classification: pictures with class indices, which ``targets`` lists
    without decoding anything."""

    targets: list[int]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, int]: ...


def read_image(source: bytes | str, name: str, upright: bool = False) -> Image.Image:
    """Decodes an image wholly, to grey (mode L) or colour (RGB).

    Args:
        source: the file's content, or its path.
        name: what an error calls it.
        upright: turn it as its EXIF orientation says; otherwise its pixels stay where they are stored.

    Raises:
        BrokenImageError: it cannot be read, decoded or converted.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if upright:
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I;16"):  # which convert() would clip at 255
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    except Exception as error:  # Pillow's formats raise errors of many kinds
        raise BrokenImageError(f"{name}: {error}") from error


def read_header(source: IO[bytes], name: str) -> tuple[str, tuple[int, int]]:
    """Pillow's mode of an image, and its width and height in pixels; only the header is read.

    Args:
        source: the file.
        name: what an error calls it.

    Raises:
        BrokenImageError: it is no image.
    """
    try:
        with Image.open(source) as image:
            return image.mode, image.size
    except Exception as error:  # Pillow's formats raise errors of many kinds
        raise BrokenImageError(f"{name}: {error}") from error


def to_uint8(image: Image.Image, channels: int, size: int, crop_pct: float = 1.0) -> Tensor:
    """Resizes the shorter side and crops the centre.

    Args:
        image: grey (mode L) or colour (RGB).
        channels: 1 for grey, 3 for colour.
        size: height and width of the result, in pixels.
        crop_pct: the share of the shorter side that is left, such as 0.875 for 224 of 256 pixels.

    Returns:
        uint8, shape (channels, size, size).
    """
    image = image.convert(_MODES[channels])
    shorter = round(size / crop_pct)
    if min(image.size) != shorter:
        image = resize(image, [shorter], antialias=True)
    if image.size != (size, size):
        image = center_crop(image, [size, size])
    tensor: Tensor = pil_to_tensor(image)
    return tensor


class ArrayImages(Dataset[tuple[Image.Image, int]]):
    """Images that are already decoded.

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
    """A data set decoded once, in threads, and kept as one uint8 tensor. Batches are cut out of it whole.

    Args:
        dataset: pictures and class indices.
        indices: which of them.
        transform: from a PIL image to a uint8 tensor of shape (channels, size, size).
        channels: 1 for grey, 3 for colour.
        size: height and width, in pixels.
        skip_broken: leave out images that cannot be decoded, and log their names.
        threads: how many decode at once.

    Raises:
        BrokenImageError: an image cannot be decoded, or none can.
    """

    def __init__(
        self,
        dataset: LabelledImages,
        indices: Sequence[int],
        transform: Callable[[Image.Image], Tensor],
        channels: int,
        size: int,
        skip_broken: bool = False,
        threads: int = 4,
    ) -> None:
        images = np.empty((len(indices), channels, size, size), np.uint8)
        targets = torch.tensor([dataset.targets[index] for index in indices], dtype=torch.long)

        def decode(position: int) -> bool:
            image = _read(dataset, indices[position], skip_broken)
            if image is not None:
                images[position] = transform(image).numpy()
            return image is not None

        with ThreadPoolExecutor(threads) as pool:
            decoded = torch.tensor(list(pool.map(decode, range(len(indices)))))
        if not decoded.any():
            raise BrokenImageError(f"none of {len(indices)} images can be decoded")
        self.images, self.targets = torch.from_numpy(images), targets
        if not decoded.all():
            self.images, self.targets = self.images[decoded], targets[decoded]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.targets[index]

    def __getitems__(self, indices: Sequence[int | Draw]) -> tuple[Tensor, Tensor]:
        """A whole batch at once (the hook of PyTorch's DataLoader), so that collating is nothing."""
        chosen = torch.tensor([i.image if isinstance(i, Draw) else i for i in indices], dtype=torch.long)
        return self.images[chosen], self.targets[chosen]


class TransformedImages(Dataset[tuple[Tensor, int] | None]):
    """A data set decoded and transformed anew at each access, for sets that do not fit into memory.

    An item is None where a broken image is skipped.

    Args:
        dataset: pictures and class indices.
        indices: which of them.
        transform: from a PIL image to a uint8 tensor of shape (channels, H, W).
        channels: 1 for grey, 3 for colour.
        skip_broken: leave out images that cannot be decoded, and log their names.
    """

    def __init__(
        self,
        dataset: LabelledImages,
        indices: Sequence[int],
        transform: Callable[[Image.Image], Tensor],
        channels: int,
        skip_broken: bool = False,
    ) -> None:
        self.dataset, self.indices, self.transform = dataset, indices, transform
        self.channels, self.skip_broken = channels, skip_broken

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int | Draw) -> tuple[Tensor, int] | None:
        if isinstance(index, Draw):
            seed_all(derive_seed(index.seed, index.epoch, index.image))
            index = index.image
        image = _read(self.dataset, self.indices[index], self.skip_broken)
        if image is None:
            return None
        return self.transform(image.convert(_MODES[self.channels])), self.dataset.targets[self.indices[index]]


def _read(dataset: LabelledImages, index: int, skip_broken: bool) -> Image.Image | None:
    try:
        image: Image.Image = dataset[index][0]
    except BrokenImageError as error:
        log_skipped(error, skip_broken)
        return None
    return image


def log_skipped(error: Exception, skip_broken: bool) -> None:
    """Logs a broken image that is left out.

    Raises:
        BrokenImageError: it is not to be left out.
    """
    if not skip_broken:
        raise BrokenImageError(f"{error}; --data.broken_images=skip leaves broken images out") from error
    _log.warning("left out a broken image: %s", error)
