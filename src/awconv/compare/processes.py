"""Training several runs, in turn or side by side."""

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

from awconv.compare.runs import OpenedData, Plan, Run, quiet_lightning

Results = Generator[tuple[Plan, Run | str], None, None]
OnProgress = Callable[[Plan, float, int], None]
_PATIENCE = 60  # seconds in which a run that is stopped may write its checkpoint


def train_in_turn(plans: Sequence[Plan], on_progress: OnProgress) -> Results:
    """Trains runs one after the other.

    Args:
        plans: the runs.
        on_progress: called with a run, the epochs done so far and the number of all.

    Yields:
        Each run, or the reason why it failed.
    """
    opened, threads = OpenedData(), torch.get_num_threads()
    try:
        for plan in plans:
            yield plan, _train(plan, opened, threads, partial(on_progress, plan))
    finally:
        torch.set_num_threads(threads)  # a run goes on with those of its checkpoint


def _train(plan: Plan, opened: OpenedData, threads: int, on_progress: Callable[[float, int], None]) -> Run | str:
    """Trains a run with some threads, or those that it was begun with."""
    torch.set_num_threads(threads)
    try:
        return plan.train(opened, on_progress)
    except Exception as error:  # a user's, or of any library below; the other runs go on
        return f"{type(error).__name__}: {error}"


def train_side_by_side(plans: Sequence[Plan], on_progress: OnProgress) -> Results:
    """Trains runs in processes of their own, each with its share of the cores. They end with this one.

    Args:
        plans: the runs; their ``jobs`` says how many go at once.
        on_progress: as for :func:`train_in_turn`.

    Yields:
        Each run, or the reason why it failed, as they finish.
    """
    if not plans:
        return
    context = multiprocessing.get_context("spawn")  # a fork would share the state of threads and of CUDA
    # Of all runs, and not only of those that are missing: the number of threads must not depend on an interruption.
    threads = max(1, (os.cpu_count() or 1) // plans[0].jobs)
    jobs = min(plans[0].jobs, len(plans))
    waiting = list(reversed(plans))
    working: dict[Connection, tuple[BaseProcess, Plan]] = {}

    def begin(connection: Connection, process: BaseProcess) -> None:
        working[connection] = process, waiting.pop()
        connection.send(working[connection][1])

    def start() -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, threads))
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
                process, plan = working[connection]
                try:
                    message = connection.recv()
                except (EOFError, ConnectionResetError):
                    del working[connection]
                    process.join()
                    yield plan, f"its process ended with status {process.exitcode}"
                    if waiting:
                        start()
                    continue
                if isinstance(message, tuple):
                    on_progress(plan, *message)
                    continue
                yield plan, message
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
def _work(connection: Connection, threads: int) -> None:
    """Trains what the other process sends, until it sends nothing more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the first one decides
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    opened = OpenedData()
    while (plan := connection.recv()) is not None:
        connection.send(_train(plan, opened, threads, lambda epochs, of: connection.send((epochs, of))))


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
