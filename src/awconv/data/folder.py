"""Trees of image files, one folder a class, as ImageNet is usually laid out."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.datasets import ImageFolder as _ImageFolder

from awconv.data.images import read_image
from awconv.data.module import ImageDataModule, Split


class ImageFolder(ImageDataModule):
    """Images under ``root/train/CLASS/`` and, where they exist, ``root/val/CLASS/`` and ``root/test/CLASS/``.

    Args:
        root: the folder that holds ``train``.
        image_size: height and width, in pixels: the shorter side is resized to it and the centre cropped.
        batch_size: as for :class:`ImageDataModule`.
        crop_padding: as for :class:`ImageDataModule`.
        horizontal_flip: as for :class:`ImageDataModule`.
        val_fraction: as for :class:`ImageDataModule`; used only without ``val``.
        split_seed: as for :class:`ImageDataModule`.
        in_memory: as for :class:`ImageDataModule`.
        num_workers: as for :class:`ImageDataModule`.
        mean: as for :class:`ImageDataModule`; ImageNet's by default.
        std: as for :class:`ImageDataModule`; ImageNet's by default.

    Raises:
        FileNotFoundError: a folder is missing or holds no images; the message names it.
        ValueError: splits have different classes.
    """

    default_mean, default_std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    def __init__(
        self,
        root: Path,
        image_size: int = 224,
        batch_size: int = 128,
        crop_padding: int = 0,
        horizontal_flip: bool = True,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        in_memory: bool | None = None,
        num_workers: int = 4,
        mean: list[float] | None = None,
        std: list[float] | None = None,
    ) -> None:
        super().__init__(
            image_size,
            batch_size,
            crop_padding,
            horizontal_flip,
            val_fraction,
            split_seed,
            in_memory,
            num_workers,
            mean,
            std,
        )
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
        return _ImageFolder(str(folder), loader=_load)

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
