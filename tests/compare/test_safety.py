"""Comparisons that are interrupted, started twice, or read untrusted records."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console

from awconv.compare import compare
from awconv.compare.record import EpochRecord, Record
from awconv.compare.report import table, with_tables, write_report
from awconv.training.checkpoints import find_last, read_checkpoint
from awconv.training.lock import locked


def recipe(folder: Path, epochs: int) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(
        "model: {network: resnet8_cifar, lr: 0.03}\n"
        f"trainer: {{max_epochs: {epochs}, limit_train_batches: 6, limit_val_batches: 1, accelerator: cpu}}\n"
        "recent_checkpoint: {every_n_steps: 1}\n"
    )
    return path


@pytest.mark.campaign
def test_the_last_run_has_the_threads_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cores are divided by the runs that go side by side, and not by those that are missing."""
    monkeypatch.setattr(import_module("awconv.compare.processes"), "usable_cores", lambda: 6)
    path = recipe(tmp_path, epochs=1)
    assert compare(path, "plain,aw", seeds=1, out=tmp_path, jobs=2) == 0
    first = json.loads((tmp_path / "aw-seed0.json").read_text())
    for left in [tmp_path / "aw-seed0.json", *(tmp_path / "aw-seed0").rglob("*.ckpt")]:
        left.unlink()
    assert compare(path, "plain,aw", seeds=1, out=tmp_path, jobs=2) == 0
    again = json.loads((tmp_path / "aw-seed0.json").read_text())
    assert first["versions"]["threads"] == again["versions"]["threads"] == "3"
    # bit for bit: the sums are those of as many threads
    assert [e["train_loss"] for e in again["epochs"]] == [e["train_loss"] for e in first["epochs"]]
    assert again["score"] == first["score"]


@pytest.mark.campaign
def test_an_interrupted_run_keeps_its_threads(tmp_path: Path) -> None:
    """SIGTERM in a run of one process, which goes on in another that would take other threads."""
    path, out = recipe(tmp_path, epochs=8), tmp_path / "out"
    command = [sys.executable, "-m", "awconv", "compare", str(path), "--variants=plain", "--seeds=1", f"--out={out}"]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "2"}, stderr=subprocess.PIPE, text=True)
    while not list(out.rglob("*.ckpt")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    last = find_last(out)
    assert last is not None
    assert read_checkpoint(last)["callbacks"]["SameThreads"] == {"threads": 2}
    before = torch.get_num_threads()
    try:
        assert before != 2
        assert compare(path, "plain", seeds=1, out=out) == 0
        assert Record.load(out / "plain-seed0.json").versions["threads"] == "2"
    finally:
        torch.set_num_threads(before)


def test_a_second_comparison_in_the_same_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("awconv.compare.session"), "locked", lambda folder: locked(folder, seconds=0))
    out = tmp_path / "out"
    with (
        locked(out),
        pytest.raises(ValueError, match=f"out is in use by process {os.getpid()}, host .*, since .*; wait"),
    ):
        compare(recipe(tmp_path, epochs=1), "plain", seeds=1, out=out)
    assert not list(out.rglob("*.ckpt"))


def planted(text: str) -> Record:
    return Record(
        variant=text,
        network=text,
        seed=0,
        parameters=1,
        test_split="test",
        score=0.5,
        epochs=[EpochRecord(1.0, 0.5, 1.0)],
        recipe={text: text},
        versions={text: text},
        metric=text,
        figures={text: 0.5},
    )


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found |= {tag, *(name for name, _ in attrs)}


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", "</title><img src=x onerror=alert(1)>", "$\\frac{1$", "[red]a[/nothing]"]
)
def test_texts_of_a_run_stay_texts_in_the_report(text: str, tmp_path: Path) -> None:
    page = write_report([planted(text)], tmp_path, text, text).read_text()
    elements = Elements()
    elements.feed(page)
    assert not elements.found & {"script", "onerror"}
    assert page.count("<img") == 1
    assert ElementTree.parse(tmp_path / "curves.svg").getroot().tag.endswith("svg")
    assert "<script" not in (tmp_path / "table.md").read_text()
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(table([planted(text)], text).rich())
    assert text in console.export_text()


def test_texts_of_a_run_cannot_add_columns_lines_or_control_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    lines = table([planted("a|b\nc")]).markdown().split("\n\n")[0].splitlines()  # without the notes
    assert len(lines) == 3
    assert lines[2].startswith("| a\\|b c | a\\|b c |")
    assert "| \\x1b[2J\\ud800 |" in table([planted("\x1b[2J\ud800")]).markdown()
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(table([planted("a\x1b]0;title\x07b\x1b[2J")], "title").rich())
    shown = console.export_text()
    assert "\x1b" not in shown
    assert "a\\x1b]0;title\\x07b\\x1b[2J" in shown


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"score": "0.9"}, "score cannot be '0.9'"),
        ({"score": True}, "score cannot be 'True'"),
        ({"seed": 1.5}, "seed cannot be '1.5'"),
        ({"parameters": None}, "parameters cannot be 'None'"),
        ({"epochs": [{"train_loss": "low", "val_score": None, "seconds": 1.0}]}, "train_loss cannot be 'low'"),
        ({"epochs": [{"train_loss": 1.0}]}, "seconds"),
        ({"epochs": 3}, "3|int"),
        ({"epochs": [7]}, "mapping"),
        ({"figures": {"AP50": "many"}}, "figures cannot be"),
        ({"versions": []}, "versions cannot be"),
        ({"recipe": "text"}, "recipe cannot be 'text'"),
        ({"variant": 3}, "variant cannot be '3'"),
        ({"test_split": "test\x1b]0;own\x07"}, r"test_split cannot be 'test\\x1b\]0;own\\x07'"),
        ({"surprise": 1}, "surprise"),
        ({"epochs": []}, "it has no epochs"),
        ({"score": 10**400}, "score cannot be '1000"),
    ],
)
def test_files_that_are_no_runs_are_named(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    (tmp_path / "aw-seed0.json").write_text(json.dumps(asdict(planted("aw")) | change))
    with pytest.raises(ValueError, match=rf"aw-seed0.json is not a run of awconv compare: .*({named})"):
        with_tables("<!-- runs: . aw -->\n<!-- end of runs -->", tmp_path)


@pytest.mark.parametrize("text", ['{"score": NaN}', "[" * 100_000, "\ud800", '{"score": 1e999}', "[]", '"text"', ""])
def test_files_that_are_no_json_are_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "aw-seed0.json").write_text(text, errors="surrogatepass")
    with pytest.raises(ValueError, match=r"aw-seed0.json is not a run of awconv compare: "):
        Record.load(tmp_path / "aw-seed0.json")


def test_a_score_that_is_no_number_is_not_kept(tmp_path: Path) -> None:
    run = planted("aw")
    object.__setattr__(run, "score", float("nan"))
    with pytest.raises(ValueError, match=re.escape("Out of range float values are not JSON compliant")):
        run.save(tmp_path / "aw-seed0.json")
    assert not (tmp_path / "aw-seed0.json").exists()
