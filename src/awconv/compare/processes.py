"""Trains several runs, in turn or side by side."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from awconv.compare.comparison import Comparison, Run
from awconv.compare.record import Record
from awconv.compare.train import OpenedData, train
from awconv.training.quiet import quiet_lightning

Results = Generator[tuple[Run, Record | str], None, None]
OnProgress = Callable[[Run, float, int], None]
_PATIENCE = 60  # seconds in which a run that is stopped may write its checkpoint


def train_in_turn(comparison: Comparison, runs: Sequence[Run], on_progress: OnProgress) -> Results:
    """Trains runs one after the other.

    Args:
        comparison: that they belong to.
        runs: the missing ones.
        on_progress: called with a run, the epochs done so far and the number of all epochs.

    Yields:
        Each run with its record, or with a message why it failed.
    """
    opened, threads = OpenedData(), torch.get_num_threads()
    try:
        for run in runs:
            yield run, _train(comparison, run, opened, threads, partial(on_progress, run))
    finally:
        torch.set_num_threads(threads)  # a run goes on with those of its checkpoint


def _train(
    comparison: Comparison, run: Run, opened: OpenedData, threads: int, on_progress: Callable[[float, int], None]
) -> Record | str:
    """Trains a run with a number of threads; a resumed run has its own."""
    torch.set_num_threads(threads)
    try:
        return train(comparison, run, opened, on_progress)
    except Exception as error:  # a user's, or of any library below; the other runs go on
        return f"{type(error).__name__}: {error}"


def train_side_by_side(comparison: Comparison, runs: Sequence[Run], on_progress: OnProgress) -> Results:
    """Trains runs in processes, each with its share of the cores. The processes end with this one.

    Args:
        comparison: that they belong to; ``jobs`` is the number of processes.
        runs: the missing ones.
        on_progress: as for :func:`train_in_turn`.

    Yields:
        Each run with its record, or with a message why it failed, as they finish.
    """
    if not runs:
        return
    context = multiprocessing.get_context("spawn")  # a fork would share the state of threads and of CUDA
    # Of all runs, and not only of those that are missing: the number of threads must not depend on an interruption.
    threads = max(1, (os.cpu_count() or 1) // comparison.jobs)
    jobs = min(comparison.jobs, len(runs))
    waiting = list(reversed(runs))
    working: dict[Connection, tuple[BaseProcess, Run]] = {}

    def begin(connection: Connection, process: BaseProcess) -> None:
        working[connection] = process, waiting.pop()
        connection.send(working[connection][1].name)

    def start() -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, comparison, threads))
        process.start()
        theirs.close()
        begin(ours, process)

    before = signal.signal(signal.SIGTERM, _terminate) if _is_main_thread() else None
    try:
        for _ in range(jobs):
            start()
        while working:
            for connection in wait(list(working)):
                assert isinstance(connection, Connection)
                process, run = working[connection]
                try:
                    message = connection.recv()
                except (EOFError, ConnectionResetError):
                    del working[connection]
                    process.join()
                    yield run, f"its process ended with status {process.exitcode}"
                    if waiting:
                        start()
                    continue
                if isinstance(message, tuple):
                    on_progress(run, *message)
                    continue
                yield run, message
                if waiting:
                    begin(connection, process)
                else:
                    del working[connection]
                    connection.send(None)
                    process.join()
    finally:
        for process, _ in working.values():
            process.terminate()  # at which a run writes a checkpoint
        for process, _ in working.values():
            process.join(_PATIENCE)
            process.kill()
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()  # which alone may handle signals


def _terminate(*_: Any) -> None:
    raise SIGTERMException


@quiet_lightning()
def _work(connection: Connection, comparison: Comparison, threads: int) -> None:
    """Trains the runs whose names the main process sends, until it sends None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the first one decides
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    opened, by_name = OpenedData(), {run.name: run for run in comparison.runs}
    while (name := connection.recv()) is not None:
        run = by_name[name]
        connection.send(_train(comparison, run, opened, threads, lambda epochs, of: connection.send((epochs, of))))


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
