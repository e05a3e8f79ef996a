"""What a run found, on a screen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_WIDTH = 150
_SHORT = {"forward": "fwd", "input_gradient": "dx", "weight_gradients": "dw"}


def lines(results: dict[str, Any]) -> Iterator[str]:
    """One for each entry, below its stage."""
    about = results["about"]
    for crash in about.get("crashes", ()):
        yield f"CRASH: {crash}"
    yield f"{about.get('device', '?')}, torch {about.get('torch', '?')}, Triton {about.get('triton', '?')}"
    for stage, entries in results["stages"].items():
        skipped = [name for name, figures in entries.items() if "skipped" in figures]
        yield f"{stage}: {len(entries) - len(skipped)} of {len(entries)} entries"
        for name, figures in entries.items():
            if name not in skipped:
                yield f"  {name}: {_said(stage, figures)}"[:_WIDTH]
        if skipped:
            yield f"  no time for: {'; '.join(skipped)}"[:_WIDTH]


def _said(stage: str, figures: dict[str, Any]) -> str:
    said = _SAID[stage](figures)
    if "error" in figures:
        reason = figures["error"].strip().splitlines()[-1]
        said = f"FAILED ({reason}) {said}"
    return said


def _tests(figures: dict[str, Any]) -> str:
    counts = ", ".join(f"{count} {outcome.lower()}" for outcome, count in figures.get("outcomes", {}).items())
    stopped = " stopped for time" if "stopped_after_seconds" in figures else ""
    lost = f", {len(files)} files not imported" if (files := figures.get("not_collected")) else ""
    return f"{counts}{lost}{stopped}"


def _layers(figures: dict[str, Any]) -> str:
    if "works" in figures:
        parts = [f"{_SHORT[work]} {_ways(compared)}" for work, compared in figures["works"].items()]
        return f"auto {figures['chosen']} | {' | '.join(parts)}"
    pools = [part for part in figures.values() if isinstance(part, dict) and "backward" in part]
    return "; ".join(f"{_ways(pool['forward'])}, back {_ways(pool['backward'])}" for pool in pools)


def _ways(compared: dict[str, Any]) -> str:
    best = compared.get("replayed", compared["eager"])
    ratios = [f"{way.replace('per_', '')} {ratio['median']:.2f}" for way, ratio in best.items() if way != "plain"]
    return " ".join([*ratios, *(f"{way} FAILED" for way in compared["failed"])])


def _networks(figures: dict[str, Any]) -> str:
    parts = []
    for work, found in figures.get("works", {}).items():
        ratios = {way: ratio for way, ratio in found.items() if "median" in ratio}
        if ratios:
            text = " ".join(f"{way} {ratio['median']:.3f}" for way, ratio in ratios.items() if way != "plain")
            parts.append(f"{work} {text} (plain {_size(ratios['plain'])})")
    keys = ("step_seconds", "kernel_seconds", "host_seconds", "first", "second")
    sums = figures.get("profile", figures)
    for way in ("plain", "aw"):
        found = sums.get(way, {})
        texts = [f"{key.removesuffix('_seconds')} {1e3 * found[key]:.1f} ms" for key in keys if key in found]
        if texts:
            parts.append(f"{way} {', '.join(texts)}")
    return "; ".join(parts)


def _size(ratio: dict[str, Any]) -> str:
    return f"{ratio['bytes'] / 2**30:.2f} GiB" if "bytes" in ratio else f"{1e3 * ratio['seconds']:.1f} ms"


def _training(figures: dict[str, Any]) -> str:
    if "together" in figures:
        return f"{figures['together']:,.0f} images/s, a step {1e3 * figures['step_seconds']:.1f} ms"
    if "ratio" not in figures:
        return ""
    ratio, seconds = figures["ratio"], figures["step_seconds"]
    return f"{ratio['median']:.2f} of the bare loop's {1e3 * seconds['bare']:.1f} ms"


_SAID = {"tests": _tests, "layers": _layers, "networks": _networks, "training": _training}
