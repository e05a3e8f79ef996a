"""The runs of a command: first those by which settings are chosen, then those that are compared; and the report."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass

from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console

from awconv import terminal
from awconv.compare.comparison import Comparison, Run
from awconv.compare.course import Course
from awconv.compare.plan import Plan
from awconv.compare.processes import InTurn, SideBySide, Trainer, terminated
from awconv.compare.progress import ProgressLine
from awconv.compare.record import Record
from awconv.compare.report import table, write_report
from awconv.compare.schedule import Took
from awconv.compare.shared_data import SharedData, key_of, shared_data
from awconv.compare.slurm import OnSlurm
from awconv.compare.summaries import complete_seeds
from awconv.compare.time_limit import STATUS, TimeLimit
from awconv.compare.tuned import Tuned
from awconv.compare.variants import Variant
from awconv.training import TrainingCLI
from awconv.training.lock import locked
from awconv.training.notice import NOTICES, in_job
from awconv.training.watch import DivergedError

_NAMED = 6  # runs that a message names


@dataclass
class _Ended:
    """How the runs of a comparison ended.

    Attributes:
        records: of the finished runs.
        failures: the failed runs, with the reasons.
        missing: the runs that have neither finished nor failed.
        status: the exit status of an interruption, or of the time limit; 0 if all were tried.
    """

    records: list[Record]
    failures: list[tuple[Run, str]]
    missing: list[Run]
    status: int


def run_plan(plan: Plan, title: Callable[[Comparison], str], command: str) -> int:
    """Trains the missing runs, prints the table and writes the report.

    Args:
        plan: what to compare.
        title: the report's, given the comparison.
        command: what the user typed.

    Returns:
        The exit status: 0, 1 if a run failed, 124 if the time limit left runs out, 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        ValueError: the plan cannot be run, or a record has other settings.
    """
    comparison, trials = plan.comparison(), plan.trials()  # which refuse wrong settings before anything is trained
    named = title(comparison)
    first = rank_zero_only.rank == 0  # type: ignore[attr-defined]  # of processes that train together
    console = terminal.console() if first else Console(quiet=True)
    _check(plan.limit, comparison, trials)
    with (
        locked(plan.folder) if first else nullcontext(),
        _interruptible(),
        shared_data(plan.folder) if first else nullcontext() as shared,
    ):
        jobs = max(comparison.jobs, 1 if trials is None else trials.jobs)
        trainer = _trainer(plan, jobs, shared)
        try:
            return _Session(plan, console, trainer, named, command, report=first).run(comparison, trials)
        finally:
            trainer.end()


def _trainer(plan: Plan, jobs: int, shared: SharedData | None) -> Trainer:
    if plan.slurm is not None:
        return OnSlurm(plan.slurm, plan.jobs, plan.folder)
    return InTurn() if jobs == 1 or shared is None else SideBySide(shared)


def _check(limit: TimeLimit, comparison: Comparison, trials: Comparison | None) -> None:
    """Raises a ValueError if there are no held-out images to choose by, or processes that cannot agree on the time."""
    built = _built(comparison.variants[0]) if limit.is_set else None
    if built is not None and built.trainer.world_size > 1:
        raise ValueError(
            f"time_limit is for runs on one device each, and these take {built.trainer.world_size}; give "
            "--trainer.devices=1 after --, and --jobs for several runs at once"
        )
    by_data = {key_of(variant.recipe): variant for variant in ([] if trials is None else trials.variants)}
    for variant in by_data.values():
        if _holds_out(variant) is False:
            raise ValueError(
                "tune chooses on held-out images, and the data have no validation split; hold some out with "
                "data.val_fraction, such as --data.val_fraction=0.1 after --"
            )


def _built(variant: Variant) -> TrainingCLI | None:
    """A training of the variant; None if it cannot be built, which each run says for itself."""
    try:
        return variant.recipe.build()
    except Exception:  # a user's settings and data fail in many ways
        return None


def _holds_out(variant: Variant) -> bool | None:
    """Whether a variant's data have held-out images; None if they cannot be read, which each run says for itself."""
    built = _built(variant)
    try:
        return None if built is None else built.datamodule.has_validation
    except Exception:  # a user's data fail in many ways
        return None


@contextmanager
def _interruptible() -> Iterator[None]:
    """Inside, SIGTERM raises a SIGTERMException, while data are decoded and processes are waited for, too.

    So does the notice that the time of a job of SLURM is nearly over, if this runs in one.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield
        return
    numbers = [signal.SIGTERM, *(NOTICES if in_job() else ())]
    before = {number: signal.signal(number, terminated) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _outcome(result: Record | str) -> str:
    """A run's score; or why it failed, in a line: an accident early in a long comparison is seen early."""
    if isinstance(result, Record):
        return f"{result.test_split} {result.metric} {100 * result.score:.2f} %"
    first, *_ = result.split("\n", 1)
    return f"failed: {first}"


class _Session:
    """Runs a plan.

    Args:
        plan: the plan.
        console: where to print.
        trainer: trains the runs.
        title: of the report.
        command: what the user typed.
        report: whether this process writes it.
    """

    def __init__(self, plan: Plan, console: Console, trainer: Trainer, title: str, command: str, report: bool) -> None:
        self._plan, self._console, self._trainer = plan, console, trainer
        self._title, self._command, self._report = title, command, report
        self._took: dict[str, list[Took]] = {}

    def run(self, comparison: Comparison, trials: Comparison | None) -> int:
        """Chooses settings, trains and reports; returns the exit status."""
        tuned, left_out, before = None, False, 0
        if trials is not None:
            later = [run for run in comparison.runs if not comparison.file(run).is_file()]
            ended = self._train(trials, "tuning: ", later)
            before = len(trials.runs)
            tuned = self._choose(ended)
            self._say_failures(ended.failures)
            if ended.status:
                self._say_end(ended, [*ended.missing, *later])
                return ended.status
            left_out = self._say_left_out(tuned)
            if tuned is None or not tuned.best:
                return 1
            comparison = self._plan.comparison(tuned)
        ended = self._train(comparison, before=before)
        if ended.status:
            self._say_end(ended, ended.missing)
        self._say_failures(ended.failures)
        if ended.records and self._report:
            self._write(comparison, ended, tuned)
        return ended.status or (1 if ended.failures or left_out else 0)

    def _train(self, comparison: Comparison, what: str = "", later: Sequence[Run] = (), before: int = 0) -> _Ended:
        finished = [record for run in comparison.runs if (record := comparison.finished(run)) is not None]
        if finished:
            place = f"in {comparison.folder}"
            self._print(f"{what}{len(finished)} of {len(comparison.runs)} runs are finished already, {place}")
        course = Course(comparison, finished, self._plan.limit, self._took, later, before)
        status = 0
        with ProgressLine(self._console, course, what) as line:
            try:
                with closing(self._trainer.train(course, line.update)) as results:
                    for run, result in results:
                        self._print(f"{run.name}: {_outcome(result)}")
            except (KeyboardInterrupt, SIGTERMException) as error:
                status = 128 + (signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM)
                self._trainer.end()
                course.running.clear()
        for run in course.unfinished:  # it may have ended while others were waited for
            if (record := comparison.finished(run)) is not None:
                course.finish(run, record)
        missing = course.unfinished
        return _Ended(course.records, course.failures, missing, status or (STATUS if missing else 0))

    def _choose(self, ended: _Ended) -> Tuned | None:
        # A loss that is no number is the value's fault; a process that was killed, or memory that ran out, is not.
        unsure = {
            run.variant.trial_of for run, reason in ended.failures if not reason.startswith(DivergedError.__name__)
        }
        tuned = self._plan.tuned(ended.records, unsure)
        if tuned is None:
            return None
        self._console.print(tuned.table().rich())
        for hint in tuned.hints if not ended.missing else ():
            self._print(hint[0].upper() + hint[1:])
        return tuned

    def _say_left_out(self, tuned: Tuned | None) -> bool:
        """Reports the variants of which every trial failed."""
        best = {} if tuned is None else tuned.best
        lost = [change.name for change in self._plan.changes if change.name not in best]
        if lost:
            terminal.say(
                f"awconv: {', '.join(lost)} left out, since runs by which to choose have failed; the same command "
                "tries them again"
            )
        return bool(lost)

    def _say_end(self, ended: _Ended, missing: Sequence[Run]) -> None:
        kept = f"{len(ended.records)} finished runs are kept in {self._plan.folder}, and the same command goes on"
        if ended.status != STATUS:
            self._print(f"Interrupted; {kept}")
            return
        names = ", ".join(run.name for run in missing[:_NAMED])
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        self._print(f"The time does not suffice for {names}{more}; {kept}")

    def _say_failures(self, failures: Sequence[tuple[Run, str]]) -> None:
        for run, reason in failures:
            terminal.say(*f"awconv: run {run.name} failed: {reason}".splitlines())

    def _write(self, comparison: Comparison, ended: _Ended, tuned: Tuned | None) -> None:
        order = [variant.name for variant in comparison.variants]
        records = sorted(ended.records, key=lambda record: (record.seed, order.index(record.variant)))
        shown = complete_seeds(records, order) if ended.status else records
        left_out = [f"{one.variant}-seed{one.seed}" for one in records if one not in shown]
        self._console.print(table(shown, self._title, left_out).rich())
        page = write_report(shown, self._plan.folder, self._title, self._command, left_out, tuned)
        self._print(f"Report: {page}")

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)
