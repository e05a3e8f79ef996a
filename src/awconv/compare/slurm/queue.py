"""SLURM's queue: what is submitted, what became of it, and where its log is."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
from collections import deque
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from awconv.compare.comparison import Comparison, Run
from awconv.compare.slurm.job import NEWS, Job
from awconv.compare.slurm.options import SlurmOptions
from awconv.extras import require
from awconv.terminal import say

_FOLDER = "slurm"  # in that of a comparison: a folder for the jobs of each run
_FIELDS = "%i|%T|%r|%N|%M"
_SECONDS = 60.0  # in which SLURM has to answer
# A job that waits, runs, or is about to do so.
_LIVE = frozenset(
    ["PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"]
    + ["REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD"]
)


class RefusedError(ValueError):
    """SLURM has refused a job."""


@dataclass(frozen=True)
class JobState:
    """What SLURM says of a job.

    Attributes:
        state: such as ``"RUNNING"``.
        reason: why it waits, such as ``"Resources"``.
        nodes: where it runs.
        elapsed: for how long, as SLURM writes it.
    """

    state: str
    reason: str = ""
    nodes: str = ""
    elapsed: str = ""

    @property
    def is_live(self) -> bool:
        """Whether it waits or runs."""
        return self.state in _LIVE

    @property
    def runs(self) -> bool:
        """Whether it runs."""
        return self.state in ("RUNNING", "COMPLETING")


class RunJobs:
    """The jobs of a run, in a folder that submitit writes and that the nodes see, too.

    Args:
        comparison: that the run belongs to.
        run: the run.
    """

    def __init__(self, comparison: Comparison, run: Run) -> None:
        self._comparison, self._run = comparison, run
        self._folder = (comparison.folder / _FOLDER / run.name).absolute()

    @property
    def last(self) -> str | None:
        """The id of the last job; None if there was none."""
        ids = [path.name.partition("_")[0] for path in self._folder.glob("*_submitted.pkl")]
        return max(ids, key=int, default=None)

    def submit(self, options: SlurmOptions) -> str:
        """Submits a job.

        Args:
            options: what it asks for.

        Returns:
            Its id.

        Raises:
            RefusedError: SLURM takes no such job, or none now.
        """
        submitit = require("submitit", extra="slurm")
        executor = submitit.SlurmExecutor(folder=self._folder)
        executor.update_parameters(job_name=f"awconv-{self._run.name}", **options.parameters(self._run.variant.recipe))
        (self._folder / NEWS).unlink(missing_ok=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        before = set(self._folder.iterdir())
        try:
            with redirect_stderr(StringIO()):  # where submitit repeats what the error says
                job = executor.submit(Job(self._comparison, self._run.name, options.cpus, self._folder))
        except submitit.core.utils.FailedJobError as error:
            for left in set(self._folder.iterdir()) - before:
                left.unlink()
            raise RefusedError(f"SLURM refuses the job of {self._run.name}: {_of_sbatch(str(error))}") from error
        return str(job.job_id)

    def is_same(self, job: str) -> bool:
        """Whether a job trains what this run is now."""
        try:
            with open(self._folder / f"{job}_submitted.pkl", "rb") as file:
                there: Job = pickle.load(file).function
            (run,) = (run for run in there.comparison.runs if run.name == self._run.name)
        except Exception:  # another version's classes differ in ways of their own
            return False
        ours, theirs = (one.variant.recipe.settings.content for one in (self._run, run))
        return ours == theirs and there.comparison.split == self._comparison.split

    def result(self, job: str) -> tuple[bool, str | None]:
        """Whether a job has ended by itself, and why its run failed; None if it did not."""
        try:
            with open(self._folder / f"{job}_0_result.pkl", "rb") as file:
                outcome, result = pickle.load(file)
        except FileNotFoundError:
            return False, None
        if outcome == "success":
            return True, result
        return True, str(result).strip().rpartition("\n")[2]  # a traceback's last line

    def news(self) -> tuple[float, int] | None:
        """The epochs done so far, and the number of all; None if nothing is known."""
        try:
            epochs, of = json.loads((self._folder / NEWS).read_text())
        except (OSError, ValueError):
            return None
        return epochs, of

    def log(self, job: str) -> Path:
        """The file of a job's output."""
        return self._folder / f"{job}_0_log.out"

    def tail(self, job: str, lines: int = 5) -> list[str]:
        """The last lines of a job's output that are not empty."""
        try:
            with open(self.log(job), errors="replace") as file:
                return list(deque((line.rstrip() for line in file if line.strip()), lines))
        except OSError:
            return []


def check_usable(folder: Path) -> None:
    """Raises a ModuleNotFoundError without submitit, and a ValueError without SLURM's programmes, or for a folder's
    name that SLURM would replace parts of."""
    require("submitit", extra="slurm")
    missing = [name for name in ("sbatch", "srun", "squeue", "scontrol", "scancel") if shutil.which(name) is None]
    if missing:
        raise ValueError(
            f"--launcher=slurm needs SLURM's programmes, and {', '.join(missing)} cannot be found; call it where jobs "
            "are submitted, or leave it out to train here"
        )
    if "%" in str(folder.absolute()):
        raise ValueError(f"SLURM replaces what follows a % in file names, got {folder.absolute()}; give another --out")


def states(jobs: Sequence[str]) -> dict[str, JobState] | None:
    """What SLURM says of jobs that it knows, by id; None if it does not answer, which is said.

    Args:
        jobs: their ids.
    """
    if not jobs:
        return {}
    command = ["squeue", "--noheader", "--states=all", f"--jobs={','.join(jobs)}", f"--format={_FIELDS}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        said = str(getattr(error, "stderr", None) or error).strip()
        if "Invalid job id" in said:  # one that it has forgotten
            each = [] if len(jobs) == 1 else [states([job]) for job in jobs]
            return None if None in each else {job: state for one in each if one for job, state in one.items()}
        say(f"awconv: squeue does not answer: {said}")
        return None
    found = (line.strip().split("|") for line in answer.splitlines() if line.count("|") == _FIELDS.count("|"))
    return {job: JobState(*rest) for job, *rest in found}


def cancel(jobs: list[str]) -> None:
    """Ends jobs; those that run write checkpoints first."""
    subprocess.run(["scancel", *jobs], timeout=_SECONDS, check=False)


def _of_sbatch(text: str) -> str:
    """The lines of sbatch's own in what submitit says of it."""
    lines = [line.strip() for line in text.splitlines()]
    return "; ".join(line for line in lines if line.startswith("sbatch:")) or text.strip()
