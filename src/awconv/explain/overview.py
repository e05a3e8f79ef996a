"""The picture at the top of an explanation: where attention acts, layer by layer."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import torch
from torch import Tensor

from awconv.explain.measure import Layer, Measured
from awconv.explain.pictures import colours
from awconv.explain.words import significant
from awconv.explain.worth import Worth

_DPI = 110
_PANEL, _GAP, _LEFT = 1.35, 0.46, 0.6  # of the figure, in inches
_TICKS = 0.14  # for the word below the bar of all layers
_LETTER = 0.085  # the width of a letter of a layer's name, in inches


@dataclass(frozen=True)
class _Theme:
    paper: str
    ink: str
    grid: str
    varies: str
    worth: str


THEMES = {
    "light": _Theme("#ffffff", "#222222", "#dddddd", "#33669a", "#c2571a"),
    "dark": _Theme("#16181d", "#e6e6e6", "#3a3d45", "#7fb2e5", "#f0a35e"),
}


def pattern_of(layer: Layer) -> Tensor:
    """A layer's mean pattern less its mean over the taps, shape (h, w)."""
    mean = layer.statistics.pattern()[0]
    return as_grid(mean - mean.mean(), layer.taps)


def as_grid(values: Tensor, taps: Sequence[int]) -> Tensor:
    """Values of taps as rows and columns; of other kernels than flat ones, as a row for each first index."""
    return values.reshape(taps[0] if len(taps) > 1 else 1, -1)


def pattern_limit(layers: Sequence[Layer]) -> float:
    """What the colours of all mean patterns end at."""
    return max(float(pattern_of(layer).abs().max()) for layer in layers)


def draw_overview(measured: Measured, theme: str) -> bytes:
    """A PNG: over the layers in order, how much attention varies between images, what it is worth, and its pattern.

    Args:
        measured: with at least one layer.
        theme: ``"light"`` or ``"dark"``.
    """
    from matplotlib.figure import Figure

    layers, look = measured.layers, THEMES[theme]
    unit = min(1.25, max(0.36, 9.0 / (len(layers) + 1)))  # inches of a layer
    longest = _LETTER * max(len(layer.name) for layer in layers)
    names, tiles = 0.3 if longest < unit else longest + 0.1, 0.8 * unit
    width, height = unit * (len(layers) + 1.2), 2 * (_PANEL + _GAP) + _TICKS + tiles + names
    size = (width + _LEFT + 0.9, height + 0.4)
    with matplotlib.rc_context({"text.parse_math": False}):  # a name may hold dollars
        figure = Figure(figsize=size, dpi=_DPI, facecolor=look.paper)
        tops = (height, height - _PANEL - _GAP, height - 2 * (_PANEL + _GAP) - _TICKS)
        made = [
            figure.add_axes((_LEFT / size[0], (top - tall) / size[1], width / size[0], tall / size[1]))
            for top, tall in zip(tops, (_PANEL, _PANEL, tiles), strict=True)
        ]
        for axes in made:
            _dress(axes, len(layers), look)
        _draw_variation(made[0], layers, look)
        _draw_worth(made[1], measured, look)
        _draw_patterns(made[2], layers, look, upright=longest >= unit)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.12, facecolor=look.paper)
    return buffer.getvalue()


def _dress(axes: Any, layers: int, look: _Theme) -> None:
    axes.set(xlim=(-0.6, layers + 0.6), facecolor=look.paper, xticks=[])
    axes.tick_params(colors=look.ink, labelsize=9)
    axes.grid(axis="y", color=look.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _title(axes: Any, text: str, look: _Theme) -> None:
    axes.set_title(text, loc="left", color=look.ink, fontsize=10)


def _draw_variation(axes: Any, layers: Sequence[Layer], look: _Theme) -> None:
    values = [100 * layer.statistics.variation() for layer in layers]
    axes.bar(range(len(layers)), values, width=0.8, color=look.varies)
    axes.set_ylim(0, 1.15 * max(*values, 1e-9))
    _title(axes, "How much an image changes the weights (root mean square, %)", look)


def _draw_worth(axes: Any, measured: Measured, look: _Theme) -> None:
    alone, together = [layer.worth for layer in measured.layers], measured.without["mean"]
    places = [*range(len(alone)), len(alone) + 0.1]
    bars = [_bar(worth) for worth in (*alone, together)]
    axes.bar(places, [value for value, _, _ in bars], width=0.8, color=look.worth)
    if measured.right is not None:
        errors = [[value - low for value, low, _ in bars], [high - value for value, _, high in bars]]
        axes.errorbar(places, [value for value, _, _ in bars], errors, fmt="none", ecolor=look.ink, elinewidth=1.2)
        _title(axes, "What it is worth: accuracy lost without it (points, 95 % interval)", look)
    else:
        axes.set_ylim(0, 1.15 * max(*(value for value, _, _ in bars), 1 / 1.15))
        _title(axes, "What it decides: predictions that change without it (%)", look)
    axes.axhline(0, color=look.ink, linewidth=1)
    axes.set_xticks([places[-1]], ["all"], color=look.ink, fontsize=9)
    axes.tick_params(axis="x", length=0)


def _bar(worth: Worth) -> tuple[float, float, float]:
    """The height of a bar, and the ends of its interval."""
    interval = worth.interval()
    if worth.points is None or interval is None:
        share = 100 * worth.changed / worth.images
        return share, share, share
    return worth.points, min(worth.points, interval[0]), max(worth.points, interval[1])


def _draw_patterns(axes: Any, layers: Sequence[Layer], look: _Theme, upright: bool) -> None:
    limit = pattern_limit(layers)
    for place, layer in enumerate(layers):
        axes.imshow(
            colours(pattern_of(layer), limit), extent=(place - 0.4, place + 0.4, 0, 0.8), aspect="auto", zorder=2
        )
    axes.set(xlim=(-0.6, len(layers) + 0.6), ylim=(0, 0.8), yticks=[])
    axes.set_xticks(
        range(len(layers)), [layer.name for layer in layers], rotation=90 if upright else 0, fontsize=9, color=look.ink
    )
    axes.tick_params(axis="x", length=0)
    _title(axes, "The mean pattern: taps that it weighs less (purple) or more (orange) than the others", look)
    bar = axes.inset_axes((1 - 0.9 / (len(layers) + 1.2), 0, 0.12 / (len(layers) + 1.2), 1))
    shades = torch.linspace(1, -1, 64)[:, None]
    bar.imshow(colours(shades, 1.0), extent=(0, 1, -1, 1), aspect="auto")
    bar.set(xticks=[])
    bar.yaxis.tick_right()
    bar.set_yticks([-1, 0, 1], [significant(-limit), "0", significant(limit)], fontsize=8)
    bar.tick_params(colors=look.ink, length=2)
    for spine in bar.spines.values():
        spine.set_visible(False)
