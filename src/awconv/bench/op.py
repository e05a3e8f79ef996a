"""``awconv bench op``: one layer, by every algorithm and by what else there is in its place."""

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
    Row,
    check_device,
    check_memory,
    check_picture,
    check_range,
    names,
    numbers,
    print_rows,
)
from awconv.bench.rivals import RoutedCondConv2d
from awconv.bench.roofline import Work, measure_ceilings, plot_roofline, work_of
from awconv.bench.timing import Ratio, ratios
from awconv.layers import AWConv2d
from awconv.ops import aw_conv2d
from awconv.ops.choose import ALGORITHMS, choose
from awconv.ops.problem import Problem, describe

LAYERS = ("layer", "branch", "se", "condconv")  # ways that are layers of their own
WAYS = ("all", "auto", *ALGORITHMS, *LAYERS)
WORKS = ("forward", "step", "input_gradient", "weight_gradients")
_Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
_SWEPT = ("channels", "size", "batch", "kernel_size")


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
    """Times one layer by some ways, in turn with the plain convolution.

    Args:
        channels: input and output channels; more than one number, with commas, makes a row for each.
        size: height and width of the images, likewise.
        batch: images, likewise.
        kernel_size: height and width of the kernel, odd, likewise; the padding keeps the size.
        stride: step of the window.
        groups: number of groups of channels; that of the channels for a depthwise convolution.
        blocks: blocks of input channels of a group that have attention of their own.
        ways: with commas: ``auto`` or an algorithm; ``all`` that can run it; ``layer``, the AWConv2d with its branch;
            ``branch``, that alone; ``se`` and ``condconv``, timm's SE after a convolution and its CondConv2d.
        work: with commas: ``forward``, ``step`` (forward and backward), ``input_gradient`` (that part of the backward
            alone), ``weight_gradients`` (of weight and attention alone).
        dtype: of all tensors.
        device: cpu or cuda.
        channels_last: memory format of the images.
        rounds: how often each way is timed.
        format: a table, the same as Markdown, or JSON with all figures.
        plot: writes the ratios over whichever argument has several numbers, as a picture (.png, .svg, .pdf).
        roofline: writes the rates that were reached, over operations a byte and under the machine's ceilings,
            likewise.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: an argument is out of place, or an algorithm cannot run the layer.
    """
    check_device(device)
    check_picture("plot", plot)
    check_picture("roofline", roofline)
    check_range(stride=stride, groups=groups, blocks=blocks, rounds=rounds)
    wanted, works = names("ways", ways, WAYS), names("work", work, WORKS)
    texts = dict(channels=channels, size=size, batch=batch, kernel_size=kernel_size)
    values = {name: numbers(name, text) for name, text in texts.items()}
    even = [value for value in values["kernel_size"] if value % 2 == 0]
    if even:
        raise ValueError(f"kernel_size must be odd, so that the padding keeps the size, got {even[0]}")
    swept = [name for name in _SWEPT if len(values[name]) > 1]
    if plot is not None and len(swept) != 1:
        raise ValueError(f"plot needs several numbers for one of {', '.join(_SWEPT)}, got {len(swept)} such arguments")
    rows: list[Row] = []
    reached: dict[str, list[tuple[Work, float]]] = {}
    for sizes in product(*values.values()):
        layer = Layer(
            *sizes,
            stride=stride,
            groups=groups,
            blocks=blocks,
            dtype=getattr(torch, dtype),
            device=device,
            channels_last=channels_last,
        )
        for kind in works:
            timed = layer.time(wanted, kind, rounds)
            counted = work_of(layer.problem, layer.batch, 3 if kind == "step" else 1)
            for way, ratio in timed.items():
                facts = dict(zip(_SWEPT, sizes, strict=True)) | dict(
                    stride=stride,
                    groups=groups,
                    blocks=blocks,
                    dtype=dtype,
                    chosen=layer.chosen,
                    operations=counted.operations,
                    bytes=counted.bytes,
                )
                rows.append(Row(layer.name, kind, way, ratio, facts))
                reached.setdefault(f"{way}, {kind}", []).append((counted, ratio.seconds))
    print_rows(rows, device, format)
    if plot is not None:
        _plot(rows, swept[0], plot)
    if roofline is not None:
        ceilings = measure_ceilings(device, getattr(torch, dtype))
        computed = {name: points for name, points in reached.items() if not name.startswith("branch")}
        plot_roofline(computed, ceilings, f"{kernel_size}x{kernel_size} convolutions, {dtype}", roofline)
    return 0


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


def _plot(rows: list[Row], argument: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for work, way in dict.fromkeys((row.work, row.way) for row in rows if row.way != "plain"):
        of_way = [row for row in rows if (row.work, row.way) == (work, way)]
        x = [row.facts[argument] for row in of_way]
        axes.plot(x, [row.ratio.median for row in of_way], "o-" if work == "forward" else "s--", label=f"{way}, {work}")
    ticks = sorted({row.facts[argument] for row in rows})
    axes.axhline(1, color="0.6", linewidth=1)
    axes.set(xscale="log", xlabel=argument.replace("_", " "), ylabel="time, in those of a plain convolution")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(True, color="0.9")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
