"""Trains the runs of a comparison as jobs of SLURM, and waits for them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from awconv.compare.comparison import Run
from awconv.compare.course import Course
from awconv.compare.processes import Results
from awconv.compare.record import Record
from awconv.compare.slurm.job import steps_trained
from awconv.compare.slurm.options import SlurmOptions
from awconv.compare.slurm.queue import JobState, RefusedError, RunJobs, cancel, check_usable, states
from awconv.terminal import say

_LOOK = 1.0  # seconds between two looks at the files of jobs
_GRACE = 10.0  # seconds in which what a job has written appears here, through a shared file system
_TRIES = 3  # jobs of a run that may be lost through no fault of its own, without having got on
# States of jobs that have ended without a fault of the run.
_LOST = frozenset({"NODE_FAIL", "BOOT_FAIL", "PREEMPTED", "TIMEOUT", "DEADLINE", "REVOKED"})


@dataclass
class _Followed:
    """A job that is waited for.

    Attributes:
        run: that it trains.
        jobs: all of the run's.
        job: its id.
        steps: of the run that were done when it was submitted.
        tries: number of jobs since the run got on.
        gone: when it was first found to have ended.
        state: what SLURM says.
    """

    run: Run
    jobs: RunJobs
    job: str
    steps: int
    tries: int = 1
    gone: float | None = None
    state: JobState = field(default_factory=lambda: JobState("PENDING"))


class OnSlurm:
    """Trains each run in a job.

    A job that waits or runs already, of an earlier command, is waited for. One that was lost with its node, or ended by
    the clock or for another job, is submitted again.

    Args:
        options: what a job asks for.
        at_once: how many jobs may wait or run; all by default.
        folder: of the comparison.

    Raises:
        ModuleNotFoundError: the extra ``slurm`` is not installed.
        ValueError: SLURM's programmes are missing.
    """

    def __init__(self, options: SlurmOptions, at_once: int | None, folder: Path) -> None:
        check_usable(folder)
        self._options, self._at_once = options, at_once
        self._followed: dict[str, _Followed] = {}
        self._looked = self._refused = -math.inf
        self._accepted = False  # whether SLURM has taken a job of this comparison

    def train(self, course: Course, on_change: Callable[[], None]) -> Results:
        """As :meth:`Trainer.train`; ``on_change`` is called every second, too.

        Raises:
            ValueError: SLURM refuses the jobs, or one of an earlier command trains other settings.
        """
        self._take_up(course)
        while course.waiting or course.running:
            self._submit(course)
            self._look()
            for one in list(self._followed.values()):
                if one.state.runs and one.run in course.waiting:
                    course.begin(one.run)
                if one.run.name in course.running and (news := one.jobs.news()) is not None:
                    course.progress(one.run, *news)
                if (result := self._ended(course, one)) is not None:
                    del self._followed[one.run.name]
                    course.finish(one.run, result)
                    yield one.run, result
            on_change()
            if self._followed or course.waiting:
                time.sleep(_LOOK)

    def end(self) -> None:
        """As :meth:`Trainer.end`: cancels the jobs, or leaves them to themselves, as the options say."""
        jobs = [one.job for one in self._followed.values()]
        if not jobs:
            return
        self._followed.clear()
        named = f"job{'s' if len(jobs) > 1 else ''} {' '.join(jobs)}"
        if self._options.leave:
            say(f"awconv: {named} go on without this command: scancel {' '.join(jobs)} would end them")
        else:
            cancel(jobs)
            say(f"awconv: cancelled {named}")

    def _take_up(self, course: Course) -> None:
        """Follows the jobs of an earlier command that wait or run, or have just ended."""
        last = {run.name: jobs for run in course.waiting if (jobs := RunJobs(course.comparison, run)).last is not None}
        found = states([str(jobs.last) for jobs in last.values()])
        if found is None:
            raise ValueError("jobs of an earlier command may still run, and SLURM does not say; call this again later")
        for run in list(course.waiting):
            if run.name not in last:
                continue
            jobs, job = last[run.name], last[run.name].last or ""
            state = found.get(job)
            if state is None or not state.is_live:
                continue
            if not jobs.is_same(job):
                raise ValueError(
                    f"job {job} trains {run.name} with other settings, or was submitted by another version; end it "
                    f"with scancel {job}, or name another folder with --out"
                )
            self._followed[run.name] = _Followed(run, jobs, job, steps_trained(course.comparison, run), state=state)
        if self._followed:
            self._accepted = True
            say(f"awconv: {_named(self._followed)} of an earlier command")

    def _submit(self, course: Course) -> None:
        """Submits the jobs of runs that have none, as many as there may be."""
        submitted: dict[str, _Followed] = {}
        for run in course.waiting:
            if run.name in self._followed:
                continue
            if self._at_once is not None and len(self._followed) >= self._at_once:
                break
            jobs = RunJobs(course.comparison, run)
            if (job := self._try_to_submit(jobs)) is None:
                break
            one = _Followed(run, jobs, job, steps_trained(course.comparison, run))
            self._followed[run.name] = submitted[run.name] = one
        if submitted:
            say(f"awconv: {_named(submitted)}")

    def _try_to_submit(self, jobs: RunJobs) -> str | None:
        """Submits a job; None if SLURM takes none for now.

        Raises:
            ValueError: SLURM refuses the very first job.
        """
        if time.monotonic() - self._refused < self._options.poll:
            return None
        try:
            job = jobs.submit(self._options)
        except RefusedError as error:
            if not self._accepted:
                raise ValueError(str(error)) from error
            if self._refused == -math.inf:
                say(f"awconv: SLURM takes no further job for now ({error}); it is asked again")
            self._refused = time.monotonic()
            return None
        self._accepted = True
        return job

    def _look(self) -> None:
        """Asks SLURM how the jobs are, if that was not done lately."""
        now = time.monotonic()
        if now - self._looked < self._options.poll:
            return
        self._looked = now
        found = states([one.job for one in self._followed.values()])
        if found is None:
            return
        for one in self._followed.values():
            one.state = found.get(one.job, JobState(""))  # SLURM forgets a job some minutes after its end
            if one.state.is_live:
                one.gone = None
            elif one.gone is None:
                one.gone = now

    def _ended(self, course: Course, one: _Followed) -> Record | str | None:
        """The record of a job's run, or why it has none; None as long as the job has not ended, or has a successor."""
        ended, reason = one.jobs.result(one.job)
        if ended and reason is not None:
            return reason
        record = course.comparison.finished(one.run)
        if record is not None:
            return record
        if one.gone is None or time.monotonic() - one.gone < _GRACE:
            return None
        steps = steps_trained(course.comparison, one.run)
        if one.state.state in _LOST and (steps > one.steps or one.tries < _TRIES):
            if (job := self._try_to_submit(one.jobs)) is None:
                return None
            say(f"awconv: job {one.job} of {one.run.name} was lost ({one.state.state}); job {job} goes on")
            tries = 1 if steps > one.steps else one.tries + 1
            one.job, one.steps, one.tries, one.gone, one.state = job, steps, tries, None, JobState("PENDING")
            return None
        return ended_without(one.jobs, one.job, one.state)


def ended_without(jobs: RunJobs, job: str, state: JobState) -> str:
    """Says that a job has ended without a result, with the end of its log."""
    tail = jobs.tail(job)
    how = f" ({state.state.lower().replace('_', ' ')})" if state.state else ""
    log = f"{jobs.log(job)} ends with" if tail else "it left no log"
    return "\n".join([f"its job {job} has ended{how} without a result; {log}", *tail])


def _named(followed: dict[str, _Followed]) -> str:
    named = ", ".join(f"{one.job} ({name})" for name, one in followed.items())
    return f"job{'s' if len(followed) > 1 else ''} {named}"
