"""Image files of many kinds, good and bad."""

from __future__ import annotations

import numpy as np
from PIL import ExifTags, Image

from tests.data.samples import digit
from tests.photographs import photograph
from tests.serve.servers import encoded

GREY = Image.fromarray(np.linspace(0, 255, 256, dtype=np.uint8).reshape(16, 16))
COLOURS = photograph("china")


def turned() -> bytes:
    notes = Image.Exif()
    notes[ExifTags.Base.Orientation] = 6
    return encoded(COLOURS, "JPEG", exif=notes)


FILES = {
    "a digit.png": encoded(digit(3), "PNG"),
    "photograph.jpg": encoded(COLOURS, "JPEG"),
    "turned.jpg": turned(),
    "cmyk.jpg": encoded(COLOURS.convert("CMYK"), "JPEG"),
    "16 bits.png": encoded(Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257), "PNG"),
    "animated.png": encoded(digit(3, 32), "PNG", save_all=True, append_images=[digit(4, 32)]),
    "transparent.webp": encoded(COLOURS.convert("RGBA"), "WEBP"),
    "floats.tiff": encoded(GREY.convert("F"), "TIFF"),
    "truncated.jpg": encoded(COLOURS, "JPEG")[:2000],
    "empty.png": b"",
    "text.png": b"<svg>no picture</svg>",
    "bomb.png": encoded(Image.new("1", (3000, 2000)), "PNG"),
}
