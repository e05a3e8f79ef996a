"""What a comparison says: a table, learning curves, a page for a browser, and the same as JSON."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median, stdev

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from scipy.stats import t as student_t

from awconv import terminal
from awconv.compare.runs import Run
from awconv.models import BASELINES


@dataclass(frozen=True)
class Difference:
    """How much better a variant is than its twin, over the seeds that both have finished.

    Attributes:
        to: the twin: the variant with the same network but without its attention, or the first one.
        seeds: number of pairs.
        mean: of the pairs' differences, in percentage points.
        low: where the 95 % confidence interval of the mean begins, by Student's t; None for one pair.
        high: where it ends.
    """

    to: str
    seeds: int
    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Row:
    """One variant of a comparison.

    Attributes:
        variant: its name.
        network: name of the network.
        parameters: number of trained parameters.
        operations: multiply-adds for one image; None where they were not counted.
        seeds: number of finished runs.
        metric: what the score is, such as ``"accuracy"``.
        score: mean over the seeds, in percent.
        spread: standard deviation over the seeds, in percentage points; None for one seed.
        figures: means of others, in percent, such as ``AP50``; None where there is nothing to judge by.
        difference: to the twin; None for the first variant, and without common seeds.
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


def headings(rows: Sequence[Row]) -> tuple[str, ...]:
    """Of a table of rows, which share their metric."""
    return (
        "variant",
        "network",
        "parameters",
        "multiply-adds, M",
        f"{rows[0].metric}, %",
        *rows[0].figures,
        "seeds",
        "paired difference (95 % interval)",
        "time ratio",
    )


def summarise(runs: Sequence[Run]) -> list[Row]:
    """One row for each variant, in the order in which they first occur."""
    by_variant: dict[str, list[Run]] = {}
    for run in runs:
        by_variant.setdefault(run.variant, []).append(run)
    rows: list[Row] = []
    for variant, group in by_variant.items():
        scores = [100 * run.score for run in group]
        seconds = median(run.seconds_per_epoch for run in group)
        twin = _twin(group[0], by_variant)
        rows.append(
            Row(
                variant=variant,
                network=group[0].network,
                parameters=group[0].parameters,
                operations=group[0].operations,
                seeds=len(group),
                metric=group[0].metric,
                score=mean(scores),
                spread=stdev(scores) if len(scores) > 1 else None,
                figures=_figures(group),
                difference=None if twin == variant else paired_difference(group, by_variant[twin]),
                seconds_per_epoch=seconds,
                ratio=seconds / rows[0].seconds_per_epoch if rows else 1.0,
            )
        )
    return rows


def _figures(runs: Sequence[Run]) -> dict[str, float | None]:
    every = {name: [100 * run.figures[name] for run in runs] for name in runs[0].figures}
    return {name: mean(values) if min(values) >= 0 else None for name, values in every.items()}


def _twin(run: Run, by_variant: Mapping[str, Sequence[Run]]) -> str:
    without = BASELINES.get(run.network)
    for variant, group in by_variant.items():
        if group[0].network == without:
            return variant
    return next(iter(by_variant))


def paired_difference(runs: Sequence[Run], twins: Sequence[Run]) -> Difference | None:
    """What the runs of a variant gain over its twin's of the same seeds; None if there are none."""
    before = {run.seed: run.score for run in twins}
    gains = [100 * (run.score - before[run.seed]) for run in runs if run.seed in before]
    if not gains:
        return None
    centre, low, high = mean(gains), None, None
    if len(gains) > 1:
        reach = float(student_t.ppf(0.975, len(gains) - 1)) * stdev(gains) / len(gains) ** 0.5
        low, high = centre - reach, centre + reach
    return Difference(twins[0].variant, len(gains), centre, low, high)


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, under :func:`headings`."""
    spread = "" if row.spread is None else f" ± {row.spread:.2f}"
    gain = row.difference
    interval = "" if gain is None or gain.low is None else f" ({gain.low:+.2f} to {gain.high:+.2f})"
    return (
        row.variant,
        row.network,
        f"{row.parameters:,}",
        "" if row.operations is None else f"{row.operations / 1e6:,.2f}",
        f"{row.score:.2f}{spread}",
        *("" if value is None else f"{value:.2f}" for value in row.figures.values()),
        str(row.seeds),
        "" if gain is None else f"{gain.mean:+.2f}{interval} to {gain.to}",
        f"{row.ratio:.2f}",
    )


def rich_table(rows: Sequence[Row], title: str) -> Table:
    """The table for a terminal."""
    table = Table(title=Text(terminal.printable(title)), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for position, heading in enumerate(headings(rows)):
        table.add_column(Text(terminal.printable(heading)), justify="left" if position < 2 else "right")
    for row in rows:
        table.add_row(*(Text(terminal.printable(cell)) for cell in cells(row)))
    return table


def markdown_table(rows: Sequence[Row]) -> str:
    """The table for a README."""
    titles = headings(rows)
    lines = [_markdown_line(titles), "| --- | --- |" + " ---: |" * (len(titles) - 2)]
    lines += [_markdown_line(cells(row)) for row in rows]
    return "\n".join(lines) + "\n"


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(markdown_cell, cells)) + " |"


def markdown_cell(text: str) -> str:
    """Text for a cell of a Markdown table. It may be anything: a file of runs may be somebody else's."""
    return html.escape(terminal.visible(" ".join(text.split())), quote=False).replace("|", "\\|")


_GENERATED = re.compile(r"<!-- runs: (\S+) (\S+) -->\n.*?<!-- end of runs -->", re.DOTALL)


def with_tables(text: str, root: Path) -> str:
    """A Markdown text whose tables of runs are made anew from the runs' files.

    A table stands between ``<!-- runs: FOLDER VARIANTS -->`` and ``<!-- end of runs -->``, with commas between the
    variants.

    Args:
        text: the Markdown.
        root: what the folders are relative to.

    Raises:
        ValueError: a folder holds no run of a variant, or a file that is none.
    """

    def table(match: re.Match[str]) -> str:
        folder, variants = match[1], match[2].split(",")
        runs = [Run.load(path) for path in sorted((root / folder).glob("*-seed*.json"))]
        missing = set(variants) - {run.variant for run in runs}
        if missing:
            raise ValueError(f"{folder} holds no run of {', '.join(sorted(missing))}")
        chosen = sorted(
            (run for run in runs if run.variant in variants), key=lambda run: (variants.index(run.variant), run.seed)
        )
        return f"<!-- runs: {match[1]} {match[2]} -->\n\n{markdown_table(summarise(chosen))}\n<!-- end of runs -->"

    return _GENERATED.sub(table, text)


def write_report(runs: Sequence[Run], folder: Path, title: str, command: str) -> Path:
    """Writes ``results.json``, ``table.md``, ``curves.svg`` and ``index.html``.

    Returns:
        The page.
    """
    import matplotlib

    rows = summarise(runs)
    content = {
        "title": title,
        "command": command,
        "summary": [asdict(row) for row in rows],
        "runs": [asdict(run) for run in runs],
    }
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "table.md").write_text(markdown_table(rows))
    with matplotlib.rc_context({"text.parse_math": False}):  # a name may hold dollars
        _plot(runs, folder / "curves.svg")
    page = folder / "index.html"
    page.write_text(_page(runs, rows, title, command))
    return page


def _plot(runs: Sequence[Run], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, scores = figure.subplots(1, 2)
    variants = list(dict.fromkeys(run.variant for run in runs))
    for variant_index, variant in enumerate(variants):
        colour = f"C{variant_index}"
        group = [run for run in runs if run.variant == variant]
        for axes, curves in (
            (losses, [[(number, e.train_loss) for number, e in enumerate(run.epochs, 1)] for run in group]),
            (
                scores,
                [
                    [(number, 100 * e.val_score) for number, e in enumerate(run.epochs, 1) if e.val_score is not None]
                    for run in group
                ],
            ),
        ):
            for curve in curves:
                axes.plot(*zip(*curve, strict=True) if curve else ([], []), color=colour, alpha=0.3, linewidth=1)
            common = list(zip(*curves, strict=False))
            epochs = [points[0][0] for points in common]
            averages = [mean(value for _, value in points) for points in common]
            axes.plot(epochs, averages, color=colour, linewidth=2, label=variant)
    for axes, label in ((losses, "training loss"), (scores, f"validation {runs[0].metric}, %")):
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
    each_run = [(run.variant, str(run.seed), f"{100 * run.score:.2f}", f"{run.seconds_per_epoch:.2f}") for run in runs]
    tested_on = {"test": "the test split", "val": "the validation split"}[runs[0].test_split]
    jobs = max(run.jobs for run in runs)
    together = "trained in turn with the others" if jobs == 1 else f"where up to {jobs} runs shared the machine"
    versions = ", ".join(f"{name} {version}" for name, version in runs[0].versions.items())
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style></head>
<body>
<h1>{html.escape(title)}</h1>
<p><code>{html.escape(command)}</code></p>
{_html_table(headings(rows), [cells(row) for row in rows])}
<p class="note">Score: {html.escape(runs[0].metric)} of the network after the last epoch on {tested_on}; mean and
standard deviation over the seeds. Difference: in percentage points, between runs of the same seed; the interval is
Student's for the mean. Time: median epoch of training, without evaluation; the ratio is to the first variant,
{together}.</p>
<img src="curves.svg" alt="Learning curves: training loss and validation figure by epoch, for each variant">
<h2>Each run</h2>
{_html_table(("variant", "seed", f"{runs[0].metric}, %", "s/epoch"), each_run)}
<p class="note">All settings and curves: <a href="results.json">results.json</a>. {html.escape(versions)}.</p>
</body>
</html>
"""
