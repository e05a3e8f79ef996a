"""A comparison keeps a time limit: it starts what can end, stops at a checkpoint, and reports whole seeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from awconv.cli import main
from awconv.compare.comparison import Comparison, Run
from awconv.compare.course import Course
from awconv.compare.record import EpochRecord, Record
from awconv.compare.schedule import Took
from awconv.compare.session import Plan, run_plan
from awconv.compare.shared_data import OpenedData
from awconv.compare.summaries import complete_seeds
from awconv.compare.time_limit import TimeLimit, TimeOverError, parse_duration
from awconv.compare.train import train
from awconv.compare.variants import Change
from awconv.process_age import process_age
from awconv.training.checkpoints import find_last
from awconv.usage import UsageError


def recipe(folder: Path, epochs: int = 2) -> Path:
    path = folder / "tiny.yaml"
    length = f"max_epochs: {epochs}, limit_train_batches: 3"
    path.write_text(f"model: {{network: resnet8_cifar}}\ntrainer: {{{length}, accelerator: cpu}}\n")
    return path


CHANGES = [Change("plain", network="resnet8_cifar"), Change("aw", network="aw_resnet8_cifar")]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("9m", 540), ("1h30m", 5400), ("90", 90), ("1h", 3600), ("1m30.5s", 90.5), ("2.5", 2.5)],
)
def test_durations_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0s", "-5", "9x", "m", "1.5h", "5m3h", "inf", "nan", "9 m m"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="time_limit must be a duration above 0, such as 90s, 9m, 1h30m"):
        parse_duration(text)


def test_a_wrong_limit_is_refused_before_anything_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "none.yaml", "--time_limit=soon"]) == 2
    assert "got 'soon'" in capsys.readouterr().err


def test_checkpoints_and_the_report_have_a_part_of_the_limit() -> None:
    now = 100.0
    limit, short = TimeLimit(540, clock=lambda: now), TimeLimit(30, clock=lambda: now)
    assert (limit.left, limit.total_left, short.left) == (540 - 8, 540, 30 - 3)
    now = 400.0
    assert (limit.left, limit.total_left) == (232, 240)
    assert not TimeLimit().is_set
    assert TimeLimit(60, begun=90.0, clock=lambda: 100.0).total_left == 50  # what began before counts


def test_a_run_stops_after_the_step_in_which_its_time_is_over_and_goes_on_to_the_same_result(tmp_path: Path) -> None:
    variant = CHANGES[1].apply(recipe(tmp_path), ())
    stopped, whole = (Comparison((variant,), 1, tmp_path / name) for name in ("stopped", "whole"))
    run, data = Run(variant, 0), OpenedData()
    batches = 0

    def count(epochs: float, of: int) -> None:
        nonlocal batches
        batches += 1

    # Over after two of the three steps of the first epoch.
    with pytest.raises(TimeOverError):
        train(stopped, run, data, count, TimeLimit(10, clock=lambda: 10.0 * (batches >= 2)))
    assert batches == 2
    last = find_last(stopped.checkpoints(run))
    assert last is not None
    assert last.name == "recent.ckpt"
    found, expected = train(stopped, run, data), train(whole, run, data)
    assert found.score == expected.score
    assert [e.train_loss for e in found.epochs] == [e.train_loss for e in expected.epochs]
    assert found.seconds is not None
    assert found.seconds > sum(epoch.seconds for epoch in found.epochs)


def test_a_comparison_that_is_cut_short_reports_whole_seeds_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    path = recipe(tmp_path, epochs=1)

    def clock() -> float:
        """Each finished run has taken 20 hours, whatever its record says."""
        return 72_000.0 * len(list(out.glob("*-seed*.json")))

    limit = TimeLimit(2.5 * 72_000, clock=clock)  # over in the fourth run
    plan = Plan(path, CHANGES, (), 3, out, "test", 1, limit=limit)
    assert run_plan(plan, lambda comparison: "title", "command") == 124
    printed = capsys.readouterr().out
    assert "The time does not suffice for aw-seed1, plain-seed2, aw-seed2; 3 finished runs are kept" in printed
    report = json.loads((out / "results.json").read_text())
    assert [(run["variant"], run["seed"]) for run in report["runs"]] == [("plain", 0), ("aw", 0)]
    assert report["left_out"] == ["plain-seed1"]
    assert "Left out: plain-seed1, since not all variants have finished these seeds" in (out / "table.md").read_text()
    assert main(["compare", str(path), f"--out={out}", "--seeds=3", "--time_limit=1h"]) == 0
    assert "3 of 6 runs are finished already" in capsys.readouterr().out
    report = json.loads((out / "results.json").read_text())
    assert len(report["runs"]) == 6
    assert "left_out" not in report


def test_a_limit_in_the_choice_of_a_setting_leaves_all_runs_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    # Over before anything: Python and the imports have taken longer.
    command = ["compare", str(recipe(tmp_path, epochs=1)), "--variants=plain", "--seeds=1", f"--out={out}"]
    assert main([*command, "--tune=lr=0.1,0.2", "--time_limit=0.001"]) == 124
    expected = "The time does not suffice for plain-lr=0.1-seed0, plain-lr=0.2-seed0, plain-seed0; 0 finished runs"
    assert expected in capsys.readouterr().out
    assert not list(out.rglob("*.ckpt"))


def test_a_limit_and_several_devices_exclude_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", str(recipe(tmp_path)), "--time_limit=9m", f"--out={tmp_path / 'out'}", "--"]
    assert main([*command, "--trainer.devices=2", "--trainer.strategy=ddp"]) == 1
    assert "time_limit is for runs on one device each, and these take 2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_rest_of_an_interrupted_run_is_shorter(tmp_path: Path) -> None:
    path = recipe(tmp_path, epochs=4)
    comparison = Comparison(tuple(change.apply(path, ()) for change in CHANGES), 1, tmp_path / "out")
    batches = 0

    def count(epochs: float, of: int) -> None:
        nonlocal batches
        batches += 1

    with pytest.raises(TimeOverError):  # in the third epoch
        train(comparison, comparison.runs[0], OpenedData(), count, TimeLimit(10, clock=lambda: 10.0 * (batches >= 7)))
    took = {"plain": [Took(epochs=4, seconds=10.0, per_epoch=2.0)]}
    course = Course(comparison, [], TimeLimit(1000, clock=lambda: 0.0), took)
    # Two of four epochs are left of one run, and all of the other; a tenth is in reserve.
    assert course.seconds_left == pytest.approx(1.1 * (10 - 2 * 2) + 1.1 * 10)


def test_a_variant_without_any_record_takes_no_seed_from_the_others() -> None:
    there = [_record("plain", 0), _record("aw", 0), _record("plain", 1)]
    assert complete_seeds(there, ["plain", "aw", "lost"]) == there[:2]
    assert complete_seeds(there, ["plain", "lost"]) == there
    assert complete_seeds(there[2:], ["plain", "aw"]) == there[2:]


def _record(variant: str, seed: int) -> Record:
    return Record(variant, "resnet8_cifar", seed, 1, "test", 0.5, [EpochRecord(1.0, None, 1.0)], {}, {})


def test_the_age_of_this_process_is_that_of_its_modules_and_more() -> None:
    assert 0 < process_age() < 600 or process_age() == 0
