"""The base of all data modules: loaders whose batches depend only on the seed, the epoch and the step."""

from __future__ import annotations

import abc
import gc
import os
import signal
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Protocol

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader

from awconv.data.order import (
    ALONE,
    EvaluationBatches,
    Share,
    TrainingBatches,
    TrainingLoader,
    derive_seed,
    seed_all,
)
from awconv.roles import Role

Split = Literal["train", "val", "test"]
_CPU = torch.device("cpu")
_WORKER_SECONDS = 12  # that a worker lives on after a SIGTERM: longer than the training that needs it


class Sized(Protocol):
    """A data set of known length. Its items are accessed by index, in training by :class:`Draw`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


def most_processes() -> int:
    """The largest number of devices, or of workers, that a training may use on this machine."""
    return max(32, 4 * (os.cpu_count() or 1))


class DataModule(pl.LightningDataModule, abc.ABC):
    """Batches of a data set's splits.

    The order of the images and their augmentation depend only on the run's seed, the epoch and the step. Several
    processes share the batches, and an evaluation sees every image once.

    Args:
        batch_size: samples a batch and device.
        num_workers: processes that decode images.

    Raises:
        ValueError: a number is out of its range.
    """

    roles: ClassVar[Mapping[str, Role]] = {"num_workers": Role.NOTHING, "max_pixels": Role.NOTHING}
    """Roles of arguments; the others decide the steps."""
    compared_names: ClassVar[Mapping[str, int]] = {"root": 1, "train": 2, "val": 2, "test": 2}
    """How many last parts of a path identify the data. The parts before them differ between machines."""

    def __init__(self, batch_size: int, num_workers: int) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if num_workers > (most := most_processes()):
            raise ValueError(f"num_workers must be at most {most} (4 for each core, or 32), got {num_workers}")
        self.batch_size, self.num_workers = batch_size, num_workers

    @property
    @abc.abstractmethod
    def classes(self) -> list[str]:
        """The names of the classes, by index."""

    @abc.abstractmethod
    def dataset(self, split: Split) -> Any:
        """A split, ready for training or evaluation; None if there is no such split.

        Without a test split, ``"test"`` is the validation split.
        """

    @property
    def has_validation(self) -> bool:
        """Whether there is a validation split, held out or of its own."""
        return self.dataset("val") is not None

    @property
    @abc.abstractmethod
    def test_split(self) -> Split:
        """The split to test on: ``"test"``, or ``"val"`` if the data set has no test split."""

    @property
    def _share(self) -> Share:
        return ALONE if self.trainer is None else Share(self.trainer.global_rank, self.trainer.world_size)

    @property
    def _device(self) -> torch.device:
        """Where batches go."""
        return _CPU if self.trainer is None else self.trainer.strategy.root_device

    @property
    def _seed(self) -> int:
        """The run's seed, from Lightning's environment variable."""
        return int(os.environ.get("PL_GLOBAL_SEED", 0))

    def _batches_done(self) -> int:
        """Number of batches of the current epoch that are trained on already."""
        return 0 if self.trainer is None else self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def _load_batches(
        self,
        dataset: Sized,
        split: Split,
        collate: Callable[[Any], Any],
        num_workers: int,
        chunks: np.ndarray[Any, Any] | None = None,
        groups: np.ndarray[Any, Any] | None = None,
        batch_size: int | None = None,
    ) -> Any:
        """Makes a loader. ``chunks`` and ``groups`` are those of :class:`TrainingBatches`."""
        share, batch_size = self._share, batch_size or self.batch_size
        batches: Any
        if split == "train":
            batches = TrainingBatches(
                len(dataset),
                batch_size,
                share,
                self._seed,
                chunks,
                groups,
                start=self._batches_done,
                same=getattr(self.trainer, "overfit_batches", 0) > 0,
            )
            if len(batches) == 0:
                raise ValueError(
                    f"batch_size must be at most the {len(dataset)} training images, got {self.batch_size}"
                    + (f" on each of {share.of} devices" if share.of > 1 else "")
                )
        else:
            batches = EvaluationBatches(len(dataset), batch_size, share)
        return (TrainingLoader if split == "train" else DataLoader)(
            dataset,  # type: ignore[arg-type]
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=num_workers,
            worker_init_fn=_begin_worker,
            persistent_workers=num_workers > 0,
            # Only what is not on the GPU already can be copied there while others are computed.
            pin_memory=self._device.type == "cuda" and getattr(dataset, "device", _CPU) == _CPU,
        )

    @abc.abstractmethod
    def _loader(self, split: Split) -> Any:
        """The loader of a split; an empty list if there is no such split."""

    def train_dataloader(self) -> Any:
        return self._loader("train")

    def val_dataloader(self) -> Any:
        return self._loader("val")

    def test_dataloader(self) -> Any:
        return self._loader("test")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """In training, augments the batch and seeds all random numbers of the rest of the step."""
        if self.trainer is None or not self.trainer.training:
            return batch
        place = (self._seed, self.trainer.current_epoch, self._batches_done())
        seed_all(derive_seed(*place, self._share.rank))
        return self._augment(batch, derive_seed(*place))

    def _augment(self, batch: Any, seed: int) -> Any:
        """Augments a whole training batch on its device; ``seed`` is the same in all processes."""
        return batch


def _begin_worker(worker: int) -> None:
    """Delays the end of a worker: SIGTERM may reach the whole process group, and the training needs one more batch.

    Keeps what the worker shares of the training's memory shared: a collection of garbage would write to all objects.
    """
    gc.freeze()
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_WORKER_SECONDS))
