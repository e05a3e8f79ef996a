"""Tables as Markdown, HTML, plain text and for a terminal."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from rich.console import Console

from awconv.tables import Table

TABLE = Table(("layer", "kind", "added"), [("conv1", "plain", "7"), ("conv2", "attention", "1,234")], title="Layers")
HOSTILE = Table(("a|b", "c"), [("[red]x[/]\x1b[2J", "<b>\n1|2 & 3")], note="a\ud800")


def test_markdown_aligns_numbers_right_and_text_left() -> None:
    assert TABLE.markdown() == (
        "**Layers**\n"
        "\n"
        "| layer | kind | added |\n"
        "| --- | --- | ---: |\n"
        "| conv1 | plain | 7 |\n"
        "| conv2 | attention | 1,234 |\n"
    )


def test_plain_text_has_columns_of_equal_width() -> None:
    assert TABLE.plain() == "Layers\nlayer  kind       added\nconv1  plain          7\nconv2  attention  1,234"


def test_text_after_the_numbers_may_be_aligned_left() -> None:
    table = Table(("n", "reason"), [("1", "a"), ("22", "bbb")], alignment="rl")
    assert table.plain().splitlines() == [" n  reason", " 1  a", "22  bbb"]
    assert "| ---: | --- |" in table.markdown()


def test_nothing_in_markdown_does_more_than_be_read() -> None:
    assert HOSTILE.markdown() == (
        "| a\\|b | c |\n| --- | --- |\n| [red]x[/]\\x1b[2J | &lt;b&gt; 1\\|2 &amp; 3 |\n\na\\ud800\n"
    )


def test_nothing_in_html_does_more_than_be_read() -> None:
    assert HOSTILE.html() == (
        "<table><thead><tr><th>a|b</th><th>c</th></tr></thead>"
        "<tbody><tr><td>[red]x[/]\\x1b[2J</td><td>&lt;b&gt;\\n1|2 &amp; 3</td></tr></tbody></table><p>a\\ud800</p>"
    )
    assert TABLE.html().startswith("<table><caption>Layers</caption><thead>")


def test_nothing_on_a_terminal_does_more_than_be_read() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    console.print(HOSTILE.rich())
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[red]x[/]\\x1b[2J" in printed
    assert "\x1b[2J" not in printed
    assert "a\\ud800" in printed


def test_a_terminal_gets_title_headings_and_rows(capsys: pytest.CaptureFixture[str]) -> None:
    TABLE.print()
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip(" ─")]
    assert lines == [["Layers"], ["layer", "kind", "added"], ["conv1", "plain", "7"], ["conv2", "attention", "1,234"]]


def test_markdown_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    TABLE.print("markdown")
    assert capsys.readouterr().out == TABLE.markdown()


def test_plain_text_and_markdown_need_no_rich() -> None:
    code = (
        "import sys; sys.modules['rich'] = None\n"
        "from awconv.tables import Table\n"
        "table = Table(('a',), [('b',)])\n"
        "print(table.plain(), table.markdown())"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).startswith("a\nb | a |")
