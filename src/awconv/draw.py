"""Copies of images with a detector's boxes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes

from awconv.data.images import FORMATS
from awconv.training.partial import replacing

_SOFTWARE = "awconv predict --draw"  # in a copy, by which a later run knows it
_KEPT = {ending: name for name in ("JPEG", "PNG", "WEBP") for ending in FORMATS[name]}  # others become PNG
_WAY_OUT = "give draw another folder"


class Labelled(Protocol):
    """An object in an image."""

    @property
    def label(self) -> str: ...
    @property
    def score(self) -> float: ...
    @property
    def box(self) -> tuple[float, float, float, float]: ...


def places(files: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """The path of each image's copy, all in one folder.

    A copy has its image's name. If several images have that, the names of the folders that they are in come before it:
    ``july_a.jpg``. JPEG, PNG and WebP stay what they are; the copies of others are PNG, and ``.png`` ends their names.

    Raises:
        ValueError: a copy cannot be written there, or would overwrite something else than a copy of an earlier run.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"draw must be a folder, and {folder} cannot be made one: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"nothing can be written into {folder}; {_WAY_OUT}")
    inputs = {real(file): file for file in files}
    copies = {file: folder / name for file, name in zip(files, _names(files), strict=True)}
    for file, copy in copies.items():
        if (over := inputs.get(real(copy))) is not None:
            raise ValueError(f"the copy of {file} would be written over {over}; {_WAY_OUT}")
        if os.path.islink(copy):
            raise ValueError(f"the copy of {file} would be written through the link {copy}; {_WAY_OUT}")
        if os.path.exists(copy) and not is_copy(copy):
            raise ValueError(f"{copy} is there and no copy of a former 'awconv predict --draw'; {_WAY_OUT}")
    return copies


def _names(files: Sequence[Path]) -> list[str]:
    """Names that differ, whatever letters a file system takes for the same."""
    parts = [_copied(real(file.parent) / file.name).parts[1:] for file in files]
    depths = [1] * len(files)
    while True:
        names = ["_".join(path[-depth:]) for path, depth in zip(parts, depths, strict=True)]
        counts = Counter(name.casefold() for name in names)
        shared = {index for index, name in enumerate(names) if counts[name.casefold()] > 1}
        longer = {index for index in shared if depths[index] < len(parts[index])}
        if not longer:
            return [f"{index}_{name}" if index in shared else name for index, name in enumerate(names)]
        for index in longer:
            depths[index] += 1


def _copied(file: Path) -> Path:
    return file if file.suffix.lower() in _KEPT else file.with_name(f"{file.name}.png")


def is_copy(path: Path) -> bool:
    """Whether a file is a copy that an earlier run has drawn."""
    try:
        with Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as image:
            return _SOFTWARE in (image.info.get("Software"), image.getexif().get(ExifTags.Base.Software))
    except (OSError, ValueError, SyntaxError):
        return False


def write(image: Image.Image, place: Path) -> None:
    """Writes a copy in the format of its name. It replaces what is there, and follows no link."""
    place.parent.mkdir(parents=True, exist_ok=True)
    format = _KEPT[place.suffix.lower()]
    notes, exif = PngInfo(), Image.Exif()
    notes.add_text("Software", _SOFTWARE)
    exif[ExifTags.Base.Software] = _SOFTWARE
    encoded = {"exif": exif, "quality": 90}
    options: dict[str, dict[str, Any]] = {"PNG": {"pnginfo": notes}, "JPEG": encoded, "WEBP": encoded}
    with replacing(place) as file:
        image.save(file, format, **options[format])


def drawn(image: Tensor, detections: Sequence[Labelled], threshold: float) -> Image.Image:
    """An image with the boxes of its objects, or with the note that it has none.

    Args:
        image: uint8, shape (3, H, W).
        detections: the objects.
        threshold: the lowest score of an object that is reported, for the note.
    """
    size = max(image.shape[1:])
    font = ImageFont.load_default(max(10, size // 45))
    if not detections:
        plain: Image.Image = to_pil_image(image)
        _write_label(plain, f"no object of score {threshold:g} or more", (0, 0), "#555555", font)
        return plain
    colours = {label: _COLOURS[index % len(_COLOURS)] for index, label in enumerate({d.label: 0 for d in detections})}
    boxed: Image.Image = to_pil_image(
        draw_bounding_boxes(
            image,
            torch.tensor([detection.box for detection in detections]),
            colors=[colours[detection.label] for detection in detections],
            width=max(2, size // 250),
        )
    )
    for detection in detections:
        text = f"{detection.label} {detection.score:.2f}"
        _write_label(boxed, text, detection.box[:2], colours[detection.label], font)
    return boxed


def _write_label(image: Image.Image, text: str, corner: tuple[float, float], colour: str, font: Any) -> None:
    """Writes a text with its upper left at a corner, or as near as the whole text fits on the image."""
    pen = ImageDraw.Draw(image)
    _, _, width, height = pen.textbbox((0, 0), text, font=font)
    left = max(0, min(corner[0], image.width - width - 1))
    top = max(0, min(corner[1], image.height - height - 1))
    ink = pen.textbbox((left, top), text, font=font)
    pen.rectangle((ink[0] - 1, ink[1] - 1, ink[2] + 1, ink[3] + 1), fill=colour)
    pen.text((left, top), text, fill="white", font=font)


_COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#ff7f0e")


def real(path: Path) -> Path:
    """The path without links. A loop of links, at which ``Path.resolve`` fails, stays as it is."""
    return Path(os.path.realpath(path))
