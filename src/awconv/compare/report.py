"""What a comparison says: a table, learning curves, a page for a browser, and the same as JSON."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median, stdev

from rich.box import SIMPLE_HEAD
from rich.table import Table

from awconv.compare.runs import Run


@dataclass(frozen=True)
class Row:
    """One variant of a comparison.

    Attributes:
        variant: its name.
        network: name of the network.
        parameters: number of trained parameters.
        seeds: number of finished runs.
        accuracy: mean test accuracy over the seeds, in percent.
        spread: standard deviation of the test accuracy over the seeds, in percentage points; None for one seed.
        seconds_per_epoch: median over the runs.
        ratio: ``seconds_per_epoch`` over that of the first variant.
    """

    variant: str
    network: str
    parameters: int
    seeds: int
    accuracy: float
    spread: float | None
    seconds_per_epoch: float
    ratio: float


HEADINGS = ("variant", "network", "parameters", "accuracy, %", "seeds", "s/epoch", "time ratio")


def summarise(runs: Sequence[Run]) -> list[Row]:
    """One row for each variant, in the order in which they first occur."""
    by_variant: dict[str, list[Run]] = {}
    for run in runs:
        by_variant.setdefault(run.variant, []).append(run)
    rows: list[Row] = []
    for variant, group in by_variant.items():
        accuracies = [100 * run.test_accuracy for run in group]
        seconds = median(run.seconds_per_epoch for run in group)
        rows.append(
            Row(
                variant=variant,
                network=group[0].network,
                parameters=group[0].parameters,
                seeds=len(group),
                accuracy=mean(accuracies),
                spread=stdev(accuracies) if len(accuracies) > 1 else None,
                seconds_per_epoch=seconds,
                ratio=seconds / rows[0].seconds_per_epoch if rows else 1.0,
            )
        )
    return rows


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, under :data:`HEADINGS`."""
    spread = "" if row.spread is None else f" ± {row.spread:.2f}"
    return (
        row.variant,
        row.network,
        f"{row.parameters:,}",
        f"{row.accuracy:.2f}{spread}",
        str(row.seeds),
        f"{row.seconds_per_epoch:.2f}",
        f"{row.ratio:.2f}",
    )


def rich_table(rows: Sequence[Row], title: str) -> Table:
    """The table for a terminal."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for position, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if position < 2 else "right")
    for row in rows:
        table.add_row(*cells(row))
    return table


def markdown_table(rows: Sequence[Row]) -> str:
    """The table for a README."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "| --- | --- |" + " ---: |" * (len(HEADINGS) - 2)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def write_report(runs: Sequence[Run], folder: Path, title: str, command: str) -> Path:
    """Writes ``results.json``, ``table.md``, ``curves.svg`` and ``index.html``.

    Returns:
        The page.
    """
    rows = summarise(runs)
    content = {
        "title": title,
        "command": command,
        "summary": [asdict(row) for row in rows],
        "runs": [asdict(run) for run in runs],
    }
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "table.md").write_text(markdown_table(rows))
    _plot(runs, folder / "curves.svg")
    page = folder / "index.html"
    page.write_text(_page(runs, rows, title, command))
    return page


def _plot(runs: Sequence[Run], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    variants = list(dict.fromkeys(run.variant for run in runs))
    for variant_index, variant in enumerate(variants):
        colour = f"C{variant_index}"
        group = [run for run in runs if run.variant == variant]
        for axes, curves in (
            (losses, [[epoch.train_loss for epoch in run.epochs] for run in group]),
            (accuracies, [[100 * e.val_accuracy for e in run.epochs if e.val_accuracy is not None] for run in group]),
        ):
            for curve in curves:
                axes.plot(range(1, len(curve) + 1), curve, color=colour, alpha=0.3, linewidth=1)
            averages = [mean(values) for values in zip(*curves, strict=False)]
            axes.plot(range(1, len(averages) + 1), averages, color=colour, linewidth=2, label=variant)
    for axes, label in ((losses, "training loss"), (accuracies, "validation accuracy, %")):
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(title="mean; thin: each seed")
    losses.set_yscale("log")
    figure.savefig(path)


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left }
thead th { border-bottom: 2px solid #888 }
img { width: 100% }
code { background: #f3f3f3; padding: .15rem .35rem; border-radius: .25rem }
.note { color: #555 }
"""


def _html_table(headings: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in body)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"


def _page(runs: Sequence[Run], rows: Sequence[Row], title: str, command: str) -> str:
    each_run = [
        (run.variant, str(run.seed), f"{100 * run.test_accuracy:.2f}", f"{run.seconds_per_epoch:.2f}") for run in runs
    ]
    splits = {"test": "the test split", "val": "the validation split, there being no test split"}
    tested_on = splits[runs[0].test_split]
    versions = ", ".join(f"{name} {version}" for name, version in runs[0].versions.items())
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style></head>
<body>
<h1>{html.escape(title)}</h1>
<p><code>{html.escape(command)}</code></p>
{_html_table(HEADINGS, [cells(row) for row in rows])}
<p class="note">Accuracy: of the network after the last epoch on {tested_on}; mean and standard deviation over the
seeds. Time: median epoch of training, without evaluation; the ratio is to the first variant, trained in turn with the
others on the same machine.</p>
<img src="curves.svg" alt="Learning curves: training loss and validation accuracy by epoch, for each variant">
<h2>Each run</h2>
{_html_table(("variant", "seed", "accuracy, %", "s/epoch"), each_run)}
<p class="note">All settings and curves: <a href="results.json">results.json</a>. {html.escape(versions)}.</p>
</body>
</html>
"""
