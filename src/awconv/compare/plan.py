"""What a command compares: the variants, their runs and how they are trained."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from awconv.compare.comparison import Comparison
from awconv.compare.record import Record, TestSplit
from awconv.compare.slurm import SlurmOptions
from awconv.compare.time_limit import TimeLimit
from awconv.compare.tuned import Tuned
from awconv.compare.tuning import Tuning
from awconv.compare.variants import Change


@dataclass(frozen=True)
class Plan:
    """What a command compares.

    Attributes:
        recipe: a YAML file for ``awconv fit``.
        changes: one for each variant.
        overrides: further arguments of all variants.
        seeds: number of seeds, counted from 0.
        folder: of the records, the checkpoints and the report.
        split: the split to test on.
        jobs: how many runs share the device, or how many jobs there may be in a queue; None for one, or for all.
        tuning: a setting to choose first for each variant, or None.
        limit: the time for all.
        slurm: what the jobs of runs ask for; None to train them here.
    """

    recipe: Path
    changes: Sequence[Change]
    overrides: Sequence[str]
    seeds: int
    folder: Path
    split: TestSplit
    jobs: int | None = None
    tuning: Tuning | None = None
    limit: TimeLimit = field(default_factory=TimeLimit)
    slurm: SlurmOptions | None = None

    def __post_init__(self) -> None:
        if self.jobs is not None and self.jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {self.jobs}")

    @property
    def sharing(self) -> int:
        """How many runs share a device."""
        return 1 if self.jobs is None or self.slurm is not None else self.jobs

    def comparison(self, tuned: Tuned | None = None) -> Comparison:
        """The runs to compare, with the chosen values where there are some; variants without one are left out."""
        variants = []
        for change in self.changes:
            if tuned is None or self.tuning is None:
                variants.append(change.apply(self.recipe, self.overrides))
            elif change.name in tuned.best:
                value = tuned.best[change.name]
                variant = self.tuning.set(change, value).apply(self.recipe, self.overrides)
                variants.append(replace(variant, tuned={tuned.name: value}, tuned_epochs=tuned.epochs))
        return Comparison(tuple(variants), self.seeds, self.folder, self.split, self.sharing)

    def tuned(self, records: Sequence[Record], unsure: Collection[str] = ()) -> Tuned | None:
        """What finished trials have found; None without any.

        Args:
            records: of the trials that have finished.
            unsure: variants that shall have no choice.
        """
        if self.tuning is None or not records:
            return None
        names = [change.name for change in self.changes]
        return Tuned.of(self.tuning.name, self.tuning.values, names, records, unsure)

    def trials(self) -> Comparison | None:
        """The runs by which the setting is chosen; None if there is none to choose."""
        if self.tuning is None:
            return None
        self.tuning.check(self.changes, self.recipe, self.overrides)
        return self.tuning.trials(self.changes, self.recipe, self.overrides, self.folder, self.sharing)
