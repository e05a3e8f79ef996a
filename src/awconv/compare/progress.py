"""One line of progress for all runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from awconv.compare.course import Course
from awconv.terminal import printable

_NAMED = {True: 1, False: 2}  # runs that are named on a terminal, and elsewhere; more are counted
_REDRAW = 0.2  # seconds, on a terminal
_LINE = 30.0  # seconds between two lines elsewhere


class ProgressLine:
    """Says what runs, how many runs are done, and how much time is left: a bar on a terminal, elsewhere now and then a
    line.

    Args:
        console: where to print.
        course: of the runs.
        what: what the runs are for.
        clock: gives the time, in seconds.
    """

    def __init__(
        self, console: Console, course: Course, what: str = "", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._course, self._what, self._clock, self._console = course, what, clock, console
        self._bar = Progress(
            TextColumn(
                "{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True)
            ),  # cut if need be
            BarColumn(bar_width=12),
            TextColumn("{task.percentage:3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=1.0, left="")
        self._said = clock()

    def __enter__(self) -> ProgressLine:
        self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.update(now=True)
        self._bar.stop()

    def update(self, now: bool = False) -> None:
        """Shows how far the runs are, if that was not done lately.

        Args:
            now: show it on a terminal however lately that was.
        """
        time, terminal = self._clock(), self._console.is_terminal
        if time - self._said < (_REDRAW if terminal else _LINE) and not (now and terminal):
            return
        self._said = time
        seconds = self._course.seconds_left
        left = "" if seconds is None else f"about {duration(seconds)} left"
        if terminal:
            self._bar.update(self._task, description=self._described(), completed=self._course.share, left=left)
        else:
            text = ", ".join(filter(None, (self._described(), f"{100 * self._course.share:.0f} %", left)))
            self._console.print(text, markup=False, highlight=False)

    def _described(self) -> str:
        course = self._course
        running = [f"{name} (epoch {run.epoch}/{run.epochs})" for name, run in course.running.items() if run.epochs]
        starting = len(course.running) - len(running)
        few = len(running) <= _NAMED[self._console.is_terminal] and not starting
        names = running if few else [f"{len(course.running)} running"]
        done = [f"{self._what}{course.done} of {course.total} {'' if self._console.is_terminal else 'runs '}done"]
        if course.failures:
            done.append(f"{len(course.failures)} failed")
        return printable(", ".join([*done, *names] if course.running else done))


def duration(seconds: float) -> str:
    """Seconds as people say them: ``40 s``, ``4 min``, ``1 h 20 min``."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
