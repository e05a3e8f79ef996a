"""Inputs spoiled by rule, at every door: each gives an error of one line, and nothing is lost.

``make campaign`` tries all inputs, the ordinary tests a few of each door. A failure names the door and the seed, which
repeat the input: ``pytest tests/robustness -m campaign -k options-17``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.robustness.doors import DOORS

Try = Callable[[str, int, Path], dict[str, Any]]


@pytest.fixture(scope="module")
def attempt() -> Iterator[Try]:
    """Tries an input in a process of its own."""
    command = [sys.executable, "-m", "tests.robustness.doors"]
    root, environment = Path(__file__).parent.parent.parent, os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(door: str, seed: int, folder: Path) -> dict[str, Any]:
            print(json.dumps([door, seed, str(folder)]), file=process.stdin, flush=True)
            answer: dict[str, Any] = json.loads(process.stdout.readline())
            return answer

        yield ask
        process.stdin.close()


def _seeds(few: bool) -> list[Any]:
    return [
        pytest.param(door, seed, id=f"{door}-{seed}", marks=() if few else pytest.mark.campaign)
        for door, (_, campaign, ordinary) in DOORS.items()
        for seed in (range(ordinary) if few else range(ordinary, campaign))
    ]


@pytest.mark.parametrize(("door", "seed"), [*_seeds(few=True), *_seeds(few=False)])
def test_a_spoiled_input_is_an_error_of_one_line(
    door: str, seed: int, tmp_path: Path, attempt: Try, record_property: Callable[[str, object], None]
) -> None:
    outcome = attempt(door, seed, tmp_path)
    record_property(f"spoiled {door}", 1)
    assert not outcome["faults"], "\n".join([outcome["case"], *outcome["faults"]])
