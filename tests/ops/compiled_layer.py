"""Compiles the kernels of a layer's step for a GPU that is not there, and prints of each launch whether its code was
there then. A process of its own: the tests beside it run kernels by Triton's interpreter."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from awconv import AWConv2d
from awconv.ops import fused, gpu, layer_plans
from awconv.ops import layer as whole
from awconv.ops.fused import cuda


class Hopper:
    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compiled(kernels: set[Any]) -> int:
    return sum(len(kernel.device_caches[0][0]) for kernel in kernels)


def main() -> None:
    driver.set_active(Hopper())
    layer_plans.on_device = lambda index: contextlib.nullcontext()
    fused._KERNELS["cpu"] = cuda
    kernels: set[Any] = set()

    def launch(self: gpu.Kernel, programs: int, tensors: tuple[Tensor | None, ...], numbers: tuple[float, ...]) -> None:
        kernels.add(self._kernel)
        before = compiled(kernels)
        self._kernel.warmup(*tensors, *numbers, grid=(programs,), **self.constants, **self.options)
        print(self.name, "was compiled" if compiled(kernels) == before else "was not compiled")

    gpu.Kernel.launch = launch
    low, last, floats = torch.bfloat16, torch.channels_last, (1e-5, 0.1, 1e-5, 0.1)
    layer = AWConv2d(16, 16, 3, padding=1, bias=False)
    image = torch.randn(2, 16, 8, 8, dtype=low).contiguous(memory_format=last).requires_grad_()
    branch, convolution = layer.attention, ((1, 1), (1, 1), (1, 1), 1, True)
    modules = branch.modules_in_turn()
    tensors = whole._tensors(modules)
    arguments = (tensors, low, True, branch.attention_size, branch.relation(), convolution)
    planned = whole._plan(image, layer.weight, modules, *arguments)
    assert planned is not None
    planned.compile(0, layer.weight.dtype, tensors, floats, (True, True, True))
    whole._Layer.apply(image, layer.weight, *tensors[:6], planned, tensors[6:], floats).sum().backward()
    layer.eval()
    planned = whole._plan(image, layer.weight, modules, *arguments)
    assert planned is not None
    with torch.no_grad():
        planned.compile(0, layer.weight.dtype, tensors, floats, (False, False, False))
        planned.run(image, layer.weight, tensors, torch.empty(planned.kept_bytes, dtype=torch.uint8), floats)


if __name__ == "__main__":
    main()
