"""The cores that this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")  # of this container, which may have a share of the machine's time


def usable_cores(groups: Path = _GROUPS) -> int:
    """The number of cores that this process may use: those that it may run on, and no more than its container's time.

    Args:
        groups: where Linux tells the container's limits, of version 2 or 1.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    share = _share(groups)
    return cores if share is None else max(1, min(cores, math.ceil(share)))


def _share(groups: Path) -> float | None:
    """The container's time for each second of the clock, in seconds; None without a limit."""
    try:
        if (groups / "cpu.max").is_file():
            quota, period = (groups / "cpu.max").read_text().split()
        else:
            quota, period = ((groups / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return None if quota == "max" or float(quota) <= 0 else float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
