"""Random resized crops from encoded images, of which Pillow need not resize any, nor decode JPEG files."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.transforms import MaybePILToTensor, RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import ColorJitter, RandomHorizontalFlip, RandomVerticalFlip
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from awconv.data.images import Encoded, decoded, opened, turn_of

_JPEG = ("JPEG", "MPO")  # MPO: a JPEG with further ones behind it, as of telephones
_COLOURS = {"L": "GRAY", "RGB": "RGB"}  # simplejpeg's, by Pillow's mode
_KEPT_BYTES = 2**25  # of memory for pixels, used again; larger images take new memory
_ON_TENSORS = (RandomHorizontalFlip, RandomVerticalFlip, MaybePILToTensor)  # draw and do the same there
_TURNED: dict[Image.Transpose, Callable[[Tensor], Tensor]] = {
    Image.Transpose.FLIP_LEFT_RIGHT: lambda image: image.flip(2),
    Image.Transpose.FLIP_TOP_BOTTOM: lambda image: image.flip(1),
    Image.Transpose.ROTATE_90: lambda image: image.rot90(1, (1, 2)),
    Image.Transpose.ROTATE_180: lambda image: image.rot90(2, (1, 2)),
    Image.Transpose.ROTATE_270: lambda image: image.rot90(3, (1, 2)),
    Image.Transpose.TRANSPOSE: lambda image: image.transpose(1, 2),
    Image.Transpose.TRANSVERSE: lambda image: image.rot90(2, (1, 2)).transpose(1, 2),
}


class QuickCrops:
    """A training transform of timm that begins with a random resized crop, from encoded images.

    PyTorch resizes the crop: in less than half of Pillow's time, to values that differ by a level of 255 in a few of a
    thousand. libjpeg-turbo decodes JPEG files through simplejpeg where it is installed (the extra ``jpeg``), to the
    pixels of Pillow, which decodes all else: other files, JPEG files in CMYK, damaged ones. All random numbers are
    timm's.

    Args:
        transform: by ``timm.data.create_transform(..., is_training=True, normalize=False)``.
        channels: 1 for grey, 3 for colour.
        max_pixels: the largest number of pixels of an image.

    Raises:
        ValueError: the transform cannot be taken apart; see :meth:`can_take`.
    """

    def __init__(self, transform: Any, channels: int, max_pixels: int) -> None:
        if not self.can_take(transform):
            raise ValueError(f"expected a random resized crop by bilinear or bicubic filters first, got {transform}")
        self._channels, self._max_pixels = channels, max_pixels
        self._crop, *self._rest = transform.transforms
        self._stays = all(type(one) in _ON_TENSORS or _is_idle(one) for one in self._rest)
        self._memory = np.empty(0, np.uint8)

    @staticmethod
    def can_take(transform: Any) -> bool:
        """Whether a transform begins with timm's random resized crop, by filters that PyTorch has."""
        first = transform.transforms[0]
        if type(first) is not RandomResizedCropAndInterpolation:
            return False
        filters = first.interpolation if isinstance(first.interpolation, tuple | list) else [first.interpolation]
        return {one.value for one in filters} <= {"bilinear", "bicubic"}

    def __call__(self, encoded: Encoded) -> Tensor:
        """Decodes, crops and augments an image.

        Returns:
            uint8, shape (channels, size, size).

        Raises:
            BrokenImageError: as :func:`awconv.data.images.read_image`.
        """
        with opened(encoded.source, encoded.name, self._max_pixels) as image:
            pixels: Any = self._pixels_of_jpeg(image)
            if pixels is None:
                pixels = decoded(image, turned=True)
        if isinstance(pixels, Image.Image) and self._channels == 1:
            pixels = pixels.convert("L")
        result: Any = self._resized_crop(pixels).expand(self._channels, -1, -1)
        if not self._stays:
            result = to_pil_image(result)
        for one in self._rest:
            result = one(result)
        tensor: Tensor = result
        return tensor

    def _pixels_of_jpeg(self, image: Image.Image) -> Tensor | None:
        """The pixels of an opened JPEG file, shape (1 or 3, H, W), in memory that the next call uses again; None for
        what Pillow must decode."""
        wanted = _COLOURS.get(image.mode) if self._channels == 3 or image.mode == "L" else None
        decoder = _decoder()
        if decoder is None or wanted is None or image.format not in _JPEG:
            return None
        shape = (image.height, image.width, len(image.mode))
        size = shape[0] * shape[1] * shape[2]
        if self._memory.size < size:
            self._memory = np.empty(min(2 * size, _KEPT_BYTES), np.uint8)
        file: Any = image.fp  # type: ignore[attr-defined]
        file.seek(0)
        try:
            values = decoder.decode_jpeg(
                file.read(), wanted, buffer=self._memory if size <= self._memory.size else None
            )
        except ValueError:  # it is cut or damaged: Pillow decodes it, or says what is wrong
            return None
        if values.shape != shape:
            return None
        pixels, turn = torch.from_numpy(values).permute(2, 0, 1), turn_of(image)
        return pixels if turn is None else _TURNED[turn](pixels)

    def _resized_crop(self, pixels: Tensor | Image.Image) -> Tensor:
        """The random crop, shape (1 or 3, size, size), in memory of its own."""
        top, left, height, width = self._crop.get_params(pixels, self._crop.scale, self._crop.ratio)
        kind = self._crop.interpolation
        if isinstance(kind, tuple | list):
            kind = random.choice(kind)
        part: Tensor
        if isinstance(pixels, Image.Image):
            part = pil_to_tensor(pixels.crop((left, top, left + width, top + height)))
        else:
            part = pixels[:, top : top + height, left : left + width]
        if part.shape[1:] == self._crop.size:
            return part.clone()
        return F.interpolate(part[None], self._crop.size, mode=kind.value, antialias=True, align_corners=False)[0]


def _is_idle(step: Any) -> bool:
    """Whether a step is a jitter of colours whose strengths are all 0, which timm adds: it only draws numbers."""
    strengths = ("brightness", "contrast", "saturation", "hue")
    return type(step) is ColorJitter and all(getattr(step, name) is None for name in strengths)


@cache
def _decoder() -> Any:
    """simplejpeg; None where it is not installed."""
    try:
        return importlib.import_module("simplejpeg")
    except ModuleNotFoundError:
        return None
