"""The mean difference between scores that are paired by seed, with Student's interval. Needs SciPy."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Protocol

from awconv.extras import require

# Differences count as equal up to this part of the largest score: float32 rounds scores by less, and one image in a
# million changes an accuracy by as much.
_EQUAL = 1e-6


@dataclass(frozen=True)
class PairedDifference:
    """The differences b - a of scores with the same seeds.

    Attributes:
        mean: mean difference, in the unit of the scores; positive if b is the larger one.
        low: lower end of the mean's 95 % confidence interval, by Student's t; None for one pair.
        high: its upper end.
        spread: standard deviation of the differences; None for one pair.
        seeds: number of pairs.
        warning: why the interval says less than it seems to, or which seeds are left out; None if there is nothing.
    """

    mean: float
    low: float | None
    high: float | None
    spread: float | None
    seeds: int
    warning: str | None

    def __str__(self) -> str:
        interval = "" if self.low is None else f" (95 % interval {self.low:+.4g} to {self.high:+.4g})"
        warning = "" if self.warning is None else f"; {self.warning}"
        return f"mean difference {self.mean:+.4g}{interval}, {self.seeds} {_plural(self.seeds, 'pair')}{warning}"

    @property
    def is_constant(self) -> bool:
        """Whether two or more differences are equal, so that the interval has no width."""
        return self.spread == 0


class _Array(Protocol):
    def tolist(self) -> Any: ...


Scores = Mapping[Any, float] | Sequence[float] | _Array | str | os.PathLike[str]


def paired(scores_a: Scores, scores_b: Scores) -> PairedDifference:
    """The mean difference b - a between scores with the same seeds, and its 95 % interval.

    Pairing takes away what both runs of a seed have in common. The interval is Student's, for the mean of the
    differences; it takes them for independent and normally distributed, and speaks of other seeds, not of other test
    images.

    Args:
        scores_a: of the baseline, in one of three forms: a sequence, array or tensor of shape (seeds,); a mapping from
            seeds to scores; or the path of a CSV file with the columns ``seed`` and ``score`` (others are ignored).
        scores_b: of what is compared with it. Sequences have the same seeds in the same order; mappings and files are
            paired by seed.

    Returns:
        The difference, in the unit of the scores. Seeds without a partner are left out and named in its ``warning``.

    Raises:
        TypeError: the scores have another form, or a score is no number.
        ValueError: a score is not finite, there is no pair, sequences differ in length, a sequence is given with
            something that has seeds, or a file lacks a column or has a seed twice.
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: SciPy is missing.

    Examples:
        >>> from awconv.compare import paired
        >>> print(paired([71.2, 70.6, 71.4], [73.9, 73.7, 74.3]))
        mean difference +2.9 (95 % interval +2.403 to +3.397), 3 pairs
        >>> print(paired({0: 0.71, 1: 0.72}, {1: 0.75, 2: 0.74}).warning)
        one pair has no interval; seeds without a partner are left out: 0 (only in a), 2 (only in b)
    """
    a, b = _scores("a", scores_a), _scores("b", scores_b)
    if a.ordered != b.ordered:
        with_seeds, without = ("b", "a") if a.ordered else ("a", "b")
        raise ValueError(
            f"paired: scores_{with_seeds} has seeds, scores_{without} has none. Give both as sequences in the order of "
            "the same seeds, or both as mappings or CSV files"
        )
    if a.ordered and len(a.by_seed) != len(b.by_seed):
        raise ValueError(
            f"paired: sequences must have the same seeds in order, got {len(a.by_seed)} scores in a and "
            f"{len(b.by_seed)} in b. Give mappings from seeds to scores if seeds are missing"
        )
    seeds = [seed for seed in a.by_seed if seed in b.by_seed]
    if not seeds:
        raise ValueError(
            f"paired: needs at least one seed with a score in both, got {_listed(a.by_seed) or 'none'} in a and "
            f"{_listed(b.by_seed) or 'none'} in b"
        )
    alone = [
        f"{_listed(ours.keys() - theirs.keys())} (only in {name})"
        for name, ours, theirs in (("a", a.by_seed, b.by_seed), ("b", b.by_seed, a.by_seed))
        if ours.keys() - theirs.keys()
    ]
    return _difference([(a.by_seed[seed], b.by_seed[seed]) for seed in seeds], alone)


def _difference(pairs: Sequence[tuple[float, float]], alone: Sequence[str]) -> PairedDifference:
    differences = [b - a for a, b in pairs]
    seeds, centre = len(differences), mean(differences)
    low = high = spread = None
    warnings = []
    if seeds == 1:
        warnings.append("one pair has no interval")
    else:
        scale = max(abs(score) for pair in pairs for score in pair)
        equal = max(differences) - min(differences) <= _EQUAL * scale
        spread = 0.0 if equal else stdev(differences)
        quantile = float(require("scipy.stats", extra="train").t.ppf(0.975, seeds - 1))
        margin = quantile * spread / seeds**0.5
        low, high = centre - margin, centre + margin
        if equal:
            warnings.append(
                f"all {seeds} differences are equal: the interval has no width and says nothing about the spread; "
                "probably the scores are rounded, or the test images are few"
            )
        elif seeds == 2:
            warnings.append("an interval from 2 pairs is very wide")
    if alone:
        warnings.append(f"seeds without a partner are left out: {', '.join(alone)}")
    return PairedDifference(centre, low, high, spread, seeds, "; ".join(warnings) or None)


@dataclass(frozen=True)
class _Scores:
    """Scores by seed, or by place in a sequence (``ordered``)."""

    by_seed: dict[Any, float]
    ordered: bool


def _scores(name: str, scores: Any) -> _Scores:
    if isinstance(scores, str | os.PathLike):
        return _Scores(_read(Path(scores)), ordered=False)
    if isinstance(scores, Mapping):
        return _Scores({seed: _number(name, seed, score) for seed, score in scores.items()}, ordered=False)
    listed = scores.tolist() if hasattr(scores, "tolist") else scores
    if not isinstance(listed, Sequence) or isinstance(listed, bytes):
        raise TypeError(
            f"paired: scores_{name} must be a sequence or an array of scores, a mapping from seeds to scores, or the "
            f"path of a CSV file, got {type(scores).__name__}"
        )
    return _Scores({place: _number(name, place, score) for place, score in enumerate(listed)}, ordered=True)


def _number(name: str, seed: Any, score: Any) -> float:
    value = score.item() if getattr(score, "ndim", None) == 0 else score
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"paired: scores_{name} must hold one number for each seed, got {value!r:.60} at {seed!r}")
    if not math.isfinite(value):
        raise ValueError(f"paired: scores must be finite, got {value} in scores_{name} at {seed!r}. Leave out its seed")
    return float(value)


def _read(path: Path) -> dict[Any, float]:
    found: dict[Any, float] = {}
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        missing = {"seed", "score"} - set(rows.fieldnames or ())
        if missing:
            raise ValueError(
                f"paired: {path} must have the columns seed and score in its first line, separated by commas; it lacks "
                f"{' and '.join(sorted(missing))}"
            )
        for row in rows:
            try:
                seed, score = _seed(row["seed"]), float(row["score"])
                finite = math.isfinite(score)
            except (TypeError, ValueError):
                finite = False
            if not finite:
                raise ValueError(
                    f"paired: {path}, line {rows.line_num}: expected a seed and a finite score, got {row['seed']!r} "
                    f"and {row['score']!r}"
                )
            if seed in found:
                raise ValueError(f"paired: {path}, line {rows.line_num}: seed {seed} is there twice; give each once")
            found[seed] = score
    return found


def _seed(text: str) -> int | str:
    """A number where it is one, so that a file and a mapping can be paired."""
    stripped = text.strip()
    return int(stripped) if stripped.removeprefix("-").isdecimal() else stripped


def _listed(seeds: Any) -> str:
    shown = sorted(map(str, seeds), key=lambda seed: (len(seed), seed))
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")


def _plural(number: int, noun: str) -> str:
    return noun if number == 1 else f"{noun}s"
