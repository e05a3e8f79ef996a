"""Small PNG files: patterns as coloured squares, photographs, and these with Grad-CAM's heat."""

from __future__ import annotations

import base64
import io

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from awconv.explain.cam import overlay

DIVERGING, SEQUENTIAL = "PuOr_r", "viridis"  # which the colour-blind read: purple below 0, orange above; dark to bright
_PHOTOGRAPH, _THUMBNAIL, _COLOURS = 192, 56, 128


def encoded(image: Image.Image) -> bytes:
    """A PNG of an image, in few bytes: of many colours, it keeps the most important ones."""
    few = image.mode == "L" or image.getcolors(_COLOURS) is not None
    buffer = io.BytesIO()
    (image if few else image.quantize(_COLOURS)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def data_uri(png: bytes) -> str:
    """For a page's ``src``."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def squares(values: Tensor, limit: float, diverging: bool = True, side: int = 28) -> bytes:
    """A PNG with a square of ``side`` pixels for each value.

    Args:
        values: shape (h, w).
        limit: what the ends of the colours stand for: from -limit to limit if diverging, else from 0.
        diverging: whether 0 is in the middle of the colours.
        side: of a square, in pixels.
    """
    return encoded(Image.fromarray(np.kron(colours(values, limit, diverging), np.ones((side, side, 1), np.uint8))))


def colours(values: Tensor, limit: float, diverging: bool = True) -> np.ndarray:  # type: ignore[type-arg]
    """The colour of each value, uint8, shape (h, w, 3)."""
    scaled = values / limit if limit else torch.zeros_like(values)
    shares = ((scaled + 1) / 2 if diverging else scaled).clamp(0, 1)
    found = colormaps[DIVERGING if diverging else SEQUENTIAL](shares.double().numpy(), bytes=True)
    return np.ascontiguousarray(found[..., :3])


def legend(palette: str) -> bytes:
    """A PNG of a palette's colours, from the lowest value to the highest."""
    shades = colormaps[palette](np.linspace(0, 1, 120)[None], bytes=True)
    return encoded(Image.fromarray(np.ascontiguousarray(shades[..., :3])))


def picture(pixels: Tensor) -> Image.Image:
    """An image for people, of uint8 pixels, shape (channels, H, W); of other channels than three, the first in grey."""
    array = pixels.numpy()
    return Image.fromarray(np.ascontiguousarray(array.transpose(1, 2, 0) if len(array) == 3 else array[0]))


def photograph(pixels: Tensor) -> bytes:
    """A PNG of an image, enlarged if it is small."""
    return encoded(_resized(picture(pixels), _PHOTOGRAPH))


def heated(pixels: Tensor, heat: Tensor) -> bytes:
    """A PNG of an image under Grad-CAM's heat, shape (H, W)."""
    return encoded(overlay(_resized(picture(pixels), _PHOTOGRAPH), heat))


def thumbnail(pixels: Tensor) -> bytes:
    """A small PNG of an image."""
    return encoded(_resized(picture(pixels), _THUMBNAIL))


def _resized(image: Image.Image, side: int) -> Image.Image:
    """Enlarged by whole pixels, which stay sharp, or made smaller; the longer side is about ``side``."""
    longer = max(image.size)
    if longer <= side:
        factor = max(1, side // longer)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    size = (max(1, round(image.width * side / longer)), max(1, round(image.height * side / longer)))
    return image.resize(size, Image.Resampling.BOX)
