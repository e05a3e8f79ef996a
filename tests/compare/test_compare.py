"""Comparisons: what is computed from runs, and what is written."""

from __future__ import annotations

import io
import json
import logging
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from rich.console import Console

from awconv.compare import ablate, compare
from awconv.compare.ablation import arms, choices
from awconv.compare.report import cells, headings, markdown_table, rich_table, summarise, with_tables, write_report
from awconv.compare.runs import Epoch, OpenedData, Plan, Run, Variant, base_network, find_variant, parse
from awconv.training.settings import differences, settings, written


def run(variant: str, seed: int, accuracy: float, seconds: tuple[float, ...]) -> Run:
    return Run(
        variant=variant,
        network=f"{variant}_net",
        seed=seed,
        parameters=1234567,
        test_split="test",
        score=accuracy,
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
    assert plain.score == pytest.approx(92.0)
    assert plain.spread == pytest.approx(2 * 2**0.5)  # of 90 and 94, with one degree of freedom
    # The first epoch warms up; then medians over epochs, and over runs.
    assert plain.seconds_per_epoch == pytest.approx((1.5 + 2.5) / 2)
    assert aw.seconds_per_epoch == pytest.approx((3 + 5) / 2)
    assert (plain.ratio, aw.ratio) == pytest.approx((1.0, 2.0))
    assert plain.difference is None
    assert aw.difference is not None
    assert (aw.difference.to, aw.difference.seeds, aw.difference.mean) == ("plain", 2, pytest.approx(0.5))
    # Gains of 2 and -1 deviate by 2.1213, and Student's t with one degree of freedom reaches 12.7062 (tables).
    reach = 12.7062 * 4.5**0.5 / 2**0.5
    assert (aw.difference.low, aw.difference.high) == pytest.approx((0.5 - reach, 0.5 + reach), rel=1e-5)


def test_differences_are_to_the_network_without_the_attention_over_common_seeds() -> None:
    def of(variant: str, network: str, seed: int, accuracy: float) -> Run:
        return replace(run(variant, seed, accuracy, (1.0,)), network=network)

    rows = summarise(
        [
            of("plain", "resnet20_cifar", 0, 0.80),
            of("se", "seresnet20_cifar", 0, 0.82),
            of("aw_se", "aw_seresnet20_cifar", 0, 0.85),
            of("aw_se", "aw_seresnet20_cifar", 1, 0.99),  # no twin of this seed
            of("aw", "aw_resnet20_cifar", 3, 0.85),
        ]
    )
    differences = {row.variant: row.difference for row in rows}
    assert (differences["se"].to, differences["se"].mean) == ("plain", pytest.approx(2.0))
    assert (differences["aw_se"].to, differences["aw_se"].mean) == ("se", pytest.approx(3.0))
    assert differences["aw_se"].seeds == 1
    assert differences["aw_se"].low is None
    assert differences["plain"] is differences["aw"] is None
    assert cells(rows[2])[-2] == "+3.00 to se"


def test_one_seed_has_no_spread() -> None:
    (row,) = summarise(RUNS[:1])
    assert row.spread is None
    assert cells(row) == ("plain", "plain_net", "1,234,567", "", "90.00", "1", "", "1.00")


def test_the_tables_show_every_cell() -> None:
    rows = summarise(RUNS)
    assert "| plain | plain_net | 1,234,567 |  | 92.00 ± 2.83 | 2 |  | 1.00 |" in markdown_table(rows)
    assert "| 92.50 ± 0.71 | 2 | +0.50 (-18.56 to +19.56) to plain | 2.00 |" in markdown_table(rows)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(rich_table(rows, "title"))
    assert "92.00 ± 2.83" in console.export_text()


def test_further_figures_have_columns() -> None:
    def of(seed: int, small: float) -> Run:
        return replace(RUNS[0], seed=seed, metric="box AP", figures={"AP50": 0.5 + 0.1 * seed, "AP_small": small})

    rows = summarise([of(0, 0.25), of(1, 0.35)])
    assert headings(rows)[4:7] == ("box AP, %", "AP50", "AP_small")
    assert cells(rows[0])[5:7] == ("55.00", "30.00")
    assert markdown_table(rows).splitlines()[1].count("---") == len(headings(rows))
    assert cells(*summarise([of(0, -1.0)]))[5:7] == ("50.00", "")  # there was no small object


def test_the_report_folder_holds_json_curves_and_a_page(tmp_path: Path) -> None:
    page = write_report(RUNS, tmp_path, "a < b", "awconv compare x --seeds 2").read_text()
    assert "<h1>a &lt; b</h1>" in page
    assert "<code>awconv compare x --seeds 2</code>" in page
    assert "<td>&lt;aw&gt;</td>" in page
    assert 'src="curves.svg"' in page
    content = json.loads((tmp_path / "results.json").read_text())
    assert [row["score"] for row in content["summary"]] == pytest.approx([92.0, 92.5])
    assert len(content["runs"]) == 4
    assert ElementTree.parse(tmp_path / "curves.svg").getroot().tag.endswith("svg")
    assert (tmp_path / "table.md").read_text() == markdown_table(summarise(RUNS))


def test_a_run_is_written_whole(tmp_path: Path) -> None:
    RUNS[0].save(tmp_path / "run.json")
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["epochs"][0] == {"train_loss": 1.0, "val_score": 0.5, "seconds": 9.0}


def test_runs_without_validation_or_test_data_are_reported_as_what_they_are(tmp_path: Path) -> None:
    without = replace(RUNS[0], epochs=[Epoch(1.0, None, 1.0)], test_split="val")
    page = write_report([without], tmp_path, "t", "c").read_text()
    assert "after the last epoch on the validation split" in page


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
    with pytest.raises(ValueError, match=r"trainer.max_epochs must be more than 0 to train anything, got 0"):
        compare(recipe, seeds=1, out=tmp_path / "out", overrides=["--trainer.max_epochs=0"])
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"seeds must be at least 1, got 0"):
        compare(recipe, "plain", seeds=0)
    with pytest.raises(ValueError, match=r"variant '' of resnet8_cifar would be"):
        compare(recipe, "plain,")
    with pytest.raises(ValueError, match="variants must have names of their own, got plain, aw, aw"):
        compare(recipe, "plain,aw,aw")


@pytest.mark.parametrize(
    ("override", "instead"),
    [
        (["--seed_everything=3"], "--seeds of the comparison counts them"),
        (["--seed_everything", "3"], "--seeds of the comparison counts them"),
        (["--trainer.default_root_dir=elsewhere"], "--out of the comparison names the folder"),
        (["--trainer.logger=true"], "leave it out: the report has the curves"),
    ],
)
def test_an_override_of_what_each_run_has_is_refused(override: list[str], instead: str, tmp_path: Path) -> None:
    for function in (compare, ablate):
        with pytest.raises(ValueError, match=f"{override[0].partition('=')[0]} cannot be given for .*; {instead}"):
            function(tiny(tmp_path), out=tmp_path / "out", overrides=override)
    assert not (tmp_path / "out").exists()


def test_an_override_of_the_network_is_heeded(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {network: resnet8_cifar}")
    assert base_network(recipe, ["--trainer.max_epochs=1"]) == "resnet8_cifar"
    assert base_network(recipe, ["--model.network=resnet20_cifar"]) == "resnet20_cifar"


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
@pytest.mark.parametrize("awaited", ["plain-seed0.json", "aw-seed0/checkpoints/*.ckpt"])
def test_ctrl_c_keeps_and_reports_what_is_finished(awaited: str, tmp_path: Path) -> None:
    out = tmp_path / "report"
    command = [sys.executable, "-m", "awconv", "demo", "--out", str(out), "--", "--trainer.max_epochs=3"]
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
    return {path.stem: Run.load(path).score for path in folder.glob("*-seed*.json")}


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
    with pytest.raises(ValueError, match="does not know"):
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
    plan = Plan(recipe, find_variant("resnet8_cifar", "plain"), 0, out)
    run = plan.finished()
    assert run is not None
    assert run.operations is None
    content["recipe"]["model"]["gone"] = 1
    (out / "plain-seed0.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="settings are no longer known"):
        plan.finished()


class StopError(Exception):
    pass


@pytest.mark.parametrize("batches", [2, 3, 4, 5])
def test_an_interrupted_run_goes_on_to_the_same_result(batches: int, tmp_path: Path) -> None:
    recipe = tiny(tmp_path)
    plan, whole = (
        Plan(recipe, find_variant("resnet8_cifar", "aw"), 1, tmp_path / name) for name in ("interrupted", "whole")
    )
    done = 0

    def interrupt(epochs: float, of: int) -> None:
        nonlocal done
        done += 1
        if done == batches:
            raise StopError

    data = OpenedData()
    with pytest.raises(StopError):
        plan.train(data, interrupt)
    found, expected = plan.train(data), whole.train(data)
    assert found.score == expected.score
    assert [(e.train_loss, e.val_score) for e in found.epochs] == [(e.train_loss, e.val_score) for e in expected.epochs]
    other = Plan(recipe, plan.variant, 1, plan.folder, ("--model.lr=0.5",))
    with pytest.raises(ValueError, match=r"aw-seed1 holds checkpoints of other settings: model\.lr is 0\.03"):
        other.train(data)
    assert plan.train(data).score == found.score


def test_runs_side_by_side_give_the_same(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, epochs=1)
    alone, together = tmp_path / "alone", tmp_path / "together"
    # In processes of their own, sums may be split among another number of threads: the same to rounding.
    assert compare(recipe, "plain,aw", seeds=1, out=alone) == 0
    assert compare(recipe, "plain,aw", seeds=1, out=together, jobs=2) == 0
    for name, accuracy in results(alone).items():
        assert results(together)[name] == pytest.approx(accuracy, abs=0.02)
    assert Run.load(together / "aw-seed0.json").jobs == 2
    assert "up to 2 runs shared the machine" in (together / "index.html").read_text()
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        compare(recipe, "plain", out=together, jobs=0)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_fails_is_named_and_the_others_go_on(
    jobs: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, broken, out = tiny(tmp_path, epochs=1), tmp_path / "broken.yaml", tmp_path / "out"
    broken.write_text("data: {class_path: awconv.data.ImageFolder, init_args: {root: nowhere}}\n")
    assert compare(recipe, f"{broken},plain", seeds=1, out=out, jobs=jobs) == 1
    printed = capsys.readouterr()
    assert "awconv: run broken-seed0 failed: FileNotFoundError: nowhere/train is not a folder" in printed.err
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
    with pytest.raises(ValueError, match="the settings of variant typo are not those of a training"):
        compare(tiny(tmp_path), f"plain,{overlay}", seeds=1, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_epochs_without_an_evaluation_have_no_figure(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, epochs=4)
    assert compare(recipe, "plain", seeds=1, out=tmp_path, overrides=["--trainer.check_val_every_n_epoch=2"]) == 0
    scores = [epoch.val_score for epoch in Run.load(tmp_path / "plain-seed0.json").epochs]
    assert [score is None for score in scores] == [True, False, True, False]


def test_runs_on_other_files_are_others(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {network: resnet8_cifar}\n")

    def of(file: str) -> dict[str, str]:
        cli = parse(recipe, "--data=Parquet", f"--data.train={file}", build=False)
        return settings(written(cli.parser, cli.config))

    assert differences(of("data/one/train.parquet"), of("data/other/train.parquet"))
    assert not differences(of("data/one/train.parquet"), of("/elsewhere/one/train.parquet"))


def test_ablation_compares_choices_on_the_validation_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = tiny(tmp_path, epochs=1), tmp_path / "out"
    vary = "reduction=4+norm_layer=none select=layer3.* branch_lr_factor=0.1"
    assert ablate(recipe, vary, seeds=1, out=out) == 0
    runs = {run.variant: run for path in out.glob("*-seed0.json") if (run := Run.load(path))}
    assert set(runs) == {"default", "reduction=4+norm_layer=none", "select=layer3.all", "branch_lr_factor=0.1"}
    assert {run.test_split for run in runs.values()} == {"val"}
    assert runs["reduction=4+norm_layer=none"].recipe["model"]["network_args"] == {
        "aw_args": {"reduction": 4, "norm_layer": None}
    }
    assert runs["branch_lr_factor=0.1"].recipe["model"]["branch_lr_factor"] == 0.1
    fewer = timm.create_model("aw_resnet8_cifar", in_chans=1, aw_args=dict(select="layer3.*"))
    assert runs["select=layer3.all"].parameters == sum(p.numel() for p in fewer.parameters())
    with_arguments = tmp_path / "arguments.yaml"
    with_arguments.write_text(
        recipe.read_text().replace("lr: 0.03", "lr: 0.03, network_args: {drop_rate: 0.1, aw_args: {activation: tanh}}")
    )
    assert ablate(with_arguments, "reduction=4", seeds=1, out=tmp_path / "merged") == 0
    assert Run.load(tmp_path / "merged" / "reduction=4-seed0.json").recipe["model"]["network_args"] == {
        "drop_rate": 0.1,
        "aw_args": {"activation": "tanh", "reduction": 4},
    }
    assert ablate(recipe, "reduction=4", seeds=1, out=tmp_path / "no", overrides=["--data.val_fraction=0"]) == 1
    assert "the data have no validation split; hold one out with data.val_fraction" in capsys.readouterr().err


def test_every_choice_offered_is_one() -> None:
    offered = choices("aw_resnet8_cifar")
    assert "select=layer3.*" in offered
    assert len({arm.name for arm in arms("aw_resnet8_cifar", offered)}) == len(offered) + 1
    with pytest.raises(ValueError, match=r"a change must be NAME=VALUE with a name of reduction, .*got 'reductoin=4'"):
        arms("aw_resnet8_cifar", ["reductoin=4"])
    with pytest.raises(ValueError, match="changes must differ"):
        arms("aw_resnet8_cifar", ["reduction=4", "reduction=4"])
    with pytest.raises(ValueError, match="vary must name at least one change"):
        arms("aw_resnet8_cifar", [])
    for text in ("{", "!!python/name:os.system", "[" * 10**4):
        with pytest.raises(ValueError, match=r"the value of the change 'reduction=.*' is not YAML"):
            arms("aw_resnet8_cifar", [f"reduction={text}"])


def test_tables_in_texts_are_made_from_the_runs(tmp_path: Path) -> None:
    for one in RUNS:
        replace(one, variant=one.variant.strip("<>")).save(tmp_path / f"{one.variant.strip('<>')}-seed{one.seed}.json")
    text = "before\n<!-- runs: . aw,plain -->\nold\n<!-- end of runs -->\nafter\n"
    made = with_tables(text, tmp_path)
    assert made.startswith("before\n<!-- runs: . aw,plain -->\n\n| variant |")
    assert made.endswith("|\n\n<!-- end of runs -->\nafter\n")
    assert made.index("| aw |") < made.index("| plain |")
    assert with_tables(made, tmp_path) == made
    with pytest.raises(ValueError, match="holds no run of se"):
        with_tables(text.replace("aw,plain", "se"), tmp_path)
