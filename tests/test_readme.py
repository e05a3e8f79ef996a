"""The README's first screen and tables; the recipes that it names parse."""

from __future__ import annotations

import re
from pathlib import Path

import lightning  # noqa: F401 - its import sets log levels, and the first command's would do so within a test
import pytest
import timm
import torch
import yaml

from awconv.cli import main
from awconv.compare.record import Record
from awconv.compare.summaries import summarise
from tests.documents import ROOT, commands

README = ROOT / "README.md"


def test_the_first_screen_has_the_two_commands() -> None:
    assert {"make demo", "make test"} <= set(commands(README))


def test_the_readme_shows_the_commands_that_matter() -> None:
    shown = {command.split()[1] for command in commands(README) if command.startswith("awconv ")}
    assert {"fit", "test", "compare", "predict", "models"} <= shown


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_parse(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["fit", f"--config={recipe}", "--print_config"])
    assert "network:" in capsys.readouterr().out


@pytest.mark.parametrize(
    "variant",
    sorted((ROOT / "recipes" / "variants").glob("**/*.yaml")),
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_variants_are_laid_over_a_recipe(variant: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ROOT / "recipes" / "retrofit_efficientnet_lite0.yaml"
    with pytest.raises(SystemExit, match="0"):
        main(["fit", f"--config={recipe}", f"--config={variant}", "--print_config"])
    shown = yaml.safe_load(capsys.readouterr().out)["model"]
    for name, value in yaml.safe_load(variant.read_text())["model"].items():
        assert shown[name] == value


def test_the_table_of_models_gives_their_parameters() -> None:
    rows = re.findall(r"^\| `(aw_\w+)` \| ([\d,]+) \| ([\d,]+) \|$", README.read_text(), flags=re.MULTILINE)
    assert len(rows) > 5
    for name, *numbers in rows:
        with torch.device("meta"):
            models = [timm.create_model(one) for one in (name, name.removeprefix("aw_"))]
        counts = [f"{sum(p.numel() for p in model.parameters()):,}" for model in models]
        assert counts == numbers, name


@pytest.mark.parametrize("folder", ["cifar10_jpeg_resnet8", "tiny_imagenet100_resnet8_short"])
def test_the_first_table_holds_the_figures_of_the_records(folder: str) -> None:
    records = [Record.load(path) for path in sorted((ROOT / "results" / folder).glob("*-seed*.json"))]
    plain, aw = ({s.variant: s for s in summarise(records)}[name] for name in ("plain", "aw"))
    first_screen = README.read_text().partition("## Install")[0]
    row = (
        f"| {plain.score:.2f} ± {plain.spread:.2f} % | **{aw.score:.2f} ± {aw.spread:.2f} %** "
        f"| + {100 * (aw.parameters / plain.parameters - 1):.1f} % |"
    )
    assert row in first_screen
    assert {plain.seeds, aw.seeds} == {3}
