"""All doors, and a process that tries their inputs.

The command line runs in forks of this process, since its imports take seconds. The process does nothing else, so it has
no threads whose locks a fork would keep.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from awconv import AWConv2d
from tests.robustness.archives import archives
from tests.robustness.boxes import DETECTORS_OPTIONS, coco, detectors_options, voc
from tests.robustness.commands import OPTIONS, dictionaries, options, outputs, recipes, run_files
from tests.robustness.harness import Case, run
from tests.robustness.others import others
from tests.robustness.pictures import detector, drawing, images
from tests.robustness.shards import parquet, tar
from tests.robustness.weights import checkpoints, resumed, trained, weights

# How many inputs a campaign tries, and the ordinary tests.
DOORS: dict[str, tuple[Callable[[int], Case], int, int]] = {
    "options": (options, len(OPTIONS), 5),
    "detectors_options": (detectors_options, len(DETECTORS_OPTIONS), 3),
    "dictionaries": (dictionaries, 120, 3),
    "recipes": (recipes, 250, 5),
    "run_files": (run_files, 150, 4),
    "outputs": (outputs, 48, 3),
    "checkpoints": (checkpoints, 280, 6),
    "resumed": (resumed, 300, 3),
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


def main() -> None:
    """Tries inputs: reads lines of a door, a seed and an empty folder as JSON, and answers with what came of each."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what else is printed must not come between the answers
    torch.set_num_threads(1)
    # What starts a process once, such as the C compiler, has done so before the inputs are tried.
    AWConv2d(4, 4, 3)(torch.zeros(2, 4, 8, 8)).sum().backward()
    AWConv2d(4, 4, 3, dtype=torch.float64)(torch.zeros(2, 4, 8, 8, dtype=torch.float64)).sum().backward()
    trained()
    detector()
    for line in sys.stdin:
        door, seed, folder = json.loads(line)
        case = DOORS[door][0](seed)
        outcome = run(case, Path(folder))
        print(json.dumps({"case": case.name, **asdict(outcome)}), file=answers, flush=True)


if __name__ == "__main__":
    main()
