"""Files of a data set, in a folder or in a zip archive."""

from __future__ import annotations

import os
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


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
