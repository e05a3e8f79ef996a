"""Trains several runs, in turn or side by side."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from awconv.compare.comparison import Comparison, Run
from awconv.compare.cores import usable_cores
from awconv.compare.course import Course
from awconv.compare.record import Record
from awconv.compare.shared_data import DataError, OpenedData, SharedData
from awconv.compare.time_limit import TimeLimit, TimeOverError
from awconv.compare.train import train
from awconv.training.quiet import quiet_lightning

Results = Generator[tuple[Run, Record | str], None, None]
_PATIENCE = 60.0  # seconds in which a run that is stopped may write its checkpoint
_NEWS = 0.25  # seconds between two messages of a run
_TO_IMPORT = 5.0  # seconds that a new process takes before it can train
_LOOK = 1.0  # seconds between two looks at the clock


class Trainer(Protocol):
    """Trains runs."""

    def train(self, course: Course, on_change: Callable[[], None]) -> Results:
        """Trains the runs that a course gives, until it gives none or the time is over.

        Args:
            course: of the runs.
            on_change: called when a run gets on.

        Yields:
            Each run with its record, or with a message why it failed, as they finish.
        """
        ...

    def end(self) -> None:
        """Ends what still runs, or leaves it to itself. Runs that are ended write checkpoints."""
        ...


class InTurn:
    """Trains runs one after the other, in this process."""

    def __init__(self) -> None:
        self._opened = OpenedData()

    def train(self, course: Course, on_change: Callable[[], None]) -> Results:
        """As :meth:`Trainer.train`."""
        threads = torch.get_num_threads()
        try:
            while (run := course.next()) is not None:
                course.begin(run)
                result = self._train(course, run, threads, on_change)
                course.finish(run, result)
                yield run, result
        except TimeOverError:
            course.running.clear()
        finally:
            torch.set_num_threads(threads)  # a run goes on with those of its checkpoint

    def _train(self, course: Course, run: Run, threads: int, on_change: Callable[[], None]) -> Record | str:
        def on_progress(epochs: float, of: int) -> None:
            course.progress(run, epochs, of)
            on_change()

        limit = course.limit if course.limit.is_set else None
        return try_to_train(Work(course.comparison, run.name, threads), self._opened, on_progress, limit)

    def end(self) -> None:
        """As :meth:`Trainer.end`; nothing runs any more."""


class Work(NamedTuple):
    """What a process is to do.

    Attributes:
        comparison: that the run belongs to.
        name: of the run.
        threads: number of threads; a resumed run has its own.
        decoded: the folder of its decoded data, or None.
    """

    comparison: Comparison
    name: str
    threads: int
    decoded: Path | None = None

    @property
    def run(self) -> Run:
        """The run."""
        return next(run for run in self.comparison.runs if run.name == self.name)


def try_to_train(
    work: Work, opened: OpenedData, on_progress: Callable[[float, int], None], limit: TimeLimit | None = None
) -> Record | str:
    """Trains a run.

    Args:
        work: the run, and what it may use.
        opened: the data sets of other runs, to share.
        on_progress: called after each batch with the epochs done so far and the number of all epochs.
        limit: ends the run when its time is over.

    Returns:
        The record, or why the run failed.

    Raises:
        TimeOverError: the time is over, and a checkpoint is written.
    """
    torch.set_num_threads(work.threads)
    try:
        return train(work.comparison, work.run, opened, on_progress, limit, work.decoded)
    except TimeOverError:
        raise
    except Exception as error:  # a user's, or of any library below; the other runs go on
        return f"{type(error).__name__}: {error}"


class SideBySide:
    """Trains runs in processes, each with its share of the cores. They end with this one.

    Args:
        shared: decodes their data.
    """

    def __init__(self, shared: SharedData) -> None:
        self._shared = shared
        self._context = multiprocessing.get_context("spawn")  # a fork would share the state of threads and of CUDA
        self._idle: list[tuple[Connection, BaseProcess]] = []
        self._busy: dict[Connection, tuple[BaseProcess, Run]] = {}

    def train(self, course: Course, on_change: Callable[[], None]) -> Results:
        """As :meth:`Trainer.train`; ``on_change`` is called every second, too."""
        jobs = course.comparison.jobs
        # By all runs, not by the missing ones: the number of threads must not depend on an interruption.
        threads = max(1, usable_cores() // jobs)
        for _ in range(len(self._idle), min(jobs, len(course.waiting)) if course.limit.left > _TO_IMPORT else 0):
            self._start()  # they import while this process decodes
        while True:
            while (run := course.next()) is not None:
                course.begin(run)
                try:
                    decoded = self._shared.of(run.variant.recipe)
                except DataError as error:
                    course.finish(run, str(error))
                    yield run, str(error)
                else:
                    self._begin(run, Work(course.comparison, run.name, threads, decoded))
            if not self._busy:
                return
            left = course.limit.left
            if left <= 0:
                self.end(course.limit.total_left)
                course.running.clear()
                return
            for connection in wait(list(self._busy), timeout=min(_LOOK, left)):
                assert isinstance(connection, Connection)
                if (ended := self._receive(connection, course)) is not None:
                    course.finish(*ended)
                    yield ended
            on_change()

    def _start(self) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs,))
        resource_tracker.ensure_running()  # to start it would unblock signals
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # for the process, while it imports, too
        try:
            process.start()
            theirs.close()
            self._idle.append((ours, process))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _begin(self, run: Run, work: Work) -> None:
        if not self._idle:
            self._start()
        connection, process = self._idle.pop(0)
        self._busy[connection] = process, run
        with suppress(BrokenPipeError):  # it has died, which is found when it is listened to
            connection.send(work)

    def _receive(self, connection: Connection, course: Course) -> tuple[Run, Record | str] | None:
        """Takes a message of a process: the end of its run, or None for news of it."""
        process, run = self._busy[connection]
        try:
            message = connection.recv()
        except (EOFError, ConnectionResetError):
            del self._busy[connection]
            connection.close()
            process.join()
            return run, f"its process ended with status {process.exitcode}"
        if isinstance(message, tuple):
            course.progress(run, *message)
            return None
        del self._busy[connection]
        self._idle.append((connection, process))
        return run, message

    def end(self, patience: float = _PATIENCE) -> None:
        """As :meth:`Trainer.end`: ends the processes.

        Args:
            patience: seconds that they may take for it.
        """
        until = time.monotonic() + patience
        for _, process in self._idle:
            process.kill()  # there is nothing to keep
        processes = [*self._idle, *((connection, process) for connection, (process, _) in self._busy.items())]
        while any(process.is_alive() for _, process in processes) and time.monotonic() < until:
            for _, process in processes:
                process.terminate()  # again and again: Lightning loses a signal that comes between two of its loops
            wait([process.sentinel for _, process in processes if process.is_alive()], timeout=_LOOK)
        for connection, process in processes:
            process.kill()
            process.join()
            connection.close()
        self._busy.clear()
        self._idle.clear()


class _News:
    """Sends news of a run, not too often: each interrupts the main process."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._sent = connection, 0.0

    def __call__(self, epochs: float, of: int) -> None:
        now = time.monotonic()
        if now - self._sent >= _NEWS:
            self._connection.send((epochs, of))
            self._sent = now


@quiet_lightning()
def _work(connection: Connection) -> None:
    """Trains the runs that the main process sends, until it ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the first one decides
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    signal.signal(signal.SIGTERM, terminated)  # to which Lightning adds its own handler, and ours of a training
    opened = OpenedData()
    try:
        while True:
            work: Work = connection.recv()
            connection.send(try_to_train(work, opened, _News(connection)))
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the main process is gone
        return
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # another one may come


def terminated(*_: Any) -> None:
    """Handles SIGTERM where no training does.

    Raises:
        SIGTERMException: always.
    """
    raise SIGTERMException


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
