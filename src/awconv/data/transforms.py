"""Transforms of a Pillow image to a uint8 tensor."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize

from awconv.data.images import MODES, upright

_RESIZED_WHOLE = 2**24  # pixels: up to this size, the whole image is resized before its centre is cropped


def to_uint8(
    image: Image.Image, channels: int, size: int, crop_pct: float = 1.0, interpolation: str = "bilinear"
) -> Tensor:
    """Resizes the shorter side and crops the centre, as torchvision's Resize and CenterCrop do.

    Computes only the centre of a large result, so that the longer side may have any length.

    Args:
        image: grey (mode L) or colour (RGB).
        channels: 1 for grey, 3 for colour.
        size: height and width of the result, in pixels.
        crop_pct: share of the shorter side to keep, such as 0.875 for 224 of 256 pixels.
        interpolation: ``"bilinear"``, ``"bicubic"`` or another of torchvision's ``InterpolationMode``.

    Returns:
        uint8, shape (channels, size, size).
    """
    image = image.convert(MODES[channels])
    shorter, shortest = round(size / crop_pct), min(image.size)
    width, height = (shorter if side == shortest else int(shorter * side / shortest) for side in image.size)
    if (width, height) != image.size and width * height > _RESIZED_WHOLE:
        image = _centre(image, width, height, size, Image.Resampling[interpolation.upper()])
    else:
        if (width, height) != image.size:
            image = resize(image, [height, width], InterpolationMode(interpolation), antialias=True)
        image = center_crop(image, [size, size]) if image.size != (size, size) else image
    tensor: Tensor = pil_to_tensor(image)
    return tensor


def _centre(image: Image.Image, width: int, height: int, size: int, filter: Image.Resampling) -> Image.Image:
    """The centre of an image resized to a width and a height, computed without the rest.

    Pillow's filter also reads pixels beyond the box. So the values are those of the whole resized image, up to the
    rounding of the box, which Pillow keeps in float32.
    """
    left, top = round((width - size) / 2), round((height - size) / 2)
    across, down = image.width / width, image.height / height
    box = (left * across, top * down, min((left + size) * across, image.width), min((top + size) * down, image.height))
    return image.resize((size, size), filter, box=box)


@dataclass(frozen=True)
class Decoded:
    """A transform from a Pillow image of any mode to uint8, shape (3, H, W), turned upright."""

    def __call__(self, image: Image.Image) -> Tensor:
        tensor: Tensor = pil_to_tensor(upright(image).convert("RGB"))
        return tensor


@dataclass(frozen=True)
class Fitted:
    """A transform from a Pillow image of any mode to uint8, shape (channels, size, size), turned upright.

    Attributes: the arguments of :func:`to_uint8` with the same names.
    """

    channels: int
    size: int
    crop_pct: float = 1.0
    interpolation: str = "bilinear"

    def __call__(self, image: Image.Image) -> Tensor:
        return to_uint8(upright(image), self.channels, self.size, self.crop_pct, self.interpolation)
