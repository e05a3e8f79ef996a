"""What the README tells people to type works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch

from awconv.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("index", range(len(blocks("python"))))
def test_the_python_examples_run(index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks("python")[index], f"README.md, example {index + 1}", "exec"), {})


def test_every_command_exists(capsys: pytest.CaptureFixture[str]) -> None:
    commands = re.findall(r"^awconv (\w+)", "\n".join(blocks("bash")), flags=re.MULTILINE)
    assert {"fit", "test", "compare", "predict", "models"} <= set(commands)
    for command in set(commands):
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
    capsys.readouterr()


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_file_that_is_named_exists(page: Path) -> None:
    text = page.read_text()
    links = [page.parent / path for path in re.findall(r"\]\(([^)#:]+)[^):]*\)", text)]
    named = [ROOT / path for path in re.findall(r"(?:recipes|benchmarks|docs|tests)/[\w/]+\.\w+", text)]
    assert links or named
    assert (links and named) or page.name != "README.md"
    for path in (*links, *named):
        assert path.exists(), path


def test_the_tables_of_recipes_hold_each_of_them() -> None:
    tables = [table for page in PAGES for table in re.findall(r"(?m)^\| recipe \|.*(?:\n\|.*)+", page.read_text())]
    named = [
        name for table in tables for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])
    ]
    assert sorted(named) == sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


def test_make_has_the_commands_of_the_first_screen() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    named = re.findall(r"^make (\w+)", "\n".join(blocks("bash")), flags=re.MULTILINE)
    assert {"demo", "test"} <= set(named) <= set(targets)


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_parse(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["fit", f"--config={recipe}", "--print_config"])
    assert "network:" in capsys.readouterr().out


@pytest.mark.parametrize("variant", sorted((ROOT / "recipes" / "variants").glob("*.yaml")), ids=lambda path: path.name)
def test_variants_are_laid_over_a_recipe(variant: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ROOT / "recipes" / "retrofit_efficientnet_lite0.yaml"
    with pytest.raises(SystemExit, match="0"):
        main(["fit", f"--config={recipe}", f"--config={variant}", "--print_config"])
    assert "init:" in capsys.readouterr().out


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_nothing_is_left_to_fill_in(path: Path) -> None:
    assert "@@" not in path.read_text()


def test_the_table_of_models_gives_their_parameters() -> None:
    rows = re.findall(r"^\| `(aw_\w+)` \| ([\d,]+) \| ([\d,]+) \|$", README, flags=re.MULTILINE)
    assert len(rows) > 5
    for name, *numbers in rows:
        with torch.device("meta"):
            models = [timm.create_model(twin) for twin in (name, name.removeprefix("aw_"))]
        counts = [f"{sum(p.numel() for p in model.parameters()):,}" for model in models]
        assert counts == numbers, name
