"""CIFAR-10 and CIFAR-100, read and downloaded by torchvision."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torchvision.datasets import CIFAR10, CIFAR100

from awconv.data.classification import ImageDataModule
from awconv.data.datasets import ArrayImages
from awconv.data.loading import Split
from awconv.models.cifar import CIFAR10_MEAN, CIFAR10_STD
from awconv.roles import Role

CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


class Cifar10(ImageDataModule):
    """CIFAR-10: 50,000 training and 10,000 test images, 32x32, 10 classes.

    Args:
        root: the folder of ``cifar-10-batches-py``.
        download: download the data if ``root`` does not hold them.
        **kwargs: as for :class:`ImageDataModule`.
    """

    roles: ClassVar[Mapping[str, Role]] = {**ImageDataModule.roles, "download": Role.NOTHING}
    default_image_size = 32
    default_crop_padding = 4
    default_mean, default_std = CIFAR10_MEAN, CIFAR10_STD
    _dataset: type[CIFAR10] = CIFAR10

    def __init__(self, root: Path = Path("data"), download: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = Path(os.path.expanduser(root))
        self.download = download

    @cached_property
    def _train(self) -> CIFAR10:
        return self._open(train=True)

    def _open(self, train: bool) -> CIFAR10:
        try:
            return self._dataset(self.root, train=train, download=self.download)
        except (RuntimeError, OSError) as error:
            raise FileNotFoundError(
                f"{self._dataset.__name__} is not in {self.root}: {error}. Put the folder {self._dataset.base_folder} "
                "there, or download it with --data.download=true on a machine with a network"
            ) from error

    @property
    def classes(self) -> list[str]:
        return list(self._train.classes)

    def open(self, split: Split) -> ArrayImages | None:
        if split == "val":
            return None
        dataset = self._train if split == "train" else self._open(train=False)
        return ArrayImages(dataset.data, dataset.targets)


class Cifar100(Cifar10):
    """CIFAR-100: 100 classes, in the folder ``cifar-100-python``. Everything else is as in :class:`Cifar10`."""

    default_mean, default_std = CIFAR100_MEAN, CIFAR100_STD
    _dataset = CIFAR100
