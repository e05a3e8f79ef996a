"""A data set of images with boxes. Each access decodes an image and checks it against its annotations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from awconv.data.boxes import Annotated
from awconv.data.datasets import log_skipped
from awconv.data.files import Files
from awconv.data.images import MAX_PIXELS, BrokenImageError, check_bytes, read_image
from awconv.data.order import Draw, derive_seed, seed_all

Target = dict[str, Tensor]
_NARROWEST = 100  # largest ratio of sides: a detector would shrink a narrower image to a few pixels across, or none


class AnnotatedImages(Dataset[tuple[Tensor, Target] | None]):
    """Images with boxes, decoded at each access.

    An item is a pair: an image, uint8 of shape (3, H, W), and a dictionary with ``boxes`` (float32, shape (K, 4): x1,
    y1, x2, y2 in pixels), ``labels`` (int64, from 1), ``area``, ``iscrowd`` and ``image_id``. If a broken image is
    skipped, training gets the next image in its place, and evaluation gets None.

    Args:
        files: the data set's files.
        images: their annotations.
        transform: called with an image and a dictionary of ``boxes`` and ``labels``, all as torchvision's tensors.
        skip_broken: leave out images that cannot be decoded, and log their names.
        max_pixels: the largest number of pixels of an image.
    """

    def __init__(
        self,
        files: Files,
        images: Sequence[Annotated],
        transform: Callable[[Any, Any], tuple[Any, Any]] | None = None,
        skip_broken: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.files, self.images, self.transform, self.skip_broken = files, images, transform, skip_broken
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int | Draw) -> tuple[Tensor, Target] | None:
        if not isinstance(index, Draw):
            return self._read(index)
        seed_all(derive_seed(index.seed, index.epoch, index.image))
        for further in range(len(self)):  # the next image replaces a broken one
            item = self._read((index.image + further) % len(self))
            if item is not None:
                return item
        raise BrokenImageError(f"none of the {len(self)} images can be decoded")

    def _read(self, index: int) -> tuple[Tensor, Target] | None:
        annotated = self.images[index]
        try:
            picture = self._decode(annotated)
        except (ValueError, FileNotFoundError) as error:
            log_skipped(error, self.skip_broken)
            return None
        image: Tensor = v2.functional.pil_to_tensor(picture.convert("RGB"))
        target: dict[str, Any] = {
            "boxes": torch.as_tensor(annotated.boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.as_tensor(annotated.labels, dtype=torch.int64),
        }
        if self.transform is None:
            target["area"] = torch.as_tensor(annotated.areas, dtype=torch.float32)
            target["iscrowd"] = torch.as_tensor(annotated.crowd, dtype=torch.int64)
            target["image_id"] = torch.tensor(annotated.image_id)
            return image, target
        size = (annotated.height, annotated.width)
        target["boxes"] = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)  # type: ignore[call-overload]
        image, target = self.transform(tv_tensors.Image(image), target)
        return image.as_subclass(Tensor), {name: value.as_subclass(Tensor) for name, value in target.items()}

    def _decode(self, annotated: Annotated) -> Image.Image:
        name, most = self.files.name(annotated.path), self.max_pixels
        check_bytes(self.files.size(annotated.path), name, most)
        content = self.files.read(annotated.path)
        picture = read_image(content, name, max_pixels=most)
        if picture.size != (annotated.width, annotated.height):
            picture = read_image(content, name, upright=False, max_pixels=most)  # annotated as stored
        check_size(annotated, picture.size, name)
        return picture


def check_size(annotated: Annotated, size: tuple[int, int], name: str) -> None:
    """Raises a BrokenImageError if an image is too narrow, or its size differs from that in its annotations."""
    if max(size) > _NARROWEST * min(size):
        raise BrokenImageError(
            f"{name}: it has {size[0]}x{size[1]} pixels; one side must be at most {_NARROWEST} times the other, as a "
            "detector shrinks narrower images to nothing; crop the image"
        )
    if size != (annotated.width, annotated.height):
        raise BrokenImageError(
            f"{name}: the image must have {annotated.width}x{annotated.height} pixels, as its annotations say, got "
            f"{size[0]}x{size[1]}; correct the annotations, or resize the image"
        )
