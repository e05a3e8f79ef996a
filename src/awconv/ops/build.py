"""Builds the package's C code with the machine's own compiler, at first use, and keeps it in a cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

_REALS = {torch.float32: "float", torch.float64: "double"}
# (a call of memcpy would take longer than most of the loops that look like one)
_FLAGS = ("-O3", "-march=native", "-fno-tree-loop-distribute-patterns", "-fopenmp", "-fPIC", "-shared", "-std=gnu11")
_log = logging.getLogger(__name__)


@functools.cache
def library(source: Path, dtype: torch.dtype) -> ctypes.CDLL | str:
    """A file of C code built for numbers of a type (its macro REAL), from the cache if it was built before.

    Args:
        source: the file.
        dtype: float32 or float64.

    Returns:
        The library, or why it cannot be had.
    """
    real = _REALS[dtype]
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if shutil.which(compiler[0]) is None:
        return f"its C code needs a C compiler, and there is no {compiler[0]!r} (name one in the variable CC)"
    try:
        path = _cache() / f"{source.stem}_{real}_{_fingerprint(compiler, source)}.so"
        if not path.exists():
            _build(compiler, source, real, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("slower algorithms are used, since the C code could not be built: %s", error)
        return f"its C code could not be built or loaded: {error}"


def _cache() -> Path:
    """A folder of the user's own, or a fresh one where that cannot be written."""
    chosen = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(chosen) if chosen else Path.home() / ".cache") / "awconv"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="awconv-"))


def _fingerprint(compiler: list[str], source: Path) -> str:
    """What a build depends on: the code, the compiler, and the processor that -march=native means."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    digest = hashlib.sha256(source.read_bytes())
    for part in (*compiler, *_FLAGS, platform.machine(), platform.processor(), _processor_features()):
        digest.update(part.encode() + b"\0")
    digest.update(version)
    return digest.hexdigest()[:16]


def _processor_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _build(compiler: list[str], source: Path, real: str, path: Path) -> None:
    """Builds beside the path and renames, so that processes which build at once do not see half a file."""
    _log.info("building %s with %s", path, shlex.join(compiler))
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".so", delete=False) as file:
        unfinished = Path(file.name)
    try:
        command = [*compiler, *_FLAGS, f"-DREAL={real}", "-o", str(unfinished), str(source)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if result.returncode:
            raise OSError(f"{shlex.join(command)} failed:\n{result.stderr.strip()[-2000:]}")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
