"""The record of a run: a small JSON file with its result. Needs no extra."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

TestSplit = Literal["test", "val"]


@dataclass(frozen=True)
class EpochRecord:
    """One epoch of a learning curve.

    Attributes:
        train_loss: mean loss over the training batches.
        val_score: the score on the validation split, from 0 to 1; None if it was not evaluated.
        seconds: duration of the training batches, without validation and checkpoints.
    """

    train_loss: float
    val_score: float | None
    seconds: float


@dataclass(frozen=True)
class Record:
    """The result of a finished run.

    Attributes:
        variant: such as ``"plain"`` or ``"aw"``.
        network: name of the network.
        seed: of the initialisation, the order of the images and their augmentation.
        parameters: number of trained parameters.
        test_split: the split of the score. ``"val"`` if the data set has no ``"test"``, or if choices are made by it.
        score: of the network after the last epoch on that split, from 0 to 1.
        epochs: the learning curve.
        recipe: all settings of the run.
        versions: of awconv, torch, timm and Python, and the machine.
        operations: multiply-adds for one image; None in records of versions that did not count them.
        jobs: how many runs shared the device.
        metric: name of the score: ``"accuracy"``, or ``"box AP"`` (COCO's).
        figures: other figures by name, such as ``AP50``, from 0 to 1; negative if there is nothing to evaluate.
        seconds: that the run took with data, evaluations and checkpoints, over all interruptions; None in records of
            versions that did not measure it.
        tuned: the value of each setting that was chosen for this variant on held-out images, such as ``lr``.
        tuned_epochs: number of epochs of the runs by which it was chosen.
    """

    variant: str
    network: str
    seed: int
    parameters: int
    test_split: str
    score: float
    epochs: list[EpochRecord]
    recipe: dict[str, Any]
    versions: dict[str, str]
    operations: int | None = None
    jobs: int = 1
    metric: str = "accuracy"
    figures: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    tuned: dict[str, float] = field(default_factory=dict)
    tuned_epochs: int = 0

    @property
    def seconds_per_epoch(self) -> float:
        """Median duration of an epoch, without the first one, which warms up, if there are more."""
        return median(epoch.seconds for epoch in self.epochs[1:] or self.epochs)

    def save(self, path: Path) -> None:
        """Writes the record as JSON, atomically."""
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self), indent=1, allow_nan=False) + "\n")
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> Record:
        """Reads what :meth:`save` wrote.

        Raises:
            ValueError: the file is not a record.
        """
        try:
            content = json.loads(path.read_text(), parse_constant=_refuse)
            record = cls(**(content | {"epochs": [EpochRecord(**epoch) for epoch in content["epochs"]]}))
            for part in (record, *record.epochs):
                _check_types(part)
            if record.test_split not in get_args(TestSplit):
                raise ValueError(f"test_split cannot be {record.test_split[:80]!r}")
            if not record.epochs:
                raise ValueError("it has no epochs")
        except (ValueError, TypeError, KeyError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path} is not a run of awconv compare: {error}") from error
        return record


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


def _check_types(part: Any) -> None:
    """Raises a TypeError for an attribute of a dataclass with a value of another type, or an infinite one."""
    types = get_type_hints(type(part))
    for one in fields(part):
        value = getattr(part, one.name)
        if not _is_a(value, types[one.name]):
            raise TypeError(f"{one.name} cannot be {str(value)[:80]!r}")


def _is_a(value: Any, kind: Any) -> bool:
    if isinstance(kind, UnionType):
        return any(_is_a(value, one) for one in get_args(kind))
    if get_origin(kind) is dict:
        names, values = get_args(kind)
        return isinstance(value, dict) and all(_is_a(k, names) and _is_a(v, values) for k, v in value.items())
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return kind is Any or isinstance(value, get_origin(kind) or kind)
