"""WebDataset shards: tar files that hold each image beside its label, under the same name."""

from __future__ import annotations

import gc
import json
import math
import os
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property, lru_cache
from itertools import product
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch.utils.data import Dataset

from awconv.data.classification import ImageDataModule
from awconv.data.files import is_leftover, log_unused, matching
from awconv.data.images import ENDINGS, MAX_PIXELS, BrokenImageError, Encoded, check_bytes, read_image
from awconv.data.labels import checked_label, checked_names, numbered
from awconv.data.loading import Split
from awconv.data.packed import PackedTexts
from awconv.data.tar_members import Member, TarHeaders
from awconv.terminal import printable

_KIND = "a tar file"
_LABELS = ("cls", "json")
_LABEL_BYTES = 2**24
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_PATTERNS = 10**6
_SHARDS_OF_A_PROCESS = 16  # fewer are read in the time that processes take to start


class TarImages(Dataset[tuple[Image.Image, int]]):
    """The labelled images of tar files.

    Beside each image lies a file of the same name that ends in ``.cls`` (the class index as text) or ``.json`` (the
    class index under ``label``). If there is a ``.cls``, the JSON may be anything else, and its ``label`` text or null.

    The headers of the tar files and the labels are read at once, each image at its access. Unused files are logged,
    except those that programs leave behind (``._x.jpg``).

    Args:
        pattern: a tar file, or a pattern of several, which are read in alphabetical order: a glob (``train-*.tar``), or
            a range as in WebDataset (``train-{0000..0099}.tar``).
        max_pixels: the largest number of pixels of an image.
        processes: that read the headers of many files, side by side.

    Attributes:
        targets: class index of each image.
        chunks: number of images in each file. Training reads a few files at a time.

    Raises:
        FileNotFoundError: no file matches.
        ValueError: a file is no tar file, is compressed or cut off, or an image has no label, or labels that disagree.
    """

    def __init__(self, pattern: str, max_pixels: int = MAX_PIXELS, processes: int = 1) -> None:
        self._max_pixels = max_pixels
        self._shards = sorted({path for one in _expanded(pattern) for path in matching(one, _KIND)})
        found = _all_labelled(self._shards, processes)
        for shard, one in zip(self._shards, found, strict=True):
            if one.unused:
                rank_zero_info(printable(f"{shard}: not used: {one.unused}"))
        self.chunks = [len(one.names) for one in found]
        if not sum(self.chunks):
            raise ValueError(f"{pattern}: the tar files hold no images beside labels ({' or '.join(_LABELS)})")
        self._shard = np.repeat(np.arange(len(self._shards)), self.chunks)
        self._offsets, self._sizes, self.targets = np.concatenate([one.places for one in found], 1)
        self._names = PackedTexts.joined(one.names for one in found)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return read_image(*self.encoded(index), max_pixels=self._max_pixels), int(self.targets[index])

    def encoded(self, index: int) -> Encoded:
        """An image as it is stored.

        Raises:
            BrokenImageError: it is too large, or the tar file has become shorter.
        """
        shard, size = self._shards[self._shard[index]], int(self._sizes[index])
        name = f"{shard}, {self._names[index]}"
        check_bytes(size, name, self._max_pixels)
        with open(shard, "rb", buffering=0) as file:
            file.seek(int(self._offsets[index]))
            content = file.read(size)
        if len(content) < size:
            raise BrokenImageError(f"{name}: the tar file ends within the image")
        return Encoded(content, name)


class _Labelled(NamedTuple):
    """The labelled images of a shard.

    Attributes:
        places: offset and size of each image, in bytes, and its class index, shape (3, N).
        names: of the images.
        unused: the kinds of other files and how many there are.
    """

    places: np.ndarray[Any, np.dtype[np.int64]]
    names: PackedTexts
    unused: str


def _all_labelled(shards: Sequence[str], processes: int) -> list[_Labelled]:
    if len(shards) < _SHARDS_OF_A_PROCESS or processes < 2:
        return [_labelled(shard) for shard in shards]
    processes = min(processes, len(shards) // (_SHARDS_OF_A_PROCESS // 2))
    with ProcessPoolExecutor(processes, initializer=gc.freeze) as pool:  # collections need not look at what is there
        return list(pool.map(_labelled, shards, chunksize=-(-len(shards) // (4 * processes))))


def _labelled(shard: str) -> _Labelled:
    """Reads the headers and the labels of a shard.

    Raises:
        ValueError: it is no tar file, is compressed or cut off, or an image has no label, or labels that disagree.
    """
    try:
        with TarHeaders(shard) as tar:
            members, end = tar.members()
            _check_end(shard, end)  # first: a cut file could lack labels
            images, labels, unused = _sorted_out(shard, tar, members)
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{shard} is not a plain tar file, or is broken: {error}") from error
    places = np.asarray([(image.offset, image.size, labels[key][0]) for key, image in images.items()], np.int64)
    counts = ", ".join(f"{count} {why}" for why, count in unused.most_common(10) if count)
    return _Labelled(places.reshape(-1, 3).T, PackedTexts(image.name for image in images.values()), counts)


def _sorted_out(
    shard: str, tar: TarHeaders, members: Sequence[Member]
) -> tuple[dict[str, Member], dict[str, tuple[int, str]], Counter[str]]:
    """The images and the labels of a shard, with the names of their files, by what both are called; what is unused."""
    images: dict[str, Member] = {}
    labels: dict[str, tuple[int, str]] = {}
    notes: dict[str, str] = {}  # JSON without a label
    unused: Counter[str] = Counter()
    for member in sorted(members, key=_is_no_index):
        folder, _, name = member.name.rpartition("/")
        if is_leftover(name) or _is_left_over(folder):
            continue
        stem, _, ending = name.partition(".")
        key, kind = _prefix(folder) + stem, _kind_of(ending)
        if kind is None:
            unused[f"not named as images ({PurePosixPath(name).suffix or name})"] += 1
            continue
        if not member.plain:
            raise ValueError(f"{shard}: {member.name} must be a plain copy, got a link or a sparse file")
        if kind == "image":
            if images.setdefault(key, member) is not member:
                names = f"{images[key].name} and {member.name}"
                raise ValueError(f"{shard}: {names} are both images of {key}; keep one")
            continue
        label = _label(tar, member, kind, shard, key in labels)
        if label is None:
            notes[key] = member.name
        elif labels.setdefault(key, (label, member.name))[0] != label:
            other, named = labels[key]
            raise ValueError(f"{shard}: the label of {key} is {other} in {named}, and {label} in {member.name}")
    for key, image in images.items():
        if key not in labels:
            raise ValueError(
                f"{shard}: image {image.name} has no label; expected {key}.cls with the class index, or {key}.json "
                "with it under 'label'" + (f"; {notes[key]} has none" if key in notes else "")
            )
    unused["labels without an image"] = len(labels.keys() - images.keys())
    return images, labels, unused


def _is_no_index(member: Member) -> bool:
    return member.name[-4:].lower() != ".cls"


@lru_cache(maxsize=2**10)
def _kind_of(ending: str) -> str | None:
    """``"image"``, or one of the kinds of labels; None for others."""
    ending = ending.lower()
    if f".{ending.rpartition('.')[2]}" in ENDINGS:
        return "image"
    return ending if ending in _LABELS else None


@lru_cache(maxsize=2**10)
def _is_left_over(folder: str) -> bool:
    return any(map(is_leftover, PurePosixPath(folder).parts))


@lru_cache(maxsize=2**10)
def _prefix(folder: str) -> str:
    """A folder in its shortest form, before a name."""
    short = str(PurePosixPath(folder))
    return "" if short == "." else f"{short}/"


def _check_end(shard: str, offset: int) -> None:
    """Refuses a tar file without its final zeros: members behind the last one may be lost."""
    with open(shard, "rb") as file:
        file.seek(offset)  # behind the last member, to the first of two headers of zeros
        end = file.read(2 * tarfile.BLOCKSIZE)
        size = file.seek(0, os.SEEK_END)
    if end != bytes(2 * tarfile.BLOCKSIZE) or size % tarfile.BLOCKSIZE:
        raise ValueError(f"{shard} is cut off: the zeros at the end of a tar file are missing; copy the file again")


def _label(tar: TarHeaders, member: Member, ending: str, shard: str, known: bool) -> int | None:
    """The class index in a file; None for JSON without one. If another file gives the class index (``known``), a label
    in JSON that is no number means something else."""
    try:
        if member.size > _LABEL_BYTES:
            raise ValueError(f"got a file of {member.size:,} bytes")
        text = tar.read(member.offset, member.size).decode("utf-8-sig").strip()
        if ending == "cls":
            if not (text.isascii() and text.isdigit() and len(text) <= 18):
                raise ValueError(f"got {text!r:.80}")
            return int(text)
        content = json.loads(text)
        if not isinstance(content, dict) or "label" not in content:
            return None
        label = content["label"]
        if known and (isinstance(label, bool) or not isinstance(label, int | float)):
            return None
        return checked_label(label)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{shard}, {member.name} must hold a class index of at least 0: {error}") from error


def _expanded(pattern: str) -> list[str]:
    """A pattern for each number of a range in braces, or for each combination of several ranges."""
    parts = _RANGE.split(pattern)
    between, ranges = parts[::3], list(zip(parts[1::3], parts[2::3], strict=True))
    counts = [int(last) - int(first) + 1 for first, last in ranges]
    if any(count < 1 for count in counts) or math.prod(counts) > _PATTERNS:
        shown = " and ".join(f"{{{first}..{last}}}" for first, last in ranges)
        raise ValueError(f"{shown} in {pattern!r} must count up, by at most {_PATTERNS:,} files")
    numbers = [[f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)] for first, last in ranges]
    return ["".join(map("".join, zip(between, (*chosen, ""), strict=True))) for chosen in product(*numbers)]


class WebDataset(ImageDataModule):
    """Images in WebDataset shards: uncompressed tar files on a disk.

    Args:
        train: the training split: a tar file, or a pattern of several: ``train-*.tar`` or ``train-{0000..0099}.tar``.
        val: the validation split, likewise. None holds out ``val_fraction`` of the training split.
        test: the test split, likewise. None tests on the validation split.
        class_names: names of the classes, by index. None takes numbers as names.
        **kwargs: further arguments of :class:`ImageDataModule`. ``val_fraction`` counts only without ``val``.

    Raises:
        FileNotFoundError: no file matches.
        ValueError: a file is no tar file, an image has no label, or a label has no name.
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        test: str | None = None,
        class_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.files: dict[Split, str | None] = {"train": train, "val": val, "test": test}
        self.class_names = class_names

    @cached_property
    def _train(self) -> TarImages:
        assert self.files["train"] is not None
        log_unused([one for pattern in self.files.values() if pattern is not None for one in _expanded(pattern)], _KIND)
        return TarImages(self.files["train"], self.max_pixels, self.num_workers)

    @property
    def classes(self) -> list[str]:
        train = self.files["train"]
        if self.class_names is None:
            return numbered(self._train.targets, str(train))
        self._check(self._train, train, len(self.class_names))
        return checked_names(self.class_names, "class_names")

    def open(self, split: Split) -> TarImages | None:
        if split == "train":
            return self._train
        pattern = self.files[split]
        if pattern is None:
            return None
        dataset = TarImages(pattern, self.max_pixels, self.num_workers)
        self._check(dataset, pattern, len(self.classes))
        return dataset

    @staticmethod
    def _check(dataset: TarImages, pattern: str | None, classes: int) -> None:
        if max(dataset.targets) >= classes:
            raise ValueError(
                f"{pattern}: labels must be from 0 to {classes - 1}, got {max(dataset.targets)}; "
                "give the names of all classes with class_names"
            )
