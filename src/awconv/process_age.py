"""How long this process has run."""

from __future__ import annotations

import os
import time
from pathlib import Path

_STAT = Path("/proc/self/stat")
_START = 19  # of the fields after the name of the program: proc(5), starttime
_MOST = 600.0  # seconds; more is a clock that counts otherwise


def process_age() -> float:
    """Seconds since this process started; 0 where the system does not tell.

    Example:
        >>> process_age() >= 0
        True
    """
    try:
        ticks = float(_STAT.read_text().rpartition(")")[2].split()[_START])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
    return age if 0 <= age < _MOST else 0.0
