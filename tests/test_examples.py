"""The scripts of examples/ run from end to end and come to what they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import ROOT

# Each script, and what its output has to have.
SCRIPTS = {
    "engineer.py": (
        r"china +48 +\d",
        r"aw_resnet8_cifar.photos: val accuracy \d+\.\d\d %, in weights/aw_resnet8_cifar.photos",
        r"photos/test/china/56-60.jpg +china",
        r"the first image is china",
        r"model.onnx differs from PyTorch by at most \d.*e-0[5-9]",
    ),
    "researcher.py": (
        r"3\.conv1 +AWConv2d 16 to 16, 3x3",
        r"seed 2: plain 9\d\.\d\d %, AW 9\d\.\d\d %",
        r"mean difference [+-]\d\S* \(95 % interval [+-]\d\S* to [+-]\d\S*\), 3 pairs",
        r"block_net: plain against aw on Digits",
        r"aw +block_net",
    ),
    "student.py": (
        r"the layer's branch gives the same: True",
        r"the layer gives the same: True",
        r"AW, MaxBranch +9\d\.\d%",
    ),
}


# The researcher's takes half a minute. Its journey is that of docs/own_loop.md, whose code runs in every test.
SLOW = ("researcher.py",)


@pytest.mark.parametrize(
    "script", [pytest.param(name, marks=pytest.mark.campaign if name in SLOW else ()) for name in SCRIPTS]
)
def test_a_script_runs(script: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    for expected in SCRIPTS[script]:
        assert re.search(expected, ran.stdout), ran.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_short(script: str) -> None:
    assert len((ROOT / "examples" / script).read_text().splitlines()) <= 90


def test_each_script_is_tested() -> None:
    assert sorted(path.name for path in (ROOT / "examples").glob("*.py")) == sorted(SCRIPTS)
