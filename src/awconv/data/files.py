"""Files of a data set, in a folder or in a zip archive."""

from __future__ import annotations

import os
import threading
import zipfile
from pathlib import Path
from typing import Any


class Files:
    """What lies under a folder, or in a zip archive, by paths relative to it.

    An archive in which all lies in one folder counts from that folder. It is opened anew in each process that reads it.

    Args:
        root: the folder or the archive.

    Raises:
        FileNotFoundError: neither is there.
        ValueError: the file is no zip archive.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._prefix = ""
        self._lock = threading.Lock()
        self._opened: dict[int, zipfile.ZipFile] = {}  # by process: forked ones would share a position in the file
        if root.is_file():
            if not zipfile.is_zipfile(root):
                raise ValueError(f"{root} is neither a folder nor a zip archive")
            names = [name for name in self._archive.namelist() if not name.startswith("__MACOSX/")]
            tops = {name.partition("/")[0] for name in names if "/" in name}
            loose = any("/" not in name for name in names)
            if len(tops) == 1 and not loose:
                self._prefix = f"{tops.pop()}/"
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

    def read(self, path: str) -> bytes:
        """A file's content.

        Raises:
            FileNotFoundError: it is not there.
        """
        if self.root.is_dir():
            try:
                return (self.root / path).read_bytes()
            except FileNotFoundError:
                raise FileNotFoundError(f"{self.name(path)} is not a file") from None
        with self._lock:
            try:
                return self._archive.read(self._prefix + path)
            except KeyError:
                raise FileNotFoundError(f"{self.name(path)} is not in the archive") from None

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "_prefix": self._prefix}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _opened={})
