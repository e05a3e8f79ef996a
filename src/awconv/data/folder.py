"""Trees of image files, one folder a class, as ImageNet is usually laid out."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from torchvision.datasets import ImageFolder as _ImageFolder

from awconv.data.images import read_image
from awconv.data.loading import Split
from awconv.data.module import ImageDataModule


class ImageFolder(ImageDataModule):
    """Images under ``root/train/CLASS/`` and, where they exist, ``root/val/CLASS/`` and ``root/test/CLASS/``.

    Args:
        root: the folder that holds ``train``.
        **kwargs: as for :class:`ImageDataModule`; ``val_fraction`` is used only without ``val``.

    Raises:
        FileNotFoundError: a folder is missing, or the folder of a class holds no images; the message names it.
        ValueError: splits have different classes.
    """

    def __init__(self, root: Path, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = Path(root)

    @cached_property
    def _train(self) -> _ImageFolder:
        return self._open("train")

    def _open(self, split: Split) -> _ImageFolder:
        folder = self.root / split
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is not a folder; expected images in {self.root}/train/CLASS/, and optionally val and test"
            )
        try:
            return _ImageFolder(str(folder), loader=_load)
        except FileNotFoundError as error:  # of torchvision: no classes, or empty ones, by their names
            raise FileNotFoundError(
                f"{folder}: {error}. Expected images in a folder for each class; remove empty ones"
            ) from error

    @property
    def classes(self) -> list[str]:
        return list(self._train.classes)

    def open(self, split: Split) -> _ImageFolder | None:
        if split == "train":
            return self._train
        if not (self.root / split).is_dir():
            return None
        dataset = self._open(split)
        if dataset.classes != self._train.classes:
            differing = sorted(set(dataset.classes) ^ set(self._train.classes))
            raise ValueError(
                f"{self.root / split} must have the classes of {self.root / 'train'}; these are only in one of them: "
                f"{', '.join(differing[:10])}"
            )
        return dataset


def _load(path: str) -> Image.Image:
    return read_image(path, path)
