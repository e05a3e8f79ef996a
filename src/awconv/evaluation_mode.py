"""Evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[dict[nn.Module, bool]]:
    """Puts a model into evaluation mode, and at the end each module into the mode that the yielded dictionary has."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield modes
    finally:
        for module, mode in modes.items():
            module.training = mode
