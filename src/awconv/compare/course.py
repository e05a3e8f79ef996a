"""How far the runs of a comparison are, what they still need, and which one is next."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import mean

from awconv.compare.comparison import Comparison, Run
from awconv.compare.record import Record
from awconv.compare.recorder import recorded
from awconv.compare.schedule import Planned, Took, expected_seconds, last_end, next_run
from awconv.compare.time_limit import TimeLimit
from awconv.training.checkpoints import find_last, read_checkpoint

_ENOUGH = 0.03  # of a run, from which the rest is estimated


class _Running:
    """A run that is trained now."""

    def __init__(self, now: float, seconds: float | None) -> None:
        self.begun, self.seconds = now, seconds
        self.first: tuple[float, float] | None = None  # the time of the first news, and the share that was done then
        self.share, self.epoch, self.epochs = 0.0, 0, 0

    def progress(self, now: float, epochs: float, of: int) -> None:
        self.share, self.epoch, self.epochs = min(1.0, epochs / max(1, of)), min(int(epochs) + 1, of), of
        self.first = self.first or (now, self.share)

    def left(self, now: float) -> float | None:
        """Seconds that it still needs: by its own pace, or else by what such a run takes."""
        if self.first is not None and self.share - self.first[1] >= _ENOUGH:
            return (now - self.first[0]) / (self.share - self.first[1]) * (1 - self.share)
        return None if self.seconds is None else max(0.0, self.seconds - (now - self.begun))

    def whole(self, now: float) -> float | None:
        """Seconds of a whole run at this pace, from its beginning on."""
        left = self.left(now)
        if left is None or self.first is None or self.share - self.first[1] < _ENOUGH:
            return None
        return self.first[0] - self.begun + left / max(1e-9, 1 - self.share) if self.share < 1 else now - self.begun


class Course:
    """How far the runs of a comparison are.

    Args:
        comparison: the comparison.
        records: of its finished runs.
        limit: the time for all.
        took: what other runs took, by variant, such as those by which a setting was chosen; runs that finish are added.
        later: runs that come after these.
        before: number of runs that came before these.
        clock: gives the time, in seconds.

    Attributes:
        records: of the finished runs.
        failures: the runs that failed, with the reasons.
        running: the runs that are trained now.
    """

    def __init__(
        self,
        comparison: Comparison,
        records: Sequence[Record],
        limit: TimeLimit,
        took: dict[str, list[Took]] | None = None,
        later: Sequence[Run] = (),
        before: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.comparison, self.limit, self.later, self.before = comparison, limit, later, before
        self.records, self.failures = list(records), list[tuple[Run, str]]()
        self.running: dict[str, _Running] = {}
        self._clock = clock
        self._took = {} if took is None else took
        done = {f"{record.variant}-seed{record.seed}" for record in records}
        self.waiting = [run for run in comparison.runs if run.name not in done]
        self._trained = {run.name: share_trained(comparison, run) for run in self.waiting if limit.is_set}
        self._families = {run.name: run.variant.family for run in comparison.runs}
        for record in records:
            self._add(record)

    def _add(self, record: Record) -> None:
        family = self._families.get(f"{record.variant}-seed{record.seed}", record.variant)
        self._took.setdefault(family, []).append(Took.of(record))

    @property
    def total(self) -> int:
        """Number of all runs, with those that came before and that come later."""
        return self.before + len(self.comparison.runs) + len(self.later)

    @property
    def done(self) -> int:
        """Number of the runs that have ended."""
        return self.before + len(self.records) + len(self.failures)

    @property
    def unfinished(self) -> list[Run]:
        """The runs that have neither finished nor failed, in order."""
        done = {f"{one.variant}-seed{one.seed}" for one in self.records} | {run.name for run, _ in self.failures}
        return [run for run in self.comparison.runs if run.name not in done]

    def next(self) -> Run | None:
        """The run to start now; None if none is left, or none can end in time."""
        if not self.limit.is_set:
            return self.waiting[0] if self.waiting and len(self.running) < self.comparison.jobs else None
        now = self._clock()
        finished = {(record.variant, record.seed) for record in self.records}
        names = [variant.name for variant in self.comparison.variants]
        complete = any(all((name, seed) in finished for name in names) for seed in range(self.comparison.seeds))
        planned, jobs = self._planned(now), self.comparison.jobs
        found = next_run(planned, self._active(now), complete, self.limit.left, jobs)
        return None if found is None else next(run for run in self.waiting if run.name == found.name)

    def begin(self, run: Run) -> None:
        """A run starts."""
        self.running[run.name] = _Running(self._clock(), self._seconds(run, self._clock()))
        self.waiting.remove(run)

    def progress(self, run: Run, epochs: float, of: int) -> None:
        """A run has trained some of its epochs."""
        self.running[run.name].progress(self._clock(), epochs, of)

    def finish(self, run: Run, result: Record | str) -> None:
        """A run has left a record, or failed for a reason."""
        self.running.pop(run.name, None)
        if run in self.waiting:
            self.waiting.remove(run)
        if isinstance(result, Record):
            self.records.append(result)
            self._add(result)
        else:
            self.failures.append((run, result))

    @property
    def share(self) -> float:
        """What is done of all runs, from 0 to 1."""
        return (self.done + sum(run.share for run in self.running.values())) / max(1, self.total)

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the last run ends, within the limit; None as long as nothing is known."""
        now = self._clock()
        waiting = [self._seconds(run, now) for run in (*self.waiting, *self.later)]
        active = [run.left(now) for run in self.running.values()]
        known = [one for one in (*waiting, *(run.whole(now) for run in self.running.values())) if one is not None]
        if not known and (waiting or None in active):
            return None
        guess = mean(known) if known else 0.0
        busy = [guess if one is None else one for one in active]
        end = last_end((guess if one is None else one for one in waiting), busy, max(len(busy), self.comparison.jobs))
        return min(max([end, *busy]), max(0.0, self.limit.total_left))

    def _planned(self, now: float) -> list[Planned]:
        return [Planned(run.name, run.seed, self._seconds(run, now)) for run in self.waiting]

    def _active(self, now: float) -> list[Planned]:
        seeds = {run.name: run.seed for run in self.comparison.runs}
        return [Planned(name, seeds[name], run.left(now)) for name, run in self.running.items()]

    def _seconds(self, run: Run, now: float) -> float | None:
        """Seconds that a waiting run needs; an interrupted one is trained in part."""
        length = run.variant.recipe.epochs
        epochs = None if length is None else length * (1 - self._trained.get(run.name, 0.0))
        family = run.variant.family
        if family not in self._took:
            beside = [one.whole(now) for name, one in self.running.items() if self._families[name] == family]
            paces = [pace for pace in beside if pace is not None]
            if paces:
                return max(paces)
        return expected_seconds(family, epochs, self._took)


def share_trained(comparison: Comparison, run: Run) -> float:
    """The share of an interrupted run's epochs that its checkpoints hold."""
    epochs, last = run.variant.recipe.epochs, find_last(comparison.checkpoints(run))
    return 0.0 if last is None or epochs is None else min(1.0, len(recorded(read_checkpoint(last))) / epochs)
