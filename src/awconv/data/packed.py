"""Many texts in two buffers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np


class PackedTexts:
    """Texts that cannot be changed, such as a million paths, in two buffers instead of an object each.

    A process that reads a list writes to the objects in it: it counts references. So each process that loads images
    would in time get a copy of its own of all of them.

    Args:
        texts: names of files, perhaps not UTF-8.

    Example:
        >>> names = PackedTexts(["a.jpg", "b.jpg"])
        >>> len(names), names[1], list(names)
        (2, 'b.jpg', ['a.jpg', 'b.jpg'])
    """

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [os.fsencode(text) for text in texts]
        self._ends: np.ndarray[Any, np.dtype[np.int64]] = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        self._content = b"".join(encoded)

    @classmethod
    def joined(cls, parts: Iterable[PackedTexts]) -> PackedTexts:
        """The texts of several, in their order."""
        parts = list(parts)
        whole = cls(())
        lengths = [np.diff(part._ends) for part in parts]
        whole._ends = np.concatenate([whole._ends, *lengths]).cumsum()
        whole._content = b"".join(part._content for part in parts)
        return whole

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        """The text of an index from 0."""
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} texts, from 0, got index {index}")
        return os.fsdecode(self._content[self._ends[index] : self._ends[index + 1]])

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))
