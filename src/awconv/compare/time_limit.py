"""The time that a comparison may take."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from awconv.training.stop import StopOnSigterm
from awconv.usage import UsageError

STATUS = 124  # of a comparison that the limit has cut short: that of timeout(1)
_PARTS = re.compile(r"(?:(\d+)h)?(?:(\d+)m(?:in)?)?(?:(\d+(?:\.\d+)?)s?)?")
_MOST, _LEAST = 8.0, 3.0  # seconds of the limit that are kept for checkpoints, the report and the processes' end
_SHARE = 0.1  # of the limit, between these two


class TimeOverError(Exception):
    """The time is over; a run has written its checkpoint."""


def parse_duration(text: str, name: str = "time_limit") -> float:
    """A duration in seconds: ``90s``, ``9m``, ``1h30m``, or a number of seconds.

    Args:
        text: the duration.
        name: of the argument, for messages.

    Raises:
        UsageError: the text is something else, or no time.

    Example:
        >>> parse_duration("1h30m")
        5400.0
    """
    match = _PARTS.fullmatch(text.strip())
    hours, minutes, seconds = (float(part or 0) for part in match.groups()) if match else (0.0, 0.0, 0.0)
    found = 3600 * hours + 60 * minutes + seconds
    if not 0 < found < math.inf:
        raise UsageError(
            f"{name} must be a duration above 0, such as 90s, 9m, 1h30m, or a number of seconds, got {text!r}"
        )
    return found


class TimeLimit:
    """Says how much time is left.

    Args:
        seconds: all that there is.
        begun: when it began, by the clock; now by default.
        clock: gives the time, in seconds.
    """

    def __init__(
        self, seconds: float = math.inf, begun: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.seconds = seconds
        self._clock, self._begun = clock, clock() if begun is None else begun

    @property
    def is_set(self) -> bool:
        """Whether there is a limit at all."""
        return self.seconds < math.inf

    @property
    def total_left(self) -> float:
        """Seconds until the limit."""
        return self.seconds - (self._clock() - self._begun)

    @property
    def left(self) -> float:
        """Seconds in which runs can be trained: until the limit, but for those that checkpoints and the report need."""
        return self.total_left - min(_MOST, max(_LEAST, _SHARE * self.seconds))


class StopInTime(pl.Callback):
    """Ends a training after the step in which its time is over, with a checkpoint, and an evaluation at the limit.

    Args:
        limit: the time.
        stop: ends the training.

    Raises:
        TimeOverError: an evaluation has reached the limit.
    """

    def __init__(self, limit: TimeLimit, stop: StopOnSigterm) -> None:
        self._limit, self._stop = limit, stop

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._limit.left <= 0:
            self._stop.ask()

    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self._end_at_the_limit()

    def on_test_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self._end_at_the_limit()

    def _end_at_the_limit(self) -> None:
        if self._limit.total_left <= 0:
            raise TimeOverError
