"""Trees of image files, one folder a class, as ImageNet is usually laid out."""

from __future__ import annotations

import os
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch.utils.data import Dataset

from awconv.data.classification import ImageDataModule
from awconv.data.files import composed, is_leftover, walk
from awconv.data.images import ENDINGS, MAX_PIXELS, Encoded, read_image
from awconv.data.loading import Split
from awconv.data.packed import PackedTexts
from awconv.terminal import printable

_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
_EXPECTED = "expected images in {root}/train/CLASS/, and optionally val and test, or in {root}/CLASS/"


class FolderImages(Dataset[tuple[Image.Image, int]]):
    """The images of a folder that holds one folder for each class.

    Args:
        folder: the folder that holds the folders of the classes.
        max_pixels: the largest number of pixels of an image.

    Attributes:
        classes: names of the folders, normalised by :func:`composed`.
        files: paths of the images, by class.
        targets: class index of each image.
        unused: number of files that are no images of a class, by the cause.

    Raises:
        FileNotFoundError: there are no folders of classes, or a class has no images.
        ValueError: a folder cannot be read, or two folders are the same class.
    """

    def __init__(self, folder: Path, max_pixels: int = MAX_PIXELS) -> None:
        self._max_pixels = max_pixels
        folders = _subfolders(folder)
        self.classes = [composed(one.name) for one in folders]
        if not self.classes:
            raise FileNotFoundError(f"{folder} holds no folders; expected images in a folder for each class")
        twice = [name for name, count in Counter(self.classes).items() if count > 1]
        if twice:
            raise ValueError(f"{folder}: two folders are called {twice[0]}, in different Unicode forms; merge them")
        files: list[str] = []
        counts: list[int] = []
        self.unused: Counter[str] = Counter()
        for one in folder.iterdir():
            if one.is_file() and not is_leftover(one.name):
                self.unused[f"beside the folders of the classes ({one.suffix or one.name})"] += 1
        empty = []
        for name, one in zip(self.classes, folders, strict=True):
            count = len(files)
            for path in walk(one):
                _, ending = os.path.splitext(path)
                if ending.lower() in ENDINGS:
                    files.append(path)
                else:
                    self.unused[f"not named as images ({ending or os.path.basename(path)})"] += 1
            counts.append(len(files) - count)
            if not counts[-1]:
                empty.append(name)
        if empty:
            raise FileNotFoundError(
                f"{folder}: {len(empty)} of {len(self.classes)} classes have no image file: {', '.join(empty[:10])}; "
                f"expected images ({', '.join(sorted(ENDINGS))}) in the folder of each class; remove empty folders"
            )

        self.files = PackedTexts(files)
        self.targets: np.ndarray[Any, np.dtype[np.int64]] = np.repeat(np.arange(len(self.classes)), counts)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return read_image(*self.encoded(index), max_pixels=self._max_pixels), int(self.targets[index])

    def encoded(self, index: int) -> Encoded:
        """An image as it is stored."""
        path = self.files[index]
        return Encoded(path, path)


class ImageFolder(ImageDataModule):
    """Images under ``root/train/CLASS/`` and, where they exist, ``root/val/CLASS/`` and ``root/test/CLASS/``.

    The folders of splits may also be called ``training``, ``valid``, ``validation`` and ``testing``, in capitals too.
    Without any of them, each folder in ``root`` is a class. A folder that then holds only folders of images is an
    error, since it may be a split of another name.

    Files and folders that programs leave behind (``.ipynb_checkpoints``, ``__MACOSX``, ``._x.jpg``, ``@eaDir`` and the
    like) are ignored. All other unused files are logged.

    Args:
        root: the folder that holds ``train``.
        **kwargs: further arguments of :class:`ImageDataModule`. ``val_fraction`` counts only without ``val``.

    Raises:
        FileNotFoundError: a folder is missing, or the folder of a class holds no images. The message names it.
        ValueError: splits have different classes, there is only one class, two folders are the same split, or a folder
            is neither a class nor a split.
    """

    def __init__(self, root: Path, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = Path(os.path.expanduser(root))

    @cached_property
    def _folders(self) -> dict[Split, Path]:
        """The folder of each split that exists."""
        expected = _EXPECTED.format(root=self.root)
        if not self.root.is_dir():
            hint = "; if it is an archive, unpack it" if self.root.is_file() else ""
            raise FileNotFoundError(f"{self.root / 'train'} is not a folder; {expected}{hint}")
        inside = _subfolders(self.root)
        named = {split: [one for one in inside if one.name.lower() in names] for split, names in _NAMES.items()}
        for split, found in named.items():
            if len(found) > 1:
                raise ValueError(f"{' and '.join(map(str, found))} are both the {split} split; expected one")
        folders = {split: found[0] for split, found in named.items() if found}
        if not folders and inside:
            names = f"{', '.join(one.name for one in inside[:10])}, {len(inside)} in all"
            rank_zero_info(
                printable(f"{self.root} has no folder 'train', so each folder in it is a training class: {names}")
            )
            return {"train": self.root}
        if "train" not in folders:
            raise FileNotFoundError(f"{self.root / 'train'} is not a folder; {expected}")
        if not _subfolders(folders["train"]):
            raise FileNotFoundError(f"{folders['train']} holds no folders of classes; {expected}")
        flat = {split: folder for split, folder in folders.items() if not _subfolders(folder)}
        for split, folder in flat.items():
            rank_zero_info(f"not used: {folder}, which holds no folders of classes ('awconv predict' needs none)")
            del folders[split]
        used = (*folders.values(), *flat.values())
        others = sorted(one.name for one in self.root.iterdir() if one not in used and not is_leftover(one.name))
        if others:
            rank_zero_info(f"not used: {printable(', '.join(others[:10]))} in {self.root}")
        return folders

    @cached_property
    def _train(self) -> FolderImages:
        train = self._open("train")
        if len(train.classes) < 2:  # perhaps the folder above the data set
            raise ValueError(
                f"a classification needs at least two classes, and {self._folders['train']} holds only the folder "
                f"{train.classes[0]}; {_EXPECTED.format(root=self.root)}"
            )
        if self._folders["train"] == self.root:
            self._refuse_splits(train)
        return train

    def _refuse_splits(self, train: FolderImages) -> None:
        """Raises a ValueError if a folder of the root is no class but holds folders of images."""
        places: dict[str, set[str]] = {name: set() for name in train.classes}
        for target, path in zip(train.targets, train.files, strict=True):
            places[train.classes[target]].add(os.path.dirname(path))
        wrong = [
            name
            for name, inside in places.items()
            if len(inside) > 1 and not any(Path(one).parent == self.root for one in inside)
        ]
        if wrong:
            likely = next((name for name in wrong if "train" in name.lower()), wrong[0])
            raise ValueError(
                f"{self.root} has no folder 'train', and {', '.join(wrong[:10])} in it are no classes: they hold no "
                f"images, but folders of images. If they are splits, lay them out as {self.root}/train/CLASS/, "
                "val/CLASS/ and test/CLASS/, or train on one of them: "
                f"--data.root={os.path.commonpath(places[likely])}; if they are classes, move all of them to "
                f"{self.root}/train"
            )

    def _open(self, split: Split) -> FolderImages:
        folder = self._folders[split]
        dataset = FolderImages(folder, self.max_pixels)
        if dataset.unused:
            counts = ", ".join(f"{count} {why}" for why, count in dataset.unused.most_common(10))
            rank_zero_info(printable(f"{folder}: not used: {counts}"))
        return dataset

    @property
    def classes(self) -> list[str]:
        return list(self._train.classes)

    def open(self, split: Split) -> FolderImages | None:
        if split == "train":
            return self._train
        if split not in self._folders:
            return None
        dataset = self._open(split)
        if dataset.classes != self._train.classes:
            differing = sorted(set(dataset.classes) ^ set(self._train.classes))
            raise ValueError(
                f"{self._folders[split]} must have the classes of {self._folders['train']}; these are in only one of "
                f"them: {', '.join(differing[:10])}"
            )
        return dataset


def _subfolders(folder: Path) -> list[Path]:
    try:
        found = [one for one in folder.iterdir() if one.is_dir() and not is_leftover(one.name)]
        return sorted(found, key=lambda one: (composed(one.name), one.name))
    except PermissionError as error:
        raise ValueError(f"folder {folder} cannot be read: {error.strerror}") from error
