"""The CPU half of the fused algorithm: builds cpu.c with the machine's C compiler, and calls it."""

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
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awconv.ops.problem import Problem

_SOURCE = Path(__file__).with_name("cpu.c")
_REALS = {torch.float32: "float", torch.float64: "double"}  # others are computed in single precision, and rounded once
# (a call of memcpy would take longer than most of the loops that look like one)
_FLAGS = ("-O3", "-march=native", "-fno-tree-loop-distribute-patterns", "-fopenmp", "-fPIC", "-shared", "-std=gnu11")
_MAX_TAPS = 512  # of cpu.c
_AXES = 3  # one and two spatial axes are the last ones of three
_log = logging.getLogger(__name__)


class _Sizes(ctypes.Structure):
    """``problem_t`` of cpu.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "groups", "group_out", "group_in", "blocks")),
        *((name, ctypes.c_int64 * _AXES) for name in ("size", "out_size", "kernel", "stride", "dilation", "padding")),
        ("threads", ctypes.c_int64),
    )


def obstacle(problem: Problem) -> str | None:
    """Why the C code cannot run a problem; building it is tried at the first call."""
    if problem.taps > _MAX_TAPS:
        return f"its C code takes kernels of {_MAX_TAPS} taps at the most"
    reason: str | None = _why_not_built(_REALS[_computed_in(problem.dtype)])
    return reason


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _why_not_built(real: str) -> str | None:
    """Why there is no library, a constant to torch.compile."""
    library = _library(real)
    return library if isinstance(library, str) else None


@functools.cache
def _library(real: str) -> ctypes.CDLL | str:
    """The C code built for ``float`` or ``double``, from the cache if it was built before; or why it cannot be."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if shutil.which(compiler[0]) is None:
        return f"its C code needs a C compiler, and there is no {compiler[0]!r} (name one in the variable CC)"
    try:
        path = _cache() / f"fused_{real}_{_fingerprint(compiler, real)}.so"
        if not path.exists():
            _build(compiler, real, path)
        library = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("the fused algorithm is not available, slower ones are used: %s", error)
        return f"its C code could not be built or loaded: {error}"
    library.workspace_elements.restype = ctypes.c_int64
    return library


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


def _fingerprint(compiler: list[str], real: str) -> str:
    """What a build depends on: the code, the compiler, and the processor that -march=native means."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    digest = hashlib.sha256(_SOURCE.read_bytes())
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


def _build(compiler: list[str], real: str, path: Path) -> None:
    """Builds beside the path and renames, so that processes which build at once do not see half a file."""
    _log.info("building %s with %s", path, shlex.join(compiler))
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".so", delete=False) as file:
        unfinished = Path(file.name)
    try:
        command = [*compiler, *_FLAGS, f"-DREAL={real}", "-o", str(unfinished), str(_SOURCE)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if result.returncode:
            raise OSError(f"{shlex.join(command)} failed:\n{result.stderr.strip()[-2000:]}")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _loaded(dtype: torch.dtype) -> ctypes.CDLL:
    library = _library(_REALS[dtype])
    if isinstance(library, str):  # an exported program can come to a machine without a compiler
        raise RuntimeError(f"awconv::fused cannot run here: {library}")
    return library


def _axes(values: Iterable[int], absent: int) -> ctypes.Array[ctypes.c_int64]:
    sizes = list(values)
    return (ctypes.c_int64 * _AXES)(*[absent] * (_AXES - len(sizes)), *sizes)


@functools.lru_cache(maxsize=4096)
def _sizes(
    input_size: tuple[int, ...],
    weight_size: tuple[int, ...],
    blocks: int,
    output_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    threads: int,
) -> Any:
    """A pointer to ``problem_t``."""
    sizes = _Sizes(
        input_size[0],
        groups,
        weight_size[0] // groups,
        weight_size[1],
        blocks,
        _axes(input_size[2:], 1),
        _axes(output_size, 1),
        _axes(weight_size[2:], 1),
        _axes(stride, 1),
        _axes(dilation, 1),
        _axes(padding[::2], 0),  # what comes after follows from the output's size
        threads,
    )
    return ctypes.byref(sizes)


def forward(
    input: Tensor,
    weight: Tensor,
    gain: Tensor,
    output_size: tuple[int, ...],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """The output, of shape (N, C2, \\*output_size)."""
    input, weight, gain = _prepared(input, weight, gain)
    library = _loaded(input.dtype)
    sizes = _sizes(
        input.shape,
        weight.shape,
        gain.shape[2],
        output_size,
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
        torch.get_num_threads(),
    )
    output = input.new_empty(input.shape[0], weight.shape[0], *output_size)
    workspace = input.new_empty(library.workspace_elements(sizes, 0))
    library.forward(sizes, *map(_pointer, (input, weight, gain, output, workspace)))
    return output


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    gain: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of input, weight and gain, None where not needed."""
    grad_output, input, weight, gain = _prepared(grad_output, input, weight, gain)
    library = _loaded(input.dtype)
    sizes = _sizes(
        input.shape,
        weight.shape,
        gain.shape[2],
        tuple(grad_output.shape[2:]),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
        torch.get_num_threads(),
    )
    sums = needs[1] or needs[2]  # both gradients are made of the same sums
    grads = [
        torch.empty_like(tensor) if made else None
        for tensor, made in zip((input, weight, gain), (needs[0], sums, sums), strict=True)
    ]
    workspace = input.new_empty(library.workspace_elements(sizes, 1))
    library.backward(sizes, *map(_pointer, (grad_output, input, weight, gain, *grads, workspace)))
    return tuple(grad if needed else None for grad, needed in zip(grads, needs, strict=True))


def _prepared(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = _computed_in(tensors[0].dtype)
    return tuple(tensor.to(dtype).contiguous() for tensor in tensors)


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
