"""The members of a tar file, without their content."""

from __future__ import annotations

import os
import re
import tarfile
from typing import NamedTuple

import numpy as np

_BLOCK = tarfile.BLOCKSIZE
_WINDOW = 4 * _BLOCK  # a label, and the headers around it
_MAGIC = (b"ustar\x0000", b"ustar  \0")  # POSIX's and GNU's
_HARMLESS = re.compile(rb"(\d+ ([acm]time|[ug]id|[ug]name)=[^\n]*\n)*")  # PAX records that change neither name nor size
_NO_FOLDERS = (b"0", b"\0")


class Member(NamedTuple):
    """A member of a tar file.

    Attributes:
        name: with its folders.
        offset: of its content, in bytes.
        size: of its content, in bytes.
        plain: whether it is a file with a content of its own: no link, no sparse file.
    """

    name: str
    offset: int
    size: int
    plain: bool


class TarHeaders:
    """An open tar file, of which headers and labels are read, and no images.

    Args:
        path: of the file.

    Raises:
        OSError: the file cannot be read.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._window, self._start = b"", 0

    def __enter__(self) -> TarHeaders:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the file; fewer at its end."""
        begin = offset - self._start
        if begin < 0 or begin + size > len(self._window):
            self._window, self._start, begin = os.pread(self._file, max(size, _WINDOW), offset), offset, 0
        return self._window[begin : begin + size]

    def members(self) -> tuple[list[Member], int]:
        """All members except folders, in their order, and the place behind the last one.

        Reads headers of files and folders without long names itself, at a tenth of the time that ``tarfile`` takes for
        them. If there is anything else, ``tarfile`` reads all.

        Raises:
            tarfile.TarError: the file is compressed, cut within a member, or no tar file.
        """
        return self._usual_members() or self._all_members()

    def _usual_members(self) -> tuple[list[Member], int] | None:
        found: list[Member] = []
        headers: list[bytes] = []
        offset = 0
        while (header := self.read(offset, _BLOCK)).strip(b"\0"):
            kind, magic = header[156:157], header[257:265]
            try:
                size = int(header[124:135], 8)
            except ValueError:
                return None
            content = offset + _BLOCK
            if len(header) < _BLOCK or magic not in _MAGIC or (magic == _MAGIC[1] and header[345] != 0):
                return None
            if kind in _NO_FOLDERS and header[99] == 0:
                name = header[: header.index(0)]
                if header[345]:
                    name = header[345 : header.find(0, 345, 500) if 0 in header[345:500] else 500] + b"/" + name
                if name.endswith(b"/"):
                    return None
                found.append(Member(os.fsdecode(name), content, size, True))
            elif kind == b"x" and _HARMLESS.fullmatch(self.read(content, size)):
                pass
            elif kind != b"5" or size:
                return None
            headers.append(header)
            offset = content + -(-size // _BLOCK) * _BLOCK
        whole = len(header) == _BLOCK and bool(found)
        return (found, offset) if whole and _sums_are_right(headers) else None

    def _all_members(self) -> tuple[list[Member], int]:
        with tarfile.open(self._path, "r:") as tar:
            found = [
                Member(one.name, one.offset_data, one.size, one.isfile() and not one.issparse())
                for one in tar.getmembers()
                if not one.isdir()
            ]
            return found, tar.offset


def _sums_are_right(headers: list[bytes]) -> bool:
    """Whether the checksum of each header is that of its bytes, with blanks in the place of the sum."""
    values = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, _BLOCK)
    sums = values.sum(1, dtype=np.int64) - values[:, 148:156].sum(1, dtype=np.int64) + 8 * ord(" ")
    try:
        return bool(np.all(sums == [int(header[148:156].rstrip(b"\0 "), 8) for header in headers]))
    except ValueError:
        return False
