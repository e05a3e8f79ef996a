"""Single layers beside cuDNN's plain convolutions: the forward and each gradient, by every algorithm."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from awconv.bench.op import Layer
from awconv.bench.roofline import work_of
from awconv.bench.timing import graphed, ratios
from awconv.ops.average_pool import average_pool
from gpu_stages.journal import Entry, Settings

WAYS = ("fused", "per_tap", "per_sample")
WORKS = ("forward", "input_gradient", "weight_gradients")
_LONGEST = 0.25  # seconds of a call, beyond which a way is not timed
_SHARE = 0.5  # of the memory that is free, beyond which the weights of all samples are not made
_TRACEBACK = 2500  # characters that are kept, the last ones
_TAPS = 3

Call = Callable[[], None]


class Shape(NamedTuple):
    """A 3x3 convolution: batch, input and output channels, height and width of the input, stride, groups."""

    batch: int
    channels: int
    out_channels: int
    size: int
    stride: int = 1
    groups: int = 1

    def __str__(self) -> str:
        channels = f"{self.channels}" if self.channels == self.out_channels else f"{self.channels}->{self.out_channels}"
        details = ["depthwise"] * (self.groups > 1) + ["stride 2"] * (self.stride > 1)
        return ", ".join((f"{channels} at {self.size}", *details, f"batch {self.batch}"))


# The 3x3 convolutions of ResNet-50 at 224x224, of ResNet-20 for CIFAR, and of MobileNetV2 at 224x224.
RESNET50 = [
    Shape(256, 64, 64, 56),
    Shape(256, 128, 128, 28),
    Shape(256, 256, 256, 14),
    Shape(256, 512, 512, 7),
    Shape(256, 128, 128, 56, 2),
    Shape(256, 256, 256, 28, 2),
    Shape(256, 512, 512, 14, 2),
]
CIFAR = [
    Shape(512, 16, 16, 32),
    Shape(512, 32, 32, 16),
    Shape(512, 64, 64, 8),
    Shape(512, 16, 32, 32, 2),
    Shape(512, 32, 64, 16, 2),
]
MOBILENETV2 = [
    Shape(256, channels, channels, size, stride, channels)
    for channels, size, stride in (
        (144, 56, 1),
        (192, 28, 1),
        (384, 14, 1),
        (960, 7, 1),
        (96, 112, 2),
        (144, 56, 2),
        (192, 28, 2),
        (576, 14, 1),
        (576, 14, 2),
        (32, 112, 1),
    )
]
QUICK = [Shape(2, 16, 16, 6), Shape(2, 16, 32, 6, 2), Shape(2, 16, 16, 6, 1, 16)]


def entries(settings: Settings) -> list[Entry]:
    """One for each layer, and the pooling of ResNet-50's."""

    def named(network: str, shapes: list[Shape]) -> list[Entry]:
        return [Entry(f"{network}, {shape}", 12, partial(_layer, shape, settings)) for shape in shapes]

    if settings.quick:
        return [*named("layer", QUICK), Entry("pooling", 0, partial(_pooling, QUICK[:1], settings))]
    return [
        *named("ResNet-50", RESNET50),
        Entry("pooling", 8, partial(_pooling, RESNET50, settings)),
        *named("ResNet-20", CIFAR),
        *named("MobileNetV2", MOBILENETV2),
    ]


def _layer(shape: Shape, settings: Settings, figures: dict[str, Any], save: Call) -> None:
    layer = Layer(
        shape.channels,
        shape.size,
        shape.batch,
        _TAPS,
        out_channels=shape.out_channels,
        stride=shape.stride,
        groups=shape.groups,
        dtype=torch.bfloat16,
        device=settings.device,
        channels_last=True,
    )
    work = work_of(layer.problem, shape.batch, 1)
    figures |= {**shape._asdict(), "dtype": "bfloat16", "seed": 0, "chosen": layer.chosen}
    figures |= {"operations": work.operations, "bytes": work.bytes, "works": {}}
    for kind in WORKS:
        makers: dict[str, Callable[[], Call]] = {"plain": partial(layer.call, "plain", kind)}
        left_out = {}
        for way in WAYS:
            obstacle = None if way in layer.able else "it cannot run this layer"
            obstacle = obstacle or _too_large(layer, way)
            if obstacle is None:
                makers[way] = partial(layer.call, way, kind)
            else:
                left_out[way] = obstacle
        compared = compare(makers, settings)
        compared["left_out"] |= left_out
        figures["works"][kind] = compared
        save()


def _too_large(layer: Layer, way: str) -> str | None:
    if way != "per_sample" or layer.device != "cuda":
        return None
    needed = 3 * layer.batch * layer.weight.nbytes  # with their gradient, and a copy
    free = torch.cuda.mem_get_info()[0]
    if needed > _SHARE * free:
        return f"the weights of all samples take {needed / 2**30:.0f} GiB, and {free / 2**30:.0f} GiB are free"
    return None


def compare(makers: dict[str, Callable[[], Call]], settings: Settings) -> dict[str, Any]:
    """Times calls in turn, as Python makes them and, on a GPU, as a CUDA graph replays them.

    Args:
        makers: each makes a fresh call; the first one's is the baseline.
        settings: of the run.

    Returns:
        ``eager`` and ``replayed``, each a ratio by name; ``fastest`` of those but the baseline, replayed where that
        worked; ``left_out``, by name the reason; ``failed``, by name the traceback.
    """
    left_out: dict[str, str] = {}
    failed: dict[str, str] = {}
    calls: dict[str, Call] = {}
    for name, make in makers.items():
        call = _with_cudnn_benchmark(make(), name == "plain")
        try:
            call()
            seconds = _wall_seconds(call, settings.device)
        except Exception:
            if name == "plain":
                raise
            failed[name] = traceback.format_exc()[-_TRACEBACK:]
            continue
        if seconds > _LONGEST and name != "plain":
            left_out[name] = f"one call takes {seconds:.2f} s"
        else:
            calls[name] = call
    result: dict[str, Any] = {"eager": _timed(calls, settings)}
    if settings.device == "cuda":
        replays: dict[str, Call] = {}
        for name in calls:
            try:
                replays[name] = graphed(_with_cudnn_benchmark(makers[name](), name == "plain"))
            except Exception:
                failed[f"{name}, in a graph"] = traceback.format_exc()[-_TRACEBACK:]
        if "plain" in replays:
            result["replayed"] = _timed(replays, settings)
    best = result.get("replayed", result["eager"])
    others = [name for name in best if name != "plain"]
    fastest = min(others, key=lambda name: best[name]["seconds"], default=None)
    return result | {"fastest": fastest, "left_out": left_out, "failed": failed}


def _timed(calls: dict[str, Call], settings: Settings) -> dict[str, Any]:
    with settings.turn():
        return {name: asdict(ratio) for name, ratio in ratios(calls, settings.rounds, settings.device).items()}


def _with_cudnn_benchmark(call: Call, on: bool) -> Call:
    """The plain convolution gets the best algorithm of cuDNN; a convolution with a group for each sample, for which the
    search takes seconds, what it chooses itself."""

    def run() -> None:
        torch.backends.cudnn.benchmark = on
        call()

    return run


def _wall_seconds(call: Call, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _pooling(shapes: list[Shape], settings: Settings, figures: dict[str, Any], save: Call) -> None:
    for shape in shapes:
        input = torch.randn(
            shape.batch, shape.channels, shape.size, shape.size, device=settings.device, dtype=torch.bfloat16
        ).contiguous(memory_format=torch.channels_last)
        found = figures[str(shape)] = {"bytes": input.nbytes}
        pools = {"plain": F.adaptive_avg_pool2d, "awconv": average_pool}
        found["forward"] = compare({name: partial(_forward, pool, input) for name, pool in pools.items()}, settings)
        found["backward"] = compare({name: partial(_backward, pool, input) for name, pool in pools.items()}, settings)
        save()


Pool = Callable[[Tensor, tuple[int, int]], Tensor]


def _forward(pool: Pool, input: Tensor) -> Call:
    def call() -> None:
        with torch.inference_mode():
            pool(input, (_TAPS, _TAPS))

    return call


def _backward(pool: Pool, input: Tensor) -> Call:
    made: list[Tensor] = []

    def call() -> None:
        if not made:  # on the stream of the call, which the backward follows
            source = input.detach().requires_grad_()
            made.extend((source, pool(source, (_TAPS, _TAPS))))
            made.append(torch.ones_like(made[1]))
        source, output, grad = made
        torch.autograd.grad(output, source, grad, retain_graph=True)

    return call
