"""Operations and bytes of a layer, counted, beside what the machine can do, measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F

from awconv.bench.timing import seconds_of
from awconv.ops.problem import Problem, product


@dataclass(frozen=True)
class Work:
    """What a layer has to do at the least.

    Attributes:
        operations: floating-point operations, two for a multiply-add.
        bytes: each input read once and each result written once.
    """

    operations: int
    bytes: int


def work_of(problem: Problem, batch: int, passes: int) -> Work:
    """The work of the plain convolution of a problem, whatever computes it.

    A step has three passes: the forward, the gradient of the input and the gradient of the weight. Each gradient reads
    the gradient of the output and one more tensor, and writes the third.
    """
    input = batch * problem.in_channels * product(problem.size)
    output = batch * problem.out_elements
    weight = problem.out_channels * problem.group_in_channels * problem.taps
    itemsize = torch.empty((), dtype=problem.dtype).element_size()
    return Work(passes * 2 * batch * problem.multiply_adds, passes * (input + output + weight) * itemsize)


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do: operations a second, bytes a second."""

    operations: float
    bytes: float


def measure_ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """Operations a second by a large matrix product or plain 3x3 convolutions, whichever are faster; bytes a second by
    a copy larger than caches."""
    matrix = torch.randn(2048, 2048, device=device, dtype=dtype)
    images = torch.randn(16, 256, 28, 28, device=device, dtype=dtype)
    kernel = torch.randn(256, 256, 3, 3, device=device, dtype=dtype)
    numbers = torch.randn(2**26, device=device)
    target = torch.empty_like(numbers)
    functions: dict[str, tuple[Callable[[], object], int]] = {
        "product": (lambda: matrix @ matrix, 2 * 2048**3),
        "convolution": (lambda: F.conv2d(images, kernel, padding=1), 2 * 16 * 28 * 28 * 256 * 256 * 9),
        "copy": (lambda: target.copy_(numbers), 2 * numbers.nbytes),
    }
    rates = {}
    with torch.inference_mode():
        for name, (function, amount) in functions.items():
            function()
            rates[name] = amount / median(seconds_of(function, 1, device) for _ in range(7))
    return Ceilings(max(rates["product"], rates["convolution"]), rates["copy"])


class Point(NamedTuple):
    """What a way to compute did: its name, the work and the seconds that it took."""

    way: str
    work: Work
    seconds: float


def plot_roofline(points: Sequence[Point], ceilings: Ceilings, title: str, path: Path) -> None:
    """Writes a picture: operations a second over operations for each byte, under the two ceilings.

    Args:
        points: measurements.
        ceilings: of the machine.
        title: stands above.
        path: ends in .png, .svg or .pdf.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    intensities = [point.work.operations / point.work.bytes for point in points]
    ridge = ceilings.operations / ceilings.bytes
    span = (min(*intensities, ridge) / 2, max(*intensities, ridge) * 2)
    axes.plot(
        [span[0], ridge, span[1]],
        [span[0] * ceilings.bytes / 1e9, *[ceilings.operations / 1e9] * 2],
        color="0.4",
        label=f"ceilings: {ceilings.operations / 1e9:,.0f} GFLOP/s, {ceilings.bytes / 1e9:,.0f} GB/s",
    )
    for marker, way in zip(cycle("osD^vPX*<>"), dict.fromkeys(point.way for point in points), strict=False):
        of_way = [point for point in points if point.way == way]
        x = [point.work.operations / point.work.bytes for point in of_way]
        y = [point.work.operations / point.seconds / 1e9 for point in of_way]
        axes.plot(x, y, marker, label=way, alpha=0.8)
    axes.set(xscale="log", yscale="log", xlim=span, xlabel="operations for each byte", ylabel="GFLOP/s", title=title)
    axes.grid(True, which="major", color="0.9")
    figure.legend(fontsize="small", loc="outside right upper")
    figure.savefig(path, dpi=150)
