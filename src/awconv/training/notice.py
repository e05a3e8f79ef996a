"""SLURM's notice that a job's time is nearly over, after which the job is queued again."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable

from lightning.pytorch.utilities.exceptions import SIGTERMException

# sbatch --signal=USR1@90 is Lightning's custom, USR2 submitit's.
_SIGNALS = frozenset({signal.SIGUSR1, signal.SIGUSR2})
_SECONDS = 5.0  # in which the first process of a job acts for all


class NoticeError(SIGTERMException):
    """A notice came, and a checkpoint is written."""


def in_job() -> bool:
    """Whether this process belongs to a job of SLURM."""
    return "SLURM_JOB_ID" in os.environ


def on_notice(act: Callable[[], None]) -> None:
    """Calls a function, in another thread, when a notice comes. Does nothing outside of a job, and in a thread.

    SLURM sends a signal to all processes of a job, of which those that load data would die. They inherit that it is
    blocked.
    """
    if not in_job() or threading.current_thread() is not threading.main_thread():
        return
    for number in _SIGNALS:
        signal.signal(number, lambda *_: act())  # for threads of libraries, in which it is not blocked
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)

    def wait() -> None:
        signal.sigwait(_SIGNALS)
        act()

    threading.Thread(target=wait, daemon=True).start()


def queue_again() -> None:
    """Asks SLURM to run this job once more, which ends it.

    Raises:
        SystemExit: always.
    """
    if os.environ.get("SLURM_PROCID", "0") != "0":
        time.sleep(_SECONDS)  # SLURM ends this process, too, unless the first one waits for others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which SLURM ends it
    subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], timeout=60, check=False)
    raise SystemExit(0)
