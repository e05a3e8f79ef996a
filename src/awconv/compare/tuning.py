"""Chooses the best value of a setting for each variant, on held-out images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from awconv.compare.comparison import Comparison
from awconv.compare.tuned import shown, trial
from awconv.compare.variants import Change, Variant
from awconv.tasks.optimization import Optimization
from awconv.training.recipe import Recipe
from awconv.usage import UsageError
from awconv.yaml_files import read_recipe

FOLDER = "tune"  # of the trials, in that of the comparison
_FORM = "it must be NAME=VALUE,VALUE,... with an argument of the task and two numbers or more, such as lr=0.05,0.1,0.2"


@dataclass(frozen=True)
class Tuning:
    """A setting, and the values to try for each variant.

    Attributes:
        name: of the task's argument, such as ``"lr"``.
        values: to try; different, from the smallest to the largest.
        epochs: number of epochs of each trial; None for the recipe's.
    """

    name: str
    values: tuple[float, ...]
    epochs: int | None = None

    @classmethod
    def parse(cls, text: str | None, epochs: int | None) -> Tuning | None:
        """Reads ``NAME=VALUE,VALUE,...``; None stays None.

        Raises:
            UsageError: the text is something else, a value is no number or comes twice, or ``epochs`` is not positive.

        Example:
            >>> Tuning.parse("lr=0.2,0.1", None)
            Tuning(name='lr', values=(0.1, 0.2), epochs=None)
        """
        if text is None:
            if epochs is not None:
                raise UsageError(f"tune_epochs = {epochs} is the length of the trials of --tune, which is missing")
            return None
        if epochs is not None and epochs < 1:
            raise UsageError(f"tune_epochs must be at least 1, got {epochs}")
        name, _, listed = text.strip().partition("=")
        name = name.removeprefix("--").removeprefix("model.")
        if not all(part.isidentifier() for part in name.split(".")):
            raise UsageError(f"tune cannot be {text!r}: {_FORM}")
        try:
            values = [float(value) for value in listed.split(",")]
        except ValueError:
            raise UsageError(f"tune cannot be {text!r}: {_FORM}") from None
        if not all(map(math.isfinite, values)) or len(values) < 2:
            raise UsageError(f"tune cannot be {text!r}: {_FORM}")
        if len(set(map(shown, values))) < len(values):
            raise UsageError(f"the values of tune must differ, got {text!r}")
        return cls(name, tuple(sorted(values)), epochs)

    def check(self, changes: Sequence[Change], recipe: Path, overrides: Sequence[str]) -> None:
        """Refuses what would set the same setting again.

        Raises:
            UsageError: an override or a variant sets it.
        """
        if self._is_set_by(overrides) or self._value(recipe, overrides) != self._value(recipe):
            raise UsageError(
                f"model.{self.name} cannot be given for the runs beside --tune={self.name}=..., which sets it; "
                "leave one out"
            )
        for change in changes:
            laid = None if change.overlay is None else self._of(read_recipe(change.overlay).get("model"))
            if laid is not None or self._is_set_by(change.arguments):
                raise UsageError(
                    f"variant {change.name} sets model.{self.name} itself, which --tune={self.name}=... would replace; "
                    "leave one out"
                )

    def _is_set_by(self, arguments: Sequence[str]) -> bool:
        return any(argument.partition("=")[0] == f"--model.{self.name}" for argument in arguments)

    def _value(self, recipe: Path, overrides: Sequence[str] = ()) -> Any:
        """The value in a recipe, which overrides may set in files, too; None if they are needed to make sense of it."""
        try:
            return self._of(Recipe.parse([f"--config={recipe}", *overrides]).settings.content["model"])
        except (UsageError, ValueError):
            return None

    def _of(self, model: Any) -> Any:
        for part in self.name.split("."):
            model = model.get(part) if isinstance(model, dict) else None
        return model

    def set(self, change: Change, value: float) -> Change:
        """A change that also sets a value."""
        return replace(change, arguments=(*change.arguments, f"--model.{self.name}={shown(value)}"))

    def trials(
        self, changes: Sequence[Change], recipe: Path, overrides: Sequence[str], folder: Path, jobs: int
    ) -> Comparison:
        """One run for each variant and value, with seed 0, tested on the held-out images.

        Raises:
            UsageError: the task has no such argument, the argument is no number, or a value is out of its range.
        """
        length = [] if self.epochs is None else [f"--trainer.max_epochs={self.epochs}"]
        variants = []
        for change in changes:
            for value in self.values:
                named = replace(self.set(change, value), name=trial(change.name, self.name, value))
                variant = named.apply(recipe, [*overrides, *length])
                self._check_value(variant)
                variants.append(replace(variant, trial_of=change.name))
        return Comparison(tuple(variants), 1, folder / FOLDER, "val", jobs)

    def _check_value(self, variant: Variant) -> None:
        """Raises a UsageError if the argument is no number, or the variant's value is out of its range."""
        given: Any = variant.recipe.settings.content["model"]
        known: dict[str, Any] = {one.name: given.get(one.name) for one in fields(Optimization)}
        known |= {"decay_epochs": tuple(known["decay_epochs"] or ()), "optimizer_args": known["optimizer_args"] or {}}
        given = self._of(given)
        if isinstance(given, bool) or not isinstance(given, int | float):
            raise UsageError(f"tune takes an argument that is a number, and model.{self.name} is none; {_FORM}")
        try:
            Optimization(**known)
        except ValueError as error:
            raise UsageError(f"tune: {error}") from error
