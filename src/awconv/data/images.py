"""Images, from files and arrays to uint8 tensors."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

FORMATS = {  # Pillow's names and the endings of files. Others are refused: some, such as PostScript, run programs
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "AVIF": (".avif",),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "JPEG2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
ENDINGS = frozenset(ending for endings in FORMATS.values() for ending in endings)
MAX_PIXELS = 2**26  # 8192x8192
_PIXEL_BYTES, _NOTES_BYTES = 8, 2**20  # of an encoded image: 4 channels of 16 bits a pixel, and metadata

Image.init()
_READABLE = [name for name in FORMATS if name in Image.OPEN]  # some builds of Pillow lack formats
MODES = {1: "L", 3: "RGB"}  # Pillow's modes, by the number of channels
_GREY = ("1", "L", "LA", "La")
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of TIFF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_QUARTERS = tuple(_TURNS[orientation] for orientation in (5, 6, 7, 8))  # these swap width and height
_OTHERS = (  # kinds of files that often bear an image's name, though Pillow does not read them
    (b"%PDF", "a PDF"),
    (b"version https://git-lfs", "a pointer of Git LFS, which 'git lfs pull' replaces by the file"),
    (b"<", "text (HTML, XML or SVG)"),
    (b"PK\3\4", "a zip archive"),
    (b"\x1f\x8b", "compressed by gzip"),
)


class BrokenImageError(ValueError):
    """An image that cannot be decoded; the message names it."""


class TooLargeImageError(BrokenImageError):
    """An image of more pixels or bytes than were allowed."""


class Encoded(NamedTuple):
    """An image as it is stored.

    Attributes:
        source: the content of a file, or its path.
        name: of the image in errors.
    """

    source: bytes | str
    name: str


def read_image(source: bytes | str, name: str, *, upright: bool = True, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes an image completely, to grey (mode L) or colour (RGB). Takes the first of several frames.

    Scales grey values of 16 bits so that 65535 becomes 255. If a TIFF or PGM file gives a smaller range, such as 12
    bits, scales by that range. Drops transparency, as torchvision and timm do.

    Args:
        source: the file's content, or its path.
        name: name of the image in errors.
        upright: turn the image by its EXIF orientation; otherwise leave the pixels as stored.
        max_pixels: the largest number of pixels. It limits the bytes, too: see :func:`check_bytes`.

    Raises:
        BrokenImageError: the image cannot be read, decoded or converted, has none of the :data:`FORMATS`, has too many
            pixels or bytes, or has values without a known white (integers of 32 bits, or floats).
    """
    with opened(source, name, max_pixels) as image:
        return decoded(image, turned=upright)


def upright(image: Image.Image) -> Image.Image:
    """An image as :func:`read_image` gives it: grey (mode L) or colour (RGB), turned by its EXIF orientation.

    Raises:
        BrokenImageError: nothing says which of its values is white.
    """
    try:
        return decoded(image, turned=True)
    except ValueError as error:
        raise BrokenImageError(f"image: {error}") from error


def decoded(image: Image.Image, turned: bool) -> Image.Image:
    """The pixels of an opened image, to grey (mode L) or colour (RGB), and turned by its EXIF orientation if wanted.

    Raises:
        ValueError: nothing says which of its values is white. The image's format may raise any error.
    """
    white = _white(image)
    image.load()
    turn = turn_of(image) if turned else None
    if white is not None:
        inverted = image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == 0  # type: ignore[attr-defined]
        image = _scaled(image, white, inverted)
    else:
        mode = "L" if image.mode in _GREY else "RGB"
        image = image if image.mode == mode else image.convert(mode)  # convert would copy it
    return image if turn is None else image.transpose(turn)


def read_header(
    source: IO[bytes], name: str, *, upright: bool = False, max_pixels: int = MAX_PIXELS
) -> tuple[str, tuple[int, int]]:
    """Reads the header of an image: Pillow's mode, and width and height in pixels.

    Args:
        source: the open file.
        name: name of the image in errors.
        upright: return the size of the image turned by its EXIF orientation; otherwise that of the pixels as stored.
        max_pixels: the largest number of pixels.

    Raises:
        BrokenImageError: the header is not that of an image for :func:`read_image`.
    """
    with opened(source, name, max_pixels) as image:
        _white(image)
        width, height = image.size
        turned = upright and turn_of(image) in _QUARTERS
        return image.mode, (height, width) if turned else (width, height)


def check_bytes(size: int, name: str, max_pixels: int, images: int = 1) -> None:
    """Refuses encoded images, before they are read, if they have more bytes than ``max_pixels`` can need.

    Args:
        size: of all images together, in bytes.
        name: name of the images in errors.
        max_pixels: the largest number of pixels of an image.
        images: number of images.

    Raises:
        TooLargeImageError: they have more than 8 bytes a pixel and a mebibyte an image.
    """
    limit = images * (_PIXEL_BYTES * max_pixels + _NOTES_BYTES)
    if size > limit:
        raise TooLargeImageError(
            f"{name}: its {size:,} bytes are more than the {limit:,} that max_pixels = {max_pixels:,} allows; shrink "
            "the images, or raise max_pixels if there is enough memory"
        )


@contextmanager
def opened(source: bytes | str | IO[bytes], name: str, max_pixels: int) -> Iterator[Image.Image]:
    """Opens an image and reads its header. Any error, also in the body, becomes a BrokenImageError with the name."""
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # else Pillow would refuse such an image
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        if isinstance(file, str) and not os.path.isfile(file):  # reading a named pipe would never end
            raise FileNotFoundError("it is not a file")
        if isinstance(source, bytes | str):
            check_bytes(len(source) if isinstance(source, bytes) else os.path.getsize(source), name, max_pixels)
        with Image.open(file, formats=_READABLE) as image:
            if image.width * image.height > max_pixels:
                raise Image.DecompressionBombError(f"{image.width}x{image.height}")
            yield image
    except Image.DecompressionBombError as error:
        raise TooLargeImageError(
            f"{name}: its pixels are more than max_pixels = {max_pixels:,} allows ({error}); shrink the image, or "
            "raise max_pixels if there is enough memory"
        ) from error
    except BrokenImageError:
        raise
    except Exception as error:  # Pillow's formats raise errors of many kinds
        what = str(error) or type(error).__name__
        # Ultralytics replaces Pillow's open: after this error it looks for another package, and fails without it.
        if isinstance(error, UnidentifiedImageError) or isinstance(error.__context__, UnidentifiedImageError):
            what = f"{_kind(file)}; expected one of {', '.join(_READABLE)}"
        raise BrokenImageError(f"{name}: {what}") from error


def _kind(file: str | IO[bytes]) -> str:
    """The kind of a file that is no readable image, as a clause for an error."""
    if isinstance(file, str):
        with open(file, "rb") as opened:
            head = opened.read(32)
    else:
        file.seek(0)
        head = file.read(32)
    if not head:
        return "cannot identify an image in an empty file"
    if head[4:8] == b"ftyp" and not (head[8:11] == b"avi" and "AVIF" in _READABLE):
        return f"it is a file of the HEIF family ({head[8:12].decode('latin-1')}), which is not read"
    for start, kind in _OTHERS:
        if head.startswith(start):
            return f"cannot identify an image: the file is {kind}"
    prefix = head[:16]
    for format, (factory, accepts) in Image.OPEN.items() if len(prefix) == 16 else ():  # Pillow passes 16 bytes
        if format not in FORMATS and accepts is not None and accepts(prefix) is True:
            description = getattr(factory, "format_description", None) or format
            return f"it is a file of {description} ({format}), which is not read"
    return "cannot identify an image: its header is damaged, or its pixels are of a kind that Pillow does not know"


def _white(image: Image.Image) -> int | None:
    """The value of white in a grey image of more than 8 bits, which ``convert`` would clip at 255; None for others."""
    if image.mode.startswith("I;16"):
        bits = image.tag_v2.get(_BITS_PER_SAMPLE, 16) if image.format == "TIFF" else 16  # type: ignore[attr-defined]
        return (1 << int(bits[0] if isinstance(bits, tuple) else bits)) - 1
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # Pillow scales these to 16 bits
        return 65535
    if image.mode in ("I", "F"):
        kind = "32 bits, or signed ones" if image.mode == "I" else "floating point"
        raise ValueError(
            f"nothing says which value is white in numbers of {kind} (Pillow's mode {image.mode}); save the image "
            "with 8 bits, or with 16 bits without a sign"
        )
    return None


def _scaled(image: Image.Image, white: int, inverted: bool) -> Image.Image:
    values = np.asarray(image).astype(np.uint32)
    grey = np.minimum((values * 510 + white) // (2 * white), 255).astype(np.uint8)  # values * 255 / white, rounded
    return Image.fromarray(255 - grey if inverted else grey)


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """The transposition that turns a loaded image upright, or None."""
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata of an image that can be decoded: other programs show it as stored
        return None
