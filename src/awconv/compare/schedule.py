"""Which run starts next, and how long all of them take, as functions of what the finished ones took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from statistics import median

from awconv.compare.record import Record

_MARGIN = 1.1  # runs differ, and none may end too late
_WITH_VALIDATION = 1.15  # an epoch's time with its validation and checkpoint, relative to that of its training batches


@dataclass(frozen=True)
class Planned:
    """A run that has not ended.

    Attributes:
        name: of the run.
        seed: of the run.
        seconds: that it still needs; None if nothing is known.
    """

    name: str
    seed: int
    seconds: float | None


@dataclass(frozen=True)
class Took:
    """What a finished run took.

    Attributes:
        epochs: number of its epochs.
        seconds: of all of it.
        per_epoch: seconds of a further epoch.
    """

    epochs: int
    seconds: float
    per_epoch: float

    @classmethod
    def of(cls, record: Record) -> Took:
        """What the run of a record took. Records of versions that did not measure it have the time of their epochs."""
        count = len(record.epochs)
        trained = sum(epoch.seconds for epoch in record.epochs)
        seconds = _WITH_VALIDATION * trained if record.seconds is None else record.seconds
        return cls(count, seconds, min(_WITH_VALIDATION * record.seconds_per_epoch, seconds / count))

    def with_epochs(self, epochs: float | None) -> float:
        """Seconds that a run of another length takes; of the same length if that is None."""
        if epochs is None:
            return self.seconds
        return max(0.0, self.seconds + (epochs - self.epochs) * self.per_epoch)


def expected_seconds(variant: str, epochs: float | None, took: Mapping[str, Sequence[Took]]) -> float | None:
    """Seconds that a run takes, by those of its variant, or else by those of the slowest variant that is known.

    Args:
        variant: of the run.
        epochs: number of its epochs; None if something else ends it.
        took: what the finished runs took, by variant.

    Returns:
        None if no run has finished.
    """
    known = {
        name: median(one.with_epochs(epochs) for one in _nearest(runs, epochs)) for name, runs in took.items() if runs
    }
    return None if not known else _MARGIN * known.get(variant, max(known.values()))


def _nearest(runs: Sequence[Took], epochs: float | None) -> list[Took]:
    """The runs whose length is nearest."""
    if epochs is None:
        return list(runs)
    distance = min(abs(one.epochs - epochs) for one in runs)
    return [one for one in runs if abs(one.epochs - epochs) == distance]


def last_end(waiting: Iterable[float], running: Sequence[float], jobs: int) -> float:
    """Seconds until the last of the waiting runs ends, if each starts as soon as one of the workers is free.

    Args:
        waiting: seconds of each run, in order.
        running: seconds that each running one still needs.
        jobs: number of workers.
    """
    free = [*running, *[0.0] * (jobs - len(running))]
    heapify(free)
    last = 0.0
    for seconds in waiting:
        last = max(last, end := free[0] + seconds)
        heapreplace(free, end)
    return last


def next_run(
    waiting: Sequence[Planned], running: Sequence[Planned], complete: bool, left: float, jobs: int
) -> Planned | None:
    """The run to start now, if one of the workers is free; None if no run can end in time.

    A seed is begun only if all its runs can end in time, so that the time goes into seeds that all variants have. As
    long as none is complete, the runs of the first one start if each can end in time. What is not known fits.

    Args:
        waiting: the runs that have not started, in the order in which they should.
        running: those that have.
        complete: whether all variants have finished for one seed.
        left: seconds in which runs must end.
        jobs: number of workers.
    """
    if left <= 0 or len(running) >= jobs:
        return None
    busy = [run.seconds or 0.0 for run in running]
    first = min((run.seed for run in (*waiting, *running)), default=0)
    for run in waiting:
        if run.seed == first and not complete:
            needed, beside = [run], []
        else:
            needed = [one for one in waiting if one.seed == run.seed]
            beside = [one.seconds or 0.0 for one in running if one.seed == run.seed]
        end = last_end((one.seconds or 0.0 for one in needed), busy, jobs)
        if max([end, *beside]) <= left:
            return run
    return None
