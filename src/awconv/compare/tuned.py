"""The values of a setting that were tried for each variant, and the best ones. Needs no extra."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from awconv.compare.record import Record
from awconv.tables import Table


def shown(value: float) -> str:
    """A value as it is written, in names too."""
    return f"{value:.12g}"


def epochs(count: int) -> str:
    """A number of epochs, in words."""
    return "1 epoch" if count == 1 else f"{count} epochs"


def trial(variant: str, name: str, value: float) -> str:
    """The name of a variant's trial."""
    return f"{variant}-{name}={shown(value)}"


@dataclass(frozen=True)
class Tuned:
    """What was found for each variant.

    Attributes:
        name: of the setting.
        epochs: number of epochs of the trials.
        metric: name of the score.
        scores: on the held-out images, from 0 to 1, by variant and value; None where a trial failed.
        unsure: variants without a choice: one of their trials failed by an accident that says nothing about its value.
    """

    name: str
    epochs: int
    metric: str
    scores: Mapping[str, Mapping[float, float | None]]
    unsure: Collection[str] = ()

    @classmethod
    def of(
        cls,
        name: str,
        values: Sequence[float],
        variants: Sequence[str],
        records: Sequence[Record],
        unsure: Collection[str] = (),
    ) -> Tuned:
        """What some trials have found.

        Args:
            name: of the setting.
            values: that were tried.
            variants: names of the variants.
            records: of the trials that have finished; at least one.
            unsure: variants that shall have no choice.
        """
        by_name = {record.variant: record.score for record in records}
        scores = {
            variant: {value: by_name.get(trial(variant, name, value)) for value in values} for variant in variants
        }
        return cls(name, max(len(one.epochs) for one in records), records[0].metric, scores, unsure)

    @property
    def best(self) -> dict[str, float]:
        """The value with the best score, by variant; the smaller one of equals. Left out are variants without a score,
        and those of ``unsure``.

        Example:
            >>> Tuned("lr", 5, "accuracy", {"aw": {0.1: 0.7, 0.2: 0.8, 0.4: 0.8}}).best
            {'aw': 0.2}
        """
        best = {}
        for variant, by_value in self.scores.items():
            found = [(score, -value) for value, score in by_value.items() if score is not None]
            if found and variant not in self.unsure:
                best[variant] = -max(found)[1]
        return best

    @property
    def hints(self) -> list[str]:
        """Says which of the best values are the first or the last that was tried."""
        said = []
        for which, of, more in (("largest", max, "larger"), ("smallest", min, "smaller")):
            names = [name for name, value in self.best.items() if value == of(self.scores[name])]
            if names:
                end = shown(of(self.scores[names[0]]))
                said.append(
                    f"the best of {self.name} for {' and '.join(names)} is the {which} tried, {end}: a {more} one may "
                    f"be better; try {more} ones, too, with another --out"
                )
        return said

    def table(self) -> Table:
        """The scores: a row for each variant, a column for each value."""
        values = list(next(iter(self.scores.values())))
        rows = [
            (
                variant,
                *("" if score is None else f"{100 * score:.2f}" for score in by_value.values()),
                shown(self.best[variant]) if variant in self.best else "none",
            )
            for variant, by_value in self.scores.items()
        ]
        headings = ("variant", *(f"{self.name} = {shown(value)}" for value in values), "taken")
        note = f"Scores ({self.metric}, %) on the held-out images, with seed 0, after {epochs(self.epochs)}"
        failed = any(None in by_value.values() for by_value in self.scores.values())
        return Table(
            headings, rows, alignment="l", note=f"{note}; empty: the run has not finished." if failed else note
        )

    def content(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {
            "name": self.name,
            "epochs": self.epochs,
            "seed": 0,
            "split": "val",
            "scores": {
                variant: {shown(value): score for value, score in by_value.items()}
                for variant, by_value in self.scores.items()
            },
            "taken": self.best,
        }
