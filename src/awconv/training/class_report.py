"""Figures of each class in an evaluation: a table, CSV, and the confusion matrix as a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from awconv.tables import Table
from awconv.terminal import printable, visible
from awconv.training.partial import clear_old, replacing

CLASSES, CONFUSION, PICTURE = "classes.csv", "confusion.csv", "confusion.png"
_HEADINGS = ("class", "images", "precision", "recall", "F1")
_SHOWN = 20  # classes in the table of the terminal
_NAMED = 60  # classes whose names fit beside the picture
_DRAWN = 2000  # classes, at most


class ClassReport(Callback):
    """Prints the figures of each class after ``awconv test`` or ``validate``, and writes them into a folder.

    ``classes.csv`` has a row for each class: its images, precision, recall and F1, from 0 to 1. ``confusion.csv`` has a
    row for each pair of a true and a predicted class that occurs, with its images. ``confusion.png`` shows the
    confusion matrix: the shares of the predicted classes, in the row of the true class.

    Args:
        folder: the folder; None writes nothing. Files of an earlier report in it are replaced.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = None if folder is None else folder.expanduser()
        self._pairs: list[Tensor] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Makes the folder before the evaluation starts.

        Raises:
            ValueError: there is a file in its place, or somebody else's file would be written over.
        """
        if self.folder is None or stage == "fit" or not trainer.is_global_zero:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise ValueError(f"report.folder must be a folder, and {self.folder} is a file") from None
        if not _is_report(self.folder):
            there = [name for name in (CLASSES, CONFUSION, PICTURE) if (self.folder / name).exists()]
            if there:
                raise ValueError(
                    f"report.folder would be written over {self.folder / there[0]}, which is no former report; name "
                    "another folder"
                )
        clear_old([self.folder])

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        self._keep(trainer, outputs)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any
    ) -> None:
        self._keep(trainer, outputs)

    def _keep(self, trainer: pl.Trainer, outputs: Any) -> None:
        if trainer.state.fn in (TrainerFn.TESTING, TrainerFn.VALIDATING):
            self._pairs.append(torch.stack([outputs["targets"], outputs["predicted"]]).cpu())

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._report(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._report(trainer, pl_module)

    def _report(self, trainer: pl.Trainer, task: Any) -> None:
        if not self._pairs:
            return
        pairs = _gathered(torch.cat(self._pairs, 1))
        self._pairs = []
        if not trainer.is_global_zero:
            return
        pairs, counts = torch.unique(pairs, dim=1, return_counts=True)
        rows = class_figures(pairs, counts, task.classes)
        _print(rows)
        if self.folder is not None:
            confused = [
                (task.classes[true], task.classes[predicted], images)
                for (true, predicted), images in zip(pairs.T.tolist(), counts.tolist(), strict=True)
            ]
            _write(self.folder / CLASSES, _csv(_HEADINGS, rows))
            _write(self.folder / CONFUSION, _csv(("class", "predicted", "images"), confused))
            if len(task.classes) <= _DRAWN:
                _write(self.folder / PICTURE, _picture(pairs, counts, task.classes))
            print(f"Report: {printable(str(self.folder))}")


def class_figures(pairs: Tensor, counts: Tensor, classes: Sequence[str]) -> list[tuple[str, int, float, float, float]]:
    """The figures of each class: name, images, precision, recall, F1; NaN where there is nothing to divide by.

    Args:
        pairs: each true and predicted class that occur together, shape (2, pairs).
        counts: their images, shape (pairs,).
        classes: the names of all classes.
    """
    number, right = len(classes), pairs[0] == pairs[1]
    images, predicted = (torch.bincount(which, counts.double(), number) for which in pairs)
    hits = torch.bincount(pairs[0][right], counts[right].double(), number)
    figures = (hits / predicted).tolist(), (hits / images).tolist(), (2 * hits / (predicted + images)).tolist()
    return list(zip(classes, map(int, images.tolist()), *figures, strict=True))


def _gathered(pairs: Tensor) -> Tensor:
    """The pairs of all processes."""
    if not torch.distributed.is_initialized():
        return pairs
    shares: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(shares, pairs)
    return torch.cat(shares, 1)


def _print(rows: Sequence[tuple[str, int, float, float, float]]) -> None:
    shown = list(rows)
    note = ""
    if len(shown) > _SHOWN:
        shown = sorted((row for row in rows if row[1]), key=lambda row: row[4])[:_SHOWN]
        note = f"the {len(shown)} of {len(rows)} classes with the lowest F1; --report.folder=FOLDER writes all"
    Table(
        ("class", "images", "precision, %", "recall, %", "F1, %"),
        [(name, str(images), *(_percent(value) for value in figures)) for name, images, *figures in shown],
        alignment="lr",
        note=note,
    ).print()


def _percent(value: float) -> str:
    return "" if value != value else f"{100 * value:.1f}"


def _csv(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(headings)
    writer.writerows(map(_cell, row) for row in rows)
    return text.getvalue().encode()


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        return visible(value)
    return "" if value != value else value  # NaN: there is no such figure


def _write(place: Path, content: bytes) -> None:
    with replacing(place) as file:
        file.write(content)


def _is_report(folder: Path) -> bool:
    try:
        with (folder / CLASSES).open(errors="replace") as file:
            return file.readline(200).strip() == ",".join(_HEADINGS)
    except OSError:
        return False


def _picture(pairs: Tensor, counts: Tensor, classes: Sequence[str]) -> bytes:
    """The confusion matrix as PNG."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    number = len(classes)
    matrix = torch.zeros(number, number)
    matrix[pairs[0], pairs[1]] = counts.float()
    side = max(5.0, 2.5 + 0.28 * min(number, _NAMED))
    with matplotlib.rc_context({"text.parse_math": False}):  # a name may hold dollars
        figure = Figure(figsize=(side + 1, side), layout="constrained")
        axes = figure.subplots()
        shares = (matrix / matrix.sum(1, keepdim=True)).nan_to_num() * 100
        image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
        figure.colorbar(image, ax=axes, label="share of the class, %", shrink=0.8)
        axes.set(xlabel="predicted class", ylabel="true class")
        if number <= _NAMED:
            names = [_short(visible(name)) for name in classes]
            axes.set_xticks(range(number), names, rotation=90)
            axes.set_yticks(range(number), names)
        if number <= 15:
            for true in range(number):
                for predicted in range(number):
                    count, share = int(matrix[true, predicted]), float(shares[true, predicted])
                    if count:
                        colour = "white" if share > 50 else "black"
                        axes.text(predicted, true, str(count), ha="center", va="center", color=colour, fontsize=8)
        content = io.BytesIO()
        FigureCanvasAgg(figure).print_png(content)
    return content.getvalue()


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"
