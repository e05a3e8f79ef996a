"""``awconv bench op``: one layer, by every algorithm and by its rivals."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import SEModule
from torch import Tensor, nn

from awconv.bench.report import (
    Format,
    Measurement,
    check_device,
    check_memory,
    check_picture,
    check_range,
    names,
    numbers,
    print_measurements,
)
from awconv.bench.rivals import RoutedCondConv2d
from awconv.bench.roofline import Point, measure_ceilings, plot_roofline, work_of
from awconv.bench.timing import Ratio, ratios
from awconv.layers import AWConv2d
from awconv.ops import aw_conv2d
from awconv.ops.choose import ALGORITHMS, choose
from awconv.ops.problem import Problem, describe

LAYERS = ("layer", "branch", "se", "condconv")  # ways that are layers of their own
WAYS = ("all", "auto", *ALGORITHMS, *LAYERS)
WORKS = ("forward", "step", "input_gradient", "weight_gradients")
_Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


def bench_op(
    channels: str = "64",
    size: str = "56",
    batch: str = "8",
    kernel_size: str = "3",
    stride: int = 1,
    groups: int = 1,
    blocks: int = 1,
    ways: str = "auto",
    work: str = "forward,step",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str = "cpu",
    channels_last: bool = False,
    rounds: int = 9,
    format: Format = "table",
    plot: Path | None = None,
    roofline: Path | None = None,
) -> int:
    """Measures the runtime of one layer relative to the plain convolution, interleaved.

    Args:
        channels: input and output channels; several numbers, with commas, make a row for each.
        size: height and width of the images, likewise.
        batch: images, likewise.
        kernel_size: height and width of the kernel, odd, likewise; the padding keeps the size.
        stride: of the window, in pixels.
        groups: of channels; as many as channels for a depthwise convolution.
        blocks: attention blocks along the input channels of a group: each has values of its own.
        ways: with commas: ``auto`` or an algorithm; ``all`` that can run it; ``layer``, an AWConv2d; ``branch``, its
            branch alone; ``se`` and ``condconv``, timm's SE after a convolution and its CondConv2d.
        work: with commas: ``forward``, ``step`` (forward, backward), ``input_gradient``, ``weight_gradients``.
        dtype: of all tensors.
        device: cpu or cuda.
        channels_last: memory format of the images.
        rounds: how often each way is timed.
        format: a table, the same as Markdown, or JSON with all figures.
        plot: a picture (.png, .svg, .pdf) to write: the ratios over the argument that has several numbers.
        roofline: a picture to write: operations a second over operations a byte, and the machine's ceilings.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: an argument is out of range, or an algorithm cannot run the layer.
    """
    check_device(device)
    check_range(stride=stride, groups=groups, blocks=blocks, rounds=rounds)
    wanted, works = names("ways", ways, WAYS), names("work", work, WORKS)
    values = _values(channels=channels, size=size, batch=batch, kernel_size=kernel_size)
    _check_pictures(values, plot=plot, roofline=roofline)
    fixed = dict(stride=stride, groups=groups, blocks=blocks, dtype=dtype)
    layers = [dict(zip(values, sizes, strict=True)) | fixed for sizes in product(*values.values())]
    measurements, points = _measure(layers, device, channels_last, wanted, works, rounds)
    print_measurements(measurements, device, format)
    if plot is not None:
        _plot(measurements, _swept(values)[0], plot)
    if roofline is not None:
        title = f"{kernel_size}x{kernel_size} convolutions, {dtype}"
        plot_roofline(points, measure_ceilings(device, getattr(torch, dtype)), title, roofline)
    return 0


def _values(**texts: str) -> dict[str, list[int]]:
    values = {name: numbers(name, text) for name, text in texts.items()}
    even = [value for value in values["kernel_size"] if value % 2 == 0]
    if even:
        raise ValueError(f"kernel_size must be odd, so that the padding keeps the size, got {even[0]}")
    return values


def _swept(values: dict[str, list[int]]) -> list[str]:
    return [name for name, several in values.items() if len(several) > 1]


def _check_pictures(values: dict[str, list[int]], **pictures: Path | None) -> None:
    for name, path in pictures.items():
        check_picture(name, path)
    if pictures["plot"] is not None and len(_swept(values)) != 1:
        raise ValueError(
            f"plot needs several numbers for one of {', '.join(values)}, got {len(_swept(values))} such arguments"
        )


def _measure(
    layers: list[dict[str, Any]], device: str, channels_last: bool, ways: list[str], works: list[str], rounds: int
) -> tuple[list[Measurement], list[Point]]:
    """Measurements of some layers, and what of them a roofline shows.

    Args:
        layers: arguments of :class:`Layer`, the dtype by its name.
        device: that of the layers.
        channels_last: memory format of the images.
        ways: to compute them.
        works: of ``WORKS``.
        rounds: how often each is timed.
    """
    measurements, points = [], []
    for facts in layers:
        arguments = facts | dict(dtype=getattr(torch, facts["dtype"]), device=device, channels_last=channels_last)
        layer = Layer(**arguments)
        for work in works:
            counted = work_of(layer.problem, layer.batch, 3 if work == "step" else 1)
            known = facts | dict(chosen=layer.chosen, operations=counted.operations, bytes=counted.bytes)
            for way, ratio in layer.time(ways, work, rounds).items():
                measurements.append(Measurement(layer.name, work, way, ratio, known))
                if way != "branch":
                    points.append(Point(f"{way}, {work}", counted, ratio.seconds))
    return measurements, points


class Layer:
    """A convolution, random data, and the ways to compute it; ``out_channels`` are as many as ``channels`` by default.

    The attention is laid out as the branch of a layer gives it.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        batch: int,
        kernel_size: int,
        *,
        out_channels: int | None = None,
        stride: int = 1,
        groups: int = 1,
        blocks: int = 1,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        channels_last: bool = False,
    ) -> None:
        columns = out_channels or channels
        if channels % groups or columns % groups or (channels // groups) % blocks:
            raise ValueError(
                f"groups must divide the channels, and blocks those of a group, got {channels} channels, {groups} "
                f"groups, {blocks} blocks"
            )
        shapes = {
            "input": (batch, channels, size, size),
            "output": (batch, columns, *[-(-size // stride)] * 2),
            "weight": (columns, channels // groups, kernel_size, kernel_size),
            "attention": (batch, columns * blocks, kernel_size, kernel_size),
        }
        sizes = dict(channels=channels, size=size, batch=batch, kernel_size=kernel_size)
        check_memory(2 * sum(map(math.prod, shapes.values())), device, **sizes)  # with gradients
        generator = torch.Generator(device).manual_seed(0)
        layout = torch.channels_last if channels_last else torch.contiguous_format

        def tensor(name: str) -> Tensor:
            values = torch.randn(shapes[name], generator=generator, device=device, dtype=dtype)
            return values.contiguous(memory_format=layout)

        self.batch, self.device = batch, device
        self.name = f"{channels} at {size} (batch {batch}, kernel {kernel_size}, stride {stride}, groups {groups})"
        self.input, self.weight = tensor("input").requires_grad_(), tensor("weight").requires_grad_()
        attention = tensor("attention").reshape(batch, columns, blocks, kernel_size, kernel_size)
        self.attention = attention.requires_grad_()
        self.arguments: tuple[Any, ...] = (None, stride, (kernel_size - 1) // 2, 1, groups)
        self.problem: Problem = describe(2, self.input, self.weight, self.attention, *self.arguments, True)
        self.chosen = choose(self.problem, "auto", "").name
        self.able = [name for name, algorithm in ALGORITHMS.items() if algorithm.obstacle(self.problem) is None]
        self._shape: dict[str, Any] = dict(in_channels=channels, out_channels=columns, kernel_size=kernel_size)
        self._shape |= dict(stride=stride, padding=self.arguments[2], groups=groups, bias=False)
        self._blocks = blocks
        self._place: dict[str, Any] = dict(device=device, dtype=dtype)

    def time(self, ways: list[str], work: str, rounds: int) -> dict[str, Ratio]:
        """Ratios to the plain convolution, which comes first."""
        every = [name for way in ways for name in (self.able if way == "all" else [way])]
        return ratios({way: self.call(way, work) for way in ("plain", *every)}, rounds, self.device)

    def call(self, way: str, work: str) -> Callable[[], None]:
        """What is timed.

        Args:
            way: ``"plain"``, ``"auto"``, an algorithm or a layer.
            work: one of ``WORKS``. For a gradient alone, the first call also makes what is differentiated.
        """
        forward, parameters = self._forward(way)
        if work == "forward":

            def without_gradients() -> None:
                with torch.inference_mode():
                    forward(self.input, self.weight, self.attention)

            return without_gradients
        if work == "step":

            def both_ways() -> None:
                output = forward(self.input, self.weight, self.attention)
                output.backward(torch.ones_like(output))

            return both_ways
        return self._gradients(forward, parameters, of_input=work == "input_gradient")

    def _gradients(self, forward: _Forward, parameters: list[nn.Parameter], of_input: bool) -> Callable[[], None]:
        made: list[tuple[Tensor, Tensor, list[Tensor]]] = []

        def make() -> tuple[Tensor, Tensor, list[Tensor]]:
            for parameter in parameters:
                parameter.requires_grad_(not of_input)
            input = self.input.detach().requires_grad_(of_input)
            weight, attention = (
                tensor.detach().requires_grad_(not of_input) for tensor in (self.weight, self.attention)
            )
            output = forward(input, weight, attention)
            return output, torch.ones_like(output), [input] if of_input else [weight, attention, *parameters]

        def backward() -> None:
            if not made:
                made.append(make())
            output, grad, wanted = made[0]
            torch.autograd.grad(output, wanted, grad, retain_graph=True, allow_unused=True)

        return backward

    def _forward(self, way: str) -> tuple[_Forward, list[nn.Parameter]]:
        """The output from input, weight and attention, and the parameters of a layer of its own."""
        if way == "plain":
            return lambda input, weight, attention: F.conv2d(input, weight, *self.arguments), []
        if way not in LAYERS:
            choose(self.problem, way, "awconv bench op")  # its error comes before anything is timed
            return (
                lambda input, weight, attention: aw_conv2d(input, weight, attention, *self.arguments, algorithm=way),
                [],
            )
        module: nn.Module
        if way in ("layer", "branch"):
            group = self.weight.shape[1]
            layer = AWConv2d(**self._shape, in_expansion=group // self._blocks, **self._place)
            module = layer if way == "layer" else layer.attention
        elif way == "se":
            se = SEModule(self._shape["out_channels"]).to(**self._place)
            module = nn.Sequential(nn.Conv2d(**self._shape, **self._place), se)
        else:
            module = RoutedCondConv2d(**self._shape).to(**self._place)
        return lambda input, weight, attention: module(input), list(module.parameters())


def _plot(measurements: list[Measurement], argument: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for work, way in dict.fromkeys((point.work, point.way) for point in measurements if point.way != "plain"):
        of_way = [point for point in measurements if (point.work, point.way) == (work, way)]
        x = [point.facts[argument] for point in of_way]
        axes.plot(
            x, [point.ratio.median for point in of_way], "o-" if work == "forward" else "s--", label=f"{way}, {work}"
        )
    ticks = sorted({point.facts[argument] for point in measurements})
    axes.axhline(1, color="0.6", linewidth=1)
    axes.set(xscale="log", xlabel=argument.replace("_", " "), ylabel="runtime relative to the plain convolution")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(True, color="0.9")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
