"""Inputs that are spoiled by rule, at every door: an error of one line, and nothing lost.

``make campaign`` tries all; the ordinary tests a few of each door. A failure names the door and the seed, which make
the same input again: ``pytest tests/robustness -m campaign -k options-17``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from awconv import AWConv2d
from tests.robustness.archives import archives
from tests.robustness.boxes import coco, voc
from tests.robustness.commands import dictionaries, options, outputs, recipes, run_files
from tests.robustness.harness import Case, run
from tests.robustness.others import others
from tests.robustness.pictures import detector, drawing, images
from tests.robustness.shards import parquet, tar
from tests.robustness.weights import checkpoints, trained, weights

# How many inputs a campaign tries, and the ordinary tests.
DOORS: dict[str, tuple[Callable[[int], Case], int, int]] = {
    "options": (options, 400, 5),
    "dictionaries": (dictionaries, 120, 3),
    "recipes": (recipes, 250, 5),
    "run_files": (run_files, 150, 4),
    "outputs": (outputs, 48, 3),
    "checkpoints": (checkpoints, 280, 6),
    "weights": (weights, 108, 3),
    "images": (images, 250, 4),
    "drawing": (drawing, 60, 2),
    "parquet": (parquet, 150, 3),
    "tar": (tar, 150, 3),
    "others": (others, 100, 3),
    "coco": (coco, 250, 4),
    "voc": (voc, 200, 3),
    "archives": (archives, 120, 3),
}


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    """What starts a process once, such as the C compiler, has done so before the inputs are tried."""
    AWConv2d(4, 4, 3)(torch.zeros(2, 4, 8, 8)).sum().backward()
    AWConv2d(4, 4, 3, dtype=torch.float64)(torch.zeros(2, 4, 8, 8, dtype=torch.float64)).sum().backward()
    trained()
    detector()


def _seeds(few: bool) -> list[pytest.param]:
    return [
        pytest.param(door, seed, id=f"{door}-{seed}", marks=() if few else pytest.mark.campaign)
        for door, (_, campaign, ordinary) in DOORS.items()
        for seed in (range(ordinary) if few else range(ordinary, campaign))
    ]


@pytest.mark.parametrize(("door", "seed"), [*_seeds(few=True), *_seeds(few=False)])
def test_a_spoiled_input_is_an_error_of_one_line(
    door: str, seed: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    case = DOORS[door][0](seed)
    outcome = run(case, tmp_path)
    record_property(f"spoiled {door}", 1)
    assert not outcome.faults, f"{case.name}\n" + "\n".join(outcome.faults)
