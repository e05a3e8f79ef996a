"""The report of a comparison: table, learning curves, HTML page and JSON."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean

from awconv.compare.record import Record
from awconv.compare.summaries import Difference, TimeRatio, VariantSummary, summarise
from awconv.compare.tuned import Tuned, epochs, shown
from awconv.tables import Table


def table(records: Sequence[Record], title: str = "", left_out: Sequence[str] = ()) -> Table:
    """A row for each variant. All records have the same metric.

    Args:
        records: of the runs.
        title: stands above.
        left_out: names of finished runs of seeds that not all variants have; the note says so.
    """
    summaries = summarise(records)
    tuned = sorted({name for summary in summaries for name in summary.tuned})
    headings = (
        "variant",
        "network",
        "parameters",
        "multiply-adds, M",
        *tuned,
        f"{summaries[0].metric}, %",
        *summaries[0].figures,
        "seeds",
        "paired difference (95 % interval)",
        "time ratio",
    )
    rows = [_cells(summary, tuned) for summary in summaries]
    on_held_out = any(record.test_split == "val" for record in records)
    return Table(headings, rows, title=title, note=_note(summaries, tuned, on_held_out, left_out))


FEW_SEEDS = 3  # fewer are marked
_FEW, _CONSTANT = "†", "‡"


def _cells(summary: VariantSummary, tuned: Sequence[str]) -> tuple[str, ...]:
    spread = "" if summary.spread is None else f" ± {summary.spread:.2f}"
    return (
        summary.variant,
        summary.network,
        f"{summary.parameters:,}",
        "" if summary.operations is None else f"{summary.operations / 1e6:,.2f}",
        *(shown(summary.tuned[name]) if name in summary.tuned else "" for name in tuned),
        f"{summary.score:.2f}{spread}",
        *("" if value is None else f"{value:.2f}" for value in summary.figures.values()),
        f"{summary.seeds} {_FEW}" if summary.seeds < FEW_SEEDS else str(summary.seeds),
        "" if summary.difference is None else _difference(summary.difference),
        "" if summary.ratio is None else _ratio(summary.ratio),
    )


def _difference(found: Difference) -> str:
    interval = "" if found.low is None else f" ({found.low:+.2f} to {found.high:+.2f})"
    marks = [mark for mark, holds in ((_FEW, found.seeds < FEW_SEEDS), (_CONSTANT, found.is_constant)) if holds]
    return " ".join((f"{found.mean:+.2f}{interval}", *marks, f"to {found.to}"))


def _ratio(ratio: TimeRatio) -> str:
    spread = "" if ratio.low == ratio.high else f" ({ratio.low:.2f} to {ratio.high:.2f})"
    return f"{ratio.median:.2f}{spread}"


def _note(summaries: Sequence[VariantSummary], tuned: Sequence[str], on_held_out: bool, left_out: Sequence[str]) -> str:
    """What the marks mean that the rows have, how settings were chosen, and what is not in the table."""
    differences = [summary.difference for summary in summaries if summary.difference is not None]
    parts = []
    if min(one.seeds for group in (summaries, differences) for one in group) < FEW_SEEDS:
        parts.append(f"{_FEW} Fewer than three seeds: an interval from two is very wide, and one has none.")
    if any(one.is_constant for one in differences):
        parts.append(
            f"{_CONSTANT} All differences are equal: the interval says nothing about the spread. Probably the scores "
            "are rounded, or the test images are few."
        )
    if any(summary.ratio is None for summary in summaries):
        parts.append(
            "No time ratio where runs were trained side by side, with other versions, devices or threads, or without "
            "common seeds."
        )
    if tuned:
        longest = max(summary.tuned_epochs for summary in summaries)
        parts.append(
            f"{' and '.join(tuned)}: of the values that were tried, the best for each variant on the held-out images, "
            f"with seed 0, after {epochs(longest)}."
        )
        if on_held_out:
            parts.append("The scores are of these images, too, and so a little too high.")
    if left_out:
        parts.append(
            f"Left out: {', '.join(left_out)}, since not all variants have finished these seeds. The records are kept, "
            "and count when they have."
        )
    return " ".join(parts)


_GENERATED = re.compile(r"<!-- runs: (\S+) (\S+) -->\n.*?<!-- end of runs -->", re.DOTALL)


def with_tables(text: str, root: Path) -> str:
    """Updates the tables of runs in a Markdown text from the records.

    A table stands between ``<!-- runs: FOLDER VARIANTS -->`` and ``<!-- end of runs -->``, with commas between the
    variants.

    Args:
        text: the Markdown.
        root: the folder that FOLDER is relative to.

    Raises:
        ValueError: a folder has no record of a variant, or a file that is not a record.
    """

    def made(match: re.Match[str]) -> str:
        folder, variants = match[1], match[2].split(",")
        records = [Record.load(path) for path in sorted((root / folder).glob("*-seed*.json"))]
        missing = set(variants) - {record.variant for record in records}
        if missing:
            raise ValueError(f"{folder} holds no run of {', '.join(sorted(missing))}")
        chosen = sorted(
            (record for record in records if record.variant in variants),
            key=lambda record: (variants.index(record.variant), record.seed),
        )
        return f"<!-- runs: {match[1]} {match[2]} -->\n\n{table(chosen).markdown()}\n<!-- end of runs -->"

    return _GENERATED.sub(made, text)


def write_report(
    records: Sequence[Record],
    folder: Path,
    title: str,
    command: str,
    left_out: Sequence[str] = (),
    tuned: Tuned | None = None,
) -> Path:
    """Writes ``results.json``, ``table.md``, ``curves.svg`` and ``index.html``.

    Args:
        records: of the runs.
        folder: of the files.
        title: of the page.
        command: what the user typed.
        left_out: as for :func:`table`.
        tuned: how a setting was chosen for each variant.

    Returns:
        The page.
    """
    import matplotlib

    content = {
        "title": title,
        "command": command,
        "summary": [asdict(summary) for summary in summarise(records)],
        "runs": [asdict(record) for record in records],
        **({"left_out": list(left_out)} if left_out else {}),
        **({} if tuned is None else {"tuning": tuned.content()}),
    }
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "table.md").write_text(table(records, left_out=left_out).markdown())
    with matplotlib.rc_context({"text.parse_math": False}):  # a name may hold dollars
        _plot(records, folder / "curves.svg")
    page = folder / "index.html"
    page.write_text(_page(records, title, command, left_out, tuned))
    return page


def _plot(records: Sequence[Record], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, scores = figure.subplots(1, 2)
    variants = list(dict.fromkeys(record.variant for record in records))
    for variant_index, variant in enumerate(variants):
        colour = f"C{variant_index}"
        group = [record for record in records if record.variant == variant]
        for axes, curves in (
            (losses, [[(number, e.train_loss) for number, e in enumerate(record.epochs, 1)] for record in group]),
            (
                scores,
                [
                    [
                        (number, 100 * e.val_score)
                        for number, e in enumerate(record.epochs, 1)
                        if e.val_score is not None
                    ]
                    for record in group
                ],
            ),
        ):
            for curve in curves:
                axes.plot(*zip(*curve, strict=True) if curve else ([], []), color=colour, alpha=0.3, linewidth=1)
            common = list(zip(*curves, strict=False))
            epochs = [points[0][0] for points in common]
            averages = [mean(value for _, value in points) for points in common]
            axes.plot(epochs, averages, color=colour, linewidth=2, label=variant)
    for axes, label in ((losses, "training loss"), (scores, f"validation {records[0].metric}, %")):
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(title="mean; thin: each seed")
    losses.set_yscale("log")
    losses.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    losses.yaxis.set_major_formatter("{x:g}")  # the usual one writes mathematics, which is not parsed here
    losses.yaxis.set_minor_formatter(NullFormatter())
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


def _page(records: Sequence[Record], title: str, command: str, left_out: Sequence[str], tuned: Tuned | None) -> str:
    each_run = Table(
        ("variant", "seed", f"{records[0].metric}, %", "s/epoch"),
        [(one.variant, str(one.seed), f"{100 * one.score:.2f}", f"{one.seconds_per_epoch:.2f}") for one in records],
    )
    tested_on = {"test": "the test split", "val": "the validation split"}[records[0].test_split]
    versions = ", ".join(f"{name} {version}" for name, version in records[0].versions.items())
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style></head>
<body>
<h1>{html.escape(title)}</h1>
<p><code>{html.escape(command)}</code></p>
{table(records, left_out=left_out).html()}
<p class="note">Score: {html.escape(records[0].metric)} of the network after the last epoch on {tested_on}; mean and
standard deviation over the seeds. Difference: in percentage points, between runs of the same seed; the interval is
Student's for the mean. Time: median epoch of training, without evaluation; the ratio is to the first variant's run of
the same seed: the median over the seeds, and the least and the largest.</p>
<img src="curves.svg" alt="Learning curves: training loss and validation figure by epoch, for each variant">
{"" if tuned is None else _tuning_section(tuned)}<h2>Each run</h2>
{each_run.html()}
<p class="note">All settings and curves: <a href="results.json">results.json</a>. {html.escape(versions)}.</p>
</body>
</html>
"""


def _tuning_section(tuned: Tuned) -> str:
    hints = "".join(f'<p class="note">{html.escape(hint[0].upper() + hint[1:])}.</p>\n' for hint in tuned.hints)
    return f"<h2>The choice of {html.escape(tuned.name)}</h2>\n{tuned.table().html()}\n{hints}"
