"""Statistics of a comparison: means over seeds, and differences and time ratios between runs with the same seed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean, median, stdev

from awconv.compare.differences import PairedDifference, paired
from awconv.compare.record import Record
from awconv.models import BASELINES


@dataclass(frozen=True)
class Difference(PairedDifference):
    """Paired difference between a variant and its baseline, in percentage points.

    Attributes:
        to: the baseline: the variant with the same network without the attention, or the first variant.
    """

    to: str


@dataclass(frozen=True)
class TimeRatio:
    """Time of training relative to the first variant, each run's median epoch, paired by seed.

    Attributes:
        median: median over the seeds.
        low: the least of the ratios.
        high: the largest.
    """

    median: float
    low: float
    high: float


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
        ratio: of the runs' times to those of the first variant; None where they cannot be compared, since runs were
            trained side by side or with other versions, devices or threads, and without common seeds.
        tuned: the values of settings that were chosen for this variant on held-out images; those alone that all its
            runs have in common.
        tuned_epochs: number of epochs of the runs by which they were chosen.
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
    ratio: TimeRatio | None
    tuned: dict[str, float] = field(default_factory=dict)
    tuned_epochs: int = 0


def summarise(records: Sequence[Record]) -> list[VariantSummary]:
    """One summary for each variant, in the order in which they first occur."""
    by_variant: dict[str, list[Record]] = {}
    for record in records:
        by_variant.setdefault(record.variant, []).append(record)
    first = next(iter(by_variant.values()), [])
    summaries = []
    for variant, group in by_variant.items():
        scores = [100 * record.score for record in group]
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
                seconds_per_epoch=median(record.seconds_per_epoch for record in group),
                ratio=_time_ratio(group, first),
                tuned=dict(sorted(set.intersection(*(set(record.tuned.items()) for record in group)))),
                tuned_epochs=max(record.tuned_epochs for record in group),
            )
        )
    return summaries


def complete_seeds(records: Sequence[Record], variants: Collection[str]) -> list[Record]:
    """The records of the seeds for which all variants have one that have any; all records if there is no such seed."""
    there = {(record.variant, record.seed) for record in records}
    some = {record.variant for record in records}.intersection(variants)
    return [one for one in records if all((variant, one.seed) in there for variant in some)] or list(records)


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
    before, after = ({record.seed: 100 * record.score for record in runs} for runs in (baseline, records))
    common = before.keys() & after.keys()
    if not common:
        return None
    found = paired({seed: before[seed] for seed in common}, {seed: after[seed] for seed in common})
    return Difference(**asdict(found), to=baseline[0].variant)


def _time_ratio(records: Sequence[Record], first: Sequence[Record]) -> TimeRatio | None:
    before = {record.seed: record for record in first}
    pairs = [(record, before[record.seed]) for record in records if record.seed in before]
    compared = [record for pair in pairs for record in pair]
    if not compared or any(one.jobs > 1 or one.versions != compared[0].versions for one in compared):
        return None
    ratios = [record.seconds_per_epoch / other.seconds_per_epoch for record, other in pairs]
    return TimeRatio(median(ratios), min(ratios), max(ratios))
