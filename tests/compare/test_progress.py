"""One line says how far all runs of a comparison are."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from awconv.compare.comparison import Comparison
from awconv.compare.course import Course
from awconv.compare.progress import ProgressLine, duration
from awconv.compare.schedule import Took
from awconv.compare.time_limit import TimeLimit
from awconv.compare.variants import Change
from tests.compare.test_schedule import record


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    path = tmp_path / "tiny.yaml"
    path.write_text("model: {network: resnet8_cifar}\ntrainer: {max_epochs: 10}\n")
    names = {"plain": "resnet8_cifar", "aw": "aw_resnet8_cifar"}
    variants = tuple(Change(name, network=network).apply(path, ()) for name, network in names.items())
    return Comparison(variants, seeds=4, folder=tmp_path, jobs=4)


def test_the_time_that_is_left_is_that_of_the_last_run(comparison: Comparison) -> None:
    clock = Clock()
    course = Course(comparison, [], TimeLimit(), clock=clock)
    assert course.seconds_left is None
    for run in course.waiting[:4]:
        course.begin(run)
    clock.now = 5.0  # for the imports and the data
    for run in comparison.runs[:4]:
        course.progress(run, 0.0, 10)
    clock.now = 25.0
    for run in comparison.runs[:4]:
        course.progress(run, 5.0, 10)
    # Half a run takes 20 seconds. The rest of these four, then four others with 5 seconds of preparation each.
    assert course.seconds_left == pytest.approx(20 + 45)
    clock.now = 45.0
    for run in comparison.runs[:4]:
        course.finish(run, replace(record(run.variant.name, [4.0] * 10, 44.0), seed=run.seed))
    assert course.seconds_left == pytest.approx(1.1 * 44)  # all at once
    for run in list(course.waiting):
        course.begin(run)
    clock.now = 55.0
    assert course.seconds_left == pytest.approx(1.1 * 44 - 10)
    course.finish(comparison.runs[4], "it failed")
    assert (course.done, course.total, len(course.unfinished)) == (5, 8, 3)


def test_a_limit_bounds_what_is_left(comparison: Comparison) -> None:
    clock = Clock()
    course = Course(comparison, [], TimeLimit(60, clock=clock), took={"plain": [Took(10, 500.0, 45.0)]}, clock=clock)
    clock.now = 20.0
    assert course.seconds_left == 40


def test_beside_a_terminal_a_line_comes_now_and_then(comparison: Comparison) -> None:
    clock, file = Clock(), io.StringIO()
    course = Course(comparison, [], TimeLimit(), clock=clock, before=3)
    with ProgressLine(Console(file=file, width=200), course, "tuning: ", clock) as line:
        line.update()
        run = course.waiting[0]
        course.begin(run)
        for second in range(100):
            clock.now = float(second)
            course.progress(run, second / 50, 10)
            line.update()
    lines = file.getvalue().splitlines()
    assert len(lines) == 3  # after 30, 60 and 90 seconds
    # The run takes 500 seconds, and so do seven others, of which at most four run at once.
    assert lines[0] == "tuning: 3 of 11 runs done, plain-seed0 (epoch 1/10), 28 %, about 17 min left"
    assert lines[2].startswith("tuning: 3 of 11 runs done, plain-seed0 (epoch 2/10), 29 %")


def test_failed_runs_are_counted(comparison: Comparison) -> None:
    clock, file = Clock(), io.StringIO()
    course = Course(comparison, [], TimeLimit(), clock=clock)
    with ProgressLine(Console(file=file, width=200), course, "", clock) as line:
        course.finish(comparison.runs[0], "it failed")
        clock.now = 100.0
        line.update()
    assert file.getvalue().startswith("1 of 8 runs done, 1 failed, 12 %")


def test_many_runs_are_counted_on_a_line_of_the_terminal(comparison: Comparison) -> None:
    clock, file = Clock(), io.StringIO()
    course = Course(comparison, [], TimeLimit(), clock=clock)
    console = Console(file=file, width=200, force_terminal=True, legacy_windows=False)
    with ProgressLine(console, course, clock=clock) as line:
        for run in course.waiting[:4]:
            course.begin(run)
            course.progress(run, 5.0, 10)
        line.update(now=True)
    assert "0 of 8 done, 4 running" in file.getvalue()
    assert "25 %" in file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59, "59 s"), (59.7, "1 min"), (150, "2 min"), (3590, "1 h 0 min"), (7500, "2 h 5 min")],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text
