"""Variants of a recipe, trained over the same seeds and compared (extra ``train``).

A recipe becomes runs, a run leaves a record, and records make a report. Records and reports do not import the training
libraries.
"""

from __future__ import annotations

from typing import Any

from awconv.extras import require

__all__ = ["ablate", "compare", "demo"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require("lightning", extra="train")
    from awconv.compare import commands

    return getattr(commands, name)
