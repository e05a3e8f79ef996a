"""A comparison: variants of a recipe, their runs, and where the records are kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from awconv.compare.record import Record, TestSplit
from awconv.compare.variants import Variant
from awconv.terminal import say
from awconv.training.recipe import Recipe


@dataclass(frozen=True)
class Run:
    """One training of a variant.

    Attributes:
        variant: the trained variant.
        seed: of the initialisation, the order of the images and their augmentation.
    """

    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        """The name of the record, and of the folder of checkpoints."""
        return f"{self.variant.name}-seed{self.seed}"


@dataclass(frozen=True)
class Comparison:
    """What all runs of a comparison share.

    Attributes:
        variants: what is compared; the first is the baseline if no other is.
        seeds: number of seeds, counted from 0.
        folder: of the records, the checkpoints and the report.
        split: the split to test on.
        jobs: how many runs share the device.

    Raises:
        ValueError: ``seeds`` or ``jobs`` is less than 1, or the variants have different tasks.
    """

    variants: tuple[Variant, ...]
    seeds: int
    folder: Path
    split: TestSplit = "test"
    jobs: int = 1

    def __post_init__(self) -> None:
        for name, value in (("seeds", self.seeds), ("jobs", self.jobs)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        tasks = {variant.recipe.settings.task.score_name: variant.name for variant in self.variants}
        if len(tasks) > 1:
            named = " and ".join(f"{name} ({score})" for score, name in tasks.items())
            raise ValueError(f"variants must have the same task, and so the same score, got {named}")
        object.__setattr__(self, "jobs", min(self.jobs, self.seeds * len(self.variants)))

    @property
    def runs(self) -> list[Run]:
        """All runs. Those of a seed follow each other, so that the ratio of their times is fair."""
        return [Run(variant, seed) for seed, variant in product(range(self.seeds), self.variants)]

    def checkpoints(self, run: Run) -> Path:
        """The folder of a run's checkpoints."""
        return self.folder / run.name

    def file(self, run: Run) -> Path:
        """The file of a run's record."""
        return self.folder / f"{run.name}.json"

    def recipe(self, run: Run) -> Recipe:
        """The settings of a run."""
        return run.variant.recipe.for_run(run.seed, self.checkpoints(run))

    def finished(self, run: Run) -> Record | None:
        """The record of a finished run, or None.

        Raises:
            ValueError: the file is not a record, or has other settings.
        """
        file = self.file(run)
        if not file.is_file():
            return None
        record, recipe = Record.load(file), self.recipe(run)
        differing = recipe.differences(record.recipe)
        if (record.variant, record.seed) != (run.variant.name, run.seed):
            differing.append(f"it is {record.variant!r} of seed {record.seed} there, {run.name} now")
        expected: str = self.split
        if (expected, record.test_split) == ("test", "val"):  # right where there is no test split
            expected = recipe.build().datamodule.test_split
        if record.test_split != expected:
            differing.append(f"it was tested on {record.test_split} there, on {expected} now")
        if differing:
            raise ValueError(
                f"{file} holds a run of other settings: {'; '.join(differing[:3])}. Name another folder with --out, or "
                "remove the file to train anew"
            )
        changed = [name for name, digest in recipe.own_code.items() if record.versions.get(name, digest) != digest]
        if changed:
            say(f"{file}: {', '.join(changed)} has changed since this run was trained; remove the file to train anew")
        variant = run.variant
        if variant.tuned:  # it may have been trained with this value before it was chosen
            record = replace(record, tuned=dict(variant.tuned), tuned_epochs=variant.tuned_epochs)
        return record
