from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest

from awconv.ops import build

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
