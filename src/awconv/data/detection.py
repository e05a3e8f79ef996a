"""The base of all data sets for detection: splits, sizes, augmentation, batches."""

from __future__ import annotations

import abc
import math
import os
import posixpath
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from awconv.data.annotated import AnnotatedImages, Target, check_size
from awconv.data.boxes import LEAST, Annotated, BoxSummary, clean
from awconv.data.datasets import log_skipped
from awconv.data.files import Files, composed
from awconv.data.images import ENDINGS, MAX_PIXELS, BrokenImageError, check_bytes, read_header
from awconv.data.loading import DataModule, Split
from awconv.roles import Role
from awconv.terminal import printable

_SPLITS: tuple[Split, ...] = ("train", "val", "test")
_READ = ENDINGS | {".json", ".xml"}  # the endings of images and annotations
_THREADS = 4  # for reading headers

Augmentation = Literal["none", "flip", "scale_jitter", "ssd"]


class DetectionDataModule(DataModule):
    """Images with boxes, as batches ``(images, targets)``: two lists, as torchvision's detectors take them.

    Images are uint8 and differ in size. Training clips boxes to their image and leaves out empty boxes, boxes outside
    their image and crowd regions. :attr:`summary` counts all of these. Evaluation takes the annotations as they are.

    Each training batch is all landscape or all portrait, to save padding, except an epoch's last batches, which mix
    what remains of both.

    An image with an EXIF orientation is turned upright, unless its annotations fit only the pixels as stored. If
    annotations give no size, or an impossible one, the size is that of the upright image. An image with one side more
    than 100 times the other counts as broken. Images and files of annotations that no split uses are logged.

    Args:
        root: the folder of the data set, or a zip archive of it.
        categories: names of the wanted categories; None for all.
        batch_size: images a batch and device.
        val_fraction: share of the training images held out if there is no validation split; 0 for none.
        split_seed: seed of that split. It is not the run's seed: all runs share one split.
        images_without_boxes: ``"skip"`` leaves them out of the training, as is usual for COCO; ``"keep"`` trains on
            them as background. They are always evaluated.
        augmentation: ``"flip"`` mirrors half of the images; ``"scale_jitter"`` also enlarges or shrinks them at random
            and crops (arXiv 2012.07177); ``"ssd"`` distorts colours, zooms out and crops (arXiv 1512.02325);
            ``"none"`` leaves them as they are.
        jitter_size: height and width of the scale jitter's crop, in pixels.
        inspect: read the header of every training image before the training. This counts images that are not RGB and
            finds files that are missing, are no images, or differ in size from their annotations.
        broken_images: ``"refuse"`` raises an error that names the broken image; ``"skip"`` leaves the image out, in
            evaluation too, and logs its name.
        num_workers: processes that decode images.
        max_pixels: the largest number of pixels of an image. A file with more pixels, or with more bytes than so many
            pixels need, counts as broken: it would take too much memory.

    Raises:
        FileNotFoundError: the data set does not exist.
        ValueError: a number is out of its range, or a category does not exist.
    """

    roles: ClassVar[Mapping[str, Role]] = {**DataModule.roles, "inspect": Role.NOTHING}

    def __init__(
        self,
        root: Path,
        categories: Sequence[str] | None = None,
        batch_size: int = 2,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        images_without_boxes: Literal["skip", "keep"] = "skip",
        augmentation: Augmentation = "flip",
        jitter_size: int = 1024,
        inspect: bool = True,
        broken_images: Literal["refuse", "skip"] = "refuse",
        num_workers: int = 4,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__(batch_size, num_workers)
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction must be at least 0 and less than 1, got {val_fraction}")
        for what, value in (("jitter_size", jitter_size), ("max_pixels", max_pixels)):
            if value < 1:
                raise ValueError(f"{what} must be at least 1, got {value}")
        if split_seed < 0:
            raise ValueError(f"split_seed must be at least 0, got {split_seed}")
        if augmentation == "scale_jitter" and jitter_size**2 > max_pixels:
            raise ValueError(
                f"jitter_size must be at most {math.isqrt(max_pixels)} (max_pixels = {max_pixels:,}), got {jitter_size}"
            )
        if categories is not None and (
            isinstance(categories, str)
            or len(set(map(composed, categories))) != len(categories)
            or not all(name.strip() for name in categories)
            or not categories
        ):
            raise ValueError(f"categories must be a list of different names, or null for all, got {categories!r}")
        self.root = Path(os.path.expanduser(root))
        self.categories = None if categories is None else list(map(composed, categories))
        self.val_fraction, self.split_seed = val_fraction, split_seed
        self.images_without_boxes = images_without_boxes
        self.augmentation, self.jitter_size = augmentation, jitter_size
        self.inspect, self.broken_images, self.max_pixels = inspect, broken_images, max_pixels
        self.summary = BoxSummary()
        self._datasets: dict[Split, AnnotatedImages | None] = {}
        self._looked_in: set[str] = set()
        self._annotation_files: set[str] = set()

    @property
    @abc.abstractmethod
    def category_ids(self) -> list[int]:
        """The id of each class in the data set."""

    @abc.abstractmethod
    def open(self, split: Split) -> list[Annotated] | None:
        """Opens a split of the data set, or returns None if there is no such split.

        Adds the folders of its files to ``_looked_in``, and the annotation files that it reads to
        ``_annotation_files``.

        Raises:
            FileNotFoundError: the data are missing.
            ValueError: the data are not in the expected format.
        """

    @cached_property
    def files(self) -> Files:
        """The data set's files."""
        return Files(self.root)

    def dataset(self, split: Split) -> AnnotatedImages | None:
        """A split, ready for training or evaluation; None if there is no such split."""
        if split == "test":
            split = self.test_split
        if split not in self._datasets:
            images = self._measure(self._select(split), split)
            if split == "train":
                images = self._clean(images)
            transform = self._transform() if split == "train" else None
            skip = self.broken_images == "skip"
            annotated = AnnotatedImages(self.files, images, transform, skip, self.max_pixels) if images else None
            self._datasets[split] = annotated
        return self._datasets[split]

    @cached_property
    def _opened(self) -> dict[Split, list[Annotated] | None]:
        opened: dict[Split, list[Annotated] | None] = {}
        for split in _SPLITS:
            images = opened[split] = self.open(split)
            if images == [] or (images is None and split == "train"):
                raise ValueError(f"--data.{split} must name a split of {self.root} with images in it")
        self._log_unused({image.path for images in opened.values() for image in images or ()})
        return opened

    def _log_unused(self, images: set[str]) -> None:
        used = images | self._annotation_files
        beside = [] if self._looked_in & {"", "."} else self.files.beside(used)
        if beside:
            rank_zero_info(printable(f"not used: {', '.join(beside[:10])} in {self.root}"))
        inside = {path for folder in self._looked_in for path in self.files.below(folder)} - used
        unused = sorted(path for path in inside if posixpath.splitext(path)[1].lower() in _READ)
        if unused:
            rank_zero_info(
                printable(
                    f"files of images or annotations that no split uses: {len(unused):,} in {self.root}, such as "
                    f"{', '.join(unused[:5])}"
                )
            )

    @property
    def test_split(self) -> Split:
        return "val" if self._opened["test"] is None else "test"

    def _select(self, split: Split) -> list[Annotated]:
        images, own = self._opened["train"] or [], self._opened["val"]
        if split == "test" or (split == "val" and own is not None):
            return self._opened[split] or []
        if own is not None:
            return images
        held_out = np.zeros(len(images), bool)
        held_out[: round(self.val_fraction * len(images))] = True
        if held_out.all():
            raise ValueError(
                f"val_fraction = {self.val_fraction} holds out all of {len(images)} images; give a smaller one, or a "
                "validation split"
            )
        np.random.default_rng(self.split_seed).shuffle(held_out)
        return [image for image, held in zip(images, held_out, strict=True) if held == (split == "val")]

    def _measure(self, images: list[Annotated], split: Split) -> list[Annotated]:
        """Gives images of unknown size the size of their files. Skips or refuses files that cannot be read."""
        unknown = [index for index, image in enumerate(images) if not image.width]
        if not unknown:
            return images
        with ThreadPoolExecutor(_THREADS) as pool:
            headers = dict(zip(unknown, pool.map(self._header, [images[index] for index in unknown]), strict=True))
        measured = []
        for index, image in enumerate(images):
            header = headers.get(index)
            if header is not None:
                width, height = header[1]
                measured.append(replace(image, width=width, height=height))
            elif index not in headers:
                measured.append(image)
        broken = len(images) - len(measured)
        if not measured:
            raise BrokenImageError(f"none of the {broken} images of the {split} split can be read; the log names them")
        if split == "train":
            self.summary.measured_images, self.summary.broken_images = len(unknown) - broken, broken
        else:
            rank_zero_info(f"{split} images: {len(unknown):,} have no size in their annotations; their files give it")
        return measured

    def _header(self, image: Annotated) -> tuple[str, tuple[int, int]] | None:
        """The mode and size of an image, upright if the annotations give no size. None for a broken image to skip."""
        name, known = self.files.name(image.path), image.width > 0
        try:
            check_bytes(self.files.size(image.path), name, self.max_pixels)
            with self.files.open(image.path) as file:
                mode, size = read_header(file, name, upright=not known, max_pixels=self.max_pixels)
            if not known or size == (image.height, image.width):  # decoding may turn it upright
                image = replace(image, width=size[0], height=size[1])
            check_size(image, size, name)
        except (ValueError, FileNotFoundError) as error:
            log_skipped(error, self.broken_images == "skip")
            return None
        return mode, size

    def _clean(self, images: list[Annotated]) -> list[Annotated]:
        cleaned = [clean(image, self.summary) for image in images]
        if self.images_without_boxes == "skip":
            cleaned = [image for image in cleaned if len(image.boxes)]
        if not cleaned:
            raise ValueError(
                f"no image of {self.root} has a box to train on ({self.summary}); boxes are counted in pixels"
            )
        self.summary.images = len(cleaned)
        if self.inspect and self._share.rank == 0:
            self._inspect(cleaned)
        rank_zero_info(f"training images: {self.summary}")
        return cleaned

    def _inspect(self, images: list[Annotated]) -> None:
        with ThreadPoolExecutor(_THREADS) as pool:
            for image, header in zip(images, pool.map(self._header, images), strict=True):
                if header is None:
                    self.summary.broken_images += 1
                    self.summary.images -= 1
                    self.summary.boxes -= len(image.boxes)
                elif header[0] != "RGB":
                    self.summary.modes[header[0]] += 1

    def _transform(self) -> Callable[[Any, Any], tuple[Any, Any]]:
        transforms: list[Any] = [] if self.augmentation == "none" else [v2.RandomHorizontalFlip(0.5)]
        if self.augmentation == "scale_jitter":
            size = (self.jitter_size, self.jitter_size)
            transforms += [v2.ScaleJitter(size, antialias=True), v2.RandomCrop(size, pad_if_needed=True)]
        elif self.augmentation == "ssd":
            grey = {tv_tensors.Image: (123, 117, 104), "others": 0}  # the mean of ImageNet's images
            transforms += [v2.RandomPhotometricDistort(), v2.RandomZoomOut(fill=grey), v2.RandomIoUCrop()]
        compose: Callable[[Any, Any], tuple[Any, Any]] = v2.Compose(
            [*transforms, v2.SanitizeBoundingBoxes(min_size=LEAST)]
        )
        return compose

    def _loader(self, split: Split) -> Any:
        dataset = self.dataset(split)
        if dataset is None:
            return []
        groups = None
        if split == "train" and self.augmentation in ("none", "flip"):  # the others make images of one size
            groups = np.array([image.height > image.width for image in dataset.images], int)
        return self._load_batches(dataset, split, collate, self.num_workers, groups=groups)


def collate(batch: list[Any]) -> tuple[list[Tensor], list[Target]]:
    """Images and targets as two lists, without skipped images."""
    readable = [item for item in batch if item is not None]
    return [image for image, _ in readable], [target for _, target in readable]
