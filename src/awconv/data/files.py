"""Files of a data set, in a folder or a zip archive."""

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
    """Whether a name is that of a program's own file or folder, which belongs to no data set.

    These are hidden names, such as ``.ipynb_checkpoints`` and the ``._x.jpg`` that macOS writes beside ``x.jpg``, and
    names that Windows and NAS devices use, in capitals or not.
    """
    return (name.startswith(".") and name != "..") or name.casefold() in _LEFTOVERS


def composed(name: str) -> str:
    """A name in Unicode's composed form (NFC), for comparison. macOS writes é as e and an accent, most other systems as
    one character."""
    return unicodedata.normalize("NFC", name)


def walk(folder: Path) -> list[str]:
    """Paths of all files below a folder, sorted by folder, then by name. Leaves out leftovers.

    Follows links, but enters no folder twice.

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
    """The files that a path or a glob pattern names, in alphabetical order.

    A path that exists is taken literally, even with brackets in it, and so are the folders at the beginning of a
    pattern. ``~`` is the home folder.

    Args:
        pattern: a path or a glob pattern.
        kind: the expected kind of file, for errors, such as "a Parquet file".

    Raises:
        FileNotFoundError: no file matches.
        ValueError: the path is a folder, or no regular file, such as a named pipe.
    """
    pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
        raise ValueError(f"{pattern} is a folder; expected {kind} or a glob pattern, such as {pattern}/train*")
    if os.path.isfile(pattern):
        return [pattern]
    if os.path.exists(pattern):
        raise ValueError(f"{pattern} is not a regular file; expected {kind}")
    folder, rest = pattern, ""
    while folder and not os.path.isdir(folder):
        folder, name = os.path.split(folder)
        rest = os.path.join(name, rest) if rest else name
    paths = {os.path.join(folder, name) for name in glob.glob(rest, root_dir=folder or None, recursive=True)}
    found = sorted(path for path in paths if os.path.isfile(path))
    if not found:
        raise FileNotFoundError(f"no file matches {pattern!r}; expected {kind} or a glob pattern")
    return found


def log_unused(patterns: Iterable[str | None], kind: str) -> None:
    """Logs files that no split uses: often a forgotten split.

    Looks beside the used files for files with the same ending. If the used files lie in a folder called ``train`` or
    the like, also looks in the folders beside it.

    Args:
        patterns: of all splits; None for a split without files.
        kind: the expected kind of file, for errors.

    Raises:
        FileNotFoundError: no file matches a pattern.
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


_SISTERS = 100  # the most folders to look into


def _inside(folder: Path) -> list[Path]:
    """The content of a folder without leftovers, in alphabetical order. Empty if the folder cannot be read."""
    try:
        return sorted(one for one in folder.iterdir() if not is_leftover(one.name))
    except OSError:
        return []


class Files:
    """The files of a folder or of a zip archive, by relative paths.

    Paths have slashes, and none leads out of the root. If all of an archive lies in a single folder, paths may leave
    out that folder. Each process opens the archive for itself.

    Args:
        root: the folder or the archive.

    Raises:
        FileNotFoundError: the root does not exist.
        ValueError: the root is no zip archive, or a damaged one, or holds a name that leads out of it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._prefixes = [""]
        self._lock = threading.Lock()
        self._archives: dict[int, _Archive] = {}  # by process: forked processes would share a file position
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
        """The name of a file in messages."""
        return str(self.root / path)

    def holds(self, path: str) -> bool:
        """Whether a file exists."""
        path = posixpath.normpath(path)
        if leads_out(path):
            return False
        if self.root.is_dir():
            return os.path.isfile(self.root / path)
        return self._member(path) is not None

    def size(self, path: str) -> int:
        """The unpacked size of a file, in bytes; 0 if it does not exist."""
        path = posixpath.normpath(path)
        if not self.holds(path):
            return 0
        member = None if self.root.is_dir() else self._member(path)
        return os.path.getsize(self.root / path) if member is None else member.file_size

    def below(self, folder: str) -> list[str]:
        """The paths of all files below a folder, in alphabetical order, without leftovers. Empty if it does not exist.

        Raises:
            ValueError: a folder cannot be read.
        """
        folder = posixpath.normpath(folder or ".")
        if folder not in self._below:
            self._below[folder] = [] if leads_out(folder) else self._list(folder)
        return self._below[folder]

    def beside(self, used: Iterable[str]) -> list[str]:
        """The names at the top of the root below which no file is used, in alphabetical order, without leftovers."""
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
        """Opens a file for reading; in an archive, one at a time.

        Args:
            path: of the file.
            limit: largest unpacked size, in bytes; None for no limit.
            option: name of the option that sets the limit, for the error.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is too large, unpacks to implausibly many bytes, or cannot be read.
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
        """The content of a file. Arguments and errors are those of :meth:`open`."""
        with self.open(path, limit, option) as file:
            return file.read()

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "_prefixes": self._prefixes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _archives={}, _below={})


class _Archive:
    """An open zip archive.

    Attributes:
        members: the files of the archive, by path.
    """

    def __init__(self, path: Path) -> None:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                if file.read(4) == b"PK\3\4":
                    raise ValueError(f"{path} is a damaged zip archive: its end is missing; copy the archive again")
            raise ValueError(f"{path} is neither a folder nor a zip archive")
        with _named(str(path)):
            self._file = zipfile.ZipFile(path)
        self.members: dict[str, zipfile.ZipInfo] = {}
        for member in self._file.infolist():
            name = member.filename.replace("\\", "/")  # as some programs on Windows write it
            if leads_out(name):
                raise ValueError(
                    f"{path}: the name {member.filename!r:.200} leads out of the archive; pack the archive again, with "
                    "relative paths without '..'"
                )
            if not name.endswith("/"):
                self.members[posixpath.normpath(name)] = member

    @contextmanager
    def open(self, member: zipfile.ZipInfo, name: str) -> Iterator[IO[bytes]]:
        """Opens a member for reading.

        Raises:
            ValueError: the member cannot be read.
        """
        if member.flag_bits & _ENCRYPTED:
            raise ValueError(f"{name} is encrypted; unpack the archive")
        with _named(name), self._file.open(member) as file:
            yield file


_ENCRYPTED = 1  # bit of a member's flags
_RATIO = 200  # the largest ratio of unpacked to packed bytes
_PACKED_TIGHTLY = 2**24  # bytes that may unpack at any ratio


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Turns errors of zipfile and its decompressors into a ValueError with a name."""
    try:
        yield
    except NotImplementedError as error:
        raise ValueError(
            f"{name} cannot be unpacked: {error}; compress it with deflate, or unpack the archive"
        ) from error
    except (
        zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, EOFError, struct.error, RuntimeError, OverflowError
    ) as error:  # fmt: skip
        raise ValueError(f"{name} is damaged: {error or type(error).__name__}; copy the archive again") from error


def check_ratio(size: int, packed: int, name: str, way_out: str) -> None:
    """Raises a ValueError if data are packed too tightly to be plausible, as in a zip bomb."""
    if size > max(_PACKED_TIGHTLY, _RATIO * packed):
        raise ValueError(
            f"{name} would grow from {packed:,} to {size:,} bytes, more than real data do; if they are real, {way_out}"
        )


def leads_out(path: str) -> bool:
    """Whether a path is absolute, also by a drive of Windows (``C:``), or has a ``..``."""
    return path.startswith("/") or path[1:3] in (":", ":/") or ".." in path.split("/")


def _check_size(size: int, limit: int | None, name: str, option: str) -> None:
    if limit is not None and size > limit:
        raise ValueError(f"{name} has {size:,} bytes; expected at most {limit:,}{option and f' ({option})'}")
