"""Launches without Triton's Python, by a driver that only notes what it gets, of kernels compiled for a GPU."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from awconv.ops import gpu, launcher
from awconv.ops.gpu import Kernel
from awconv.ops.launcher import Code, Parameter, Table, parameter_types

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

# Numbers of 64 bits: of a launch the function, grid and block, shared memory, stream, and three parameters.
DRIVER = """
#include <stdint.h>
#include <string.h>
int64_t notes[1000], count, parameters = 3;
int failure;  // not error, a function of the C library
void *context = &notes;
int cuCtxGetCurrent(void **current) { *current = context; return 0; }
int cuGetErrorName(int error, const char **name) { *name = "CUDA_ERROR_OF_A_TEST"; return error == 7; }
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **passed, void **extra) {
    const int64_t facts[] = {(intptr_t)function, gx, gy, gz, bx, by, bz, shared, (intptr_t)stream, extra == 0};
    for (int i = 0; i < 10; i++) notes[count++] = facts[i];
    for (int i = 0; i < parameters; i++) notes[count++] = *(int64_t *)passed[i];
    return failure;
}
"""


@triton.jit(do_not_specialize=["size", "scale"])
def scaled(source, unit, target, size, scale, block: tl.constexpr):
    index = tl.program_id(0) * block + tl.arange(0, block)
    value = tl.load(source + index, mask=index < size, other=0) * scale
    if unit is not None:
        value *= tl.load(unit)
    tl.store(target + index, value, mask=index < size)


class Driver:
    """A library that stands for CUDA's."""

    def __init__(self, folder: Path) -> None:
        (folder / "driver.c").write_text(DRIVER)
        self.path = folder / "driver.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", self.path, folder / "driver.c"], check=True)
        self.library = ctypes.CDLL(str(self.path))

    def variable(self, name: str, kind: Any = ctypes.c_int64) -> Any:
        return kind.in_dll(self.library, name)

    def take(self) -> list[tuple[int, ...]]:
        """The launches since the last time."""
        each, count = 10 + self.variable("parameters").value, self.variable("count")
        notes = (ctypes.c_int64 * 1000).in_dll(self.library, "notes")[: count.value]
        count.value = 0
        return [tuple(notes[start : start + each]) for start in range(0, len(notes), each)]


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    made = Driver(tmp_path)
    monkeypatch.setattr(launcher, "_DRIVER", str(made.path).encode())
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 1000 + device, raising=False)
    launcher._driver.cache_clear()
    yield made
    launcher._driver.cache_clear()


def table(launches: int = 1) -> Table:
    """Launches with an address, 64 bytes further, and a number."""
    passed = (Parameter(0), Parameter(1, 64), Parameter(2))
    code = Code(555, 128, 2048, 0, None)
    return Table(2, [(code._replace(function=555 + index), 7, passed) for index in range(launches)], 2, "i")


def test_a_table_launches_kernels_in_turn(driver: Driver) -> None:
    assert table(2).launch([4096, 8192], [-5])
    facts = (7, 1, 1, 128, 1, 1, 2048, 1002, 1)
    assert driver.take() == [(function, *facts, 4096, 8256, 2**32 - 5) for function in (555, 556)]


def test_numbers_known_before_and_what_follows_them(driver: Driver) -> None:
    driver.variable("parameters").value = 5
    passed = (Parameter(0), Parameter.number(-3), Parameter(1), Parameter(2))
    made = Table(0, [(Code(1, 32, 0, 1, None), 1, passed)], 1, "fi")
    assert made.launch([32], [0.1, 9])
    ((*_, address, known, real, integer, hidden),) = driver.take()
    assert (address, known, integer, hidden) == (32, -3, 9, 0)
    assert real == struct.unpack("i", struct.pack("f", 0.1))[0]


def test_no_programs_are_no_launch(driver: Driver) -> None:
    code = Code(555, 128, 2048, 0, None)
    assert Table(0, [(code, 0, [Parameter(0)] * 3), (code, 1, [Parameter(0)] * 3)], 1, "").launch([4096], [])
    assert [programs for _, programs, *_ in driver.take()] == [1]


def test_addresses_that_are_not_aligned_are_left_to_triton(driver: Driver) -> None:
    assert not table(2).launch([4096, 8200], [1])
    assert driver.take() == []


def test_a_thread_without_a_context_is_left_to_triton(driver: Driver) -> None:
    driver.variable("context", ctypes.c_void_p).value = None
    assert not table().launch([4096, 8192], [1])
    assert driver.take() == []


@pytest.mark.parametrize(("error", "name"), [(701, "CUDA_ERROR_OF_A_TEST"), (7, "unknown")])
def test_errors_are_raised_with_their_name(driver: Driver, error: int, name: str) -> None:
    driver.variable("failure", ctypes.c_int).value = error
    with pytest.raises(RuntimeError, match=rf"cuLaunchKernel failed: {name} \({error}\)"):
        table(2).launch([4096, 8192], [1])
    assert len(driver.take()) == 1


def test_no_driver_and_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher._driver.cache_clear()
    monkeypatch.setattr(launcher, "_DRIVER", b"libno.so.1")
    assert not launcher.launches_directly()
    launcher._driver.cache_clear()
    monkeypatch.setattr(launcher, "library", lambda *arguments: "there is no compiler")
    assert not launcher.launches_directly()
    launcher._driver.cache_clear()


@pytest.mark.parametrize(
    ("ptx", "types"),
    [
        (
            ".visible .entry name_1(\n\t.param .u64 .ptr .global .align 1 a,\n\t.param .u32 b\n)\n.reqntid 4",
            ["u64", "u32"],
        ),
        (".entry $k (.param .align 8 .b64 a, .param .f32 b) { .param .b32 c; }", ["b64", "f32"]),
        (".entry a(.param .u64 x) {} .entry b(.param .u64 y) {}", []),
        (".entry a() {}", []),
        (".func (.param .b32 r) f(.param .b32 x)", []),
    ],
)
def test_types_of_parameters(ptx: str, types: list[str]) -> None:
    assert parameter_types(ptx) == types


def compiled(unit: bool) -> Any:
    """The kernel above, for a GPU that is not here."""
    types = dict(source="*fp32", unit="*fp32" if unit else "constexpr", target="*fp32", size="i32", scale="fp32")
    constants = dict(block=128) | ({} if unit else dict(unit=None))
    values = {(scaled.arg_names.index(name),): value for name, value in constants.items()}
    source = triton.compiler.ASTSource(scaled, types | dict(block="constexpr"), values)
    made = triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", 90, 32), options=dict(num_warps=2))
    return SimpleNamespace(metadata=made.metadata, asm=made.asm, function=77)


def check_what_triton_says() -> None:
    found = Code.of(compiled(True), 3, (100, 0.5))
    assert found is not None
    assert (found.function, found.threads, found.hidden) == (77, 64, 2)
    without = compiled(False)
    assert Code.of(without, 2, (100, 0.5)) is not None
    for tensors, numbers in ((3, (100, 0.5)), (2, (100,)), (2, (100, 5)), (2, (0.5, 100)), (1, (100, 0.5))):
        assert Code.of(without, tensors, numbers) is None


def test_what_triton_says_of_a_kernel() -> None:
    code = f"from {__name__} import check_what_triton_says as check; check()"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"TRITON_INTERPRET": "0"})


@pytest.mark.parametrize(
    "facts",
    [
        dict(num_ctas=2),
        dict(cluster_dims=(2, 1, 1)),
        dict(launch_cooperative_grid=True),
        dict(launch_pdl=True),
        dict(tensordesc_meta=[{}]),
        dict(instrumentation_mode="gsan"),
        dict(global_scratch_size=8),
        dict(profile_scratch_size=8),
        dict(target=SimpleNamespace(backend="hip", warp_size=32)),
        dict(target=SimpleNamespace(backend="cuda", warp_size=64)),
    ],
)
def test_unusual_kernels_are_left_to_triton(facts: dict[str, Any]) -> None:
    made = SimpleNamespace(
        metadata=SimpleNamespace(
            target=SimpleNamespace(backend="cuda", warp_size=32),
            num_warps=4,
            shared=0,
            **dict(num_ctas=1, global_scratch_size=0, profile_scratch_size=0),
        ),
        asm={"ptx": ".entry a(.param .u64 x, .param .u64 y, .param .u64 z)"},
        function=7,
    )
    assert Code.of(made, 1, ()) == Code(7, 128, 0, 2, made)
    vars(made.metadata).update(facts)
    assert Code.of(made, 1, ()) is None


def test_versions_of_triton_that_say_other_things() -> None:
    facts = SimpleNamespace(target=SimpleNamespace(backend="cuda", warp_size=32), num_warps=4, shared=0)
    ptx = ".entry a(.param .u64 x, .param .u64 y)"
    assert Code.of(SimpleNamespace(metadata=facts, asm={"ptx": ptx}, function=7), 2, ()) is not None
    assert Code.of(SimpleNamespace(metadata=facts, asm={"ptx": ptx}, function=7), 1, ()) is None
    assert Code.of(SimpleNamespace(metadata=facts, asm={"ptx": ptx}, function=None), 2, ()) is None
    assert Code.of(SimpleNamespace(metadata=facts, asm={}, function=7), 2, ()) is None
    assert Code.of(SimpleNamespace(), 2, ()) is None


class Triton:
    """A kernel that Triton compiled, and notes when it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.arg_names = ["source", "target", "size", "block"]
        self.metadata = SimpleNamespace(target=SimpleNamespace(backend="cuda", warp_size=32), num_warps=4, shared=0)
        self.asm = {"ptx": ".entry a(.param .u64 x, .param .u64 y, .param .u32 z)"}
        self.function: int | None = 7

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **constants: Any) -> Triton:
            self.asked.append("compile" if constants else "launch")
            return self

        return run


class OnGPU(Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]

    def get_device(self) -> int:
        return 0


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(gpu, "on_device", lambda index: nullcontext())
    made = Kernel("", "", dict(block=16))
    vars(made)["_kernel"] = Triton()
    return made


def on_gpu(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(OnGPU)


def test_triton_is_asked_once(driver: Driver, kernel: Kernel) -> None:
    source, target = on_gpu(torch.zeros(64)), on_gpu(torch.zeros(64))
    for _ in range(3):
        kernel.launch(4, (source, target), (50,))
    kernel.launch(4, (source[1:], target), (50,))
    kernel.launch(5, (target, source), (60,))
    kernel.launch(5, (target, source), (60,))
    assert kernel._kernel.asked == ["compile", "compile", "launch"]
    facts = (1, 1, 128, 1, 1, 0, 1000, 1)
    one, other = source.data_ptr(), target.data_ptr()
    assert driver.take() == [(7, 4, *facts, one, other, 50)] * 2 + [(7, 5, *facts, other, one, 60)]


def test_triton_launches_what_only_it_can(driver: Driver, kernel: Kernel) -> None:
    kernel._kernel.function = None
    source, target = on_gpu(torch.zeros(64)), on_gpu(torch.zeros(64))
    for _ in range(3):
        kernel.launch(4, (source, target), (50,))
    assert kernel._kernel.asked == ["compile", "launch", "launch"]
    assert driver.take() == []


@pytest.mark.gpu
def test_launches_on_a_gpu_are_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(__name__, "scaled", dict(block=128))
    source, target = torch.randn(1000, device="cuda"), torch.zeros(1000, device="cuda")
    kernel.launch(8, (source, None, target), (1000, 2.0))
    monkeypatch.setattr(kernel, "launch_by_triton", None)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for scale in (0.5, -3.0):
        with torch.cuda.stream(stream):
            kernel.launch(8, (source, None, target), (1000, scale))
            found = target.clone()
        stream.synchronize()
        assert torch.equal(found, source * scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.launch(8, (source, None, target), (1000, 4.0))
    source.fill_(1)
    graph.replay()
    assert torch.equal(target, torch.full_like(target, 4))
