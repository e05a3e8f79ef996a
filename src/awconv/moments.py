"""Mean and variance of tensors that come a few at a time."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """The mean and the variance, value by value, over all samples of some batches, in float64.

    Attributes:
        count: how many samples there were.
    """

    def __init__(self) -> None:
        self.count = 0
        self._first = self._sum = self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Adds a batch, shape (N, ...)."""
        values = values.detach().cpu().double()
        if self.count == 0 and len(values):
            self._first = values[0]
        differences = values - self._first  # whose squares round less, and are zero where nothing varies
        self._sum = self._sum + differences.sum(0)
        self._squares = self._squares + differences.square().sum(0)
        self.count += len(values)

    def mean(self) -> Tensor:
        """Shape (...), of at least one sample."""
        return self._first + self._sum / self.count

    def variance(self) -> Tensor:
        """Shape (...): the mean square of the distance to the mean."""
        return (self._squares / self.count - (self._sum / self.count).square()).clamp(min=0)
