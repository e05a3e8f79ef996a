"""WebDataset shards: tar files in which an image and its label are neighbours of one name."""

from __future__ import annotations

import glob
import io
import json
import re
import tarfile
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from PIL import Image
from torch.utils.data import Dataset

from awconv.data.images import BrokenImageError, read_image
from awconv.data.loading import Split
from awconv.data.module import ImageDataModule

_LABELS = ("cls", "json")


class _Place(NamedTuple):
    """Where an image lies in the shards."""

    shard: int
    name: str
    offset: int
    size: int


class TarImages(Dataset[tuple[Image.Image, int]]):
    """The images of some tar files, each beside a file of the same name that ends in ``.cls`` (the class index as
    text) or ``.json`` (with the index under ``label``).

    The tar files' headers and the labels are read at once; an image when it is asked for, from its place.

    Args:
        pattern: a tar file, or a pattern of several, read in alphabetical order: a glob (``train-*.tar``), or numbers
            as WebDataset has them (``train-{0000..0099}.tar``).

    Attributes:
        targets: the class index of each image.
        blocks: number of images in each file, so that training reads a few files at a time.

    Raises:
        FileNotFoundError: no file matches.
        ValueError: a file is no tar file, is compressed or cut off, or an image has no label.
    """

    def __init__(self, pattern: str) -> None:
        found = {one: glob.glob(one, recursive=True) for one in _expanded(pattern)}
        missing = [one for one, paths in found.items() if not paths]
        if missing:
            raise FileNotFoundError(f"no file matches {missing[0]!r}; expected a tar file or a glob pattern of some")
        self._shards = sorted(path for paths in found.values() for path in paths)
        self._places: list[_Place] = []
        self.blocks: list[int] = []
        self.targets: list[int] = []
        for number, shard in enumerate(self._shards):
            try:
                with tarfile.open(shard, "r:") as tar:
                    before = len(self.targets)
                    self._index(number, tar)
                    self.blocks.append(len(self.targets) - before)
                    _check_end(shard, tar.offset)
            except (tarfile.TarError, OSError) as error:
                raise ValueError(f"{shard} is not a plain tar file, or a broken one: {error}") from error
        if not self._places:
            raise ValueError(f"{pattern}: the tar files hold no images beside labels ({' or '.join(_LABELS)})")

    def _index(self, number: int, tar: tarfile.TarFile) -> None:
        endings = Image.registered_extensions()
        images: dict[str, _Place] = {}
        labels: dict[str, int] = {}
        for member in tar:
            if not member.isfile():
                continue
            path = PurePosixPath(member.name)
            stem, _, ending = path.name.partition(".")
            key, ending = str(path.with_name(stem)), ending.lower()
            if f".{ending.rpartition('.')[2]}" in endings:
                if key in images:
                    raise ValueError(
                        f"{self._shards[number]}: {images[key].name} and {member.name} are both images of {key}; "
                        "expected one"
                    )
                images[key] = _Place(number, member.name, member.offset_data, member.size)
            elif ending in _LABELS:
                content = tar.extractfile(member)
                assert content is not None
                labels[key] = _label(content.read(), ending, f"{self._shards[number]}, {member.name}")
        for key, place in images.items():
            if key not in labels:
                raise ValueError(
                    f"{self._shards[number]}: image {place.name} has no label; expected {key}.cls with the class "
                    f"index, or {key}.json with it under 'label'"
                )
            self._places.append(place)
            self.targets.append(labels[key])

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        place = self._places[index]
        shard = self._shards[place.shard]
        with open(shard, "rb") as file:
            file.seek(place.offset)
            content = file.read(place.size)
        if len(content) < place.size:
            raise BrokenImageError(f"{shard}, {place.name}: the tar file ends within the image")
        return read_image(content, f"{shard}, {place.name}"), self.targets[index]


def _check_end(shard: str, offset: int) -> None:
    """Refuses a tar file without the zeros that end one: what is behind the last member may be lost."""
    with open(shard, "rb") as file:
        file.seek(offset)  # of the header after the last member, which is the first of two blocks of zeros
        end = file.read(tarfile.BLOCKSIZE)
    if end != bytes(tarfile.BLOCKSIZE):
        raise ValueError(f"{shard} is cut off: it does not end as a tar file does")


def _label(content: bytes, ending: str, name: str) -> int:
    try:
        label = json.load(io.BytesIO(content))["label"] if ending == "json" else int(content)
        if not isinstance(label, int) or label < 0:
            raise ValueError(f"got {label!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name} must hold a class index of at least 0: {error}") from error
    return label


def _expanded(pattern: str) -> list[str]:
    """A pattern for each number of a range in braces."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    before, after = pattern[: match.start()], pattern[match.end() :]
    numbers = range(int(match[1]), int(match[2]) + 1)
    return [one for number in numbers for one in _expanded(f"{before}{number:0{len(match[1])}}{after}")]


class WebDataset(ImageDataModule):
    """Images in WebDataset shards: tar files, not compressed, on a disk.

    Args:
        train: a tar file, or a pattern of several: ``train-*.tar`` or ``train-{0000..0099}.tar``.
        val: the same; None holds out ``val_fraction`` of the training split.
        test: the same; None tests on the validation split.
        class_names: by index; numbers by default.
        **kwargs: as for :class:`ImageDataModule`; ``val_fraction`` is used only without ``val``.

    Raises:
        FileNotFoundError: no file matches.
        ValueError: a file is no tar file, an image has no label, or there are labels without a name.
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
        return TarImages(self.files["train"])

    @property
    def classes(self) -> list[str]:
        names = self.class_names or [str(index) for index in range(max(self._train.targets) + 1)]
        self._check(self._train, self.files["train"], len(names))
        return names

    def open(self, split: Split) -> TarImages | None:
        if split == "train":
            return self._train
        pattern = self.files[split]
        if pattern is None:
            return None
        dataset = TarImages(pattern)
        self._check(dataset, pattern, len(self.classes))
        return dataset

    @staticmethod
    def _check(dataset: TarImages, pattern: str | None, classes: int) -> None:
        if max(dataset.targets) >= classes:
            raise ValueError(
                f"{pattern}: labels must be from 0 to {classes - 1}, got {max(dataset.targets)}; "
                "name all classes with class_names"
            )
