"""Statistics of a comparison: means over seeds, and differences between runs with the same seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median, stdev

from scipy.stats import t as student_t

from awconv.compare.record import Record
from awconv.models import BASELINES


@dataclass(frozen=True)
class Difference:
    """Paired difference between a variant and its baseline.

    Attributes:
        to: the baseline: the variant with the same network without the attention, or the first variant.
        seeds: number of pairs.
        mean: mean difference, in percentage points.
        low: lower end of the mean's 95 % confidence interval, by Student's t; None for one pair.
        high: its upper end.
    """

    to: str
    seeds: int
    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class VariantSummary:
    """The runs of one variant, summarised.

    Attributes:
        variant: its name.
        network: name of the network.
        parameters: number of trained parameters.
        operations: multiply-adds for one image; None if they were not counted.
        seeds: number of finished runs.
        metric: name of the score, such as ``"accuracy"``.
        score: mean over the seeds, in percent.
        spread: standard deviation over the seeds, in percentage points; None for one seed.
        figures: means of other figures, such as ``AP50``, in percent; None if there is nothing to evaluate.
        difference: to the baseline; None for the baseline itself, and without common seeds.
        seconds_per_epoch: median over the runs.
        ratio: ``seconds_per_epoch`` over that of the first variant.
    """

    variant: str
    network: str
    parameters: int
    operations: int | None
    seeds: int
    metric: str
    score: float
    spread: float | None
    figures: dict[str, float | None]
    difference: Difference | None
    seconds_per_epoch: float
    ratio: float


def summarise(records: Sequence[Record]) -> list[VariantSummary]:
    """One summary for each variant, in the order in which they first occur."""
    by_variant: dict[str, list[Record]] = {}
    for record in records:
        by_variant.setdefault(record.variant, []).append(record)
    summaries: list[VariantSummary] = []
    for variant, group in by_variant.items():
        scores = [100 * record.score for record in group]
        seconds = median(record.seconds_per_epoch for record in group)
        baseline = _baseline(group[0], by_variant)
        summaries.append(
            VariantSummary(
                variant=variant,
                network=group[0].network,
                parameters=group[0].parameters,
                operations=group[0].operations,
                seeds=len(group),
                metric=group[0].metric,
                score=mean(scores),
                spread=stdev(scores) if len(scores) > 1 else None,
                figures=_figures(group),
                difference=None if baseline == variant else paired_difference(group, by_variant[baseline]),
                seconds_per_epoch=seconds,
                ratio=seconds / summaries[0].seconds_per_epoch if summaries else 1.0,
            )
        )
    return summaries


def _figures(records: Sequence[Record]) -> dict[str, float | None]:
    every = {name: [100 * record.figures[name] for record in records] for name in records[0].figures}
    return {name: mean(values) if min(values) >= 0 else None for name, values in every.items()}


def _baseline(record: Record, by_variant: Mapping[str, Sequence[Record]]) -> str:
    without = BASELINES.get(record.network)
    for variant, group in by_variant.items():
        if group[0].network == without:
            return variant
    return next(iter(by_variant))


def paired_difference(records: Sequence[Record], baseline: Sequence[Record]) -> Difference | None:
    """The difference between a variant's runs and its baseline's with the same seeds; None without such seeds."""
    before = {record.seed: record.score for record in baseline}
    differences = [100 * (record.score - before[record.seed]) for record in records if record.seed in before]
    if not differences:
        return None
    centre, low, high = mean(differences), None, None
    if len(differences) > 1:
        quantile = float(student_t.ppf(0.975, len(differences) - 1))
        margin = quantile * stdev(differences) / len(differences) ** 0.5
        low, high = centre - margin, centre + margin
    return Difference(baseline[0].variant, len(differences), centre, low, high)
