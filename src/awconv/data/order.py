"""The images of each batch and their random numbers, as functions of the seed, the epoch and the step.

No random state is carried from step to step. So a resumed training gets the batches of an uninterrupted one, several
processes together get the batches of a single one, and the number of workers changes nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

WINDOW = 8  # chunks shuffled together, and kept decompressed


class Draw(NamedTuple):
    """An image of a training batch.

    Attributes:
        image: index of the image in the data set.
        epoch: number of the epoch.
        seed: of the run.
    """

    image: int
    epoch: int
    seed: int


class Share(NamedTuple):
    """The part of each batch that a process takes.

    Attributes:
        rank: number of this process, from 0.
        of: number of processes.
    """

    rank: int = 0
    of: int = 1


ALONE = Share()


class EpochCounter:
    """The number of the epoch to draw batches for. Lightning sets it."""

    def __init__(self) -> None:
        self.number = 0

    def set_epoch(self, epoch: int) -> None:
        self.number = epoch


class TrainingBatches(Sampler[list[Draw]]):
    """Training batches, in a new random order each epoch. Images that fill no batch of all processes are left out.

    Args:
        size: number of images.
        batch_size: images a batch and process.
        share: the part of this process.
        seed: of the orders and the augmentation.
        chunks: for each image, the number of the chunk that stores it (a Parquet row group, a shard). Shuffles the
            chunks, then the images within :data:`WINDOW` chunks, so that each chunk is read once. None shuffles all
            images.
        groups: for each image, the number of its group. Each batch is then of one group, except an epoch's last
            batches, which mix the groups' remaining images.
        start: called at the beginning of each epoch. Returns the number of batches to skip: an interrupted training
            has used them.
        same: repeat the order of the first epoch in each, as ``overfit_batches`` needs it.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        share: Share = ALONE,
        seed: int = 0,
        chunks: np.ndarray[Any, Any] | None = None,
        groups: np.ndarray[Any, Any] | None = None,
        start: Callable[[], int] = lambda: 0,
        same: bool = False,
    ) -> None:
        self.size, self.batch_size, self.share, self.seed = size, batch_size, share, seed
        self.chunks, self.groups, self.start, self.same = chunks, groups, start, same
        self.sampler = EpochCounter()  # Lightning calls sampler.set_epoch

    def __len__(self) -> int:
        return self.size // (self.batch_size * self.share.of)

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch, together = self.sampler.number, self.batch_size * self.share.of
        order = self._order(0 if self.same else epoch)
        for number in range(self.start(), len(self)):
            batch = order[number * together : (number + 1) * together]
            yield [Draw(image, epoch, self.seed) for image in batch[self.share.rank :: self.share.of].tolist()]
        self.sampler.set_epoch(epoch + 1)  # for loops that never call set_epoch

    def _order(self, epoch: int) -> np.ndarray[Any, Any]:
        generator = np.random.default_rng([self.seed, epoch])
        if self.chunks is None:
            order = generator.permutation(self.size)
        else:
            windows = generator.permutation(int(self.chunks.max()) + 1) // WINDOW
            order = np.lexsort((generator.random(self.size), windows[self.chunks]))
        return order if self.groups is None else np.asarray(self._grouped(order, self.groups), np.int64)

    def _grouped(self, order: Any, groups: np.ndarray[Any, Any]) -> list[int]:
        """Groups an order: a batch is emitted as soon as its group has enough images."""
        together = self.batch_size * self.share.of
        waiting: dict[int, list[int]] = {}
        full: list[int] = []
        for index in order:
            batch = waiting.setdefault(int(groups[index]), [])
            batch.append(index)
            if len(batch) == together:
                full += waiting.pop(int(groups[index]))
        return full + [index for batch in waiting.values() for index in batch]


class EvaluationBatches(Sampler[list[int]]):
    """Evaluation batches: every image once, over all processes. Each process has the same number of batches, since
    processes wait for each other.

    Args:
        size: number of images.
        batch_size: images of a batch. Some batches have one more, if the processes' shares need it.
        share: the part of this process.

    Raises:
        ValueError: there are fewer images than processes.
    """

    def __init__(self, size: int, batch_size: int, share: Share = ALONE) -> None:
        if size < share.of:
            raise ValueError(f"{size} images cannot be evaluated by {share.of} processes: take fewer devices")
        self.indices = range(share.rank, size, share.of)
        # At most one batch for each image of the smallest share: no batch may be empty.
        self.batches = min(math.ceil(math.ceil(size / share.of) / batch_size), size // share.of)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in np.array_split(self.indices, self.batches):
            yield batch.tolist()


class TrainingLoader(DataLoader[Any]):
    """A DataLoader that reads the epoch and the start when its first batch is fetched, not when its iterator is made.

    Lightning makes iterators before it sets the epoch, and before a resumed training knows its position.
    """

    def __iter__(self) -> Any:
        yield from super().__iter__()


def derive_seed(*numbers: int) -> int:
    """A seed from several numbers. Different numbers give independent seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)  # torch takes signed integers


def seed_all(seed: int) -> None:
    """Seeds Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # As torch.manual_seed, at a tenth of its cost: that formats the stack for each kind of device that is not used.
    torch.default_generator.manual_seed(seed)
    torch.mps.manual_seed(seed)
    for kind in (torch.cuda, torch.xpu):
        if kind.is_initialized():
            kind.manual_seed_all(seed)


def chunks_of(stored: Sequence[int], indices: Sequence[int] | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The chunk of each of some images. Chunks are numbered anew, without gaps.

    Args:
        stored: number of images in each chunk.
        indices: of the images, within the data set.
    """
    chunk = np.repeat(np.arange(len(stored)), stored)[np.asarray(indices)]
    return np.unique(chunk, return_inverse=True)[1]
