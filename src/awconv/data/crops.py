"""Random resized crops of JPEG files without Pillow's pixels: from the file's bytes to a tensor's crop."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.transforms import MaybePILToTensor, RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import RandomHorizontalFlip, RandomVerticalFlip
from torchvision.transforms.v2.functional import to_pil_image

from awconv.data.images import MODES, Encoded, decoded, opened, turn_of

_JPEG = ("JPEG", "MPO")  # MPO: a JPEG with further ones behind it, as of telephones
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

    JPEG files are decoded by torchvision, into a tensor of which the crop alone is read on. PyTorch resizes it. The
    pixels are those of Pillow before the resizing, and differ by a level in a few of a thousand after it. All random
    numbers are timm's. Other files, JPEG files in CMYK, and damaged ones take the way over Pillow, with its errors.

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
        self._whole, self._channels, self._max_pixels = transform, channels, max_pixels
        self._crop, *self._rest = transform.transforms
        self._stays = all(type(one) in _ON_TENSORS for one in self._rest)

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
            pixels = self._pixels(image)
            other = decoded(image, turned=True) if pixels is None else None
        if pixels is not None:
            return self._augmented(pixels)
        assert other is not None
        whole: Tensor = self._whole(other.convert(MODES[self._channels]))
        return whole

    def _pixels(self, image: Image.Image) -> Tensor | None:
        """The pixels of an opened JPEG file, shape (1 or 3, H, W); None for what Pillow must read."""
        grey = image.mode == "L"
        if image.format not in _JPEG or not (grey or (image.mode == "RGB" and self._channels == 3)):
            return None
        file: Any = image.fp  # type: ignore[attr-defined]
        file.seek(0)
        content = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
        try:
            pixels: Tensor = decode_jpeg(content, mode=ImageReadMode.GRAY if grey else ImageReadMode.RGB)
        except RuntimeError:  # a cut or damaged file: Pillow reads it, or says what is wrong
            return None
        turn = turn_of(image)
        return pixels if turn is None else _TURNED[turn](pixels)

    def _augmented(self, pixels: Tensor) -> Tensor:
        top, left, height, width = self._crop.get_params(pixels, self._crop.scale, self._crop.ratio)
        filter = self._crop.interpolation
        if isinstance(filter, tuple | list):
            filter = random.choice(filter)
        part = pixels[None, :, top : top + height, left : left + width]
        if part.shape[2:] != self._crop.size:
            part = F.interpolate(part, self._crop.size, mode=filter.value, antialias=True, align_corners=False)
        part = part[0].expand(self._channels, -1, -1)
        image: Any = part if self._stays else to_pil_image(part)
        for one in self._rest:
            image = one(image)
        tensor: Tensor = image
        return tensor
