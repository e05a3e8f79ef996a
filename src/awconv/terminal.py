"""Printing for people."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_UNBOUNDED = 10_000  # columns


def console() -> Console:
    """A console that wraps lines at a terminal's width, and not at all in a file or a pipe."""
    from rich.console import Console  # of the extra ``train``; an error can be printed without it

    return Console() if sys.stdout.isatty() else Console(width=_UNBOUNDED)


def say(*lines: str) -> None:
    """Prints lines to the error output, with special characters escaped."""
    print(*map(printable, lines), sep="\n", file=sys.stderr)


def printable(text: str) -> str:
    """Text from elsewhere, such as a file's name, made safe for a terminal.

    Escapes, as Python does, control characters (which may hide lines or retitle the window), characters that change the
    writing direction, bytes that are not UTF-8, and what the output's encoding lacks. For rich, which reads brackets as
    markup, use ``rich.text.Text(printable(name))``.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return visible(text).encode(encoding, "backslashreplace").decode(encoding)


def visible(text: str) -> str:
    """Like :func:`printable`, for output in UTF-8."""
    return "".join(character if character.isprintable() else _escaped(character) for character in text)


def _escaped(character: str) -> str:
    byte = ord(character) - 0xDC00  # as which Python keeps a byte that is not UTF-8
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else character.encode("unicode_escape").decode()
