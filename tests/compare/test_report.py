"""The report of a comparison: its figures and its files."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from awconv.compare.record import EpochRecord, Record
from awconv.compare.report import table, with_tables, write_report
from awconv.compare.summaries import summarise


def record(variant: str, seed: int, accuracy: float, seconds: tuple[float, ...]) -> Record:
    return Record(
        variant=variant,
        network=f"{variant}_net",
        seed=seed,
        parameters=1234567,
        test_split="test",
        score=accuracy,
        epochs=[EpochRecord(1.0 / (i + 1), 0.5 + 0.1 * i, s) for i, s in enumerate(seconds)],
        recipe={"trainer": {"max_epochs": len(seconds)}},
        versions={"torch": "2"},
    )


RECORDS = [
    record("plain", 0, 0.90, (9.0, 1.0, 2.0, 1.5)),
    record("<aw>", 0, 0.92, (9.0, 3.0, 3.0, 3.0)),
    record("plain", 1, 0.94, (9.0, 2.5, 2.5, 2.5)),
    record("<aw>", 1, 0.93, (9.0, 5.0, 5.0, 5.0)),
]


def test_a_row_has_mean_spread_and_the_difference_to_the_first_variant() -> None:
    plain, aw = summarise(RECORDS)
    assert (plain.variant, plain.seeds, plain.parameters) == ("plain", 2, 1234567)
    assert plain.score == pytest.approx(92.0)
    assert plain.spread == pytest.approx(2 * 2**0.5)  # of 90 and 94, with one degree of freedom
    # The first epoch warms up; then medians over epochs, and over runs.
    assert plain.seconds_per_epoch == pytest.approx((1.5 + 2.5) / 2)
    assert aw.seconds_per_epoch == pytest.approx((3 + 5) / 2)
    assert plain.difference is None
    assert aw.difference is not None
    assert (aw.difference.to, aw.difference.seeds, aw.difference.mean) == ("plain", 2, pytest.approx(0.5))
    # Differences of 2 and -1 deviate by 2.1213. Student's t has the quantile 12.7062 (tables).
    margin = 12.7062 * 4.5**0.5 / 2**0.5
    assert (aw.difference.low, aw.difference.high) == pytest.approx((0.5 - margin, 0.5 + margin), rel=1e-5)


def test_differences_are_to_the_network_without_the_attention_over_common_seeds() -> None:
    def of(variant: str, network: str, seed: int, accuracy: float) -> Record:
        return replace(record(variant, seed, accuracy, (1.0,)), network=network)

    records = [
        of("plain", "resnet20_cifar", 0, 0.80),
        of("se", "seresnet20_cifar", 0, 0.82),
        of("aw_se", "aw_seresnet20_cifar", 0, 0.85),
        of("aw_se", "aw_seresnet20_cifar", 1, 0.99),  # no baseline of this seed
        of("aw", "aw_resnet20_cifar", 3, 0.85),
    ]
    differences = {row.variant: row.difference for row in summarise(records)}
    assert (differences["se"].to, differences["se"].mean) == ("plain", pytest.approx(2.0))
    assert (differences["aw_se"].to, differences["aw_se"].mean) == ("se", pytest.approx(3.0))
    assert differences["aw_se"].seeds == 1
    assert differences["aw_se"].low is None
    assert differences["plain"] is differences["aw"] is None
    assert table(records).rows[2][-2] == "+3.00 † to se"


def test_one_seed_has_no_spread() -> None:
    (row,) = summarise(RECORDS[:1])
    assert row.spread is None
    assert table(RECORDS[:1]).rows[0] == ("plain", "plain_net", "1,234,567", "", "90.00", "1 †", "", "1.00")


def test_the_tables_show_every_cell() -> None:
    made = table(RECORDS, "title")
    assert "| plain | plain_net | 1,234,567 |  | 92.00 ± 2.83 | 2 † |  | 1.00 |" in made.markdown()
    assert "| 92.50 ± 0.71 | 2 † | +0.50 (-18.56 to +19.56) † to plain | 2.00 |" in made.markdown()
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(made.rich())
    assert "92.00 ± 2.83" in console.export_text()


def with_scores(plain: tuple[float, ...], aw: tuple[float, ...]) -> list[Record]:
    return [
        record(variant, seed, score, (1.0,))
        for variant, scores in (("plain", plain), ("aw", aw))
        for seed, score in enumerate(scores)
    ]


def test_fewer_than_three_seeds_are_marked_everywhere(tmp_path: Path) -> None:
    two = with_scores((0.7, 0.8), (0.75, 0.81))
    write_report(two, tmp_path, "t", "c")
    for file in ("table.md", "index.html"):
        text = (tmp_path / file).read_text()
        assert "† to plain" in text, file
        assert "† Fewer than three seeds: an interval from two is very wide" in text, file
    (_, aw) = json.loads((tmp_path / "results.json").read_text())["summary"]
    assert aw["difference"]["warning"] == "an interval from 2 pairs is very wide"
    three = table(with_scores((0.7, 0.8, 0.7), (0.75, 0.81, 0.7)))
    assert three.note == ""
    assert "†" not in three.markdown()


def test_an_interval_without_width_is_marked_everywhere(tmp_path: Path) -> None:
    equal = with_scores((0.7, 0.8, 0.9), (0.71, 0.81, 0.91))  # 1.0 each, but for the rounding of binary fractions
    write_report(equal, tmp_path, "t", "c")
    for file in ("table.md", "index.html"):
        text = (tmp_path / file).read_text()
        assert "+1.00 (+1.00 to +1.00) ‡ to plain" in text, file
        assert "‡ All differences are equal: the interval says nothing about the spread" in text, file
    (_, aw) = json.loads((tmp_path / "results.json").read_text())["summary"]
    assert aw["difference"]["warning"].startswith("all 3 differences are equal")
    assert "‡" not in table(with_scores((0.7, 0.8, 0.9), (0.71, 0.81, 0.92))).markdown()


def test_the_time_ratio_is_paired_by_seed_and_has_its_range() -> None:
    # Median epochs: the second seed ran while the machine was twice as slow.
    seconds = {("plain", 0): 1.0, ("plain", 1): 2.0, ("plain", 2): 1.0, ("aw", 2): 1.3, ("aw", 1): 2.2, ("aw", 0): 1.2}
    records = [record(variant, seed, 0.1 * seed, (9.0, one, one)) for (variant, seed), one in seconds.items()]
    plain, aw = summarise(records)
    assert aw.ratio is not None
    assert (aw.ratio.median, aw.ratio.low, aw.ratio.high) == pytest.approx((1.2, 1.1, 1.3))
    assert (plain.ratio.median, plain.ratio.low, plain.ratio.high) == (1.0, 1.0, 1.0)
    assert [row[-1] for row in table(records).rows] == ["1.00", "1.20 (1.10 to 1.30)"]


@pytest.mark.parametrize(
    "change",
    [
        {"jobs": 2},
        {"versions": {"torch": "3"}},
        {"versions": {"torch": "2", "device": "H100"}},
        {"versions": {"torch": "2", "threads": "1"}},
        {"seed": 9},
    ],
    ids=str,
)
def test_there_is_no_time_ratio_where_runs_did_not_have_the_machine_alike(change: dict[str, object]) -> None:
    plain, aw = record("plain", 0, 0.5, (1.0,)), record("aw", 0, 0.5, (1.0,))
    assert [row[-1] for row in table([plain, aw]).rows] == ["1.00", "1.00"]
    changed = table([plain, replace(aw, **change)])
    assert [row[-1] for row in changed.rows] == ["1.00", ""]
    assert "No time ratio where runs were trained side by side" in changed.note


def test_further_figures_have_columns() -> None:
    def of(seed: int, small: float) -> Record:
        return replace(RECORDS[0], seed=seed, metric="box AP", figures={"AP50": 0.5 + 0.1 * seed, "AP_small": small})

    made = table([of(0, 0.25), of(1, 0.35)])
    assert made.headings[4:7] == ("box AP, %", "AP50", "AP_small")
    assert made.rows[0][5:7] == ("55.00", "30.00")
    assert table([of(0, -1.0)]).rows[0][5:7] == ("50.00", "")  # there was no small object


def test_the_report_folder_holds_json_curves_and_a_page(tmp_path: Path) -> None:
    page = write_report(RECORDS, tmp_path, "a < b", "awconv compare x --seeds 2").read_text()
    assert "<h1>a &lt; b</h1>" in page
    assert "<code>awconv compare x --seeds 2</code>" in page
    assert "<td>&lt;aw&gt;</td>" in page
    assert 'src="curves.svg"' in page
    content = json.loads((tmp_path / "results.json").read_text())
    assert [row["score"] for row in content["summary"]] == pytest.approx([92.0, 92.5])
    assert len(content["runs"]) == 4
    assert ElementTree.parse(tmp_path / "curves.svg").getroot().tag.endswith("svg")
    assert "mathdefault" not in (tmp_path / "curves.svg").read_text()  # numbers on the axes, not their markup
    assert (tmp_path / "table.md").read_text() == table(RECORDS).markdown()


def test_a_run_is_written_whole(tmp_path: Path) -> None:
    RECORDS[0].save(tmp_path / "run.json")
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["epochs"][0] == {"train_loss": 1.0, "val_score": 0.5, "seconds": 9.0}


def test_runs_without_validation_or_test_data_are_reported_as_what_they_are(tmp_path: Path) -> None:
    without = replace(RECORDS[0], epochs=[EpochRecord(1.0, None, 1.0)], test_split="val")
    page = write_report([without], tmp_path, "t", "c").read_text()
    assert "after the last epoch on the validation split" in page


def test_tables_in_texts_are_made_from_the_runs(tmp_path: Path) -> None:
    for one in RECORDS:
        replace(one, variant=one.variant.strip("<>")).save(tmp_path / f"{one.variant.strip('<>')}-seed{one.seed}.json")
    text = "before\n<!-- runs: . aw,plain -->\nold\n<!-- end of runs -->\nafter\n"
    made = with_tables(text, tmp_path)
    assert made.startswith("before\n<!-- runs: . aw,plain -->\n\n| variant |")
    assert made.endswith("one has none.\n\n<!-- end of runs -->\nafter\n")
    assert made.index("| aw |") < made.index("| plain |")
    assert with_tables(made, tmp_path) == made
    with pytest.raises(ValueError, match="holds no run of se"):
        with_tables(text.replace("aw,plain", "se"), tmp_path)


def test_tables_of_records_need_no_training() -> None:
    """A page of results is made where nothing can be trained."""
    code = "import sys; sys.modules['lightning'] = None; from awconv.compare.report import with_tables"
    subprocess.run([sys.executable, "-c", code], check=True)
