"""The pages that people read, and the examples in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

_EXAMPLE = re.compile(
    r"(?:^<!-- (?P<mark>not run|output varies|needs): (?P<reason>[^\n]*) -->\n+)?"
    r"^```(?P<language>\w+)\n(?P<text>.*?)^```$",
    flags=re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Example:
    """A block of code of a page.

    A line ``<!-- not run: reason -->`` before it says that tests cannot run it, and ``<!-- needs: module, other -->``
    that they run it where these modules can be imported. What a Python block prints may stand
    below it, in a block of the language ``text``; ``<!-- output varies: reason -->`` before that says that it depends
    on the machine.

    Attributes:
        page: the file, from the repository's root.
        line: the first line of the code, counted from 1.
        language: such as ``python`` or ``bash``.
        text: the code.
        skipped: why it is not run, or None.
        needs: the modules without which it is not run.
        output: what it prints, or None if the page does not say so or it varies.
    """

    page: str
    line: int
    language: str
    text: str
    skipped: str | None = None
    needs: tuple[str, ...] = ()
    output: str | None = None

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def examples(page: Path, language: str) -> list[Example]:
    """The blocks of one language of a page, in order."""
    text = page.read_text()
    blocks = list(_EXAMPLE.finditer(text))
    found = []
    for block, after in zip(blocks, [*blocks, None][1:], strict=True):
        if block["language"] != language:
            continue
        output = None
        if after is not None and after["language"] == "text" and not text[block.end() : after.start()].strip():
            output = after["text"] if after["mark"] is None else None
        found.append(
            Example(
                page=page.relative_to(ROOT).as_posix(),
                line=text.count("\n", 0, block.start("text")) + 1,
                language=language,
                text=block["text"],
                skipped=block["reason"] if block["mark"] == "not run" else None,
                needs=tuple(re.findall(r"[\w.]+", block["reason"])) if block["mark"] == "needs" else (),
                output=output,
            )
        )
    return found


def commands(page: Path) -> list[str]:
    """The command lines of a page's shell blocks, without comments, each continued line joined."""
    lines: list[str] = []
    for example in examples(page, "bash"):
        for line in re.sub(r"\\\n\s*", "", example.text).splitlines():
            command = re.sub(r"(^|\s)#.*", "", line).strip()
            if command:
                lines.append(command)
    return lines
