"""What all data sets of images with boxes share: cleaning, augmentation, batches."""

from __future__ import annotations

import abc
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from awconv.data.files import Files
from awconv.data.images import MAX_PIXELS, BrokenImageError, log_skipped, read_header, read_image
from awconv.data.loading import DataModule, Split
from awconv.data.order import Draw, derive_seed, seed_all

Target = dict[str, Tensor]
Array = np.ndarray[Any, Any]
_LEAST = 1.0  # pixels: what torchvision's augmentation leaves out, too


@dataclass(frozen=True)
class Annotated:
    """An image and what is marked in it.

    Attributes:
        path: of the image, among the data set's files.
        image_id: its number in the data set.
        width: in pixels.
        height: in pixels.
        boxes: float64, shape (K, 4): x1, y1, x2, y2 in pixels.
        labels: int64, shape (K,), from 1; 0 is the background.
        areas: float64, shape (K,), in square pixels, of the object, by which an evaluation calls it small or large.
        crowd: bool, shape (K,): regions that hold any number of objects (COCO), or are too difficult (VOC). They are
            not trained on, and detections in them are not counted as wrong.
        others: number of boxes of categories that were not asked for, which are not here.
    """

    path: str
    image_id: int
    width: int
    height: int
    boxes: Array
    labels: Array
    areas: Array
    crowd: Array
    others: int = 0


@dataclass
class BoxSummary:
    """What a training split holds, and what was done to it; printed, a sentence.

    Attributes:
        images: that are trained on.
        boxes: that are trained on.
        empty_boxes: left out, because they are less than a pixel wide or high.
        outside_boxes: left out, because less than a pixel of them lies inside their image.
        clipped_boxes: that were clipped to their image.
        crowd_regions: left out of the training.
        other_boxes: left out, because their category was not asked for.
        images_without_boxes: that have no box to train on.
        modes: number of images by Pillow's mode that are not RGB, and were converted, such as ``{"L": 3, "CMYK": 1}``.
    """

    images: int = 0
    boxes: int = 0
    empty_boxes: int = 0
    outside_boxes: int = 0
    clipped_boxes: int = 0
    crowd_regions: int = 0
    other_boxes: int = 0
    images_without_boxes: int = 0
    modes: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        notes = [
            (self.empty_boxes, "empty boxes (less than a pixel) left out"),
            (self.outside_boxes, "boxes outside their image left out"),
            (self.clipped_boxes, "boxes clipped to their image"),
            (self.crowd_regions, "crowd regions not trained on"),
            (self.other_boxes, "boxes of other categories left out"),
            (self.images_without_boxes, "images without boxes"),
            *((count, f"images of mode {mode} converted to RGB") for mode, count in sorted(self.modes.items())),
        ]
        return "; ".join(
            [f"{self.images:,} images, {self.boxes:,} boxes", *(f"{count:,} {text}" for count, text in notes if count)]
        )


def clean(image: Annotated, counts: BoxSummary) -> Annotated:
    """The boxes of an image that can be trained on, clipped to it; what was left out is counted."""
    boxes, crowd = image.boxes, image.crowd.astype(bool)
    empty = ((boxes[:, 2:] - boxes[:, :2]) < _LEAST).any(1)
    limits = np.array([image.width, image.height] * 2, boxes.dtype)
    clipped = boxes.clip(0, limits)
    outside = ((clipped[:, 2:] - clipped[:, :2]) < _LEAST).any(1) & ~empty
    kept = ~(empty | outside | crowd)
    counts.crowd_regions += int(crowd.sum())
    counts.empty_boxes += int((empty & ~crowd).sum())
    counts.outside_boxes += int((outside & ~crowd).sum())
    counts.clipped_boxes += int((kept & (clipped != boxes).any(1)).sum())
    counts.boxes += int(kept.sum())
    counts.images_without_boxes += not kept.any()
    counts.other_boxes += image.others
    return replace(image, boxes=clipped[kept], labels=image.labels[kept], areas=image.areas[kept], crowd=crowd[kept])


class AnnotatedImages(Dataset[tuple[Tensor, Target] | None]):
    """Images with boxes, decoded at each access.

    An item is an image, uint8 of shape (3, H, W), and a dictionary of ``boxes`` (float32, shape (K, 4): x1, y1, x2, y2
    in pixels), ``labels`` (int64, from 1), ``area``, ``iscrowd`` and ``image_id``; where a broken image is skipped,
    another one in training, and None in an evaluation.

    Args:
        files: where the images are.
        images: what is marked in them.
        transform: of an image and a dictionary with ``boxes`` and ``labels`` as torchvision's tensors.
        skip_broken: leave out images that cannot be decoded, and log their names.
        max_pixels: the most that an image may have.
    """

    def __init__(
        self,
        files: Files,
        images: Sequence[Annotated],
        transform: Callable[[Any, Any], tuple[Any, Any]] | None = None,
        skip_broken: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.files, self.images, self.transform, self.skip_broken = files, images, transform, skip_broken
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int | Draw) -> tuple[Tensor, Target] | None:
        if not isinstance(index, Draw):
            return self._read(index)
        seed_all(derive_seed(index.seed, index.epoch, index.image))
        for step in range(len(self)):  # in the place of a broken image, the one behind it
            item = self._read((index.image + step) % len(self))
            if item is not None:
                return item
        raise BrokenImageError(f"none of the {len(self)} images can be decoded")

    def _read(self, index: int) -> tuple[Tensor, Target] | None:
        annotated = self.images[index]
        try:
            content, name = self.files.read(annotated.path), self.files.name(annotated.path)
            picture = read_image(content, name, max_pixels=self.max_pixels)
            if picture.size != (annotated.width, annotated.height):
                picture = read_image(content, name, upright=False, max_pixels=self.max_pixels)  # annotated as stored
            _check_size(annotated, picture.size, name)
        except (BrokenImageError, FileNotFoundError) as error:
            log_skipped(error, self.skip_broken)
            return None
        image: Tensor = v2.functional.pil_to_tensor(picture.convert("RGB"))
        target: dict[str, Any] = {
            "boxes": torch.as_tensor(annotated.boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.as_tensor(annotated.labels, dtype=torch.int64),
        }
        if self.transform is None:
            target["area"] = torch.as_tensor(annotated.areas, dtype=torch.float32)
            target["iscrowd"] = torch.as_tensor(annotated.crowd, dtype=torch.int64)
            target["image_id"] = torch.tensor(annotated.image_id)
            return image, target
        size = (annotated.height, annotated.width)
        target["boxes"] = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)  # type: ignore[call-overload]
        image, target = self.transform(tv_tensors.Image(image), target)
        return image.as_subclass(Tensor), {name: value.as_subclass(Tensor) for name, value in target.items()}


def _check_size(annotated: Annotated, size: tuple[int, int], name: str) -> None:
    """Raises a BrokenImageError for an image that is not as large as its annotations say."""
    if size != (annotated.width, annotated.height):
        raise BrokenImageError(
            f"{name}: the annotations say {annotated.width}x{annotated.height} pixels, and it has "
            f"{size[0]}x{size[1]}; annotate the image as it is, or resize it"
        )


Augmentation = Literal["none", "flip", "scale_jitter", "ssd"]


class DetectionDataModule(DataModule):
    """Images with boxes, as batches ``(images, targets)``: two lists, as torchvision's detectors take them.

    Images are uint8, of sizes of their own. For the training, boxes are clipped to their image; empty boxes, those
    outside and crowd regions are left out, and all of it is counted in :attr:`summary`. An evaluation takes the
    annotations as they are. The images of a training batch are all upright or all lying, so that little is padded; the
    last batches of an epoch take what is left of both. An image with an EXIF orientation is turned upright, unless its
    annotations fit only the pixels as they are stored.

    Args:
        root: the folder, or the zip archive, that the data set lies in.
        categories: names of those that are wanted; None for all.
        batch_size: images a batch and device.
        val_fraction: share of the training images that is held out, where no validation split is given; 0 for none.
        split_seed: seed of that split. It is not the run's seed: all runs share one split.
        images_without_boxes: ``"skip"`` leaves them out of the training, as is usual for COCO; ``"keep"`` trains on
            them as background. They are always evaluated.
        augmentation: ``"flip"`` mirrors half of the images; ``"scale_jitter"`` also enlarges or shrinks them at random
            and crops (arXiv 2012.07177); ``"ssd"`` distorts colours, zooms out and crops (arXiv 1512.02325);
            ``"none"`` leaves them as they are.
        jitter_size: height and width that the scale jitter crops to, in pixels.
        inspect: read the header of every training image before the training, to count those that are not RGB, and to
            find those that are missing, no images, or of another size than their annotations say.
        broken_images: ``"refuse"`` raises an error that names an image which cannot be decoded; ``"skip"`` leaves it
            out, in the evaluation too, and logs its name.
        num_workers: processes that decode images.
        max_pixels: an image file with more pixels is as a broken one: it would take too much memory.

    Raises:
        FileNotFoundError: the data set is not there.
        ValueError: a number is out of its range, or a category does not exist.
    """

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
        self.root = Path(os.path.expanduser(root))
        self.categories = None if categories is None else list(categories)
        self.val_fraction, self.split_seed = val_fraction, split_seed
        self.images_without_boxes = images_without_boxes
        self.augmentation, self.jitter_size = augmentation, jitter_size
        self.inspect, self.broken_images, self.max_pixels = inspect, broken_images, max_pixels
        self.summary = BoxSummary()
        self._datasets: dict[Split, AnnotatedImages | None] = {}

    @property
    @abc.abstractmethod
    def category_ids(self) -> list[int]:
        """The data set's own number of each class."""

    @abc.abstractmethod
    def open(self, split: Split) -> list[Annotated] | None:
        """The data set's own split, or None if it has none of that name.

        Raises:
            FileNotFoundError: the data is not there.
            ValueError: it is not what was expected.
        """

    @cached_property
    def files(self) -> Files:
        """The data set's files."""
        return Files(self.root)

    def dataset(self, split: Split) -> AnnotatedImages | None:
        """A split as it is trained or evaluated on; None if there is none."""
        if split == "test":
            split = self.test_split
        if split not in self._datasets:
            images = self._select(split)
            if images and split == "train":
                images = self._clean(images)
            transform = self._transform() if split == "train" else None
            skip = self.broken_images == "skip"
            annotated = AnnotatedImages(self.files, images, transform, skip, self.max_pixels) if images else None
            self._datasets[split] = annotated
        return self._datasets[split]

    @cached_property
    def _opened(self) -> dict[Split, list[Annotated] | None]:
        splits: tuple[Split, ...] = ("train", "val", "test")
        return {split: self.open(split) for split in splits}

    @property
    def test_split(self) -> Split:
        return "val" if self._opened["test"] is None else "test"

    def _select(self, split: Split) -> list[Annotated] | None:
        images, own = self._opened["train"], self._opened["val"]
        assert images is not None
        if split == "test" or (split == "val" and own is not None):
            return self._opened[split]
        if own is not None:
            return images
        held_out = np.zeros(len(images), bool)
        held_out[: round(self.val_fraction * len(images))] = True
        np.random.default_rng(self.split_seed).shuffle(held_out)
        return [image for image, held in zip(images, held_out, strict=True) if held == (split == "val")]

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
        def mode(image: Annotated) -> str:
            name = self.files.name(image.path)
            try:
                with self.files.open(image.path) as file:
                    found, size = read_header(file, name, max_pixels=self.max_pixels)
                if size != (image.height, image.width):  # which may be turned upright
                    _check_size(image, size, name)
            except (BrokenImageError, FileNotFoundError) as error:
                log_skipped(error, self.broken_images == "skip")
                return "RGB"
            return found

        with ThreadPoolExecutor(4) as pool:
            self.summary.modes.update(name for name in pool.map(mode, images) if name != "RGB")

    def _transform(self) -> Callable[[Any, Any], tuple[Any, Any]]:
        steps: list[Any] = [] if self.augmentation == "none" else [v2.RandomHorizontalFlip(0.5)]
        if self.augmentation == "scale_jitter":
            size = (self.jitter_size, self.jitter_size)
            steps += [v2.ScaleJitter(size, antialias=True), v2.RandomCrop(size, pad_if_needed=True)]
        elif self.augmentation == "ssd":
            grey = {tv_tensors.Image: (123, 117, 104), "others": 0}  # the mean of ImageNet's images
            steps += [v2.RandomPhotometricDistort(), v2.RandomZoomOut(fill=grey), v2.RandomIoUCrop()]
        compose: Callable[[Any, Any], tuple[Any, Any]] = v2.Compose([*steps, v2.SanitizeBoundingBoxes(min_size=_LEAST)])
        return compose

    def _loader(self, split: Split) -> Any:
        dataset = self.dataset(split)
        if dataset is None:
            return []
        groups = None
        if split == "train" and self.augmentation in ("none", "flip"):  # the others leave images of one size
            groups = np.array([image.height > image.width for image in dataset.images], int)
        return self._load_batches(dataset, split, collate, self.num_workers, groups=groups)


def collate(batch: list[Any]) -> tuple[list[Tensor], list[Target]]:
    """Two lists, without the images that were left out."""
    readable = [item for item in batch if item is not None]
    return [image for image, _ in readable], [target for _, target in readable]
