"""Checks of labels and of the names of classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from awconv.data.files import composed


def checked_label(value: Any) -> int:
    """A class index.

    Raises:
        ValueError: the value is no integer of at least 0, or a boolean. The message begins with "got".
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"got {value!r:.80}")
    return value


def checked_names(names: Sequence[Any], where: str) -> list[str]:
    """Names of classes, by index, each normalised by :func:`composed`.

    Args:
        names: at least two names.
        where: the source of the names, at the beginning of an error.

    Raises:
        ValueError: there are fewer than two names, or a name is no text, empty, or given twice.
    """
    if len(names) < 2:
        raise ValueError(f"{where}: a classification needs at least two classes, got {list(names)}")
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{where}: the name of class {index} must be text, got {name!r:.80}")
    names = [composed(name) for name in names]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        shown = "; ".join(f"{name!r} of {[i for i, other in enumerate(names) if other == name]}" for name in twice[:5])
        raise ValueError(f"{where}: the names of classes must differ, got {shown}")
    return names


def numbered(targets: Sequence[int] | np.ndarray[Any, Any], where: str) -> list[str]:
    """Names of classes that have none: the numbers from 0 to the largest label.

    Raises:
        ValueError: there is no label, a label is negative, or a number below the largest is no label.
    """
    values, counts = np.unique(np.asarray(targets), return_counts=True)
    found: set[int] = set(values.tolist())
    if not found:
        raise ValueError(f"{where} holds no labelled image")
    largest = max(found)
    if min(found) < 0:
        raise ValueError(
            f"{where}: labels must be at least 0, got {values[0]} {counts[0]} times; -1 usually marks "
            "images without a label, which cannot be used"
        )
    missing = largest + 1 - len(found)
    if missing:
        first = [number for number in range(min(largest, 10 + len(found))) if number not in found][:5]
        raise ValueError(
            f"{where}: classes without names must be numbered from 0 without gaps; the largest label is {largest}, and "
            f"{missing:,} below it have no image, such as {', '.join(map(str, first))}; renumber the labels, or give "
            "names of the classes"
        )
    return checked_names([str(number) for number in range(largest + 1)], where)
