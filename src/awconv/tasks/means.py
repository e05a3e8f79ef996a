"""Means of an epoch's losses, at little cost for each step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_STEPS = 256  # whose figures are read from the device at once


class EpochMeans:
    """Means over the images of an epoch of figures that each step has.

    A step's figures are kept where they are: no operation runs on the device, and nothing waits for it. Lightning's
    own ``log`` takes Python's time in each step, for each figure.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets what was added."""
        self._waiting: dict[str, list[Tensor]] = {}
        self._images: list[int] = []
        self._sums: dict[str, float] = {}
        self._count = 0

    def add(self, figures: Mapping[str, Tensor], images: int) -> None:
        """Adds a step's figures.

        Args:
            figures: means over the images of the step, scalars on any device; the same names in each step.
            images: their number.
        """
        for name, figure in figures.items():
            self._waiting.setdefault(name, []).append(figure.detach())
        self._images.append(images)
        if len(self._images) == _STEPS:
            self._read()

    def take(self) -> dict[str, float]:
        """The means over all images since the last call, by name; none if nothing was added."""
        self._read()
        means = {name: total / self._count for name, total in self._sums.items()}
        self.clear()
        return means

    def _read(self) -> None:
        weights = torch.tensor(self._images, dtype=torch.float64)
        for name, figures in self._waiting.items():
            values = torch.stack(figures).cpu().double()
            self._sums[name] = self._sums.get(name, 0.0) + float(values @ weights)
        self._count += sum(self._images)
        self._waiting, self._images = {}, []
