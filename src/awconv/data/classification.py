"""The base of all data sets for classification: splits, decoding, augmentation."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch import Tensor
from torch.utils.data import default_collate

from awconv.data.augment import mirror, shift
from awconv.data.crops import QuickCrops
from awconv.data.datasets import InMemoryImages, LabelledImages, TransformedImages
from awconv.data.images import MAX_PIXELS, BrokenImageError
from awconv.data.labels import checked_names
from awconv.data.loading import DataModule, Split
from awconv.data.order import chunks_of
from awconv.data.transforms import to_uint8

IN_MEMORY_BYTES = 2**31
BATCH_BYTES = 2**32
_EVALUATED = 4  # times the batch of a training on a GPU, which keeps activations


def check_batch(batch_size: int, channels: int, image_size: int) -> None:
    """Refuses a batch too large for any network, before memory runs out.

    Raises:
        ValueError: its images take more than 4 GiB as float32.
    """
    size = 4 * batch_size * channels * image_size**2
    if size > BATCH_BYTES:
        raise ValueError(
            f"{batch_size} images of {channels} channels and {image_size}x{image_size} pixels take "
            f"{size / 2**30:,.1f} GiB as float32; a batch may take at most {BATCH_BYTES / 2**30:.0f}: choose a smaller "
            "batch_size or image_size"
        )


class ImageDataModule(DataModule):
    """Labelled images for a classification, as batches ``(images, targets)``.

    Images are uint8, shape (N, channels, image_size, image_size). The task normalises them.

    A data set of at most 2 GiB is decoded once and kept as one tensor, on the GPU that trains if there is room for it,
    and then four times as many images are evaluated at once as trained on. The training device augments its batches, by
    random crops after zero padding and by horizontal flips. Workers decode a larger data set, with the random resized
    crops usual at that scale, or those of ``transform``.

    The order of the images and their augmentation depend only on the run's seed, the epoch and the step. Several
    processes share the batches, and an evaluation sees every image once.

    None, as an argument, stands for the data set's own default, in the class attribute ``default_...``.

    Args:
        image_size: height and width, in pixels.
        crop_pct: share of the shorter side that the centre crop keeps: the shorter side is first resized to
            ``image_size / crop_pct``.
        batch_size: samples a batch and device.
        crop_padding: zeros on each side before the random crop, in pixels; 0 for no crop.
        horizontal_flip: mirror half of the training images.
        val_fraction: share of each class held out from the training split if there is no validation split; 0 for none.
        split_seed: seed of that split. It is not the run's seed: all runs share one split.
        in_memory: true decodes each image once, false at each access, None decides by the size of the data set.
        num_workers: processes that decode images, if the data set is not in memory.
        transform: arguments of ``timm.data.create_transform`` for the training images, such as
            ``{"auto_augment": "rand-m7-mstd0.5-inc1", "scale": [0.35, 1.0]}``. They are then decoded at each access.
        resizing: of random resized crops: by ``"torch"``, the default, or by ``"pillow"``, as timm does it, in more
            time. The crops differ by a level of 255 in a few values of a thousand. An evaluation always takes Pillow.
        broken_images: ``"refuse"`` raises an error that names the broken image; ``"skip"`` leaves the image out, in
            evaluation too, and logs its name.
        max_pixels: the largest number of pixels of an image. A file with more pixels, or with more bytes than so many
            pixels need, counts as broken: it would take too much memory.
        mean: mean of each channel, of values from 0 to 1.
        std: standard deviation of each channel.

    Raises:
        ValueError: a number is out of its range, or a batch would take too much memory.
    """

    channels = 3
    default_image_size = 224
    default_crop_padding = 0
    default_horizontal_flip = True
    default_resizing: Literal["torch", "pillow"] = "torch"
    default_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN
    default_std: Sequence[float] = IMAGENET_DEFAULT_STD

    def __init__(
        self,
        image_size: int | None = None,
        crop_pct: float = 1.0,
        batch_size: int = 128,
        crop_padding: int | None = None,
        horizontal_flip: bool | None = None,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        in_memory: bool | None = None,
        num_workers: int = 4,
        transform: dict[str, Any] | None = None,
        resizing: Literal["torch", "pillow"] | None = None,
        broken_images: Literal["refuse", "skip"] = "refuse",
        max_pixels: int = MAX_PIXELS,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.image_size = self.default_image_size if image_size is None else image_size
        self.crop_padding = self.default_crop_padding if crop_padding is None else crop_padding
        self.horizontal_flip = self.default_horizontal_flip if horizontal_flip is None else horizontal_flip
        self.crop_pct = crop_pct
        self.transform = transform
        self.resizing = resizing or self.default_resizing
        self.broken_images = broken_images
        self.max_pixels = max_pixels
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.in_memory = in_memory
        self.mean = [float(value) for value in (mean or self.default_mean)]
        self.std = [float(value) for value in (std or self.default_std)]
        self._check_arguments()
        self._sources: dict[Split, LabelledImages | None] = {}
        self._datasets: dict[Split, InMemoryImages | TransformedImages] = {}
        self._on_device: dict[tuple[Split, torch.device], InMemoryImages] = {}

    def _check_arguments(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction must be at least 0 and less than 1, got {self.val_fraction}")
        for name, least in (("image_size", 1), ("crop_padding", 0), ("max_pixels", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.split_seed < 2**32:
            raise ValueError(f"split_seed must be at least 0 and less than 2^32, got {self.split_seed}")
        if self.crop_padding >= self.image_size:
            raise ValueError(f"crop_padding must be less than image_size = {self.image_size}, got {self.crop_padding}")
        if not 0.01 <= self.crop_pct <= 1:
            raise ValueError(f"crop_pct must be at least 0.01 and at most 1, got {self.crop_pct}")
        if self.in_memory and self.transform:
            raise ValueError("in_memory and transform exclude each other: a transform decodes images at each access")
        for name in ("mean", "std"):
            values = getattr(self, name)
            above = 0.0 if name == "std" else -math.inf
            if len(values) != self.channels or not all(above < value < math.inf for value in values):
                kind = "positive numbers" if name == "std" else "numbers"
                raise ValueError(f"{name} must be {self.channels} {kind}, one for each channel, got {values}")
        check_batch(self.batch_size, self.channels, self.image_size)

    @abc.abstractmethod
    def open(self, split: Split) -> LabelledImages | None:
        """Opens a split of the data set, or returns None if there is no such split. Decodes nothing yet.

        Raises:
            FileNotFoundError: the data are missing.
        """

    @property
    def input_size(self) -> list[int]:
        """Channels, height and width of an image."""
        return [self.channels, self.image_size, self.image_size]

    def dataset(self, split: Split) -> InMemoryImages | TransformedImages | None:
        """A split, ready for training or evaluation. The first use opens it and, if it is kept in memory, decodes it.

        Without a test split, ``"test"`` is the validation split.
        """
        if split == "test":
            split = self.test_split
        if split not in self._datasets:
            source, indices = self._select(split)
            if source is None or not len(indices):
                return None
            self._datasets[split] = self._load(source, indices, split)
        return self._datasets[split]

    def adopt(self, split: Split, decoded: InMemoryImages) -> None:
        """Takes a split that another process has decoded for a data set with the same settings.

        Args:
            split: the split; ``"val"``, too, where it takes the place of a test split.
            decoded: its images.
        """
        self._datasets[split] = decoded

    @property
    def has_validation(self) -> bool:
        """Whether there is a validation split, held out or of its own. Decodes nothing."""
        return "val" in self._datasets or len(self._select("val")[1]) > 0

    @property
    def test_split(self) -> Split:
        """The split to test on: ``"test"``, or ``"val"`` if the data set has no test split."""
        there = "test" in self._datasets or self._source("test") is not None
        return "test" if there else "val"

    def _source(self, split: Split) -> LabelledImages | None:
        if split not in self._sources:
            self._sources[split] = self.open(split)
            if split == "train":
                self._check_classes(self._sources[split])
        return self._sources[split]

    def _check_classes(self, train: LabelledImages | None) -> None:
        if train is None:
            return
        classes = checked_names(self.classes, type(self).__name__)
        found = set(np.unique(np.asarray(train.targets)).tolist())
        empty = [name for index, name in enumerate(classes) if index not in found]
        if empty:
            raise ValueError(
                f"{len(empty)} of {len(classes)} classes have no training image: {', '.join(empty[:10])}; remove these "
                "classes, or add images of them"
            )

    def _select(self, split: Split) -> tuple[LabelledImages | None, np.ndarray[Any, Any]]:
        source = self._source(split)
        if split == "val" and source is None:
            return self._source("train"), self._held_out[1]
        if split == "train" and self._source("val") is None:
            return source, self._held_out[0]
        return source, np.arange(0 if source is None else len(source))

    @cached_property
    def _held_out(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Indices into the training split: the images to train on, and the held-out images."""
        source = self._source("train")
        assert source is not None
        everything = np.arange(len(source))
        if self.val_fraction == 0:
            return everything, everything[:0]
        try:
            train, val = train_test_split(
                everything,
                test_size=self.val_fraction,
                random_state=self.split_seed,
                stratify=np.asarray(source.targets),
            )
        except ValueError as error:
            raise ValueError(
                f"val_fraction = {self.val_fraction} cannot be held out of every class of {len(source)} training "
                f"images: {error} Give a validation split, another val_fraction, or 0 for no validation"
            ) from error
        return np.sort(train), np.sort(val)

    def _load(
        self, source: LabelledImages, indices: np.ndarray[Any, Any], split: Split
    ) -> InMemoryImages | TransformedImages:
        fits = len(indices) * self.channels * self.image_size**2 <= IN_MEMORY_BYTES
        skip = self.broken_images == "skip"
        transform: Any = partial(to_uint8, channels=self.channels, size=self.image_size, crop_pct=self.crop_pct)
        augmented = split == "train" and self.transform is not None
        if not augmented and (fits if self.in_memory is None else self.in_memory):
            return InMemoryImages(source, indices, transform, self.channels, self.image_size, skip)
        if split != "train":
            return TransformedImages(source, indices, transform, self.channels, skip)
        transform, quick = self._augmentation(), None
        if self.resizing == "torch" and QuickCrops.can_take(transform):
            quick = QuickCrops(transform, self.channels, self.max_pixels)
        return TransformedImages(source, indices, transform, self.channels, skip, quick)

    def _augmentation(self) -> Any:
        """timm's transform of training images, from a PIL image to a uint8 tensor."""
        arguments: dict[str, Any] = dict(
            hflip=0.5 if self.horizontal_flip else 0.0, color_jitter=0.0, mean=self.mean, std=self.std
        )
        arguments |= self.transform or {}
        try:  # normalize=False keeps uint8
            return create_transform(input_size=self.image_size, is_training=True, normalize=False, **arguments)
        except TypeError as error:
            raise ValueError(
                f"transform must hold arguments of timm.data.create_transform, got {self.transform}: {error}"
            ) from error

    def _loader(self, split: Split) -> Any:
        dataset = self.dataset(split)
        if dataset is None:
            return []
        if isinstance(dataset, InMemoryImages):
            beside = self._beside_the_network(dataset, split)
            at_once = self.batch_size * (_EVALUATED if beside.device.type != "cpu" and split != "train" else 1)
            return self._load_batches(beside, split, _as_it_is, num_workers=0, batch_size=at_once)
        stored = getattr(dataset.dataset, "chunks", None)
        chunks = chunks_of(stored, dataset.indices) if stored and split == "train" else None
        return self._load_batches(dataset, split, _collate, self.num_workers, chunks)

    def _beside_the_network(self, dataset: InMemoryImages, split: Split) -> InMemoryImages:
        """A data set in the memory of the GPU that trains, where a quarter of what is free there holds it."""
        device = self._device
        if device.type == "cuda" and (split, device) not in self._on_device:
            fits = dataset.images.nbytes <= torch.cuda.mem_get_info(device)[0] // 4
            self._on_device[split, device] = dataset.on(device) if fits else dataset
        return self._on_device.get((split, device), dataset)

    def _augment(self, batch: Any, seed: int) -> Any:
        """Augments images kept in memory. The workers have augmented all others."""
        if not isinstance(self.dataset("train"), InMemoryImages):
            return batch
        images, targets = batch
        return self.augment(images, seed), targets

    def augment(self, images: Tensor, seed: int) -> Tensor:
        """Augments a batch of training images.

        Args:
            images: shape (N, C, H, W); this process's share of the batch.
            seed: the same in all processes, so that together they draw what a single process would.
        """
        rank, of = self._share
        generator = torch.Generator().manual_seed(seed)
        count = len(images) * of
        places = torch.randint(0, 2 * self.crop_padding + 1, (2, count), generator=generator)[:, rank::of]
        mirrored = (torch.rand(count, generator=generator) < 0.5)[rank::of]
        if self.crop_padding:
            images = shift(images, self.crop_padding, *places.to(images.device))
        if self.horizontal_flip:
            images = mirror(images, mirrored.to(images.device))
        return images


def _as_it_is(batch: Any) -> Any:
    return batch


def _collate(batch: list[Any]) -> Any:
    readable = [item for item in batch if item is not None]
    if not readable:
        raise BrokenImageError(f"none of the {len(batch)} images of a batch can be decoded")
    return default_collate(readable)
