"""What a job of SLURM does: it trains a run, and is queued again where its time does not suffice."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from awconv.compare.comparison import Comparison, Run
from awconv.compare.cores import usable_cores
from awconv.compare.processes import Work, terminated, try_to_train
from awconv.compare.record import Record
from awconv.compare.recorder import Progress
from awconv.compare.shared_data import OpenedData
from awconv.training.checkpoints import find_last, read_checkpoint
from awconv.training.notice import NoticeError, queue_again
from awconv.training.quiet import quiet_lightning

NEWS = "news.json"  # in the folder of a run's jobs: how far it is
_SECONDS = 2.0  # between two pieces of news, which a shared file system has to carry
_TOO_SHORT = "a job's time does not suffice for a step and a checkpoint; give a longer --slurm.time"


@dataclass(frozen=True)
class Job:
    """Trains a run; submitit calls it on a node.

    SLURM sends a job a notice some time before its end. The run then writes a checkpoint after its next step, and the
    job is queued again. On SIGTERM, of ``scancel`` or where a job with precedence takes its place, it writes a
    checkpoint and ends.

    Attributes:
        comparison: that the run belongs to.
        name: of the run.
        threads: number of threads; None for one on each of the cores that SLURM gives. A resumed run has its own.
        folder: of the run's jobs.
    """

    comparison: Comparison
    name: str
    threads: int | None
    folder: Path

    @quiet_lightning()
    def __call__(self) -> str | None:
        """Trains.

        Returns:
            None if there is a record, or else why the run failed.
        """
        signal.signal(signal.SIGTERM, terminated)  # to which Lightning adds its own handler, and ours of a training
        work = Work(self.comparison, self.name, self.threads or _cores())
        _ = work.run.variant.recipe.own_code  # imported: checkpoints of one's own networks are read below
        before = steps_trained(self.comparison, work.run)
        try:
            result = try_to_train(work, OpenedData(), self._news())
        except NoticeError:
            if steps_trained(self.comparison, work.run) > before:
                return f"its job's time was over, and SLURM did not queue it again: {queue_again()}"
            return _TOO_SHORT
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # there is nothing more to write
        return None if isinstance(result, Record) else result

    def checkpoint(self) -> Any:
        """What submitit queues again if the job is told to end before it trains."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _news(self) -> Progress:
        first, written = os.environ.get("SLURM_PROCID", "0") == "0", 0.0

        def write(epochs: float, of: int) -> None:
            nonlocal written
            now = time.monotonic()
            if first and now - written >= _SECONDS:
                partial = self.folder / f".{NEWS}"
                partial.write_text(json.dumps([epochs, of]))
                os.replace(partial, self.folder / NEWS)
                written = now

        return write


def steps_trained(comparison: Comparison, run: Run) -> int:
    """Number of the optimizer's steps that a run's checkpoints hold."""
    last = find_last(comparison.checkpoints(run))
    return 0 if last is None else int(read_checkpoint(last)["global_step"])


def _cores() -> int:
    """The number of cores that this process may use: its share of the job's, where SLURM binds no process to them."""
    cores, processes = (os.environ.get(f"SLURM_{name}", "") for name in ("CPUS_ON_NODE", "NTASKS_PER_NODE"))
    share = int(cores) // int(processes or 1) if cores.isdigit() else usable_cores()
    return max(1, min(usable_cores(), share))
