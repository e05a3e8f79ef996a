"""Times the tiles that the kernels for GPUs could take, where ``awconv/ops/fused/tiles.py`` says which they do.

    python benchmarks/tiles.py --out tiles.json [--seconds 120] [--shapes 0 3] [--work sums]

For each 3x3 convolution of ResNet-50 at 224x224 (batch 256) and of ResNet-20 at 32x32 (batch 512), in bfloat16 with the
channels last: microseconds of the output, the input's gradient, and the gradients of weight and attention, for every
candidate, beside cuDNN's plain convolution. Candidates are compiled first, side by side in as many processes as there
are cores. Results are written as they come.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from awconv.ops import average_pool
from awconv.ops.fused import cuda, cuda_plans, tiles
from awconv.ops.fused.tiles import Tile
from awconv.ops.geometry import Geometry

# batch, input channels, output channels, size, stride
RESNET50 = [
    (256, 64, 64, 56, 1),
    (256, 128, 128, 56, 2),
    (256, 128, 128, 28, 1),
    (256, 256, 256, 28, 2),
    (256, 256, 256, 14, 1),
    (256, 512, 512, 14, 2),
    (256, 512, 512, 7, 1),
]
RESNET20 = [(512, 16, 16, 32, 1), (512, 16, 32, 32, 2), (512, 32, 32, 16, 1), (512, 32, 64, 16, 2), (512, 64, 64, 8, 1)]
WORK = ("output", "input", "sums")

# kernel, tile_rows, tile_pixels, tile_inner, warps, stages, wide gains
CORRELATE = [
    ("scaled_weights", 128, 256, 64, 8, 3, False),
    ("scaled_weights", 128, 256, 64, 8, 3, True),
    ("scaled_weights", 128, 256, 64, 8, 4, False),
    ("scaled_weights", 128, 128, 64, 8, 3, True),
    ("scaled_weights", 128, 128, 64, 8, 3, False),
    ("scaled_weights", 128, 128, 64, 4, 3, False),
    ("scaled_weights", 128, 128, 64, 4, 3, True),
    ("scaled_weights", 128, 64, 64, 4, 3, True),
    ("scaled_weights", 128, 64, 64, 8, 3, True),
    ("scaled_weights", 128, 64, 64, 8, 3, False),
    ("scaled_weights", 64, 256, 64, 4, 3, True),
    ("scaled_weights", 64, 256, 64, 8, 3, False),
    ("scaled_weights", 64, 128, 64, 4, 3, True),
    ("scaled_weights", 64, 128, 64, 4, 3, False),
    ("scaled_weights", 64, 128, 64, 4, 2, True),
    ("scaled_weights", 64, 64, 64, 4, 3, True),
    ("scaled_weights", 64, 64, 64, 4, 3, False),
    ("scaled_weights", 64, 64, 64, 4, 4, False),
    ("scaled_sums", 64, 128, 64, 4, 3, False),
    ("scaled_sums", 128, 64, 64, 4, 3, False),
    ("scaled_sums", 128, 64, 64, 4, 4, False),
    ("scaled_sums", 128, 128, 64, 8, 3, False),
    ("scaled_sums", 128, 128, 64, 8, 4, False),
    ("scaled_weights", 32, 256, 32, 4, 3, False),
    ("scaled_weights", 32, 128, 32, 4, 3, False),
    ("scaled_weights", 32, 256, 16, 4, 3, False),
    ("scaled_weights", 16, 256, 16, 4, 3, False),
    ("scaled_weights", 16, 512, 16, 8, 3, False),
    ("scaled_weights", 16, 256, 16, 4, 3, True),
]
# tile_rows, tile_columns, tile_positions, warps, stages
SUMS = [
    (128, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (128, 128, 128, 8, 2),
    (128, 128, 128, 8, 3),
    (64, 128, 64, 4, 3),
    (64, 128, 64, 4, 4),
    (64, 128, 128, 4, 2),
    (128, 64, 64, 4, 3),
    (64, 64, 64, 4, 3),
    (64, 64, 64, 4, 4),
    (64, 64, 128, 4, 3),
    (32, 32, 64, 4, 3),
    (32, 64, 64, 4, 3),
    (16, 32, 128, 4, 3),
    (16, 32, 64, 4, 3),
]


def candidates(work: str, shape: tuple[int, ...]) -> Iterator[Tile]:
    """The tiles that suit a shape's channels."""
    _, columns, rows, size, stride = shape
    positions = (size // stride) ** 2
    if work == "sums":
        for tile_rows, tile_columns, tile_positions, warps, stages in SUMS:
            most = tiles.ceiling(rows, 128), tiles.ceiling(columns, 128)
            fits = tile_rows <= most[0] and 2 * tile_rows * tile_columns >= most[0] * most[1]
            if fits and tile_positions <= tiles.ceiling(positions, 128):
                segment = min(tiles.ceiling(columns, 128), tile_columns)
                sizes = dict(tile_rows=tile_rows, tile_columns=tile_columns, tile_segment=segment)
                sizes["tile_positions"] = tile_positions
                yield Tile("sum_products", sizes, warps, stages)
        return
    made, summed = (rows, columns) if work == "output" else (columns, rows)
    for kernel, tile_rows, tile_pixels, tile_inner, warps, stages, wide in CORRELATE:
        if not min(made, 128) // 2 <= tile_rows <= tiles.ceiling(made, 128):
            continue
        fits = kernel == "scaled_sums" or tile_pixels <= 2 * positions  # its tiles hold pixels of several samples
        if min(summed, 64) // 2 <= tile_inner <= summed and fits:
            sizes = dict(tile_rows=tile_rows, tile_pixels=tile_pixels, tile_inner=tile_inner)
            yield Tile(kernel, sizes, warps, stages, wide)


def forget() -> None:
    for cached in (cuda_plans.forward, cuda_plans.grad_input, cuda_plans.sums):
        cached.cache_clear()


class Work:
    """One layer's tensors, and a call for each part of the work."""

    def __init__(self, shape: tuple[int, ...], device: str, batch: int | None = None) -> None:
        self.shape = shape
        samples, columns, rows, size, stride = shape
        samples = batch or samples
        last = torch.channels_last
        dtype = torch.bfloat16 if device == "cuda" else torch.float16  # which Triton's interpreter multiplies
        make = torch.Generator(device).manual_seed(0)

        def random(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=make, device=device).to(dtype).contiguous(memory_format=last)

        self.input = random(samples, columns, size, size)
        self.weight = random(rows, columns, 3, 3)
        self.gain = random(samples, rows, 3, 3).unflatten(1, (rows, 1)).flatten(3)
        self.above = random(samples, rows, size // stride, size // stride)
        self.pooled = random(samples, columns, 3, 3)
        self.geometry = Geometry((stride, stride), ((1, 1), (1, 1)), (1, 1), 1)
        self.arguments = (self.above, self.input, self.weight, None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], 1)

    def run(self, work: str, tile: Tile | None) -> None:
        """Ours with some tile, or with the one that would be taken."""
        name = "sum_products" if work == "sums" else "correlate"
        with mock.patch.object(tiles, name, return_value=tile) if tile else contextlib.nullcontext():
            if work == "output":
                cuda.forward(self.input, self.weight, self.gain, self.geometry)
            else:
                needs = [work == "input", work == "sums", work == "sums"]
                cuda.backward(self.above, self.input, self.weight, self.gain, self.geometry, needs)

    def pool(self, work: str) -> None:
        """The pooling of its input to 3 x 3, or its gradient added to another."""
        if work == "pool":
            average_pool._launch("pool", self.input, self.pooled, self.input.shape[2:], (3, 3))
        else:
            average_pool._launch("spread", self.pooled, self.input, self.input.shape[2:], (3, 3), added=True)

    def plain(self, work: str) -> None:
        if work == "output":
            torch.conv2d(self.input, self.weight, None, self.geometry.stride, 1)
        else:
            torch.ops.aten.convolution_backward(*self.arguments, [work == "input", work == "sums", False])


def microseconds(call: Any, device: str, rounds: int = 10) -> float:
    """The median of some calls, each timed by itself."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return 1e6 * (time.perf_counter() - start)
    call()
    torch.cuda._sleep(10**7)  # so that the calls wait for the GPU, not it for them
    times = []
    for _ in range(rounds):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        times.append((start, stop))
    torch.cuda.synchronize()
    return sorted(1e3 * start.elapsed_time(stop) for start, stop in times)[rounds // 2]


def compile_share(share: tuple[int, int, list[tuple[int, ...]], list[str]]) -> None:
    """Runs every candidate once on two samples, which leaves its code in Triton's cache."""
    index, shares, shapes, parts = share
    every = [(shape, work, tile) for shape in shapes for work in parts for tile in candidates(work, shape)]
    for shape, work, tile in every[index::shares]:
        forget()
        with contextlib.suppress(Exception):  # said where it is timed
            Work(shape, "cuda", batch=2).run(work, tile)


def timed(layer: Work, work: str, device: str) -> list[tuple[float, str]]:
    """Microseconds and names of the candidates, the fastest first."""
    times = []
    for tile in candidates(work, layer.shape):
        name = " ".join(map(str, (tile.kernel, *tile.sizes.values(), *tile[2:])))
        forget()
        try:
            times.append((round(microseconds(partial(layer.run, work, tile), device), 1), name))
        except Exception as error:
            times.append((float("inf"), f"{name}: {str(error)[:80]}"))
    return sorted(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tiles.json"))
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--shapes", type=int, nargs="*", help="indices of the shapes, all if none is given")
    parser.add_argument("--work", nargs="*", choices=WORK, default=WORK)
    options = parser.parse_args()
    device, start = options.device, time.monotonic()
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU was found here; --device cpu with TRITON_INTERPRET=1 tries it in small")
    torch.backends.cudnn.benchmark = True
    shapes = [*RESNET50, *RESNET20]
    shapes = [shapes[index] for index in options.shapes] if options.shapes else shapes
    if device == "cuda":
        with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
            shares = [(index, options.processes, shapes, options.work) for index in range(options.processes)]
            pool.map(compile_share, shares, chunksize=1)
        print(f"compiled in {time.monotonic() - start:.0f} s on {torch.cuda.get_device_name()}", flush=True)
    results: list[dict[str, Any]] = []
    for shape in shapes:
        layer = Work(shape, device, batch=2 if device == "cpu" else None)
        for work in options.work:
            if time.monotonic() - start > options.seconds:
                print("out of time")
                return
            plain = microseconds(partial(layer.plain, work), device)
            forget()
            taken = microseconds(partial(layer.run, work, None), device)
            times = timed(layer, work, device)
            results.append(dict(shape=shape, work=work, plain=plain, taken=taken, tiles=times))
            options.out.write_text(json.dumps(results, indent=1))
            best = (f"{one} {name};" for one, name in times[:3])
            print(shape, work, f"plain {plain:.0f}, taken {taken:.0f};", *best, flush=True)
        if len(options.work) == len(WORK):
            pooled = {work: round(microseconds(partial(layer.pool, work), device), 1) for work in ("pool", "spread")}
            results.append(dict(shape=shape, **pooled))
            print(shape, pooled, flush=True)


if __name__ == "__main__":
    main()
