"""The tests that need a GPU, in a process of their own."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gpu_stages.journal import Entry, Settings

OPTIONS = ("-vv", "-rfE", "--tb=short", "--continue-on-collection-errors")
_ROOT = Path(__file__).parent.parent.parent
_SECONDS, _TO_END = 150.0, 10.0
_MOST_WORKERS = 12  # on one card: each takes half a gigabyte of it
_LONGEST, _MOST_FAILURES = 1500, 30  # characters of a failure's report, the last ones
_OUTCOME = re.compile(r" (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")


def entries(settings: Settings) -> list[Entry]:
    """The whole suite; in a quick run one file of it."""
    return [Entry("pytest -m gpu", 0 if settings.quick else 60, partial(_pytest, settings))]


def _pytest(settings: Settings, figures: dict[str, Any], save: Callable[[], None]) -> None:
    """Counts outcomes in the log, which is there however the tests end."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", *OPTIONS]
    if settings.quick:
        command.append("tests/ops/test_gpu.py")
    elif importlib.util.find_spec("xdist"):  # compilers take most of the time, and a core each
        command += ["-n", str(max(1, min(_MOST_WORKERS, (os.cpu_count() or 1) - 2)))]
    figures["command"] = command[1:]
    seconds = max(1.0, min(_SECONDS, settings.deadline - time.time() - 2 * _TO_END))
    log = settings.out / "tests.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=_ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            figures["status"] = process.wait(seconds)
        except subprocess.TimeoutExpired:
            figures["stopped_after_seconds"] = seconds
            process.send_signal(signal.SIGINT)  # after which pytest still tells of the failures so far
            try:
                process.wait(_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    figures |= read_log(log.read_text(errors="replace"))


def read_log(text: str) -> dict[str, Any]:
    """What pytest has said so far, with ``OPTIONS``.

    Returns:
        ``outcomes``, how many tests had each; ``failed``, which and with what message; ``failures``, the end of each
        one's report by its name; ``not_collected``, files that could not be imported.
    """
    progress = re.split(r"^=+ (?:ERRORS|FAILURES) =+$", text, maxsplit=1, flags=re.MULTILINE)[0]
    parts = re.split(r"^=+ (.+?) =+$", text, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    told = sections.get("ERRORS", "") + sections.get("FAILURES", "")
    reports = re.split(r"^_{3,} (.+?) _{3,}$", told, flags=re.MULTILINE)[1:]
    names, bodies = reports[::2], reports[1::2]
    return {
        "outcomes": dict(Counter(_OUTCOME.findall(progress))),
        "failed": re.findall(r"^(?:FAILED|ERROR) (\S+::.*)$", text, re.MULTILINE),
        "not_collected": re.findall(r"^ERROR (\S+\.py)(?: -.*)?$", text, re.MULTILINE),
        "failures": {
            name: body.strip()[-_LONGEST:] for name, body in list(zip(names, bodies, strict=True))[:_MOST_FAILURES]
        },
    }
