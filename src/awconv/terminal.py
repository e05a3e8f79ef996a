"""What is printed for a person."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_UNBOUNDED = 10_000  # columns


def console() -> Console:
    """A console that wraps at the width of a terminal, and nowhere where the output goes to a file or a pipe."""
    from rich.console import Console  # of the extra ``train``; an error can be printed without it

    return Console() if sys.stdout.isatty() else Console(width=_UNBOUNDED)


def say(*lines: str) -> None:
    """Prints lines on the error output, in which nothing that came with a file does more than be read."""
    print(*map(printable, lines), sep="\n", file=sys.stderr)


def printable(text: str) -> str:
    """Text from elsewhere, such as a file's name, that can do no more to a terminal than be read.

    Control characters (an escape sequence may hide lines or retitle the window), those that turn the direction of
    writing, bytes of a name that are not UTF-8, and what the output's encoding lacks are written as Python escapes
    them.
    rich would take brackets for its markup: hand it ``rich.text.Text(printable(name))``.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return visible(text).encode(encoding, "backslashreplace").decode(encoding)


def visible(text: str) -> str:
    """The same for a file that is read as UTF-8."""
    return "".join(character if character.isprintable() else _escaped(character) for character in text)


def _escaped(character: str) -> str:
    byte = ord(character) - 0xDC00  # as which Python keeps a byte that is not UTF-8
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else character.encode("unicode_escape").decode()
