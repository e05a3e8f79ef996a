"""Runs one command on one spoiled input, in a process of its own, and reports what went wrong."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

SECONDS = 60
MEMORY = 2 * 2**30  # bytes
_ADDRESSES = 6 * 2**30  # more than the process has: what allocates without end fails, and the machine goes on
_FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "socket.connect")
_CRASHED, _STARTED = 70, 71


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def folder_of_this_process() -> Path:
    """A new folder, which is removed when this process ends."""
    _KEPT.append(tempfile.TemporaryDirectory(prefix="awconv-robustness-"))
    return Path(_KEPT[-1].name)


@dataclass(frozen=True)
class Case:
    """A spoiled input.

    Attributes:
        name: the door, the rule and the seed, from which the same input is made again.
        prepare: makes the input in an empty folder and returns the command's arguments.
        names: what an error must name: a part of a file's name, or an option; or several.
        outcome: ``"error"`` where the input cannot be used; ``"either"`` where it may be harmless.
        check: for a command that succeeds: what is wrong nevertheless, given the folder; None if nothing.
    """

    name: str
    prepare: Callable[[Path], Sequence[str]]
    names: str | tuple[str, ...]
    outcome: Literal["error", "either"] = "error"
    check: Callable[[Path], str | None] = lambda folder: None


@dataclass(frozen=True)
class Outcome:
    """What came of a command.

    Attributes:
        status: its exit status; negative for the signal that ended it.
        printed: on both outputs.
        seconds: that it took.
        memory: the most that it had, in bytes.
        faults: what must not be, a phrase each.
    """

    status: int
    printed: str
    seconds: float
    memory: int
    faults: tuple[str, ...]


def run(case: Case, folder: Path) -> Outcome:
    """Makes the input in a folder, runs the command and looks at what it did."""
    inputs = folder / "in"
    inputs.mkdir()
    arguments = [str(argument) for argument in case.prepare(inputs)]
    before = _hashes(inputs)
    printed = folder / "printed.txt"
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        _run_here(arguments, inputs, printed)
    _, wait_status, usage = os.wait4(child, 0)
    seconds = time.monotonic() - begun
    text = printed.read_text(errors="replace")
    outcome = Outcome(os.waitstatus_to_exitcode(wait_status), text, seconds, usage.ru_maxrss * 1024, ())
    faults = [*_faults(case, outcome), *_damage(before, inputs)]
    if outcome.status == 0 and (wrong := case.check(inputs)):
        faults.append(wrong)
    return Outcome(outcome.status, text, seconds, outcome.memory, tuple(faults))


def _faults(case: Case, outcome: Outcome) -> list[str]:
    last = "\n".join(outcome.printed.strip().splitlines()[-12:])
    faults = []
    if outcome.status == _STARTED:
        return [f"it started a process or a connection: {last}"]
    if outcome.status == _CRASHED or "Traceback (most recent call last)" in outcome.printed:
        return [f"a raw traceback: {last}"]
    if outcome.status < 0:
        return [f"ended by signal {-outcome.status} after {outcome.seconds:.0f} s: {last}"]
    if outcome.status == 0 and case.outcome == "error":
        faults.append(f"taken silently: {last}")
    names = (case.names,) if isinstance(case.names, str) else case.names
    faults += [
        f"the message does not name {name!r}: {last}"
        for name in names
        if outcome.status != 0 and name not in outcome.printed
    ]
    if outcome.memory > MEMORY:
        faults.append(f"{outcome.memory / 2**30:.1f} GiB of memory")
    return faults


def _hashes(folder: Path) -> dict[Path, str]:
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def _damage(before: dict[Path, str], folder: Path) -> list[str]:
    after = _hashes(folder)
    changed = [path.name for path, known in before.items() if after.get(path) != known]
    half = [path.name for path in folder.rglob("*.partial") if path not in before]
    return [f"an input was changed: {name}" for name in changed] + [f"half written: {name}" for name in half]


def _run_here(arguments: list[str], folder: Path, printed: Path) -> None:
    """In the child: the command line, watched. Does not return."""
    status = _CRASHED
    try:
        output = os.open(printed, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.chdir(folder)
        os.environ.pop("PL_GLOBAL_SEED", None)
        resource.setrlimit(resource.RLIMIT_AS, (_size() + _ADDRESSES,) * 2)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        sys.addaudithook(_watch)
        from awconv.cli import main

        status = main(arguments)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1 if error.code else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _size() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _watch(event: str, arguments: Any) -> None:
    """Ends the process at once where it starts another, or talks to one beyond this machine."""
    if event.startswith(_FORBIDDEN) and not (event == "socket.connect" and isinstance(arguments[1], str)):
        print(f"{event}: {arguments!r:.300}", file=sys.stderr, flush=True)
        os._exit(_STARTED)
