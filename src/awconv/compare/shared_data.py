"""Data sets that are decoded once, for all processes that train side by side."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from awconv.compare.record import TestSplit
from awconv.data import DataModule, ImageDataModule
from awconv.data.datasets import InMemoryImages
from awconv.data.loading import Split
from awconv.terminal import say
from awconv.training import TrainingCLI
from awconv.training.recipe import Recipe

_FOLDER = ".decoded"  # in the folder of a comparison


class DataError(ValueError):
    """The data of a run cannot be read. The message begins with the kind of error."""


class OpenedData:
    """Data sets that runs share, so that each is decoded once."""

    def __init__(self) -> None:
        self._opened: dict[str, DataModule] = {}

    def of(self, recipe: Recipe, built: TrainingCLI, split: TestSplit, decoded: Path | None = None) -> DataModule:
        """The data of an earlier run with the same settings, or else the run's own.

        Args:
            recipe: the run's settings.
            built: the run.
            split: the split to test on.
            decoded: a folder that :class:`SharedData` has written; the run's own data then map its files.

        Raises:
            ValueError: there is nothing to test on.
        """
        key = key_of(recipe)
        if key not in self._opened:
            self._opened[key] = built.datamodule
            if decoded is not None and isinstance(built.datamodule, ImageDataModule):
                _map(built.datamodule, decoded)
        data = self._opened[key]
        if data.dataset(split) is None:
            splits = {"test": "neither a test nor a validation split", "val": "no validation split"}
            raise ValueError(f"the data have {splits[split]}; hold one out with data.val_fraction")
        return data


def key_of(recipe: Recipe) -> str:
    """Text that is the same for the same data set."""
    return json.dumps(recipe.settings.content["data"], sort_keys=True)


class SharedData:
    """Decodes each data set once and writes its images to files. Processes that map the files share their memory.

    The files lie in the comparison's folder: shared memory proper is small in containers. Data sets that are not kept
    in memory are left to each process.

    Args:
        folder: of the files; made when it is needed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, Path | str | None] = {}

    def of(self, recipe: Recipe) -> Path | None:
        """The folder of a run's decoded data; None if each process has to read the data for itself.

        Raises:
            DataError: they cannot be read.
        """
        key = key_of(recipe)
        if key not in self._made:
            self._made[key] = self._make(recipe, self._folder / str(len(self._made)))
        made = self._made[key]
        if isinstance(made, str):
            raise DataError(made)
        return made

    def _make(self, recipe: Recipe, folder: Path) -> Path | str | None:
        """The folder of the decoded data, why they cannot be read, or None where there is nothing to share."""
        if not issubclass(recipe.settings.data, ImageDataModule):
            return None
        try:
            data = recipe.build().datamodule
        except Exception:  # perhaps of the network: each run says it for itself
            return None
        if data.in_memory is False:
            return None
        try:
            decoded = {split: dataset for split in get_args(Split) if (dataset := _in_memory(data, split)) is not None}
        except Exception as error:  # a user's data fail in many ways
            return f"{type(error).__name__}: {error}"
        if not decoded:
            return None
        try:
            folder.mkdir(parents=True)
            for split, dataset in decoded.items():
                np.save(folder / f"{split}-images.npy", dataset.images.numpy())
                np.save(folder / f"{split}-targets.npy", dataset.targets.numpy())
        except OSError as error:  # such as a full disk
            shutil.rmtree(folder, ignore_errors=True)
            say(f"awconv: {folder} cannot hold the decoded images ({error.strerror}); each process decodes for itself")
            return None
        return folder


@contextmanager
def shared_data(folder: Path) -> Iterator[SharedData]:
    """Shared data in the folder of a comparison, which nothing else may use meanwhile.

    The files are removed at the end, and those first that a killed process has left.
    """
    place = folder / _FOLDER
    shutil.rmtree(place, ignore_errors=True)
    try:
        yield SharedData(place)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _in_memory(data: ImageDataModule, split: Split) -> InMemoryImages | None:
    """A split that is kept in memory, under its own name; None for others."""
    if split == "test" and data.test_split != "test":
        return None
    dataset = data.dataset(split)
    return dataset if isinstance(dataset, InMemoryImages) else None


def _map(data: ImageDataModule, decoded: Path) -> None:
    """Gives data the splits in a folder."""
    for split in get_args(Split):
        images, targets = (decoded / f"{split}-{part}.npy" for part in ("images", "targets"))
        if images.is_file():
            data.adopt(split, InMemoryImages.of(_mapped(images), _mapped(targets)))


def _mapped(file: Path) -> Tensor:
    """A tensor of a file's memory, copied on writing: nobody writes, and PyTorch takes no memory that is read-only."""
    return torch.from_numpy(np.load(file, mmap_mode="c"))
