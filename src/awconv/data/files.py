"""Files of a data set, in a folder or in a zip archive."""

from __future__ import annotations

import glob
import os
import threading
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lightning.pytorch.utilities import rank_zero_info

from awconv.terminal import printable

_LEFTOVERS = frozenset(
    {
        "__MACOSX", "Icon\r",  # macOS, which also writes ._NAME and .DS_Store
        "Thumbs.db", "desktop.ini", "$RECYCLE.BIN", "System Volume Information",  # Windows
        "@eaDir", "#recycle", "@Recycle", "lost+found",  # NAS and Linux
    }
)  # fmt: skip


def is_leftover(name: str) -> bool:
    """Whether a file or folder of this name is a program's own and none of a data set: hidden ones, such as
    ``.ipynb_checkpoints`` and the ``._x.jpg`` that a Mac writes beside ``x.jpg``, and those of Windows and of NAS."""
    return (name.startswith(".") and name != "..") or name in _LEFTOVERS


def walk(folder: Path) -> list[str]:
    """Paths of all files below a folder but leftovers, sorted by their folders and then by their names.

    Links are followed, but no folder is entered twice.

    Raises:
        ValueError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise ValueError(f"folder {error.filename} cannot be read: {error.strerror}") from error

    found: list[tuple[str, str]] = []
    entered: set[tuple[int, int]] = set()
    for top, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        place = os.stat(top)
        if (place.st_dev, place.st_ino) in entered:
            folders.clear()
            continue
        entered.add((place.st_dev, place.st_ino))
        folders[:] = sorted(name for name in folders if not is_leftover(name))
        found += [(top, name) for name in files if not is_leftover(name)]
    return [os.path.join(top, name) for top, name in sorted(found)]


def matching(pattern: str, kind: str) -> list[str]:
    """The files that a path or a glob pattern names, in alphabetical order. A path that is there is no pattern, even
    with brackets in it; ``~`` is the home folder.

    Args:
        pattern: the path or pattern.
        kind: what is expected, for the error: "a Parquet file".

    Raises:
        FileNotFoundError: there are none.
        ValueError: it is a folder.
    """
    pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
        raise ValueError(f"{pattern} is a folder; expected {kind} or a glob pattern of some, such as {pattern}/train*")
    if os.path.exists(pattern):
        return [pattern]
    found = sorted(path for path in set(glob.glob(pattern, recursive=True)) if os.path.isfile(path))
    if not found:
        raise FileNotFoundError(f"no file matches {pattern!r}; expected {kind} or a glob pattern of some")
    return found


def log_unused(patterns: Iterable[str | None], kind: str) -> None:
    """Logs the files beside those that the patterns of all splits name, of the same endings, that none of them names:
    often a split that was forgotten.

    Raises:
        FileNotFoundError: a pattern names no file.
        ValueError: a pattern is a folder.
    """
    used = {Path(path) for pattern in patterns if pattern is not None for path in matching(pattern, kind)}
    kinds = {(path.parent, path.suffix) for path in used}
    beside = {other for folder, suffix in kinds for other in folder.iterdir() if other.suffix == suffix} - used
    unused = sorted(str(path) for path in beside if path.is_file() and not is_leftover(path.name))
    if unused:
        rank_zero_info(printable(f"files not used by any split: {', '.join(unused[:10])}, {len(unused)} in all"))


class Files:
    """What lies under a folder, or in a zip archive, by paths relative to it.

    Of an archive with a single folder at its top, paths may leave out that folder. It is opened anew in each process
    that reads it.

    Args:
        root: the folder or the archive.

    Raises:
        FileNotFoundError: neither is there.
        ValueError: the file is no zip archive.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._prefixes = [""]
        self._lock = threading.Lock()
        self._opened: dict[int, zipfile.ZipFile] = {}  # by process: forked ones would share a position in the file
        if root.is_file():
            if not zipfile.is_zipfile(root):
                raise ValueError(f"{root} is neither a folder nor a zip archive")
            tops = {name.partition("/")[0] for name in self._archive.namelist() if "/" in name} - {"__MACOSX"}
            if len(tops) == 1:
                self._prefixes.append(f"{tops.pop()}/")
        elif not root.is_dir():
            raise FileNotFoundError(f"{root} is neither a folder nor a zip archive")

    @property
    def _archive(self) -> zipfile.ZipFile:
        process = os.getpid()
        if process not in self._opened:
            self._opened = {process: zipfile.ZipFile(self.root)}
        return self._opened[process]

    def name(self, path: str) -> str:
        """What messages call a file."""
        return str(self.root / path)

    @contextmanager
    def open(self, path: str) -> Iterator[IO[bytes]]:
        """A file to read from; of an archive, one at a time.

        Raises:
            FileNotFoundError: it is not there.
        """
        if self.root.is_dir():
            if not (self.root / path).is_file():
                raise FileNotFoundError(f"{self.name(path)} is not a file")
            with (self.root / path).open("rb") as file:
                yield file
            return
        with self._lock:
            for prefix in self._prefixes:
                try:
                    member = self._archive.open(prefix + path)
                except KeyError:
                    continue
                with member:
                    yield member
                return
            raise FileNotFoundError(f"{self.name(path)} is not in the archive")

    def read(self, path: str) -> bytes:
        """A file's content.

        Raises:
            FileNotFoundError: it is not there.
        """
        with self.open(path) as file:
            return file.read()

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "_prefixes": self._prefixes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _opened={})
