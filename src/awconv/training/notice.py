"""SLURM's notice that a job's time is nearly over, after which the job is queued again."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from functools import cache

from lightning.pytorch.utilities.exceptions import SIGTERMException

from awconv.terminal import say

# sbatch --signal=USR1@90 is Lightning's custom, USR2 submitit's.
NOTICES = frozenset({signal.SIGUSR1, signal.SIGUSR2}) if hasattr(signal, "SIGUSR1") else frozenset()
_SECONDS = 5.0  # in which the first process of a job acts for all


class NoticeError(SIGTERMException):
    """A notice came, and a checkpoint is written."""


def in_job() -> bool:
    """Whether this process belongs to a job of SLURM."""
    return "SLURM_JOB_ID" in os.environ


class _Listener:
    """Waits for a notice, in a thread.

    SLURM sends a signal to all processes of a job, of which those that load data would die. They inherit that it is
    blocked.
    """

    def __init__(self) -> None:
        self._came, self._act = False, _nothing
        for number in NOTICES:
            signal.signal(number, lambda *_: self._notice())  # for threads of libraries, in which it is not blocked
        signal.pthread_sigmask(signal.SIG_BLOCK, NOTICES)
        threading.Thread(target=self._wait, daemon=True).start()

    def call(self, act: Callable[[], None]) -> None:
        self._act = act
        if self._came:
            act()

    def _wait(self) -> None:
        while True:
            signal.sigwait(NOTICES)
            self._notice()

    def _notice(self) -> None:
        self._came = True
        self._act()


@cache
def _listener() -> _Listener:
    return _Listener()


def _nothing() -> None:
    pass


def on_notice(act: Callable[[], None]) -> None:
    """Calls a function, in another thread, when a notice comes, or at once if one came before.

    It takes the place of an earlier one. Does nothing outside of a job, and in threads, which may handle no signals.
    """
    if in_job() and threading.current_thread() is threading.main_thread():
        _listener().call(act)


def queue_again() -> str | None:
    """Asks SLURM to run this job once more, which ends it.

    Returns:
        Why SLURM does not, in its words.

    Raises:
        SystemExit: it does; and in all processes of the job but the first.
    """
    first, job = os.environ.get("SLURM_PROCID", "0") == "0", os.environ["SLURM_JOB_ID"]
    if not first:
        time.sleep(_SECONDS)  # SLURM ends this process, too, unless the first one waits for others
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # by which SLURM ends it, while there is something to say
    try:
        subprocess.run(["scontrol", "requeue", job], timeout=60, check=True, capture_output=True, text=True)
    except (OSError, subprocess.SubprocessError) as error:
        signal.signal(signal.SIGTERM, before)
        if first:
            return str(getattr(error, "stderr", None) or error).strip()
    if first:
        say(f"awconv: the time of job {job} is nearly over; it is queued again")
    raise SystemExit(0)
