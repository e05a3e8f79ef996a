"""The folder of an explanation: written whole or not at all, over nothing but a former explanation."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from awconv.explain.page import TOOL
from awconv.training.lock import PARTIAL

_FIGURES = "explain.json"


def check_folder(folder: Path) -> None:
    """Checks that an explanation can be written there.

    Raises:
        FileExistsError: it is a file, or holds something else than a former explanation.
        ValueError: no folder can be made there, or take the place of the one that is there.
    """
    if folder.exists() or folder.is_symlink():
        if not folder.is_dir():
            raise FileExistsError(f"{folder} is there already and no folder; give --out another name")
        _check_own(folder, folder)
    place = Path(os.path.realpath(folder))
    if place == Path.cwd() or os.path.ismount(place):  # another folder takes its place
        raise ValueError(f"out must be a new folder, or a former explanation; give --out a folder inside {place}")
    above = next(parent for parent in place.parents if os.path.lexists(parent))
    if not above.is_dir():
        raise ValueError(f"out must be a folder, and {folder} cannot be one: {above} is none")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"nothing can be written into {above}; give --out another place")


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes files into a new folder that then takes the place of the former one.

    Raises:
        FileExistsError: something else came there meanwhile.
    """
    check_folder(folder)
    place = Path(os.path.realpath(folder))
    partial = place.with_name(f".{secrets.token_hex(8)}{PARTIAL}")
    former = place.with_name(f".{secrets.token_hex(8)}{PARTIAL}")
    try:
        partial.mkdir(parents=True)
        if place.exists():
            shutil.copymode(place, partial)
        for name, content in files.items():
            (partial / name).write_bytes(content)
        if place.exists():
            os.rename(place, former)
        try:
            if former.exists():
                _check_own(former, folder)  # again: the measurements took their time
            os.rename(partial, place)
        except BaseException:  # an interruption, too
            if former.exists():
                os.rename(former, place)
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(former, ignore_errors=True)


def _check_own(folder: Path, named: Path) -> None:
    foreign = sorted(set(os.listdir(folder)) - _written(folder))
    if foreign:
        raise FileExistsError(
            f"{named} holds what awconv explain did not write ({', '.join(foreign[:3])}); give --out another name"
        )


def _written(folder: Path) -> set[str]:
    """The names of the files that a former run has written there."""
    try:
        content: Any = json.loads((folder / _FIGURES).read_text())
        if content["tool"] != TOOL:
            return set()
        return {name for name in content["files"] if isinstance(name, str) and (folder / name).is_file()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()
