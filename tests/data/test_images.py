"""Reading images, and making tensors of them."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize

from awconv.data import BrokenImageError, Coco, to_uint8
from awconv.data.images import read_header, read_image
from tests.data.samples import digit, png
from tests.photographs import SIZE, write_coco


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_files_of_any_mode_and_shape_become_uint8(mode: str, channels: int) -> None:
    image = digit(3, 20).resize((30, 17)).convert(mode)
    tensor = to_uint8(read_image(encoded(image, "TIFF"), "name"), channels, 8)
    assert (tensor.dtype, tensor.shape) == (torch.uint8, (channels, 8, 8))


RAMP = np.arange(0, 65536, 257, np.uint16).reshape(16, 16)  # 0 to 65535, which are 0 to 255 in 8 bits


def pgm(values: Any, largest: int) -> bytes:
    """Written by hand, as Pillow writes no range but 255 and 65535."""
    return b"P5 16 16 %d\n" % largest + values.astype(">u2" if largest > 255 else np.uint8).tobytes()


def tiff(values: Any, **tags: int) -> bytes:
    """Little-endian, one strip, written by hand: of kinds that Pillow does not write."""
    entries = {256: 16, 257: 16, 258: 16, 259: 1, 262: 1, 273: 0, 277: 1, 278: 16, 279: values.nbytes, 339: 1}
    entries |= {int(tag.removeprefix("t")): value for tag, value in tags.items()}
    entries[273] = 8 + 2 + 12 * len(entries) + 4
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + directory + bytes(4) + values.tobytes()


@pytest.mark.parametrize(
    "content",
    [
        encoded(Image.fromarray(RAMP), "PNG"),
        encoded(Image.fromarray(RAMP), "TIFF"),
        encoded(Image.fromarray(RAMP), "JPEG2000", irreversible=False),
        encoded(Image.fromarray(RAMP.astype(">u2")), "TIFF"),
        pgm(RAMP, 65535),
        pgm((RAMP.astype(int) // 257 * 4095 + 127) // 255, 4095),
        pgm(RAMP // 257, 255),
        tiff(65535 - RAMP, t262=0),  # white is zero
    ],
    ids=["png", "tiff", "jpeg2000", "big-endian tiff", "pgm", "12-bit pgm", "8-bit pgm", "white-is-zero tiff"],
)
def test_grey_of_many_bits_is_scaled_not_clipped(content: bytes) -> None:
    assert np.array_equal(np.asarray(read_image(content, "name")), np.arange(256).reshape(16, 16))


def test_sixteen_bits_are_rounded_to_the_nearest_of_eight() -> None:
    ramp = (np.arange(64, dtype=np.uint16) * 1024).reshape(8, 8)
    assert np.array_equal(np.asarray(read_image(png(Image.fromarray(ramp)), "name")), np.round(ramp / 257))


def test_twelve_bits_of_a_tiff_are_scaled_by_their_own_range() -> None:
    values = np.arange(256).reshape(16, 16) * 16  # of 4095
    first, second = values[:, ::2], values[:, 1::2]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).astype(np.uint8)
    found = np.asarray(read_image(tiff(packed, t258=12), "name"))
    assert np.array_equal(found, np.floor(values * 255 / 4095 + 0.5))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (RAMP.astype(np.int32), "32 bits, or signed ones .Pillow's mode I"),
        (RAMP.astype(np.float32) / 65535, "floating point .Pillow's mode F"),
    ],
)
def test_numbers_of_which_none_is_white_are_refused(values: Any, message: str) -> None:
    content = encoded(Image.fromarray(values), "TIFF")
    for read in (read_image, lambda content, name: read_header(io.BytesIO(content), name)):
        with pytest.raises(BrokenImageError, match=rf"^name: nothing says .* {message}.; save the image with 8 bits"):
            read(content, "name")
    with pytest.raises(BrokenImageError, match=r"^name: nothing says .* signed"):
        read_image(tiff(RAMP.astype(np.int16), t339=2), "name")


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_is_dropped_and_colours_stay(kind: str) -> None:
    colours = np.stack([np.full((4, 4), 200), np.full((4, 4), 50), np.full((4, 4), 10), np.eye(4) * 255], -1)
    exactly = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    content = encoded(Image.fromarray(colours.astype(np.uint8)), kind, **exactly)
    assert np.array_equal(np.asarray(read_image(content, "name")), colours[..., :3])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(kind: str, orientation: int) -> None:
    corners = np.zeros((32, 48), np.uint8)
    corners[:16, :16], corners[16:, 32:] = 255, 128
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(corners).convert("RGB"), kind, exif=exif)
    expected = corners  # by the definition: where row 0 and column 0 of the stored image lie in the upright one
    if orientation >= 5:
        expected = expected.T  # row 0 is a side
    if orientation in (3, 4, 7, 8):
        expected = expected[::-1]
    if orientation in (2, 3, 6, 7):
        expected = expected[:, ::-1]
    found = np.asarray(read_image(content, "name").convert("L")).astype(int)
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 4  # JPEG's and WebP's losses
    if kind != "TIFF":  # which Pillow itself turns
        stored = np.asarray(read_image(content, "name", upright=False).convert("L")).astype(int)
        assert np.abs(stored - corners).mean() < 4


def test_damaged_exif_is_no_damaged_image() -> None:
    content = encoded(digit(0, 16), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert read_image(content, "name").size == (16, 16)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n"


@pytest.mark.parametrize("ending", ["jpg", "png", "eps"])
def test_postscript_is_named_and_no_program_runs(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ghostscript = tmp_path / "gs"  # as Pillow would find and call it
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # Pillow looks for it anew
    (tmp_path / f"a.{ending}").write_bytes(POSTSCRIPT)
    with Image.open(tmp_path / f"a.{ending}") as opened, pytest.raises(Exception):  # noqa: B017, PT011
        opened.load()
    assert (tmp_path / "ran").exists()  # the trap works
    (tmp_path / "ran").unlink()
    message = r"it is a file of Encapsulated Postscript \(EPS\), which is not read; expected one of JPEG, PNG, "
    for source in (str(tmp_path / f"a.{ending}"), POSTSCRIPT):
        with pytest.raises(BrokenImageError, match=rf"^a\.{ending}: {message}"):
            read_image(source, f"a.{ending}")
    with pytest.raises(BrokenImageError, match=message):
        read_header(io.BytesIO(POSTSCRIPT), "a")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b"%PDF-1.4 invented", "a PDF"),
        (b"<!DOCTYPE html><title>404</title>", "text .HTML, XML or SVG."),
        (b"version https://git-lfs.github.com/spec/v1", "'git lfs pull' replaces"),
        (b"\0\0\0\x18ftypheic" + bytes(20), r"HEIF family .heic."),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5"),
        (b"8BPS\0\1" + bytes(40), "Photoshop"),
        (b"\x89PNG\r\n\x1a\n a PNG in its first bytes alone", "header is damaged"),
    ],
)
def test_what_is_no_image_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    for source in (content, str(tmp_path / "a.jpg")):
        with pytest.raises(BrokenImageError, match=rf"^a\.jpg: .*{message}.*; expected one of JPEG, PNG, "):
            read_image(source, "a.jpg")


def test_what_is_no_image_is_named_where_a_library_has_replaced_pillows_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ultralytics does, without the package that it takes for other formats."""
    pillows = Image.open

    def replaced(*args: Any, **kwargs: Any) -> Image.Image:
        try:
            return pillows(*args, **kwargs)
        except UnidentifiedImageError:
            raise ModuleNotFoundError("No module named 'pi_heif'")  # noqa: B904

    monkeypatch.setattr(Image, "open", replaced)
    with pytest.raises(BrokenImageError, match=r"^a: .*empty file; expected one of JPEG, PNG, "):
        read_image(b"", "a")


def test_a_pipe_or_nothing_is_no_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("pipe.png", "none.png"):
        with pytest.raises(BrokenImageError, match=rf"^{name}: it is not a file"):
            read_image(str(tmp_path / name), name)


def test_the_number_of_pixels_is_limited_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    content = png(Image.new("L", (60, 50)))
    for limit in (100, 2999):  # Pillow refuses the first, as it is more than twice its own limit
        with pytest.raises(BrokenImageError, match=rf"^name: .* than max_pixels = {limit:,} allows .*raise max_pixels"):
            read_image(content, "name", max_pixels=limit)
        with pytest.raises(BrokenImageError, match="max_pixels"):
            read_header(io.BytesIO(content), "name", max_pixels=limit)
    assert read_image(content, "name", max_pixels=3000).size == (60, 50)
    bomb = png(Image.new("1", (9_000, 9_000)))  # a few kilobytes
    with pytest.raises(BrokenImageError, match=r"max_pixels = 67,108,864 allows"):
        read_image(bomb, "name")


def test_the_number_of_bytes_is_limited_before_they_are_read(tmp_path: Path) -> None:
    limit = 8 * 64 + 2**20
    content = png(digit(0))
    for size, path in ((limit, tmp_path / "fits.png"), (limit + 1, tmp_path / "large.png")):
        path.write_bytes(content + bytes(size - len(content)))
        for source in (str(path), path.read_bytes()):
            if size == limit:
                assert read_image(source, "name", max_pixels=64).size == (8, 8)
                continue
            with pytest.raises(
                BrokenImageError,
                match=r"^name: its 1,049,089 bytes are more than the 1,049,088 that max_pixels = 64 allows; ",
            ):
                read_image(source, "name", max_pixels=64)


def test_a_file_of_a_terabyte_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.touch()
    os.truncate(path, 2**40)  # zeros that take no place
    with pytest.raises(
        BrokenImageError, match=r"^name: its [\d,]+ bytes are more than .* max_pixels = 67,108,864 allows"
    ):
        read_image(str(path), "name")


def test_neither_are_those_of_a_detector(tmp_path: Path) -> None:
    root = write_coco(tmp_path)
    os.truncate(root / "train2017" / "china.png", 2**40)
    with pytest.raises(
        BrokenImageError, match=r"china\.png: its [\d,]+ bytes are more than .* max_pixels = 67,108,864 allow"
    ):
        Coco(root, val_fraction=0).dataset("train")
    skipping = Coco(root, val_fraction=0, inspect=False, broken_images="skip").dataset("train")
    assert skipping is not None
    assert skipping._read(0) is None or skipping._read(1) is None


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_a_damaged_file_is_decoded_or_a_broken_image_with_its_name(kind: str) -> None:
    buffer = io.BytesIO()
    digit(0, 20).save(buffer, kind)
    generator = np.random.default_rng(0)
    broken = 0
    for _ in range(60):
        content = bytearray(buffer.getvalue())
        for position in generator.integers(len(content), size=8):
            content[position] = generator.integers(256)
        try:
            assert read_image(bytes(content), "damaged").mode in ("L", "RGB")
        except BrokenImageError as error:
            assert str(error).startswith("damaged: ")  # noqa: PT017  # some are decoded all the same
            broken += 1
    assert broken


def test_the_shorter_side_is_resized_and_the_centre_kept() -> None:
    stripes = np.zeros((8, 24), np.uint8)
    stripes[:, 8:16] = 200
    assert torch.equal(to_uint8(Image.fromarray(stripes), 1, 8), torch.full((1, 8, 8), 200, dtype=torch.uint8))


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000), (60_000, 3)])
def test_a_long_side_costs_no_memory_and_leaves_the_centre(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.zeros(size[::-1], np.uint8)
    middle = slice(29_990, 30_010)
    values[(slice(None), middle) if size[0] > size[1] else middle] = 200
    monkeypatch.setattr("awconv.data.transforms.resize", lambda *_, **__: pytest.fail("9 GB for all of it"))
    tensor = to_uint8(Image.fromarray(values), 3, 224)
    assert torch.equal(tensor, torch.full((3, 224, 224), 200, dtype=torch.uint8))


def test_the_centre_alone_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        height, width = generator.integers(1, 200, 2)
        image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        size, crop_pct = int(generator.integers(1, 100)), float(generator.choice([1, 0.875, 0.5]))
        whole = center_crop(resize(image, [round(size / crop_pct)], antialias=True), [size, size])
        assert torch.equal(to_uint8(image, 3, size, crop_pct), pil_to_tensor(whole))
        with monkeypatch.context() as patched:
            patched.setattr("awconv.data.transforms._RESIZED_WHOLE", 0)
            centre = to_uint8(image, 3, size, crop_pct)
        # Two roundings to uint8, of weights that differ by the rounding of the box to float32.
        assert (centre.int() - pil_to_tensor(whole).int()).abs().max() <= 2


def test_the_part_of_the_shorter_side_that_is_kept() -> None:
    ring = np.zeros((16, 16), np.uint8)
    ring[2:14, 2:14] = 200
    assert torch.equal(
        to_uint8(Image.fromarray(ring), 1, 12, crop_pct=0.75), torch.full((1, 12, 12), 200, dtype=torch.uint8)
    )


def test_a_detectors_images_are_read_alike(tmp_path: Path) -> None:
    root = write_coco(tmp_path)
    limit = SIZE[0] * SIZE[1]
    assert Coco(root, max_pixels=limit, val_fraction=0).dataset("train")[0] is not None
    with pytest.raises(
        BrokenImageError, match=r"china\.png: its pixels are more than max_pixels = "
    ):  # as it is inspected
        Coco(root, max_pixels=limit - 1, val_fraction=0).dataset("train")
    with pytest.raises(BrokenImageError, match="more than max_pixels"):
        Coco(root, max_pixels=limit - 1, val_fraction=0, inspect=False).dataset("train")[0]
    with pytest.raises(ValueError, match="max_pixels must be at least 1, got 0"):
        Coco(root, max_pixels=0)
    (root / "train2017" / "china.png").write_bytes(POSTSCRIPT)
    with pytest.raises(BrokenImageError, match=r"china\.png: it is a file of Encapsulated Postscript"):
        Coco(root, val_fraction=0).dataset("train")
