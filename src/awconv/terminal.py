"""What is printed for a person."""

from __future__ import annotations

import sys

from rich.console import Console

_UNBOUNDED = 10_000  # columns


def console() -> Console:
    """A console that wraps at the width of a terminal, and nowhere where the output goes to a file or a pipe."""
    return Console() if sys.stdout.isatty() else Console(width=_UNBOUNDED)
