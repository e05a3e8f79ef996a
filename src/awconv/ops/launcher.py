"""Launches of compiled kernels without Triton's Python, which takes longer than the kernels of a small layer.

Triton compiles a kernel and loads it. How the driver launches it then follows from what Triton says of it; where that
is not what is known here, there is no table, and Triton goes on launching.
"""

from __future__ import annotations

import ctypes
import functools
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from awconv.ops.build import library

_SOURCE = Path(__file__).with_name("launch.c")
_DRIVER = b"libcuda.so.1"
ALIGNMENT = 16  # bytes, of all addresses: Triton compiles other code for others
_MOST_PARAMETERS = 64
_ADDRESS, _INTEGER, _FLOAT = ("u64", "b64"), ("u32", "s32", "b32"), ("f32", "b32")  # a parameter's types in PTX
_SCRATCH = ("global_scratch_size", "profile_scratch_size")  # each a parameter more, an address: null where it is 0
# What a kernel may be that a plain launch is not right for, and what says that it is none.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "num_ctas": (1,),
    "cluster_dims": ((1, 1, 1), [1, 1, 1]),
    "launch_cooperative_grid": (False,),
    "launch_pdl": (False,),
    "tensordesc_meta": ([], (), None),
    "instrumentation_mode": ("",),
    "global_scratch_size": (0,),
    "profile_scratch_size": (0,),
}


class Code(NamedTuple):
    """How the driver launches a compiled kernel.

    Attributes:
        function: the driver's handle.
        threads: of a program.
        shared: bytes of memory of a program.
        hidden: parameters after the kernel's own, which are null.
        compiled: Triton's object, with which the function lives.
    """

    function: int
    threads: int
    shared: int
    hidden: int
    compiled: Any

    @classmethod
    def of(cls, compiled: Any, tensors: int, numbers: Sequence[float]) -> Code | None:
        """Of what Triton compiled for some tensors, none of them None, and then numbers; None where it is unusual."""
        facts, assembly = getattr(compiled, "metadata", None), getattr(compiled, "asm", {})
        if facts is None or "ptx" not in assembly or not isinstance(getattr(compiled, "function", None), int):
            return None
        if facts.target.backend != "cuda" or facts.target.warp_size != 32:
            return None
        if any(getattr(facts, name, usual[0]) not in usual for name, usual in _PLAIN.items()):
            return None
        scratch = sum(hasattr(facts, name) for name in _SCRATCH)
        own = [_ADDRESS] * tensors + [_FLOAT if isinstance(number, float) else _INTEGER for number in numbers]
        expected, types = own + [_ADDRESS] * scratch, parameter_types(assembly["ptx"])
        if len(types) != len(expected) or len(types) > _MOST_PARAMETERS:
            return None
        if any(name not in names for name, names in zip(types, expected, strict=True)):
            return None
        return cls(compiled.function, 32 * facts.num_warps, facts.shared, scratch, compiled)


def parameter_types(ptx: str) -> list[str]:
    """The types of the parameters of the only kernel in some PTX, none if there are several."""
    entries = re.findall(r"\.entry\s+[\w$.]+\s*\(([^)]*)\)", ptx)
    if len(entries) != 1:
        return []
    return re.findall(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)", entries[0])


class Parameter(NamedTuple):
    """What a kernel gets for a parameter: a number, or one of the arguments and an offset."""

    argument: int
    value: int = 0

    @classmethod
    def number(cls, value: int) -> Parameter:
        return cls(-1, value)


class Table:
    """Some launches, one after another.

    Args:
        device: on which they run.
        launches: the code, the number of programs and the parameters of each.
        addresses: how many arguments are, the first.
        numbers: a letter of ``struct`` for each other argument.
    """

    def __init__(
        self, device: int, launches: Sequence[tuple[Code, int, Sequence[Parameter]]], addresses: int, numbers: str
    ) -> None:
        self._device, self._codes = device, [code for code, _, _ in launches]
        table = [addresses, len(launches)]
        for code, programs, parameters in launches:
            passed = [*parameters, *[Parameter.number(0)] * code.hidden]
            table += [code.function, programs, code.threads, code.shared, len(passed)]
            for parameter in passed:
                table += parameter
        self._table = struct.pack(f"={len(table)}q", *table)
        self._pack = struct.Struct(f"={addresses}Q" + "".join(f"{letter}4x" for letter in numbers)).pack
        self._launch = _driver().launch_all

    def launch(self, addresses: Sequence[int], numbers: Sequence[float]) -> bool:
        """Whether the kernels were launched, on the device's current stream. They are not where an address is not
        aligned, or the thread is new to the driver; Triton can launch them then.

        Raises:
            RuntimeError: the driver refused a launch.
        """
        stream = torch._C._cuda_getCurrentRawStream(self._device)  # type: ignore[attr-defined]
        error = self._launch(self._table, self._pack(*addresses, *numbers), stream)
        if error > 0:
            raise RuntimeError(f"cuLaunchKernel failed: {_driver().error_name(error).decode()} ({error})")
        return bool(error == 0)


def launches_directly() -> bool:
    """Whether there can be tables: a compiler built what launches them, and it found the driver."""
    return _driver() is not None


@functools.cache
def _driver() -> Any:
    built = library(_SOURCE, torch.float32)
    if isinstance(built, str) or not built.open_driver(_DRIVER):
        return None
    built.launch_all.argtypes, built.launch_all.restype = [ctypes.c_char_p] * 2 + [ctypes.c_void_p], ctypes.c_int
    built.error_name.argtypes, built.error_name.restype = [ctypes.c_int], ctypes.c_char_p
    return built
