"""A pytest plugin, ``-p tests.ops.figures``: adds up numbers that tests record as properties, and prints the sums."""

from __future__ import annotations

from collections import Counter
from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    figures: Counter[str] = Counter()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            figures.update({name: value for name, value in report.user_properties if isinstance(value, int | float)})
    if figures:
        terminalreporter.section("figures")
        for name, value in figures.items():
            terminalreporter.write_line(f"{name}: {value:,.0f}")
