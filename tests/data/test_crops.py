"""Random resized crops from encoded images, beside timm's own of Pillow's pixels."""

from __future__ import annotations

import io
import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms.v2.functional import pil_to_tensor

from awconv.data import BrokenImageError, crops
from awconv.data.crops import QuickCrops
from awconv.data.images import MAX_PIXELS, MODES, Encoded, read_image
from awconv.data.order import seed_all
from tests.data.samples import spoilt
from tests.photographs import photograph


@pytest.fixture(params=["simplejpeg", "Pillow"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who decodes JPEG files."""
    if request.param == "simplejpeg":
        pytest.importorskip("simplejpeg")
    else:
        monkeypatch.setattr(crops, "_decoder", lambda: None)
    return request.param


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> Encoded:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Encoded(file.getvalue(), "name")


def transform(size: int = 32, **options: Any) -> Any:
    options = dict(hflip=0.5, color_jitter=0.0) | options
    return create_transform(input_size=size, is_training=True, normalize=False, **options)


def assert_alike(image: Encoded, channels: int = 3, **options: Any) -> None:
    """Compares with timm's transform of Pillow's pixels, given the same random numbers."""
    both = transform(**options)
    quick = QuickCrops(both, channels, MAX_PIXELS)
    for seed in range(4):
        seed_all(seed)
        found = quick(image)
        seed_all(seed)
        expected = both(read_image(*image).convert(MODES[channels]))
        assert (found.dtype, found.shape) == (torch.uint8, expected.shape)
        difference = (found.int() - expected.int()).abs()
        # Both round the rows and then the columns to integers, with weights of different precision: a level each.
        assert difference.max() <= 2
        assert (difference > 0).float().mean() < 0.03


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_files_of_any_mode_are_cropped_as_timm_does(mode: str, channels: int, decoder: str) -> None:
    assert_alike(encoded(photograph("china").convert(mode), quality=90), channels)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_files_of_other_formats_are_too(kind: str, decoder: str) -> None:
    assert_alike(encoded(photograph("flower"), kind))


def test_palettes_transparency_and_16_bits_are_too() -> None:
    picture = photograph("flower")
    assert_alike(encoded(picture.convert("P"), "PNG"))
    assert_alike(encoded(picture.convert("RGBA"), "PNG"))
    assert_alike(encoded(Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257), "PNG"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright_before_the_crop_is_drawn(orientation: int, decoder: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert_alike(encoded(photograph("china"), exif=exif), scale=(0.3, 0.6))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
def test_each_filter_is_pillows(interpolation: str, decoder: str) -> None:
    assert_alike(encoded(photograph("china")), interpolation=interpolation)


def test_steps_that_need_a_picture_get_one(decoder: str) -> None:
    assert_alike(encoded(photograph("china")), grayscale_prob=1.0)


def test_only_crops_that_pytorch_can_resize_are_taken() -> None:
    assert QuickCrops.can_take(transform())
    for options in ({"interpolation": "lanczos"}, {"train_crop_mode": "rkrc"}):
        assert not QuickCrops.can_take(transform(**options))
        with pytest.raises(ValueError, match="expected a random resized crop by bilinear or bicubic filters first"):
            QuickCrops(transform(**options), 3, MAX_PIXELS)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_simplejpeg_changes_no_bit(
    mode: str, subsampling: str, progressive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("simplejpeg")
    image = encoded(photograph("china").convert(mode), subsampling=subsampling, progressive=progressive)
    taken = [transform(scale=(0.2, 1.0))] * 2
    results = []
    for one, without in zip(taken, (False, True), strict=True):
        if without:
            monkeypatch.setattr(crops, "_decoder", lambda: None)
        seed_all(5)
        results.append(QuickCrops(one, 3, MAX_PIXELS)(image))
    assert torch.equal(*results)


def test_a_crop_outlives_the_next_image(decoder: str) -> None:
    quick = QuickCrops(transform(16, scale=(1, 1), ratio=(1, 1), hflip=0.0), 3, MAX_PIXELS)  # the whole image, as it is
    pictures = [photograph(name).resize((16, 16)) for name in ("china", "flower")]
    files = [encoded(picture, quality=95) for picture in pictures]
    found = [quick(file) for file in files]
    for result, file in zip(found, files, strict=True):
        assert torch.equal(result, pil_to_tensor(read_image(*file)))


def test_damaged_files_are_read_or_refused_as_pillow_does(decoder: str) -> None:
    content = encoded(photograph("china").resize((40, 30)), quality=90).source
    assert isinstance(content, bytes)
    both = transform(8, scale=(1, 1), hflip=0.0)
    quick, refused = QuickCrops(both, 3, MAX_PIXELS), 0
    for damaged in spoilt(content, 100):
        message = None
        random.seed(0)
        try:
            expected = both(read_image(damaged, "name").convert("RGB"))
        except BrokenImageError as error:
            message = re.escape(str(error))
        if message is not None:
            refused += 1
            with pytest.raises(BrokenImageError, match=f"^{message}$"):
                quick(Encoded(damaged, "name"))
            continue
        random.seed(0)
        assert (quick(Encoded(damaged, "name")).int() - expected.int()).abs().max() <= 2
    assert 0 < refused < 100


def test_files_are_refused_before_they_are_read() -> None:
    image = encoded(photograph("china"))
    with pytest.raises(BrokenImageError, match="its pixels are more than max_pixels = 100 allows"):
        QuickCrops(transform(), 3, 100)(image)
    with pytest.raises(BrokenImageError, match=r"^gone: it is not a file"):
        QuickCrops(transform(), 3, MAX_PIXELS)(Encoded("gone.jpg", "gone"))
