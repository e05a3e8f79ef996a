"""What a training step spends its time on: kernels on the GPU, and Python beside them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from awconv.bench.model import Side
from awconv.bench.timing import seconds_of

_KERNELS, _OPERATIONS = 40, 25
_NAME = 160  # characters


def profile_step(side: Side, trace: Path) -> dict[str, Any]:
    """Kernels and operators of one training step, by the time that they take.

    Args:
        side: whose step.
        trace: a file, .json.gz, for when each of them began and ended, which https://ui.perfetto.dev shows.

    Returns:
        ``step_seconds`` of a step without a profiler; ``kernel_seconds``, the sum over all kernels, and how many there
        are; ``kernels``, the longest ones by name; ``operators``, those of PyTorch that take most of Python's time.
        On a CPU, the kernels are the operators.
    """
    on_gpu = side.device == "cuda"
    for _ in range(2):
        side.training()
    step_seconds = seconds_of(side.training, 3, side.device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiler:
        side.training()
        if on_gpu:
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(trace))
    rows = profiler.key_averages()
    place = DeviceType.CUDA if on_gpu else DeviceType.CPU
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    kernels = [row for row in rows if row.device_type == place and getattr(row, own) > 0 and not _is_annotation(row)]
    operators = [row for row in rows if row.device_type == DeviceType.CPU]
    return {
        "step_seconds": step_seconds,
        "kernel_seconds": sum(getattr(row, own) for row in kernels) / 1e6,
        "launches": sum(row.count for row in kernels),
        "kernels": _longest(kernels, own, _KERNELS),
        "operators": _longest(operators, "self_cpu_time_total", _OPERATIONS),
    }


def _is_annotation(row: Any) -> bool:
    """Whether a row is a span with a name, such as an optimizer's step, that covers kernels with rows of their own."""
    return bool(getattr(row, "is_user_annotation", False)) or row.key.startswith(("Optimizer.", "ProfilerStep"))


def _longest(rows: list[Any], own: str, most: int) -> list[dict[str, Any]]:
    total = sum(getattr(row, own) for row in rows) or 1
    rows = sorted(rows, key=lambda row: -getattr(row, own))[:most]
    return [
        {
            "name": row.key[:_NAME],
            "calls": row.count,
            "milliseconds": round(getattr(row, own) / 1e3, 4),
            "share": round(getattr(row, own) / total, 4),
        }
        for row in rows
    ]


def host_seconds(side: Side, steps: int = 10) -> float:
    """The time that Python takes for a training step, of a network whose images are so few and small that the device
    never keeps it waiting."""
    for _ in range(2):
        side.training()
    start = time.perf_counter()
    for _ in range(steps):
        side.training()
    if side.device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps
