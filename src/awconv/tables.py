"""Tables of text, for a terminal, Markdown, a page for a browser, or as plain text."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from awconv import terminal

if TYPE_CHECKING:
    import rich.table
    import rich.text


@dataclass(frozen=True)
class Table:
    """Rows of text under headings.

    The text may be anything, a file of runs may be somebody else's: each form escapes what would do more there than be
    read.

    Attributes:
        headings: one for each column.
        rows: of cells, one for each column.
        alignment: ``l`` (left) or ``r`` (right) for each column; columns beyond its end are aligned right.
        title: stands above; a table with a title has a rule below its headings on a terminal.
        note: stands below.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    alignment: str = "ll"
    title: str = ""
    note: str = ""

    def markdown(self) -> str:
        """For a README: a table in the Markdown of GitHub, with a line break at its end."""
        rule = ("---" if letter == "l" else "---:" for letter in self._alignment())
        lines = [map(markdown_cell, self.headings), rule, *(map(markdown_cell, row) for row in self.rows)]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        parts = (f"**{markdown_cell(self.title)}**" if self.title else "", table, markdown_cell(self.note))
        return "\n\n".join(filter(None, parts)) + "\n"

    def html(self) -> str:
        """For a browser: a ``table``, whose alignment is left to the page's style."""
        caption = f"<caption>{_html_text(self.title)}</caption>" if self.title else ""
        head = "".join(f"<th>{_html_text(heading)}</th>" for heading in self.headings)
        body = "".join("<tr>" + "".join(f"<td>{_html_text(cell)}</td>" for cell in row) + "</tr>" for row in self.rows)
        note = f"<p>{_html_text(self.note)}</p>" if self.note else ""
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}"

    def plain(self) -> str:
        """As plain text, in columns of equal width, without a line break at its end."""
        lines = [[terminal.visible(cell) for cell in line] for line in (self.headings, *self.rows)]
        padded = []
        for column, letter in zip(zip(*lines, strict=True), self._alignment(), strict=True):
            width = max(map(len, column))
            padded.append([cell.ljust(width) if letter == "l" else cell.rjust(width) for cell in column])
        table = "\n".join("  ".join(line).rstrip() for line in zip(*padded, strict=True))
        return "\n".join(filter(None, (terminal.visible(self.title), table, terminal.visible(self.note))))

    def rich(self) -> rich.table.Table:
        """For :func:`awconv.terminal.console`, which prints it; needs the extra ``train``."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table as RichTable

        ruled = SIMPLE_HEAD if self.title else None
        table = RichTable(box=ruled, pad_edge=False, title_justify="left", caption_justify="left")
        table.title = _rich_text(self.title) if self.title else None
        table.caption = _rich_text(self.note) if self.note else None
        for heading, letter in zip(self.headings, self._alignment(), strict=True):
            table.add_column(_rich_text(heading), justify="left" if letter == "l" else "right")
        for row in self.rows:
            table.add_row(*map(_rich_text, row))
        return table

    def print(self, format: Literal["table", "markdown"] = "table") -> None:
        """Prints it for a terminal, or as Markdown."""
        if format == "markdown":
            print(self.markdown(), end="")
        else:
            terminal.console().print(self.rich())

    def _alignment(self) -> str:
        return self.alignment.ljust(len(self.headings), "r")[: len(self.headings)]


def markdown_cell(text: str) -> str:
    """Text for a cell of a Markdown table, on one line."""
    return _html_text(" ".join(text.split())).replace("|", "\\|")


def _html_text(text: str) -> str:
    return html.escape(terminal.visible(text), quote=False)


def _rich_text(text: str) -> rich.text.Text:
    from rich.text import Text

    return Text(terminal.printable(text))  # not a string, in which rich would take brackets for its markup
