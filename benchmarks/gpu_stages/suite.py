"""The tests that need a GPU, in a process of their own."""

from __future__ import annotations

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

_ROOT = Path(__file__).parent.parent.parent
_SECONDS, _TO_END = 150.0, 10.0
_LONGEST = 6000  # characters of the failures
_OUTCOME = re.compile(r" (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")


def entries(settings: Settings) -> list[Entry]:
    """The whole suite; in a quick run one file of it."""
    return [Entry("pytest -m gpu", 0 if settings.quick else 60, partial(_pytest, settings))]


def _pytest(settings: Settings, figures: dict[str, Any], save: Callable[[], None]) -> None:
    """Counts outcomes in the log, which is there however the tests end."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-vv", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    if settings.quick:
        command.append("tests/ops/test_gpu.py")
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
    text = log.read_text(errors="replace")
    figures["outcomes"] = dict(Counter(_OUTCOME.findall(text.partition("= FAILURES =")[0])))
    figures["failed"] = re.findall(r"^(?:FAILED|ERROR) (\S+::.*)$", text, re.MULTILINE)
    if figures["failed"]:
        figures["failures"] = text[-_LONGEST:]
