"""What the kernels for GPUs share: Triton, launches, the layout of images, sizes of tiles."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from awconv.ops.launcher import ALIGNMENT, Code, Parameter, Table, launches_directly


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def triton_obstacle() -> str | None:
    """Why Triton's kernels cannot be compiled here, a constant to torch.compile; None if they can."""
    return _triton_obstacle()


@functools.cache  # asked at every call of a layer
def _triton_obstacle() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "its kernels for GPUs need Triton, which is not installed"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "its kernels for GPUs need compute capability 8.0"
    return None


def precision_of_products() -> str:
    """How products of float32 are rounded: as PyTorch's own convolutions do it."""
    convolutions: Any = torch.backends.cudnn
    return "tf32" if convolutions.conv.fp32_precision == "tf32" else "ieee"


def is_channels_last(image: Tensor) -> bool:
    """Whether an image of two spatial axes has its channels last, and cannot be read otherwise."""
    return image.dim() == 4 and image.is_contiguous(memory_format=torch.channels_last) and not image.is_contiguous()


def empty_like_image(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised image, with its channels last where those of another are."""
    last = torch.channels_last if is_channels_last(like) else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=last)


def power_of_two(size: int, most: int, least: int = 1) -> int:
    """The power of two that holds a number of channels or positions, within what a tile may have."""
    return min(max(1 << (size - 1).bit_length(), least), most)


_Kind = tuple[Any, ...]


class _Compiled(NamedTuple):
    """What Triton made of a kernel, and how the driver launches it; None where only Triton can."""

    compiled: Any
    code: Code | None


class Kernel:
    """A Triton kernel with its constants. On a CPU, Triton's interpreter runs it.

    A later launch does not ask Triton again which code suits its arguments, which takes longer than a small layer.
    Their dtypes decide it, and whether addresses are multiples of 16; no number does.

    Args:
        module: where the kernel is, imported at the first launch, since it imports Triton.
        name: of the kernel, whose parameters are tensors, numbers in ``do_not_specialize``, and the constants.
        constants: by name.
        warps: of a program.
        stages: of the pipeline of its loops.
    """

    def __init__(self, module: str, name: str, constants: dict[str, Any], warps: int = 4, stages: int = 3) -> None:
        self.module, self.name, self.constants = module, name, constants
        self.options = dict(num_warps=warps, num_stages=stages)
        self._compiled: dict[_Kind, _Compiled] = {}
        self._tables: dict[tuple[int, _Kind], Table] = {}

    def launch(self, programs: int, tensors: tuple[Tensor | None, ...], numbers: tuple[float, ...]) -> None:
        """Runs the kernel on the device of its first tensor."""
        first = tensors[0]
        assert first is not None
        device = first.get_device()
        if not first.is_cuda:
            self._kernel[(programs,)](*tensors, *numbers, **self.constants)
            return
        kind = _kind(device, tensors)
        with on_device(device):
            table = self._tables.get((programs, kind))
            if table is not None and table.launch(addresses(tensors), numbers):
                return
            code = self.launch_by_triton(programs, tensors, numbers)
            if code is not None and table is None:
                count = len(addresses(tensors))
                passed = [Parameter(index) for index in range(count + len(numbers))]
                self._tables[programs, kind] = Table(device, [(code, programs, passed)], count, letters(numbers))

    def launch_by_triton(
        self, programs: int, tensors: tuple[Tensor | None, ...], numbers: tuple[float, ...]
    ) -> Code | None:
        """Runs the kernel on the current device, that of its first tensor.

        Returns:
            How the driver launches the same code for other addresses and numbers, where it can.
        """
        assert tensors[0] is not None
        kind = _kind(tensors[0].get_device(), tensors)
        aligned = all(address % ALIGNMENT == 0 for address in addresses(tensors))
        known = self._compiled.get(kind)
        if known is not None and aligned:
            known.compiled[(programs, 1, 1)](*tensors, *numbers, *self._values)
            return known.code
        compiled = self._kernel[(programs,)](*tensors, *numbers, **self.constants, **self.options)
        if not aligned or compiled is None:  # which a hook of Triton's compiler makes of it
            return None
        code = Code.of(compiled, len(addresses(tensors)), numbers) if launches_directly() else None
        self._compiled[kind] = _Compiled(compiled, code)
        return code

    def compile(self, dtypes: Sequence[torch.dtype | None], numbers: tuple[float, ...]) -> None:
        """Compiles it for tensors of these dtypes on the current device, and for numbers as at a launch."""
        self._kernel.warmup(*dtypes, *numbers, grid=(1,), **self.constants, **self.options)

    @functools.cached_property
    def _kernel(self) -> Any:
        return getattr(importlib.import_module(self.module), self.name)

    @functools.cached_property
    def _values(self) -> list[Any]:
        """Of the constants, in the kernel's order."""
        return [self.constants[name] for name in self._kernel.arg_names[-len(self.constants) :]]


@contextmanager
def compiling_side_by_side() -> Iterator[None]:
    """What is asked for inside, Triton compiles in as many threads as there are processors: it is there at the end."""
    triton = importlib.import_module("triton")
    mode = importlib.import_module("triton.runtime._async_compile").active_mode
    outer = mode.get()  # of a caller, beside which Triton allows no other
    mode.set(None)
    try:
        with ThreadPoolExecutor(os.cpu_count()) as executor, triton.AsyncCompileMode(executor):
            yield
    finally:
        mode.set(outer)  # Triton before 3.8 leaves its own where a compilation fails or is interrupted


def addresses(tensors: Iterable[Tensor | None]) -> list[int]:
    """Of those that are tensors."""
    return [tensor.data_ptr() for tensor in tensors if tensor is not None]


def on_device(index: int) -> AbstractContextManager[Any]:
    """Inside, a device is the current one."""
    current = torch._C._cuda_getDevice()  # type: ignore[attr-defined]
    return nullcontext() if current == index else torch.cuda.device(index)


def letters(numbers: Iterable[float]) -> str:
    """The formats of numbers in ``struct``."""
    return "".join("f" if isinstance(number, float) else "i" for number in numbers)


def _kind(device: int, tensors: tuple[Tensor | None, ...]) -> _Kind:
    """What decides the code but alignment."""
    return (device, *[None if tensor is None else tensor.dtype for tensor in tensors])


class Launch(NamedTuple):
    """All of a launch but its tensors, and numbers that are no integers."""

    kernel: Kernel
    programs: int
    integers: tuple[int, ...]

    def run(self, *tensors: Tensor | None, floats: tuple[float, ...] = ()) -> None:
        """Runs the kernel on the device of its first tensor."""
        self.kernel.launch(self.programs, tensors, (*self.integers, *floats))


class Operand(NamedTuple):
    """What a kernel of a sequence gets as a tensor: one of the sequence's, or what lies in it from an offset on.

    Attributes:
        tensor: its place among the sequence's.
        offset: in bytes, a multiple of 16.
        dtype: of what lies there; None for the tensor itself.
    """

    tensor: int
    offset: int = 0
    dtype: torch.dtype | None = None

    def of(self, tensors: list[Tensor]) -> Tensor:
        whole = tensors[self.tensor]
        return whole if self.dtype is None else whole[self.offset :].view(self.dtype)


class Step(NamedTuple):
    """A launch of a sequence, with what its kernel gets as tensors and which of the sequence's floats it gets."""

    launch: Launch
    operands: tuple[Operand | None, ...]
    floats: tuple[int, ...] = ()


class Launches:
    """Launches one after another, in one call of the driver where all were launched before.

    Args:
        steps: in their order. The dtypes of the tensors are always the same, and those with parts are of bytes.
    """

    def __init__(self, steps: list[Step]) -> None:
        self._steps = steps
        self._tables: dict[int, Table] = {}

    def compile(self, dtypes: Sequence[torch.dtype], floats: tuple[float, ...] = ()) -> None:
        """Compiles the kernels for tensors of these dtypes, for the current device."""
        for step in self._steps:
            passed = [None if operand is None else operand.dtype or dtypes[operand.tensor] for operand in step.operands]
            step.launch.kernel.compile(passed, (*step.launch.integers, *(floats[index] for index in step.floats)))

    def run(self, tensors: list[Tensor], floats: tuple[float, ...] = ()) -> None:
        """Runs the kernels on the device of the first tensor, which all are on."""
        device = tensors[0].get_device()
        if not tensors[0].is_cuda:
            for step in self._steps:
                step.launch.kernel.launch(step.launch.programs, *_arguments(step, tensors, floats))
            return
        with on_device(device):
            table = self._tables.get(device)
            if table is not None and table.launch(list(map(Tensor.data_ptr, tensors)), floats):
                return
            codes = [
                step.launch.kernel.launch_by_triton(step.launch.programs, *_arguments(step, tensors, floats))
                for step in self._steps
            ]
            if table is None and None not in codes:
                self._tables[device] = self._table(device, codes, len(tensors), letters(floats))

    def _table(self, device: int, codes: list[Code | None], count: int, numbers: str) -> Table:
        launches = []
        for step, code in zip(self._steps, codes, strict=True):
            assert code is not None
            passed = [Parameter(operand.tensor, operand.offset) for operand in step.operands if operand is not None]
            passed += map(Parameter.number, step.launch.integers)
            passed += [Parameter(count + index) for index in step.floats]
            launches.append((code, step.launch.programs, passed))
        return Table(device, launches, count, numbers)


def _arguments(
    step: Step, tensors: list[Tensor], floats: tuple[float, ...]
) -> tuple[tuple[Tensor | None, ...], tuple[float, ...]]:
    """The tensors and numbers of a launch."""
    passed = tuple(None if operand is None else operand.of(tensors) for operand in step.operands)
    return passed, (*step.launch.integers, *(floats[index] for index in step.floats))


def divider(divisor: int) -> tuple[int, int]:
    """Multiplier (in 32 bits, signed) and shift by which kernels divide: see ``divide`` in ``triton_arithmetic.py``."""
    shift = (divisor - 1).bit_length()
    multiplier = -(-(2 ** (31 + shift)) // divisor)
    return multiplier - 2**32 if multiplier >= 2**31 else multiplier, shift
