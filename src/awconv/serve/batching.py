"""Runs requests that come at the same time through the network together."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Returned = TypeVar("Returned")


class FullError(Exception):
    """As many requests are admitted as may be, or the thread has ended."""


@dataclass
class _Job:
    """What waits for the thread: an item, or a function that runs on its own."""

    item: Any
    future: Future[Any]
    alone: bool = False


class Batcher(Generic[Item, Result]):
    """One thread that runs a function on batches of what others submit to it, in the order of arrival.

    It alone calls the network, whose hooks and buffers are not made for several threads. An item waits for others only
    while a request is known to be on its way (:meth:`admitted`), and no longer than ``max_wait``: a client that sends
    one request after the other waits for nobody.

    Args:
        run: from a batch of items to the result of each, in order.
        batch_size: the most items of a batch.
        max_wait: the longest time that an item waits for others, in seconds.
        limit: the most requests that are admitted at a time.
    """

    def __init__(
        self, run: Callable[[Sequence[Item]], Sequence[Result]], batch_size: int, max_wait: float, limit: int
    ) -> None:
        self._run, self.batch_size, self.max_wait, self.limit = run, batch_size, max_wait, limit
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._admitted = 0
        self._coming = 0  # of those, the ones that have submitted nothing yet
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def ready(self) -> bool:
        """Whether its thread runs and takes items."""
        return self._thread is not None and self._thread.is_alive() and not self._closed

    @property
    def busy(self) -> int:
        """The number of requests that are admitted now."""
        return self._admitted

    def start(self) -> None:
        """Starts the thread: not before a server has forked, if it does."""
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="awconv-serve", daemon=True)
        self._thread.start()

    def close(self, timeout: float) -> None:
        """Ends the thread when everything submitted has been run, or stops waiting for it after ``timeout`` seconds."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout)

    @contextlib.contextmanager
    def admitted(self) -> Iterator[Admission[Item, Result]]:
        """Counts a request from its arrival to its answer.

        Raises:
            FullError: as many as may are admitted already.
        """
        admission = Admission(self)
        with self._changed:
            if self._admitted >= self.limit:
                raise FullError
            self._admitted += 1
            self._coming += 1
        try:
            yield admission
        finally:
            admission.arrived()
            with self._changed:
                self._admitted -= 1

    def call(self, function: Callable[[], Returned]) -> Future[Returned]:
        """Runs a function in the thread, on its own.

        Raises:
            FullError: the thread has ended.
        """
        return self._enter(_Job(function, Future(), alone=True))

    def _enter(self, job: _Job) -> Future[Any]:
        with self._changed:
            if self._closed:
                raise FullError
            self._jobs.append(job)
            self._changed.notify_all()
        return job.future

    def _arrived(self) -> None:
        with self._changed:
            self._coming -= 1
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return
                batch = self._take()
            self._answer([job for job in batch if job.future.set_running_or_notify_cancel()])
            del batch  # else its images would stay in memory until the next

    def _take(self) -> list[_Job]:
        if self._jobs[0].alone:
            return [self._jobs.popleft()]
        self._changed.wait_for(
            lambda: len(self._jobs) >= self.batch_size or not self._coming or self._closed, self.max_wait
        )
        batch: list[_Job] = []
        while self._jobs and not self._jobs[0].alone and len(batch) < self.batch_size:
            batch.append(self._jobs.popleft())
        return batch

    def _answer(self, jobs: Sequence[_Job]) -> None:
        try:
            if not jobs:
                return
            if jobs[0].alone:
                results: Sequence[Any] = [jobs[0].item()]
            else:
                results = self._run([job.item for job in jobs])
        except Exception as error:  # whatever networks raise: the thread goes on
            for job in jobs:
                job.future.set_exception(error)
            return
        for job, result in zip(jobs, results, strict=True):
            job.future.set_result(result)


class Admission(Generic[Item, Result]):
    """A request that is counted; see :meth:`Batcher.admitted`."""

    def __init__(self, batcher: Batcher[Item, Result]) -> None:
        self._batcher = batcher
        self._has_arrived = False

    def submit(self, item: Item) -> Future[Result]:
        """Gives an item to the thread.

        Raises:
            FullError: the thread has ended.
        """
        try:
            return self._batcher._enter(_Job(item, Future()))
        finally:
            self.arrived()

    def arrived(self) -> None:
        """Nobody needs to wait for this request any more."""
        if not self._has_arrived:
            self._has_arrived = True
            self._batcher._arrived()
