"""Files that are written whole or not at all, in folders that others may write to."""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from awconv.training.lock import PARTIAL

_NAME = re.compile(rf"\.[0-9a-f]{{16}}{re.escape(PARTIAL)}")
_SECONDS = 3600.0  # for which nothing was written to what is left


@contextmanager
def replacing(place: Path) -> Iterator[IO[bytes]]:
    """A temporary file that replaces another one when it is whole. Follows no links, not even new ones."""
    partial = place.with_name(f".{secrets.token_hex(8)}{PARTIAL}")
    try:
        with partial.open("xb") as file:
            yield file
        os.replace(partial, place)
    finally:
        partial.unlink(missing_ok=True)


def clear_old(folders: Iterable[Path]) -> None:
    """Removes half-written files older than an hour; a newer one may be in use."""
    for folder in folders:
        readable = folder.is_dir() and os.access(folder, os.R_OK)
        for path in folder.iterdir() if readable else ():
            if _NAME.fullmatch(path.name):
                with suppress(OSError):  # it is gone, or cannot be removed
                    if time.time() - path.lstat().st_mtime > _SECONDS:
                        path.unlink()
