"""The one place that knows that there is more than one algorithm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from awconv.ops import fused, gain, naive, per_sample, per_tap
from awconv.ops.algorithm import Algorithm, Machine
from awconv.ops.problem import Problem

# From the most special to the most general.
ALGORITHMS = {
    algorithm.name: algorithm
    for algorithm in (
        gain.OUTPUT_GAIN,
        gain.INPUT_GAIN,
        fused.ALGORITHM,
        per_tap.ALGORITHM,
        per_sample.ALGORITHM,
        naive.ALGORITHM,
    )
}

# By type of device. The CPU's were measured with benchmarks/choice.py on 2 cores with AVX-512 in float32 (all but the
# last, earlier, on 2 cores with AVX2); others have no measurement yet. The kernels for GPUs have only been run by an
# interpreter, so that algorithm="fused" takes them there, and "auto" does not until they have been measured.
_CPU = Machine(element=25, grouped=1.05, weight=4, call=50_000, fused=0.95)
MACHINES = {"cpu": _CPU, "cuda": _CPU._replace(fused=1e6)}


_forced: str | None = None


@contextmanager
def forced(algorithm: str | None) -> Iterator[None]:
    """Holds every ``algorithm="auto"`` to one algorithm (to none if it is None), to compare whole networks."""
    global _forced
    before, _forced = _forced, algorithm
    try:
        yield
    finally:
        _forced = before


def wanted(algorithm: str) -> str:
    """What ``algorithm=`` stands for now."""
    return _forced if algorithm == "auto" and _forced is not None else algorithm


def choose(problem: Problem, algorithm: str, caller: str) -> Algorithm:
    """The algorithm that ``algorithm=`` names or, with ``"auto"``, the one that should be the fastest.

    Raises:
        ValueError: no algorithm has that name, or it cannot run the problem.
    """
    if algorithm != "auto":
        if algorithm not in ALGORITHMS:
            raise ValueError(f"{caller}: algorithm must be 'auto' or one of {list(ALGORITHMS)}, got {algorithm!r}")
        chosen = ALGORITHMS[algorithm]
        obstacle = chosen.obstacle(problem)
        if obstacle is not None:
            raise ValueError(
                f"{caller}: algorithm={algorithm!r} cannot run this problem: {obstacle}; the attention has "
                f"sizes {problem.attention_blocks} without the batch. Use algorithm='auto'"
            )
        return chosen
    able = [candidate for candidate in ALGORITHMS.values() if candidate.obstacle(problem) is None]
    if torch.compiler.is_exporting():
        # Runtimes want constant weights, and sizes may be symbolic: structure alone decides.
        portable = [candidate for candidate in able if candidate.portable]
        constant = [candidate for candidate in portable if candidate.constant_weights]
        return (constant or portable)[0]
    machine = MACHINES.get(problem.device, MACHINES["cpu"])
    cheapest, least = able[0], able[0].cost(problem, machine)
    for candidate in able[1:]:  # not min(key=...), which torch.compile cannot trace with symbolic sizes
        cost = candidate.cost(problem, machine)
        if cost < least:
            cheapest, least = candidate, cost
    return cheapest
