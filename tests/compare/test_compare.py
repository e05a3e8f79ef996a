"""Comparisons: what is computed from runs, and what is written."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import timm
from PIL import Image
from rich.console import Console

from awconv.compare import compare
from awconv.compare.report import cells, markdown_table, rich_table, summarise, write_report
from awconv.compare.runs import Epoch, Run, Variant, base_network, find_variant


def run(variant: str, seed: int, accuracy: float, seconds: tuple[float, ...]) -> Run:
    return Run(
        variant=variant,
        network=f"{variant}_net",
        seed=seed,
        parameters=1234567,
        test_split="test",
        test_accuracy=accuracy,
        epochs=[Epoch(1.0 / (i + 1), 0.5 + 0.1 * i, s) for i, s in enumerate(seconds)],
        recipe={"trainer": {"max_epochs": len(seconds)}},
        versions={"torch": "2"},
    )


RUNS = [
    run("plain", 0, 0.90, (9.0, 1.0, 2.0, 1.5)),
    run("<aw>", 0, 0.92, (9.0, 3.0, 3.0, 3.0)),
    run("plain", 1, 0.94, (9.0, 2.5, 2.5, 2.5)),
    run("<aw>", 1, 0.93, (9.0, 5.0, 5.0, 5.0)),
]


def test_a_row_has_mean_spread_and_the_ratio_to_the_first_variant() -> None:
    plain, aw = summarise(RUNS)
    assert (plain.variant, plain.seeds, plain.parameters) == ("plain", 2, 1234567)
    assert plain.accuracy == pytest.approx(92.0)
    assert plain.spread == pytest.approx(2 * 2**0.5)  # of 90 and 94, with one degree of freedom
    # The first epoch warms up; then medians over epochs, and over runs.
    assert plain.seconds_per_epoch == pytest.approx((1.5 + 2.5) / 2)
    assert aw.seconds_per_epoch == pytest.approx((3 + 5) / 2)
    assert (plain.ratio, aw.ratio) == pytest.approx((1.0, 2.0))


def test_one_seed_has_no_spread() -> None:
    (row,) = summarise(RUNS[:1])
    assert row.spread is None
    assert cells(row) == ("plain", "plain_net", "1,234,567", "90.00", "1", "1.50", "1.00")


def test_the_tables_show_every_cell() -> None:
    rows = summarise(RUNS)
    assert "| plain | plain_net | 1,234,567 | 92.00 ± 2.83 | 2 | 2.00 | 1.00 |" in markdown_table(rows)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(rich_table(rows, "title"))
    assert "92.00 ± 2.83" in console.export_text()


def test_the_report_folder_holds_json_curves_and_a_page(tmp_path: Path) -> None:
    page = write_report(RUNS, tmp_path, "a < b", "awconv compare x --seeds 2").read_text()
    assert "<h1>a &lt; b</h1>" in page
    assert "<code>awconv compare x --seeds 2</code>" in page
    assert "<td>&lt;aw&gt;</td>" in page
    assert 'src="curves.svg"' in page
    content = json.loads((tmp_path / "results.json").read_text())
    assert [row["accuracy"] for row in content["summary"]] == pytest.approx([92.0, 92.5])
    assert len(content["runs"]) == 4
    assert ElementTree.parse(tmp_path / "curves.svg").getroot().tag.endswith("svg")
    assert (tmp_path / "table.md").read_text() == markdown_table(summarise(RUNS))


def test_a_run_is_written_whole(tmp_path: Path) -> None:
    RUNS[0].save(tmp_path / "run.json")
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["epochs"][0] == {"train_loss": 1.0, "val_accuracy": 0.5, "seconds": 9.0}


def test_runs_without_validation_or_test_data_are_reported_as_what_they_are(tmp_path: Path) -> None:
    without = replace(RUNS[0], epochs=[Epoch(1.0, None, 1.0)], test_split="val")
    page = write_report([without], tmp_path, "t", "c").read_text()
    assert "the validation split, there being no test split" in page


@pytest.mark.parametrize(
    ("base", "given", "network"),
    [
        ("resnet20_cifar", "plain", "resnet20_cifar"),
        ("resnet20_cifar", "aw", "aw_resnet20_cifar"),
        ("resnet20_cifar", "se", "seresnet20_cifar"),
        ("resnet20_cifar", "aw_cbam", "aw_cbamresnet20_cifar"),
        ("resnet50", "se", "seresnet50"),
        ("wide_resnet28_10_cifar", "aw_aa", "aw_aa_wide_resnet28_10_cifar"),
    ],
)
def test_a_variant_is_a_prefix_of_the_networks_name(base: str, given: str, network: str) -> None:
    assert find_variant(base, given) == Variant(given, network=network)


def test_a_variant_that_does_not_exist_is_named() -> None:
    message = r"'best' of resnet20_cifar would be .*'best_resnet20_cifar' or .* plain, aw, se, aw_se, cbam, aw_cbam, or"
    with pytest.raises(ValueError, match=message):
        find_variant("resnet20_cifar", "best")
    with pytest.raises(FileNotFoundError, match=r"variant none\.yaml is not a file; expected YAML with what differs"):
        find_variant("resnet20_cifar", "none.yaml")


def test_a_variant_is_a_file_laid_over_the_recipe(tmp_path: Path) -> None:
    recipe, overlay = tmp_path / "tiny.yaml", tmp_path / "identity.yaml"
    recipe.write_text("model: {network: resnet8_cifar, lr: 0.03}\ntrainer: {max_epochs: 1, limit_train_batches: 2}\n")
    overlay.write_text("model: {lr: 0.5, convert: {init: identity, reduction: 4}}\n")
    out = tmp_path / "report"
    assert compare(recipe, f"plain,{overlay}", seeds=1, out=out, overrides=["--model.lr=0.02"]) == 0
    plain, identity = json.loads((out / "results.json").read_text())["runs"]
    assert (identity["variant"], identity["network"]) == ("identity", "resnet8_cifar")
    assert "convert" not in plain["recipe"]["model"]
    assert identity["recipe"]["model"]["convert"] == {"init": "identity", "reduction": 4}
    assert {run["recipe"]["model"]["lr"] for run in (plain, identity)} == {0.02}  # what is typed goes to every run
    assert identity["parameters"] > plain["parameters"]


def test_wrong_recipes_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"recipe .*none\.yaml is not a file"):
        compare(tmp_path / "none.yaml")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("trainer: {max_epochs: 1}")
    with pytest.raises(ValueError, match=r"recipe\.yaml must name a network under model\.network"):
        compare(recipe)
    recipe.write_text("model: {network: resnet8_cifar}")
    with pytest.raises(ValueError, match=r"seeds must be at least 1, got 0"):
        compare(recipe, "plain", seeds=0)
    with pytest.raises(ValueError, match=r"variant '' of resnet8_cifar would be"):
        compare(recipe, "plain,")
    with pytest.raises(ValueError, match="variants must have names of their own, got plain, aw, aw"):
        compare(recipe, "plain,aw,aw")


def test_an_override_of_the_network_is_heeded(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {network: resnet8_cifar}")
    assert base_network(recipe, ["--trainer.max_epochs=1"]) == "resnet8_cifar"
    assert base_network(recipe, ["--model.network=resnet20_cifar"]) == "resnet20_cifar"


def test_nothing_to_test_on_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {network: resnet8_cifar}")
    for index in range(20):
        folder = tmp_path / "train" / str(index % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), index, np.uint8)).save(folder / f"{index}.png")
    data = ["--data=ImageFolder", f"--data.root={tmp_path}", "--data.image_size=8", "--data.val_fraction=0"]
    with pytest.raises(ValueError, match="the data have neither a test nor a validation split"):
        compare(recipe, out=tmp_path / "out", overrides=data)


@pytest.mark.parametrize("delay", [0.0, 2.0])  # between two runs, and in one
def test_ctrl_c_keeps_and_reports_what_is_finished(delay: float, tmp_path: Path) -> None:
    out = tmp_path / "report"
    command = [sys.executable, "-m", "awconv", "demo", "--out", str(out), "--", "--trainer.max_epochs=3"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 240
    while not (out / "plain-seed0.json").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130, printed
    assert "Interrupted in aw-seed0; 1 finished runs are kept" in printed
    assert "Traceback" not in printed
    (finished,) = json.loads((out / "results.json").read_text())["runs"]
    assert (finished["variant"], finished["seed"], len(finished["epochs"])) == ("plain", 0, 3)
    assert (out / "index.html").exists()
    assert timm.is_model(finished["network"])
