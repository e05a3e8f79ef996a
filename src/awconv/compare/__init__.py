"""Variants of a recipe, trained over the same seeds and compared (extra ``train``).

A recipe becomes runs, a run leaves a record, and records make a report. :func:`paired` compares scores from elsewhere.
It, records and reports do not import the training libraries.
"""

from __future__ import annotations

from typing import Any

from awconv.compare.differences import paired
from awconv.extras import require

_COMMANDS = ("ablate", "compare", "demo")
__all__ = ["ablate", "compare", "demo", "paired"]


def __getattr__(name: str) -> Any:
    if name not in _COMMANDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require("lightning", extra="train")
    from awconv.compare import commands

    return getattr(commands, name)
