"""A setting is chosen for each variant on held-out images, before the seeds are run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from awconv.cli import main
from awconv.compare import processes
from awconv.compare.comparison import Comparison, Run
from awconv.compare.record import Record
from awconv.compare.report import table, with_tables
from awconv.compare.tuned import Tuned
from awconv.compare.tuning import Tuning
from awconv.usage import UsageError


def recipe(folder: Path, more: str = "") -> Path:
    path = folder / "tiny.yaml"
    path.write_text(
        "model: {network: resnet8_cifar}\n"
        f"trainer: {{max_epochs: 2, limit_train_batches: 4, accelerator: cpu}}\n{more}"
    )
    return path


def records(folder: Path) -> dict[str, Record]:
    return {path.stem: Record.load(path) for path in folder.glob("*-seed*.json")}


def test_every_variant_takes_its_best_value_for_all_its_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["compare", str(recipe(tmp_path)), f"--out={out}", "--seeds=2", "--tune=lr=0.2,0.001", "--tune_epochs=1"]
    assert main(command) == 0
    trials, runs = records(out / "tune"), records(out)
    assert set(trials) == {f"{variant}-lr={lr}-seed0" for variant in ("plain", "aw") for lr in ("0.001", "0.2")}
    assert {(len(run.epochs), run.test_split, run.seed) for run in trials.values()} == {(1, "val", 0)}
    for variant in ("plain", "aw"):
        scores = {lr: trials[f"{variant}-lr={lr:g}-seed0"].score for lr in (0.001, 0.2)}
        best = max(scores, key=lambda lr: scores[lr])
        for seed in (0, 1):
            run = runs[f"{variant}-seed{seed}"]
            assert run.recipe["model"]["lr"] == best
            assert (run.tuned, run.tuned_epochs, len(run.epochs), run.test_split) == ({"lr": best}, 1, 2, "test")
    report = json.loads((out / "results.json").read_text())["tuning"]
    assert report["scores"]["aw"] == {lr: trials[f"aw-lr={lr}-seed0"].score for lr in ("0.001", "0.2")}
    assert report["taken"] == {variant: runs[f"{variant}-seed0"].tuned["lr"] for variant in ("plain", "aw")}
    assert "<h2>The choice of lr</h2>" in (out / "index.html").read_text()
    markdown = with_tables("<!-- runs: out plain,aw -->\n<!-- end of runs -->", tmp_path)
    assert "| multiply-adds, M | lr | accuracy, % |" in markdown
    assert "on the held-out images, with seed 0, after 1 epoch." in markdown
    capsys.readouterr()
    # A second call trains nothing, and says the same.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*-seed*.json")}
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "tuning: 4 of 4 runs are finished already" in printed
    assert "\n4 of 4 runs are finished already" in printed
    assert printed.count("is the largest tried, 0.2") + printed.count("is the smallest tried, 0.001") >= 1
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*-seed*.json")} == before
    # Other values, of which one is tried already.
    assert main([*command[:3], "--seeds=1", "--tune=weight_decay=0,0.001", "--", "--trainer.max_epochs=1"]) == 1
    assert "holds a run of other settings" in capsys.readouterr().err


def test_failed_trials_leave_the_best_of_the_others_and_a_variant_without_any_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, path = tmp_path / "broken.yaml", recipe(tmp_path)
    broken.write_text("model: {mixup: {mixup_alpha: {a: 1}}}")
    out = tmp_path / "out"
    command = ["compare", str(path), f"--variants=plain,{broken}", f"--out={out}", "--seeds=1"]
    # With the larger rate the loss is infinite after a step or two.
    assert main([*command, "--tune=lr=0.05,1e18", "--tune_epochs=1", "--", "--trainer.max_epochs=1"]) == 1
    printed = capsys.readouterr()
    assert "run plain-lr=1e+18-seed0 failed" in printed.err
    assert "broken left out, since runs by which to choose have failed; the same command tries them" in printed.err
    assert "largest tried" not in printed.out  # the larger one was tried
    assert {name: run.tuned for name, run in records(out).items()} == {"plain-seed0": {"lr": 0.05}}
    report = json.loads((out / "results.json").read_text())["tuning"]
    assert report["scores"]["broken"] == {"0.05": None, "1e+18": None}
    assert report["taken"] == {"plain": 0.05}


def test_an_ablation_chooses_too_and_says_that_its_scores_are_of_the_same_images(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["ablate", str(recipe(tmp_path)), "--vary=activation=tanh", f"--out={out}", "--seeds=1"]
    assert main([*command, "--tune=branch_lr_factor=1,3", "--", "--trainer.max_epochs=1"]) == 0
    chosen = {run.variant: run.tuned["branch_lr_factor"] for run in records(out).values()}
    assert set(chosen) == {"default", "activation=tanh"}
    assert set(chosen.values()) <= {1.0, 3.0}
    assert "The scores are of these images, too" in (out / "table.md").read_text()


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ("lr=0.1", "tune cannot be 'lr=0.1': it must be NAME=VALUE,VALUE"),
        ("lr", "tune cannot be 'lr': it must be"),
        ("lr=0.1,", "tune cannot be 'lr=0.1,': it must be"),
        ("lr=0.1,many", "tune cannot be 'lr=0.1,many': it must be"),
        ("lr=0.1,inf", "tune cannot be 'lr=0.1,inf': it must be"),
        ("=1,2", "tune cannot be '=1,2': it must be"),
        ("lr=0.1,0.2,0.10", "the values of tune must differ, got 'lr=0.1,0.2,0.10'"),
        ("lrr=0.1,0.2", "there is no option --model.lrr; near it: --model.lr"),
        ("lr=0.1,-1", "tune: lr must be a number from 0 to 1e\\+18, got -1"),
        ("network=1,2", "tune takes an argument that is a number, and model.network is none"),
    ],
)
def test_what_cannot_be_tried_is_refused_before_anything_is_trained(tune: str, message: str, tmp_path: Path) -> None:
    from awconv.compare import compare

    with pytest.raises(UsageError, match=message):
        compare(recipe(tmp_path), tune=tune, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_setting_that_is_set_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, overlay = recipe(tmp_path), tmp_path / "fast.yaml"
    overlay.write_text("model: {lr: 0.5}")
    out = f"--out={tmp_path / 'out'}"
    assert main(["compare", str(path), out, "--tune=lr=0.1,0.2", "--", "--model.lr=0.3"]) == 2
    message = "model.lr cannot be given for the runs beside --tune=lr=..."
    assert message in capsys.readouterr().err
    for override in (f"--config={overlay}", '--model={"lr": 0.5}'):
        assert main(["compare", str(path), out, "--tune=lr=0.1,0.2", "--", override]) == 2
        assert message in capsys.readouterr().err
    assert main(["compare", str(path), out, f"--variants=plain,{overlay}", "--tune=lr=0.1,0.2"]) == 2
    assert "variant fast sets model.lr itself" in capsys.readouterr().err
    assert main(["ablate", str(path), out, "--vary=branch_lr_factor=3", "--tune=branch_lr_factor=1,2"]) == 2
    assert "variant branch_lr_factor=3 sets model.branch_lr_factor itself" in capsys.readouterr().err
    assert main(["compare", str(path), out, "--tune_epochs=2"]) == 2
    assert "tune_epochs = 2 is the length of the trials of --tune, which is missing" in capsys.readouterr().err
    assert main(["compare", str(path), out, "--tune=lr=0.1,0.2", "--tune_epochs=0"]) == 2
    assert "tune_epochs must be at least 1, got 0" in capsys.readouterr().err
    assert main(["compare", str(path), out, "--tune=lr=0.1,0.2", "--", "--data.val_fraction=0"]) == 1
    assert "the data have no validation split; hold some out with data.val_fraction" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_smaller_of_equal_values_is_taken_and_the_ends_of_the_list_are_named() -> None:
    scores = {
        "plain": {0.1: 0.5, 0.2: 0.7, 0.4: 0.7},
        "aw": {0.1: 0.5, 0.2: 0.6, 0.4: 0.8},
        "se": {0.1: 0.9, 0.2: 0.6, 0.4: None},
        "lost": {0.1: None, 0.2: None, 0.4: None},
    }
    tuned = Tuned("lr", 5, "accuracy", scores)
    assert tuned.best == {"plain": 0.2, "aw": 0.4, "se": 0.1}
    assert [hint.partition(":")[0] for hint in tuned.hints] == [
        "the best of lr for aw is the largest tried, 0.4",
        "the best of lr for se is the smallest tried, 0.1",
    ]
    assert tuned.table().rows[2:] == [("se", "90.00", "60.00", "", "0.1"), ("lost", "", "", "", "none")]


def test_a_trial_that_an_accident_ended_leaves_its_variant_without_a_choice_until_it_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = processes.train

    def train(comparison: Comparison, run: Run, *arguments: Any) -> Record:
        if run.name == "plain-lr=0.1-seed0":
            raise MemoryError("none is left")
        return trained(comparison, run, *arguments)

    monkeypatch.setattr(processes, "train", train)
    out = tmp_path / "out"
    command = ["compare", str(recipe(tmp_path)), "--variants=plain,aw", f"--out={out}", "--seeds=1"]
    command += ["--tune=lr=0.001,0.1", "--tune_epochs=1", "--", "--trainer.max_epochs=1"]
    assert main(command) == 1
    assert "plain left out, since runs by which to choose have failed" in capsys.readouterr().err
    assert set(records(out)) == {"aw-seed0"}
    monkeypatch.setattr(processes, "train", trained)
    assert main(command) == 0
    assert set(records(out)) == {"aw-seed0", "plain-seed0"}


def test_names_and_values_are_read_in_any_form() -> None:
    assert Tuning.parse("--model.lr=4e-1,0.1,.2", 3) == Tuning("lr", (0.1, 0.2, 0.4), 3)
    assert Tuning.parse("optimizer_args.beta=1,2", None) == Tuning("optimizer_args.beta", (1.0, 2.0))
    assert Tuning.parse(None, None) is None


def test_records_of_other_choices_have_an_empty_cell(tmp_path: Path) -> None:
    from tests.compare.test_schedule import record

    one, other = record("plain", [1.0], 2.0), record("aw", [1.0], 2.0)
    one.tuned["lr"] = 0.2
    rows = table([one, other]).rows
    assert [row[4] for row in rows] == ["0.2", ""]
    assert "lr" not in table([other]).headings
