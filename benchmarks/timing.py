"""Timing that is fair to both sides on a machine whose speed drifts."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def interleaved(functions: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each call, the functions in turn; the first two rounds warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 2):
        for name, function in functions.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds
