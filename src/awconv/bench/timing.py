"""Runtime ratios that a drifting machine does not distort, and the memory that a call holds at its peak."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

import torch
from torch.profiler import ProfilerActivity, profile

_SHORTEST = 2e-3  # seconds: shorter calls are repeated within a measurement


@dataclass(frozen=True)
class Ratio:
    """A runtime relative to the baseline's in the same round.

    Attributes:
        median: of all rounds.
        low, high: the first and the ninth decile.
        seconds: median time of a call.
    """

    median: float
    low: float
    high: float
    seconds: float


def ratios(functions: Mapping[str, Callable[[], None]], rounds: int, device: str) -> dict[str, Ratio]:
    """Runtimes of functions relative to the first of them, measured interleaved.

    After two rounds to warm up, every round calls each function once, or as often as makes a measurement of 2 ms, and
    begins with another one. A ratio compares times of one round. On a GPU, the device's own clock counts.
    """
    repeats = {}
    for name, function in functions.items():
        seconds_of(function, 1, device)
        repeats[name] = max(1, round(_SHORTEST / max(seconds_of(function, 1, device), 1e-7)))
    names = list(functions)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for offset in range(len(names)):
            name = names[(turn + offset) % len(names)]
            seconds = seconds_of(functions[name], repeats[name], device)
            if turn:
                taken[name].append(seconds)
    baseline = taken[names[0]]
    result = {}
    for name, all_seconds in taken.items():
        each = [one / other for one, other in zip(all_seconds, baseline, strict=True)]
        deciles = quantiles(each, n=10, method="inclusive") if len(each) > 1 else [each[0]] * 9
        result[name] = Ratio(median(each), deciles[0], deciles[-1], median(all_seconds))
    return result


def seconds_of(function: Callable[[], object], repeats: int, device: str) -> float:
    """The mean time of some calls."""
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        return (time.perf_counter() - start) / repeats
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        function()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000 / repeats


def graphed(function: Callable[[], None]) -> Callable[[], None]:
    """A call that replays what a function launches on a GPU, from a CUDA graph: without the time that Python takes.

    Args:
        function: launches the same kernels at every call, and waits for none of them. What its first call keeps for
            the later ones is made on the graph's own stream.
    """
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    return graph.replay


def peak_memory(function: Callable[[], None], held: int, device: str) -> int:
    """Bytes that PyTorch's allocator holds at the peak of a call.

    Args:
        function: is called once to warm up, and once measured.
        held: bytes of the tensors that live before the call and through it.
        device: ``"cpu"`` or ``"cuda"``, where the allocator counts itself and ``held`` is not used.
    """
    function()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]  # in the order of their times
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return held + peak
