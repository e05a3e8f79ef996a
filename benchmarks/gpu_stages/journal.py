"""The figures of a run in one JSON file, and the time that is left to it."""

from __future__ import annotations

import fcntl
import gc
import json
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_LONGEST = 6000  # characters of a traceback that are kept, the last ones
_GRACE = 30.0  # seconds an entry may take beyond three times what was guessed


@dataclass(frozen=True)
class Settings:
    """What a run was asked for.

    Attributes:
        device: ``"cuda"`` or ``"cpu"``.
        quick: the smallest work of each kind, to try the programme itself.
        rounds: how often each thing is timed.
        algorithm: what AW networks are held to.
        only: a regular expression that the names of entries have to match.
        out: the folder of the results.
        data: the folder of CIFAR-10 as Parquet files, train.parquet and test.parquet.
        stages: what is measured, in this order.
        deadline: when all must have ended, in seconds of time.time().
        lock: a file that runs take turns by, which then compile side by side and are timed one after another.
    """

    device: str
    quick: bool
    rounds: int
    algorithm: str
    only: str
    out: Path
    data: Path
    stages: tuple[str, ...]
    deadline: float
    lock: Path | None = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Inside, no other run with the same lock is timed."""
        if self.lock is None:
            yield
            return
        with self.lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
            yield


@dataclass(frozen=True)
class Entry:
    """A piece of work that is done or left as a whole.

    Attributes:
        name: of it, in its stage.
        guess: seconds that it should take on an H100.
        work: fills a dictionary with figures, and calls ``save`` whenever one is worth keeping.
    """

    name: str
    guess: float
    work: Callable[[dict[str, Any], Callable[[], None]], None]


class Journal:
    """``results.json``: it is whole at every moment, and holds each figure from when it is known.

    An entry that began has ``began`` and ``limit`` (seconds since the epoch), and one that ended ``seconds`` beside its
    figures, or ``skipped``, or ``error`` with the traceback.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        empty: dict[str, Any] = {"about": {}, "stages": {}}
        self.results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else empty

    def save(self) -> None:
        """Replaces the file by what is known now."""
        whole = self.path.with_suffix(".partial")
        whole.write_text(json.dumps(self.results, indent=1) + "\n")
        os.replace(whole, self.path)

    def run(self, stage: str, entries: list[Entry], only: str, until: float) -> None:
        """Does the entries that were not begun before and whose names match, as long as each should end before a
        moment of time.time()."""
        kept = self.results["stages"].setdefault(stage, {})
        for entry in entries:
            done = "skipped" not in kept.get(entry.name, {"skipped": ""})
            if done or not re.search(only, entry.name):
                continue
            left = until - time.time()
            if left < entry.guess:
                kept[entry.name] = {"skipped": f"it takes some {entry.guess:.0f} s, and {max(left, 0):.0f} s were left"}
                self.save()
                continue
            self._do(kept, entry)

    def _do(self, kept: dict[str, Any], entry: Entry) -> None:
        began = time.time()
        figures = kept[entry.name] = {"began": began, "limit": began + 3 * entry.guess + _GRACE}
        self.save()
        try:
            entry.work(figures, self.save)
        except Exception:
            figures["error"] = traceback.format_exc()[-_LONGEST:]
        figures["seconds"] = round(time.time() - began, 2)
        self.save()
        print(f"  {entry.name}: {figures['seconds']} s{', failed' if 'error' in figures else ''}", flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # raises after an error that no later call on this device survives
            torch.cuda.empty_cache()

    def running(self) -> dict[str, Any] | None:
        """The entry that began and has not ended."""
        for entries in self.results["stages"].values():
            for figures in entries.values():
                if "began" in figures and "seconds" not in figures:
                    return figures
        return None

    def begun(self) -> int:
        """How many entries began."""
        return sum("began" in figures for entries in self.results["stages"].values() for figures in entries.values())

    def failed(self) -> bool:
        """Whether an entry ended with an error, or a process before its time."""
        entries = [entry for stage in self.results["stages"].values() for entry in stage.values()]
        return "crashes" in self.results["about"] or any("error" in entry for entry in entries)

    def abandon(self, reason: str) -> None:
        """Ends the entry that is running, whose process is no more."""
        figures = self.running()
        if figures is not None:
            figures |= {"error": reason, "seconds": round(time.time() - figures["began"], 2)}
            self.save()
