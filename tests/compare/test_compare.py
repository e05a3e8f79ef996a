"""Comparisons: which runs are trained, kept or refused."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from awconv.compare import compare
from awconv.compare.comparison import Comparison, Run
from awconv.compare.record import Record
from awconv.compare.shared_data import OpenedData
from awconv.compare.train import train
from awconv.compare.variants import Change
from awconv.training.recipe import Recipe


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
    with pytest.raises(ValueError, match=r"trainer.max_epochs must be more than 0 to train anything, got 0"):
        compare(recipe, seeds=1, out=tmp_path / "out", overrides=["--trainer.max_epochs=0"])
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"seeds must be at least 1, got 0"):
        compare(recipe, "plain", seeds=0)
    with pytest.raises(ValueError, match="there is no variant '' of resnet8_cifar"):
        compare(recipe, "plain,")
    with pytest.raises(ValueError, match="variants must have names of their own, got plain, aw, aw"):
        compare(recipe, "plain,aw,aw")


def test_nothing_to_test_on_is_said_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {network: resnet8_cifar}")
    for index in range(20):
        folder = tmp_path / "train" / str(index % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), index, np.uint8)).save(folder / f"{index}.png")
    data = ["--data=ImageFolder", f"--data.root={tmp_path}", "--data.image_size=8", "--data.val_fraction=0"]
    assert compare(recipe, out=tmp_path / "out", overrides=data) == 1
    assert capsys.readouterr().err.count("the data have neither a test nor a validation split") == 6
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


# Between two runs, and in one.
@pytest.mark.parametrize(
    "awaited", [pytest.param("plain-seed0.json", marks=pytest.mark.campaign), "aw-seed0/checkpoints/*.ckpt"]
)
def test_ctrl_c_keeps_and_reports_what_is_finished(awaited: str, tmp_path: Path) -> None:
    out = tmp_path / "report"
    recipe = str(Path(__file__).parents[2] / "recipes" / "digits.yaml")
    command = [sys.executable, "-m", "awconv", "compare", recipe, "--out", str(out), "--", "--trainer.max_epochs=3"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background jobs ignore
    )
    deadline = time.monotonic() + 240
    while not list(out.glob(awaited)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130, printed
    assert "Interrupted; 1 finished runs are kept" in printed
    assert "Traceback" not in printed
    (finished,) = json.loads((out / "results.json").read_text())["runs"]
    assert (finished["variant"], finished["seed"], len(finished["epochs"])) == ("plain", 0, 3)
    assert (out / "index.html").exists()
    assert timm.is_model(finished["network"])


def tiny(folder: Path, epochs: int = 2) -> Path:
    recipe = folder / "tiny.yaml"
    recipe.write_text(
        "model: {network: resnet8_cifar, lr: 0.03}\n"
        f"trainer: {{max_epochs: {epochs}, limit_train_batches: 3, accelerator: cpu}}\n"
        "recent_checkpoint: {every_n_steps: 1}\n"
    )
    return recipe


def results(folder: Path) -> dict[str, float]:
    return {path.stem: Record.load(path).score for path in folder.glob("*-seed*.json")}


def test_a_second_call_trains_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = tiny(tmp_path), tmp_path / "out"
    assert compare(recipe, "plain", seeds=1, out=out) == 0
    first = (out / "plain-seed0.json").stat().st_mtime_ns
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "plain-seed0.json").write_text((out / "plain-seed0.json").read_text())  # without checkpoints
    assert compare(recipe, "plain,aw", seeds=2, out=elsewhere) == 0
    assert "1 of 4 runs are finished already" in capsys.readouterr().out
    assert set(results(elsewhere)) == {"plain-seed0", "plain-seed1", "aw-seed0", "aw-seed1"}
    assert compare(recipe, "plain,aw", seeds=2, out=out) == 0
    assert (out / "plain-seed0.json").stat().st_mtime_ns == first
    assert results(out) == results(elsewhere)
    report = json.loads((out / "results.json").read_text())
    assert [(run["variant"], run["seed"]) for run in report["runs"]] == [
        ("plain", 0),
        ("aw", 0),
        ("plain", 1),
        ("aw", 1),
    ]


def test_a_comparison_leaves_messages_and_threads_as_they_were(tmp_path: Path) -> None:
    """What is computed next in the same process speaks and adds as before."""
    loggers = [logging.getLogger("lightning.pytorch"), logging.getLogger("lightning.fabric")]
    before = [logger.level for logger in loggers], list(warnings.filters), torch.get_num_threads()
    with pytest.raises(ValueError, match="there is no variant 'none'"):
        compare(tiny(tmp_path), "none")
    assert compare(tiny(tmp_path), "plain", seeds=1, out=tmp_path / "out") == 0
    assert ([logger.level for logger in loggers], list(warnings.filters), torch.get_num_threads()) == before


def test_runs_of_other_settings_are_refused_and_kept(tmp_path: Path) -> None:
    recipe, out = tiny(tmp_path), tmp_path / "out"
    assert compare(recipe, "plain", seeds=1, out=out) == 0
    before = (out / "plain-seed0.json").read_text()
    with pytest.raises(ValueError, match=r"other settings: model\.lr is 0\.03 there, 0\.5 now\. Name another folder"):
        compare(recipe, "plain", seeds=1, out=out, overrides=["--model.lr=0.5"])
    with pytest.raises(ValueError, match="it was tested on test there, on val now"):
        compare(recipe, "plain", seeds=1, out=out, split="val")
    assert compare(recipe, "plain", seeds=1, out=out, overrides=["--trainer.log_every_n_steps=7"]) == 0
    assert (out / "plain-seed0.json").read_text() == before
    (out / "plain-seed0.json").write_text(before.replace('"variant": "plain"', '"variant": "other"'))
    with pytest.raises(ValueError, match=r"plain-seed0\.json holds .*: it is 'other' of seed 0 there, plain-seed0 now"):
        compare(recipe, "plain", seeds=1, out=out)
    (out / "plain-seed0.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"plain-seed0\.json is not a run of awconv compare"):
        compare(recipe, "plain", seeds=1, out=out)


def test_runs_of_older_versions_are_taken_with_todays_defaults(tmp_path: Path) -> None:
    recipe, out = tiny(tmp_path), tmp_path / "out"
    assert compare(recipe, "plain", seeds=1, out=out) == 0
    content = json.loads((out / "plain-seed0.json").read_text())
    for name in ("ema_decay", "mixup", "branch_weight_decay", "erasing", "compile"):
        content["recipe"]["model"].pop(name, None)
    del content["recipe"]["recent_checkpoint"], content["operations"], content["jobs"]
    (out / "plain-seed0.json").write_text(json.dumps(content))
    comparison = Comparison((Change("plain", network="resnet8_cifar").apply(recipe, ()),), 1, out)
    (run,) = comparison.runs
    record = comparison.finished(run)
    assert record is not None
    assert record.operations is None
    content["recipe"]["model"]["gone"] = 1
    (out / "plain-seed0.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="settings are no longer known"):
        comparison.finished(run)


class StopError(Exception):
    pass


@pytest.mark.parametrize("batches", [2, 3, 4, 5])
def test_an_interrupted_run_goes_on_to_the_same_result(batches: int, tmp_path: Path) -> None:
    recipe = tiny(tmp_path)
    variant = Change("aw", network="aw_resnet8_cifar").apply(recipe, ())
    comparison, whole = (Comparison((variant,), 2, tmp_path / name) for name in ("interrupted", "whole"))
    run = Run(variant, 1)
    done = 0

    def interrupt(epochs: float, of: int) -> None:
        nonlocal done
        done += 1
        if done == batches:
            raise StopError

    data = OpenedData()
    with pytest.raises(StopError):
        train(comparison, run, data, interrupt)
    found, expected = train(comparison, run, data), train(whole, run, data)
    assert found.score == expected.score
    assert [(e.train_loss, e.val_score) for e in found.epochs] == [(e.train_loss, e.val_score) for e in expected.epochs]
    other = Change("aw", network="aw_resnet8_cifar").apply(recipe, ["--model.lr=0.5"])
    with pytest.raises(ValueError, match=r"aw-seed1 holds checkpoints of other settings: model\.lr is 0\.03"):
        train(replace(comparison, variants=(other,)), Run(other, 1), data)
    assert train(comparison, run, data).score == found.score


def test_runs_side_by_side_give_the_same(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, epochs=1)
    alone, together = tmp_path / "alone", tmp_path / "together"
    # In processes of their own, sums may be split among another number of threads: the same to rounding.
    assert compare(recipe, "plain,aw", seeds=1, out=alone) == 0
    assert compare(recipe, "plain,aw", seeds=1, out=together, jobs=2) == 0
    for name, accuracy in results(alone).items():
        assert results(together)[name] == pytest.approx(accuracy, abs=0.02)
    assert Record.load(together / "aw-seed0.json").jobs == 2
    assert "No time ratio where runs were trained side by side" in (together / "index.html").read_text()
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        compare(recipe, "plain", out=together, jobs=0)


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.campaign)])
def test_a_run_that_fails_is_named_and_the_others_go_on(
    jobs: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, broken, out = tiny(tmp_path, epochs=1), tmp_path / "broken.yaml", tmp_path / "out"
    broken.write_text("data: {class_path: awconv.data.ImageFolder, init_args: {root: nowhere}}\n")
    assert compare(recipe, f"{broken},plain", seeds=1, out=out, jobs=jobs) == 1
    printed = capsys.readouterr()
    assert "awconv: run broken-seed0 failed: FileNotFoundError: nowhere/train is not a folder" in printed.err
    at_once, _, rest = printed.out.partition("plain-seed0: ")
    assert "broken-seed0: failed: FileNotFoundError: nowhere/train is not a folder" in at_once.replace("\n", " ")
    assert "failed" not in rest
    assert set(results(out)) == {"plain-seed0"}
    assert json.loads((out / "results.json").read_text())["runs"][0]["variant"] == "plain"


def test_what_the_first_step_failed_by_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixup = "--model.mixup={mixup_alpha: {a: 1}}"
    assert compare(tiny(tmp_path), "plain", seeds=1, out=tmp_path / "out", overrides=[mixup]) == 1
    error = capsys.readouterr().err
    assert "run plain-seed0 failed: ValueError: the first step failed, perhaps by model.mixup={'mixup_alpha'" in error


def test_a_variant_that_is_no_recipe_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    overlay = tmp_path / "typo.yaml"
    overlay.write_text("model: {lrr: 0.5}")
    with pytest.raises(ValueError, match=r"recipe .*typo\.yaml: there is no setting model\.lrr; near it: model\.lr"):
        compare(tiny(tmp_path), f"plain,{overlay}", seeds=1, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_epochs_without_an_evaluation_have_no_figure(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, epochs=4)
    assert compare(recipe, "plain", seeds=1, out=tmp_path, overrides=["--trainer.check_val_every_n_epoch=2"]) == 0
    scores = [epoch.val_score for epoch in Record.load(tmp_path / "plain-seed0.json").epochs]
    assert [score is None for score in scores] == [True, False, True, False]


def test_runs_on_other_files_are_others(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {network: resnet8_cifar}\n")

    def of(file: str) -> Recipe:
        return Recipe.parse([f"--config={recipe}", "--data=Parquet", f"--data.train={file}"])

    one = of("data/one/train.parquet").settings.content
    assert of("data/other/train.parquet").differences(one) == [
        'data.init_args.train is "one/train.parquet" there, "other/train.parquet" now'
    ]
    assert of("/elsewhere/one/train.parquet").differences(one) == []
