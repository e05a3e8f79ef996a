"""Which images a batch holds, and with which random numbers: a function of the seed, the epoch and the step.

Nothing is drawn from a state that grows with the training. So a resumed training goes on with the very batches that an
uninterrupted one has, several processes together see those of one, and the number of workers does not matter.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

WINDOW = 8  # chunks that are shuffled together, and kept decompressed


class Draw(NamedTuple):
    """An image of a training batch.

    Attributes:
        image: its position in the data set.
        epoch: for which it is drawn.
        seed: of the run.
    """

    image: int
    epoch: int
    seed: int


class Share(NamedTuple):
    """The part of each batch that a process takes.

    Attributes:
        rank: the number of the process, from 0.
        of: how many there are.
    """

    rank: int = 0
    of: int = 1


ALONE = Share()


class EpochCounter:
    """The number of the epoch that the batches are drawn for. Lightning sets it."""

    def __init__(self) -> None:
        self.number = 0

    def set_epoch(self, epoch: int) -> None:
        self.number = epoch


class TrainingBatches(Sampler[list[Draw]]):
    """Batches of an order drawn anew for each epoch. Images that do not fill a batch of all processes are left out.

    Args:
        size: number of images.
        batch_size: images a batch and process.
        share: the part of this process.
        seed: of the orders and the augmentation.
        chunks: for each image the number of the chunk that it is stored in (a Parquet row group, a shard). Chunks are
            then shuffled, and images within :data:`WINDOW` chunks, so that each chunk is read once. By default all
            images are shuffled.
        groups: for each image the number of its group. Each batch is then of one group, except an epoch's last
            batches, of images that fill no batch with their own group.
        start: called at the beginning of each epoch: the number of batches to leave out, which were trained on before
            an interruption.
        same: draw the order of the first epoch again in each, to fit a few batches as ``overfit_batches`` does.
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
        self.sampler = EpochCounter()  # under the name where Lightning looks for set_epoch

    def __len__(self) -> int:
        return self.size // (self.batch_size * self.share.of)

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch, together = self.sampler.number, self.batch_size * self.share.of
        order = self._order(0 if self.same else epoch)
        for number in range(self.start(), len(self)):
            batch = order[number * together : (number + 1) * together]
            yield [Draw(image, epoch, self.seed) for image in batch[self.share.rank :: self.share.of]]
        self.sampler.set_epoch(epoch + 1)  # for loops that do not say which epoch it is

    def _order(self, epoch: int) -> list[int]:
        generator = np.random.default_rng([self.seed, epoch])
        if self.chunks is None:
            order = generator.permutation(self.size)
        else:
            windows = generator.permutation(int(self.chunks.max()) + 1) // WINDOW
            order = np.lexsort((generator.random(self.size), windows[self.chunks]))
        return [int(index) for index in (order if self.groups is None else self._grouped(order, self.groups))]

    def _grouped(self, order: Any, groups: np.ndarray[Any, Any]) -> list[int]:
        """The same order, in which each batch waits until enough images of its group have come."""
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
    """Every image once, in all processes together, and as many batches in each of them: they wait for one another.

    Args:
        size: number of images.
        batch_size: images of a batch; where the processes' shares need it, some batches have one more.
        share: the part of this process.

    Raises:
        ValueError: there are fewer images than processes.
    """

    def __init__(self, size: int, batch_size: int, share: Share = ALONE) -> None:
        if size < share.of:
            raise ValueError(f"{size} images cannot be evaluated by {share.of} processes: take fewer devices")
        self.indices = range(share.rank, size, share.of)
        # No more than the smallest share has images: an empty batch is none.
        self.batches = min(math.ceil(math.ceil(size / share.of) / batch_size), size // share.of)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in np.array_split(self.indices, self.batches):
            yield [int(index) for index in batch]


class TrainingLoader(DataLoader[Any]):
    """A DataLoader that asks for the epoch and the start with its first batch, and not when its iterator is made.

    Lightning makes iterators before it has set the epoch, and before a resumed training knows where it was.
    """

    def __iter__(self) -> Any:
        yield from super().__iter__()


def derive_seed(*numbers: int) -> int:
    """A seed for some purpose, from numbers that say which; seeds of different numbers have nothing to do with each
    other."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)  # torch's are signed


def seed_all(seed: int) -> None:
    """Seeds Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def chunks_of(stored: Sequence[int], indices: Sequence[int]) -> np.ndarray[Any, Any]:
    """The chunks of some images, numbered without gaps.

    Args:
        stored: number of images in each chunk.
        indices: the images.
    """
    chunk = np.repeat(np.arange(len(stored)), stored)[np.asarray(indices)]
    return np.unique(chunk, return_inverse=True)[1]
