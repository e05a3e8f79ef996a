"""How far the runs of a comparison are, without training any."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field

from awconv import terminal
from awconv.compare.comparison import Comparison, Run
from awconv.compare.course import share_trained
from awconv.compare.plan import Plan
from awconv.compare.record import Record
from awconv.compare.slurm.queue import JobState, RunJobs, states
from awconv.tables import Table
from awconv.training.lock import in_use


@dataclass(frozen=True)
class _Line:
    """What is said of a run.

    Attributes:
        run: its name.
        state: in a word.
        details: on the same line.
        log: what its last job has left, below the table.
    """

    run: str
    state: str
    details: str = ""
    log: list[str] = field(default_factory=list)


def print_status(plan: Plan) -> int:
    """Prints a table: which runs have finished, run, wait, have failed or are missing; and why a job failed.

    Args:
        plan: what is compared.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: the plan cannot be run, or a record has other settings.
    """
    comparison, trials = plan.comparison(), plan.trials()
    found = _jobs([one for one in (trials, comparison) if one is not None])
    lines = [] if trials is None else [_line(trials, run, found) for run in trials.runs]
    chosen = {run.name: (comparison, run) for run in comparison.runs}
    if trials is not None:
        tuned = _chosen(plan, trials, comparison)
        chosen = {} if tuned is None else {run.name: (tuned, run) for run in tuned.runs}
    waits = f"{'' if plan.tuning is None else plan.tuning.name} is not chosen yet"
    for run in comparison.runs:
        known = chosen.get(run.name)
        lines.append(_Line(run.name, "missing", waits) if known is None else _line(*known, found))
    done = sum(line.state == "finished" for line in lines)
    owner = in_use(plan.folder)
    note = f"{done} of {len(lines)} runs are finished, in {plan.folder}"
    note += "" if owner is None else f"; a command works on them: {owner}"
    Table(("run", "state", ""), [(line.run, line.state, line.details) for line in lines], "lll").print()
    terminal.console().print(terminal.printable(note), markup=False, highlight=False)
    for line in lines:
        terminal.console().print(
            *map(terminal.printable, line.log), sep="\n", end="\n" if line.log else "", markup=False
        )
    return 0


def _chosen(plan: Plan, trials: Comparison, comparison: Comparison) -> Comparison | None:
    """The runs with the chosen values; None as long as nothing is chosen.

    A trial that has diverged leaves nothing, but what comes after the choice says that there was one.
    """
    records = [record for run in trials.runs if (record := trials.finished(run)) is not None]
    begun = (
        comparison.file(run).is_file() or comparison.checkpoints(run).is_dir() or RunJobs(comparison, run).last
        for run in comparison.runs
    )
    tuned = plan.tuned(records) if len(records) == len(trials.runs) or any(begun) else None
    return None if tuned is None else plan.comparison(tuned)


def _jobs(comparisons: list[Comparison]) -> dict[str, JobState] | None:
    """What SLURM says of jobs, if there were any; None if it says nothing."""
    last = [job for one in comparisons for run in one.runs if (job := RunJobs(one, run).last) is not None]
    return states(last) if not last or shutil.which("squeue") else None


def _line(comparison: Comparison, run: Run, found: dict[str, JobState] | None) -> _Line:
    record = comparison.finished(run)
    if record is not None:
        return _Line(run.name, "finished", _score(record))
    jobs = RunJobs(comparison, run)
    job = jobs.last
    if job is not None and found is None and not jobs.result(job)[0]:
        return _Line(run.name, "unknown", f"job {job}, of which SLURM says nothing here")
    state = None if job is None or found is None else found.get(job)
    if job is not None and state is not None and state.is_live:
        return _live(run, job, jobs, state)
    trained = share_trained(comparison, run)
    trained_part = f"{100 * trained:.0f} % trained" if trained else ""
    if job is None:
        return _Line(run.name, "interrupted", trained_part) if trained else _Line(run.name, "missing")
    ended, reason = jobs.result(job)
    how = "" if state is None else f" ({state.state.lower().replace('_', ' ')})"
    details = ", ".join(filter(None, (f"job {job}{how}", trained_part)))
    said = [f"{run.name}: {reason}"] if ended and reason is not None else []
    tail = jobs.tail(job)
    return _Line(
        run.name, "failed", details, [*said, *([f"{run.name}: {jobs.log(job)} ends with"] if tail else []), *tail]
    )


def _live(run: Run, job: str, jobs: RunJobs, state: JobState) -> _Line:
    if not state.runs:
        return _Line(run.name, "waiting", f"job {job} ({state.reason})")
    news = jobs.news()
    epoch = "" if news is None else f", epoch {min(int(news[0]) + 1, news[1])}/{news[1]}"
    return _Line(run.name, "running", f"job {job} on {state.nodes} for {state.elapsed}{epoch}")


def _score(record: Record) -> str:
    return f"{record.test_split} {record.metric} {100 * record.score:.2f} %"
