from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from awconv.ops import build, layer

# Flags that build the C code as for processors with shorter vectors.
INSTRUCTIONS = ["", "-mno-avx512f", "-mno-avx"] if platform.machine() == "x86_64" else [""]


@pytest.fixture
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The C code built with fewer of the processor's instructions."""
    monkeypatch.setenv("CC", f"cc {request.param}".strip())
    build.library.cache_clear()
    yield
    monkeypatch.undo()
    build.library.cache_clear()


def interpreter_obstacle() -> str | None:
    """Why Triton's interpreter cannot run kernels here, if there is Triton."""
    major, minor, _ = importlib.metadata.version("triton").split(".", maxsplit=2)
    if (int(major), int(minor)) < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        return "the interpreter of Triton before 3.7 does not run with NumPy 2.4"
    return None


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def triton_device(request: pytest.FixtureRequest) -> str:
    """Where Triton's kernels run: by its interpreter on a CPU, and on a GPU where there is one."""
    pytest.importorskip("triton")
    if request.param == "cpu":
        if torch.cuda.is_available():
            pytest.skip("the interpreter is for machines without a GPU")
        if obstacle := interpreter_obstacle():
            pytest.skip(obstacle)
    device: str = request.param
    return device


@pytest.fixture
def forgotten_plans() -> None:
    """Nothing is known of calls of whole layers: what a test patches does not reach the next."""
    layer._KNOWN.clear()
