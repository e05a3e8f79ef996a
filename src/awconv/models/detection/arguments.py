"""Arguments that are handed on to torchvision's detectors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any


def check_arguments(detector: type[Any], arguments: Mapping[str, Any]) -> None:
    """Raises a TypeError for an argument that a detector does not have: torchvision's take any, and ignore it."""
    known = [name for name, p in inspect.signature(detector).parameters.items() if p.kind is not p.VAR_KEYWORD]
    unknown = [name for name in arguments if name not in known]
    if unknown:
        raise TypeError(f"{detector.__name__} takes no {', '.join(unknown)}; it takes {', '.join(known)}")
