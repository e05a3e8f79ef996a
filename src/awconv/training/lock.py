"""Locks a folder for one process."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_warn

_LOCK, _OWNER = ".lock", ".lock.json"
_SECONDS = 30.0  # what is waited for a process that is about to end
PARTIAL = ".partial"


@contextmanager
def locked(folder: Path, seconds: float = _SECONDS) -> Iterator[None]:
    """Locks a folder for this process, and removes files that killed processes left half written.

    The operating system releases the lock when the process ends, however it ends.

    Args:
        folder: the folder; created if missing.
        seconds: how long to wait for another process to release it.

    Raises:
        ValueError: another process holds the lock; the message names the process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    owner = folder / _OWNER
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=seconds)
    except NotImplementedError:  # a file system without locks
        rank_zero_warn(f"{folder} cannot be locked: keep other trainings out of it")
        yield
        return
    except Timeout:
        raise ValueError(
            f"{folder} is in use by {_described(owner)}; wait until it has ended, or give another folder"
        ) from None
    try:
        for partial in folder.glob(f"*{PARTIAL}"):
            partial.unlink()
        now = datetime.now().isoformat(" ", "seconds")
        owner.write_text(json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": now}) + "\n")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def in_use(folder: Path) -> str | None:
    """Describes the process that has locked a folder; None if there is none."""
    if not (folder / _OWNER).is_file():
        return None
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except NotImplementedError:  # a file system without locks
        return None
    except (Timeout, OSError):  # or a folder of somebody else's
        return _described(folder / _OWNER)
    lock.release()
    return None


def clear(folder: Path) -> None:
    """Removes half-written files of killed processes below a folder, except where another process works."""
    for parent in {partial.parent for partial in folder.rglob(f"*{PARTIAL}")}:
        with suppress(ValueError), locked(parent, seconds=0):
            pass


def _described(owner: Path) -> str:
    try:
        return ", ".join(f"{name} {value}" for name, value in json.loads(owner.read_text()).items())
    except (OSError, ValueError, AttributeError):  # it has only just begun, or ended
        return "another process"
