"""The pages: their examples and commands run, and the files that they name exist."""

from __future__ import annotations

import logging
import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonargparse
import lightning  # noqa: F401 - its import sets log levels, and the first command's would do so within a test
import pytest

from awconv.cli import main
from tests.documents import PAGES, ROOT, Example, commands, examples
from tests.kept import kept_settings

PYTHON = [example for page in PAGES for example in examples(page, "python")]
COMMANDS = sorted({command for page in PAGES for command in commands(page) if command.startswith("awconv ")})
# What a page writes in capitals, the reader puts in.
PLACEHOLDERS = {
    "RECIPE": "recipes/cifar10_resnet20.yaml",
    "RATE": "0.1",
    "NETWORK": "aw_resnet18",
}


def pages_of(blocks: list[Example]) -> list[str]:
    return sorted({block.page for block in blocks})


@pytest.fixture
def _keeps_settings() -> Iterator[None]:
    """A page may show how to log more, or use a library that changes what holds for the whole process."""
    loggers = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    before = [(logger, logger.level) for logger in loggers]
    with kept_settings():
        yield
    for logger, level in before:
        logger.setLevel(level)


@pytest.mark.usefixtures("_keeps_settings")
@pytest.mark.parametrize("page", pages_of([example for example in PYTHON if not example.skipped]))
def test_the_python_examples_of_a_page_run_in_order(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    script = ModuleType("__main__")  # where torch 2.9's compiler looks for the variables of a script
    monkeypatch.setitem(sys.modules, "__main__", script)
    missing: set[str] = set()
    for example in PYTHON:
        if example.page == page and not example.skipped:
            lacks = {module for module in example.needs if find_spec(module) is None}
            missing |= lacks
            if lacks:
                continue
            capsys.readouterr()
            lines = "\n" * (example.line - 1)  # so that a traceback names the page's own lines
            exec(compile(lines + example.text, str(ROOT / page), "exec"), vars(script))
            if example.output is not None:
                assert capsys.readouterr().out == example.output, example.name
    if missing:
        pytest.skip(f"the rest of the page ran; not installed: {', '.join(sorted(missing))}")


@pytest.mark.parametrize("example", [e for e in PYTHON if e.skipped], ids=lambda example: example.name)
def test_python_examples_that_cannot_run_here_are_python(example: Example) -> None:
    compile(example.text, example.name, "exec")
    pytest.skip(f"only compiled: {example.skipped}")


class Parsed(BaseException):
    """Stops a command once its arguments are parsed; no command catches it."""


@pytest.mark.parametrize("command", COMMANDS)
def test_the_arguments_of_a_command_parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "..." in command:
        command = command.split("...")[0]
    for placeholder, value in PLACEHOLDERS.items():
        command = re.sub(rf"\b{placeholder}\b", value, command)
    parse = jsonargparse.ArgumentParser.parse_args

    def parse_and_stop(self: jsonargparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        parse(self, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(jsonargparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr("awconv.cli.import_own", lambda names: None)  # files of a reader's own
    monkeypatch.chdir(ROOT)
    with pytest.raises(Parsed):
        main(shlex.split(command)[1:])
    before, dashes, overrides = command.partition(" -- ")
    assert main(shlex.split(f"{before} --misspelt=1{dashes}{overrides}")[1:]) == 2


def test_other_commands_name_targets_extras_and_files_that_exist() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    extras = re.findall(r"(?m)^(\w+) = \[", (ROOT / "pyproject.toml").read_text())
    named = defaultdict(set)
    for page in PAGES:
        for command in commands(page):
            named["make"].update(re.findall(r"^make (\w+)", command))
            named["extra"].update(
                extra for names in re.findall(r"pip install .*\[([\w,]+)\]", command) for extra in names.split(",")
            )
            named["file"].update(re.findall(r"^(?:python|pytest) ([\w/]+\.py)", command))
    assert {"demo", "test"} <= named["make"] <= set(targets)
    assert {"train"} <= named["extra"] <= set(extras)
    assert named["file"]
    for file in named["file"]:
        assert (ROOT / file).is_file(), file


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_file_that_is_named_exists(page: Path) -> None:
    text = page.read_text()
    links = [page.parent / path for path in re.findall(r"\]\(([^)#:]+)[^):]*\)", text)]
    named = [ROOT / path for path in re.findall(r"(?:recipes|benchmarks|docs|tests)/[\w/]+\.\w+", text)]
    assert links or named
    assert (links and named) or page.name != "README.md"
    for path in (*links, *named):
        assert path.exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_stand_in_fences_that_are_tested(page: Path) -> None:
    assert not re.findall(r"(?m)^    +(?:awconv|python|make|pip|pytest) .*", page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_is_left_to_fill_in(page: Path) -> None:
    assert "@@" not in page.read_text()


def test_the_tables_of_recipes_hold_each_of_them() -> None:
    tables = [table for page in PAGES for table in re.findall(r"(?m)^\| recipe \|.*(?:\n\|.*)+", page.read_text())]
    named = [
        name for table in tables for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])
    ]
    assert sorted(named) == sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
