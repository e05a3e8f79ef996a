"""The one place that knows that there is more than one algorithm."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar

import torch

from awconv.ops import exports, factored, fused, matmul, naive, per_sample, per_tap, shifted, tracing
from awconv.ops.algorithm import Algorithm, Machine
from awconv.ops.problem import Problem

# From the most special to the most general: the first of equal costs is taken.
ALGORITHMS = {
    algorithm.name: algorithm
    for algorithm in (
        factored.OUTPUT_GAIN,
        factored.INPUT_GAIN,
        fused.ALGORITHM,
        per_tap.ALGORITHM,
        per_sample.ALGORITHM,
        shifted.ALGORITHM,
        matmul.ALGORITHM,
        naive.ALGORITHM,
    )
}

# By type of device; others take the CPU's.
MACHINES = {
    # Measured with benchmarks/choice.py on 2 cores with AVX-512 in float32 (all but the last, earlier, with AVX2).
    "cpu": Machine(element=25, grouped=1.05, weight=4, call=50_000, fused=0.95),
    # Estimates, until measured.
    "cuda": Machine(element=25, grouped=1.05, weight=4, call=50_000, fused=1.0),
}

_log = logging.getLogger(__name__)


class _OfThread(threading.local):
    def __init__(self) -> None:  # in each thread: torch.compile guards what an instance has, and no class attribute
        self.algorithm = "auto"
        self.entries: list[list[str]] = []  # of use_algorithm, which tasks may leave in another order

    def enter(self, name: str) -> list[str]:
        self.entries.append([name])
        self.algorithm = name
        return self.entries[-1]

    def leave(self, entry: list[str]) -> None:
        self.entries = [other for other in self.entries if other is not entry]
        self.algorithm = self.entries[-1][0] if self.entries else "auto"


# The same twice: torch.compile cannot read a ContextVar (torch 2.13), and its guards look at the thread's instead.
_asked: ContextVar[str] = ContextVar("awconv.use_algorithm", default="auto")
_asked_in_thread = _OfThread()


@contextmanager
def use_algorithm(algorithm: str | None) -> Iterator[None]:
    """Runs every AW-convolution inside that leaves the choice open (``algorithm="auto"``) by one algorithm.

    It compares algorithms over a whole network, or pins one down.

    It holds for the thread or the task that asked, and for what these call. Threads that they start, as
    ``nn.DataParallel`` does for its replicas, choose for themselves. A backward follows its forward, in whichever of
    autograd's threads it runs. The exception is activation checkpointing on a GPU: a thread of autograd repeats the
    forward and does not see the choice, so give ``algorithm=`` to the convolution there.

    ``torch.compile`` traces a function once for each algorithm that is asked for around its calls; this follows the
    thread and not the task. An exported program keeps the algorithm that it was exported with.

    Args:
        algorithm: a name that ``algorithm=`` of :func:`aw_conv2d` takes. None or ``"auto"`` gives the choice back.

    Raises:
        ValueError: no algorithm has that name. The convolution raises where the algorithm cannot run it.

    Examples:
        >>> import torch
        >>> import awconv
        >>> layer, input = awconv.AWConv2d(16, 32, 3).eval(), torch.randn(2, 16, 8, 8)
        >>> with awconv.use_algorithm("naive"):
        ...     expected = layer(input)
        >>> torch.allclose(layer(input), expected, atol=1e-5)
        True
    """
    name = "auto" if algorithm is None else algorithm
    if name != "auto" and name not in ALGORITHMS:
        raise ValueError(f"use_algorithm: algorithm must be None, 'auto' or one of {list(ALGORITHMS)}, got {name!r}")
    token, entry = _asked.set(name), _asked_in_thread.enter(name)
    try:
        yield
    finally:
        _asked_in_thread.leave(entry)
        with suppress(ValueError):  # of a generator that is closed in another context, which does not see the choice
            _asked.reset(token)


def wanted(algorithm: str) -> str:
    """What ``algorithm=`` stands for here and now."""
    if algorithm != "auto":
        return algorithm
    return _asked_in_thread.algorithm if tracing.compiling_bytecode() else _asked.get()


def choose(problem: Problem, algorithm: str, caller: str) -> Algorithm:
    """The algorithm that ``algorithm=`` names or, with ``"auto"``, the one that should be the fastest.

    Raises:
        ValueError: no algorithm has that name, or it cannot run the problem.
    """
    if algorithm != "auto":
        chosen, why = _named(problem, algorithm, caller), "asked for"
    elif tracing.exporting():
        chosen, why = _exported(problem), "PyTorch's own operators, for an exported graph"
    else:
        chosen, why = _cheapest(problem), "least cost"
    if tracing.compiling_bytecode():
        _log_traced(caller, chosen.name, why)
    elif _log.isEnabledFor(logging.DEBUG):
        _log.debug("%s: %s, %s%s", caller, chosen.name, why, _judged(problem))
    return chosen


def _named(problem: Problem, algorithm: str, caller: str) -> Algorithm:
    if algorithm not in ALGORITHMS:
        raise ValueError(f"{caller}: algorithm must be 'auto' or one of {list(ALGORITHMS)}, got {algorithm!r}")
    obstacle = ALGORITHMS[algorithm].obstacle(problem)
    if obstacle is not None:
        raise ValueError(
            f"{caller}: algorithm={algorithm!r} cannot run this problem: {obstacle}; the attention has sizes "
            f"{problem.attention_blocks} without the batch. Use algorithm='auto', and no use_algorithm around it"
        )
    return ALGORITHMS[algorithm]


def _able(problem: Problem) -> list[Algorithm]:
    return [candidate for candidate in ALGORITHMS.values() if candidate.obstacle(problem) is None]


def _exported(problem: Problem) -> Algorithm:
    candidates = (ALGORITHMS[name] for name in exports.preferred(problem))
    return next(candidate for candidate in candidates if candidate.obstacle(problem) is None)


def _cheapest(problem: Problem) -> Algorithm:
    able = _able(problem)
    cheapest, least = able[0], able[0].cost(problem, _machine(problem))
    for candidate in able[1:]:  # not min(key=...), which torch.compile cannot trace with symbolic sizes
        cost = candidate.cost(problem, _machine(problem))
        if cost < least:
            cheapest, least = candidate, cost
    return cheapest


def _machine(problem: Problem) -> Machine:
    return MACHINES.get(problem.device, MACHINES["cpu"])


def _judged(problem: Problem) -> str:
    """What each algorithm would cost or why it cannot run, and the problem, for the log."""
    lines = [f" for {problem}; in multiply-adds of a plain convolution of one sample, of {problem.multiply_adds:,}:"]
    for name, algorithm in ALGORITHMS.items():
        obstacle = algorithm.obstacle(problem)
        lines.append(
            f"{name}: {f'{algorithm.cost(problem, _machine(problem)):,.0f}' if obstacle is None else obstacle}"
        )
    return "\n  ".join(lines)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _log_traced(caller: str, name: str, why: str) -> None:
    """The same without the sizes, which may be symbols: torch.compile calls it as it traces."""
    _log.debug("%s: %s, %s, compiled", caller, name, why)
