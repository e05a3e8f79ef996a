"""Files of a data set, in a folder or in a zip archive."""

from __future__ import annotations

import glob
import lzma
import os
import posixpath
import struct
import threading
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any

from lightning.pytorch.utilities import rank_zero_info

from awconv.terminal import printable

_LEFTOVERS = frozenset(
    name.casefold()
    for name in (
        "__MACOSX", "Icon\r", "Network Trash Folder", "Temporary Items",  # macOS, as ._NAME and .DS_Store
        "Thumbs.db", "desktop.ini", "$RECYCLE.BIN", "System Volume Information",  # Windows
        "@eaDir", "#recycle", "#snapshot", "@Recycle", "@Recently-Snapshot", "lost+found",  # NAS and Linux
    )
)  # fmt: skip


def is_leftover(name: str) -> bool:
    """Whether a file or folder of this name is a program's own and none of a data set: hidden ones, such as
    ``.ipynb_checkpoints`` and the ``._x.jpg`` that a Mac writes beside ``x.jpg``, and those of Windows and of NAS,
    in capitals or not."""
    return (name.startswith(".") and name != "..") or name.casefold() in _LEFTOVERS


def composed(name: str) -> str:
    """A name in the one of Unicode's forms in which names are compared: macOS writes é as e and an accent, and most
    others as one character."""
    return unicodedata.normalize("NFC", name)


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
    with brackets in it, nor is a folder at its beginning; ``~`` is the home folder.

    Args:
        pattern: the path or pattern.
        kind: what is expected, for the error: "a Parquet file".

    Raises:
        FileNotFoundError: there are none.
        ValueError: it is a folder, or something else that is no file, such as a named pipe.
    """
    pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
        raise ValueError(f"{pattern} is a folder; expected {kind} or a glob pattern of some, such as {pattern}/train*")
    if os.path.isfile(pattern):
        return [pattern]
    if os.path.exists(pattern):
        raise ValueError(f"{pattern} is not a file that can be read more than once; expected {kind}")
    folder, rest = pattern, ""
    while folder and not os.path.isdir(folder):
        folder, name = os.path.split(folder)
        rest = os.path.join(name, rest) if rest else name
    paths = {os.path.join(folder, name) for name in glob.glob(rest, root_dir=folder or None, recursive=True)}
    found = sorted(path for path in paths if os.path.isfile(path))
    if not found:
        raise FileNotFoundError(f"no file matches {pattern!r}; expected {kind} or a glob pattern of some")
    return found


def log_unused(patterns: Iterable[str | None], kind: str) -> None:
    """Logs the files beside those that the patterns of all splits name, of the same endings, that none of them names:
    often a split that was forgotten. Beside a folder that is called ``train`` or the like, they may lie in another one.

    Raises:
        FileNotFoundError: a pattern names no file.
        ValueError: a pattern is a folder.
    """
    found = [path for pattern in patterns if pattern is not None for path in matching(pattern, kind)]
    used = {Path(os.path.abspath(path)) for path in found}
    kinds = {(path.parent, path.suffix) for path in used}
    above = {(folder.parent, suffix) for folder, suffix in kinds if "train" in folder.name.lower()}
    for place, suffix in above:
        kinds |= {(folder, suffix) for folder in islice(filter(os.path.isdir, _inside(place)), _SISTERS)}
    beside = {other for folder, suffix in kinds for other in _inside(folder) if other.suffix == suffix} - used
    unused = sorted(str(path) for path in beside if os.path.isfile(path))
    if unused:
        rank_zero_info(printable(f"files not used by any split: {', '.join(unused[:10])}, {len(unused)} in all"))


_SISTERS = 100  # folders at most that are looked into


def _inside(folder: Path) -> list[Path]:
    """What lies in a folder but leftovers, in alphabetical order; nothing of one that cannot be read."""
    try:
        return sorted(one for one in folder.iterdir() if not is_leftover(one.name))
    except OSError:
        return []


class Files:
    """What lies under a folder, or in a zip archive, by paths relative to it.

    Paths have slashes. None leads out of the folder. Of an archive with a single folder at its top, paths may leave out
    that folder. It is opened anew in each process that reads it.

    Args:
        root: the folder or the archive.

    Raises:
        FileNotFoundError: neither is there.
        ValueError: the file is no zip archive, is damaged, or a name in it leads out of it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._prefixes = [""]
        self._lock = threading.Lock()
        self._archives: dict[int, _Archive] = {}  # by process: forked ones would share a position in the file
        self._below: dict[str, list[str]] = {}
        if root.is_file():
            tops = {path.partition("/")[0] for path in self._archive.members if "/" in path}
            tops = {top for top in tops if not is_leftover(top)}
            if len(tops) == 1:
                self._prefixes.append(f"{tops.pop()}/")
        elif not root.is_dir():
            raise FileNotFoundError(f"{root} is neither a folder nor a zip archive")

    @property
    def _archive(self) -> _Archive:
        process = os.getpid()
        if process not in self._archives:
            self._archives = {process: _Archive(self.root)}
        return self._archives[process]

    def name(self, path: str) -> str:
        """What messages call a file."""
        return str(self.root / path)

    def holds(self, path: str) -> bool:
        """Whether a file is there."""
        path = posixpath.normpath(path)
        if leads_out(path):
            return False
        if self.root.is_dir():
            return os.path.isfile(self.root / path)
        return self._member(path) is not None

    def size(self, path: str) -> int:
        """The number of a file's bytes, unpacked; 0 if it is not there."""
        path = posixpath.normpath(path)
        if not self.holds(path):
            return 0
        member = None if self.root.is_dir() else self._member(path)
        return os.path.getsize(self.root / path) if member is None else member.file_size

    def below(self, folder: str) -> list[str]:
        """The paths of all files below a folder but leftovers, in alphabetical order; none if it is not there.

        Raises:
            ValueError: a folder in it cannot be read.
        """
        folder = posixpath.normpath(folder or ".")
        if folder not in self._below:
            self._below[folder] = [] if leads_out(folder) else self._list(folder)
        return self._below[folder]

    def beside(self, used: Iterable[str]) -> list[str]:
        """The names of the files and folders at the top but leftovers, of which nothing is used, in alphabetical
        order."""
        if self.root.is_dir():
            names, paths = set(os.listdir(self.root)), set(used)
        else:
            prefix, members = self._prefixes[-1], self._archive.members
            names = {path[len(prefix) :].partition("/")[0] for path in members if path.startswith(prefix)}
            paths = {path.removeprefix(prefix) for path in used}
        names -= {path.partition("/")[0] for path in paths}
        return sorted(name for name in names if not is_leftover(name))

    def _list(self, folder: str) -> list[str]:
        if self.root.is_dir():
            if not os.path.isdir(self.root / folder):
                return []
            return sorted(Path(path).relative_to(self.root).as_posix() for path in walk(self.root / folder))
        within = "" if folder == "." else f"{folder}/"
        for prefix in reversed(self._prefixes):
            found = [path[len(prefix) :] for path in self._archive.members if path.startswith(prefix + within)]
            if found:
                return sorted(path for path in found if not any(map(is_leftover, path.split("/"))))
        return []

    def _member(self, path: str) -> zipfile.ZipInfo | None:
        found = (self._archive.members.get(prefix + path) for prefix in self._prefixes)
        return next((member for member in found if member is not None), None)

    @contextmanager
    def open(self, path: str, limit: int | None = None, option: str = "") -> Iterator[IO[bytes]]:
        """A file to read from; of an archive, one at a time.

        Args:
            path: of the file.
            limit: the most bytes that it may have, unpacked; None for any number.
            option: by which a user sets the limit.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it is larger, compressed beyond what data can be, or cannot be read.
        """
        path, name = posixpath.normpath(path), self.name(path)
        if leads_out(path):
            raise FileNotFoundError(f"{name} is not in {self.root}")
        if self.root.is_dir():
            if not os.path.isfile(self.root / path):
                raise FileNotFoundError(f"{name} is not a file")
            try:
                with (self.root / path).open("rb") as file:
                    _check_size(os.fstat(file.fileno()).st_size, limit, name, option)
                    yield file
            except OSError as error:
                raise ValueError(f"{name} cannot be read: {error.strerror or error}") from error
            return
        with self._lock:
            member = self._member(path)
            if member is None:
                raise FileNotFoundError(f"{name} is not in the archive")
            _check_size(member.file_size, limit, name, option)
            check_ratio(member.file_size, member.compress_size, name, "unpack the archive")
            with self._archive.open(member, name) as file:
                yield file

    def read(self, path: str, limit: int | None = None, option: str = "") -> bytes:
        """A file's content; arguments and errors as for :meth:`open`."""
        with self.open(path, limit, option) as file:
            return file.read()

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "_prefixes": self._prefixes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _archives={}, _below={})


class _Archive:
    """A zip archive, opened.

    Attributes:
        members: its files, by their paths.
    """

    def __init__(self, path: Path) -> None:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                if file.read(4) == b"PK\3\4":
                    raise ValueError(f"{path} is a damaged zip archive: its end is missing; copy it again")
            raise ValueError(f"{path} is neither a folder nor a zip archive")
        with _named(str(path)):
            self._file = zipfile.ZipFile(path)
        self.members: dict[str, zipfile.ZipInfo] = {}
        for member in self._file.infolist():
            name = member.filename.replace("\\", "/")  # as some programs on Windows write it
            if leads_out(name):
                raise ValueError(
                    f"{path}: the name {member.filename!r:.200} leads out of the archive; pack it anew, by paths that "
                    "are relative and without '..'"
                )
            if not name.endswith("/"):
                self.members[posixpath.normpath(name)] = member

    @contextmanager
    def open(self, member: zipfile.ZipInfo, name: str) -> Iterator[IO[bytes]]:
        """A member to read from.

        Raises:
            ValueError: it cannot be read.
        """
        if member.flag_bits & _ENCRYPTED:
            raise ValueError(f"{name} is encrypted; unpack the archive")
        with _named(name), self._file.open(member) as file:
            yield file


_ENCRYPTED = 1  # of a member's flags
_RATIO = 200  # of data to packed data
_PACKED_TIGHTLY = 2**24  # bytes that are unpacked whatever the ratio


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Makes a ValueError with a name of what zipfile and its decompressors raise."""
    try:
        yield
    except NotImplementedError as error:
        raise ValueError(f"{name} cannot be unpacked: {error}; pack the archive with deflate, or unpack it") from error
    except (
        zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, EOFError, struct.error, RuntimeError, OverflowError
    ) as error:  # fmt: skip
        raise ValueError(f"{name} is damaged: {error or type(error).__name__}; copy the archive again") from error


def check_ratio(size: int, packed: int, name: str, way_out: str) -> None:
    """Raises a ValueError for data of some bytes that were packed into too few."""
    if size > max(_PACKED_TIGHTLY, _RATIO * packed):
        raise ValueError(
            f"{name} would become {size:,} bytes of {packed:,}, as data hardly do; {way_out}, if that is what it holds"
        )


def leads_out(path: str) -> bool:
    """Whether a path is absolute or has ``..`` left; ``C:`` is Windows' root."""
    return path.startswith("/") or path[1:3] in (":", ":/") or ".." in path.split("/")


def _check_size(size: int, limit: int | None, name: str, option: str) -> None:
    if limit is not None and size > limit:
        raise ValueError(f"{name} has {size:,} bytes; expected at most {limit:,}{option and f' ({option})'}")
