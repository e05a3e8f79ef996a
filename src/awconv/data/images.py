"""From files and arrays to uint8 tensors."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize

_MODES = {1: "L", 3: "RGB"}


class BrokenImageError(ValueError):
    """An image that cannot be decoded; the message names it."""


class LabelledImages(Protocol):
    """torchvision's convention for data sets in a classification: pictures with class indices, which ``targets`` lists
    without decoding anything."""

    targets: list[int]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, int]: ...


def read_image(source: bytes | str, name: str) -> Image.Image:
    """Decodes an image wholly, to grey (mode L) or colour (RGB).

    Args:
        source: the file's content, or its path.
        name: what an error calls it.

    Raises:
        BrokenImageError: it cannot be read, decoded or converted.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.mode.startswith("I;16"):  # which convert() would clip at 255
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    except Exception as error:  # Pillow's formats raise errors of many kinds
        raise BrokenImageError(f"{name}: {error}") from error


def to_uint8(image: Image.Image, channels: int, size: int) -> Tensor:
    """Resizes the shorter side to ``size`` and crops the centre.

    Args:
        image: grey (mode L) or colour (RGB).
        channels: 1 for grey, 3 for colour.
        size: height and width of the result, in pixels.

    Returns:
        uint8, shape (channels, size, size).
    """
    image = image.convert(_MODES[channels])
    if min(image.size) != size:
        image = resize(image, [size], antialias=True)
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
        channels: 1 for grey, 3 for colour.
        size: height and width, in pixels.
        threads: how many decode at once.

    Raises:
        BrokenImageError: an image cannot be decoded.
    """

    def __init__(
        self, dataset: LabelledImages, indices: Sequence[int], channels: int, size: int, threads: int = 4
    ) -> None:
        images = np.empty((len(indices), channels, size, size), np.uint8)
        self.targets = torch.tensor([dataset.targets[index] for index in indices], dtype=torch.long)

        def decode(position: int) -> None:
            images[position] = to_uint8(dataset[indices[position]][0], channels, size).numpy()

        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(decode, range(len(indices))):
                pass
        self.images = torch.from_numpy(images)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.targets[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A whole batch at once (the hook of PyTorch's DataLoader), so that collating is nothing."""
        chosen = torch.tensor(indices, dtype=torch.long)
        return self.images[chosen], self.targets[chosen]


class TransformedImages(Dataset[tuple[Tensor, int]]):
    """A data set decoded and transformed anew at each access, for sets that do not fit into memory.

    Args:
        dataset: pictures and class indices.
        indices: which of them.
        channels: 1 for grey, 3 for colour.
        transform: from a PIL image to a uint8 tensor of shape (channels, H, W).
    """

    def __init__(self, dataset: LabelledImages, indices: Sequence[int], channels: int, transform: Any) -> None:
        self.dataset, self.indices, self.channels, self.transform = dataset, indices, channels, transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, target = self.dataset[self.indices[index]]
        return self.transform(image.convert(_MODES[self.channels])), target
