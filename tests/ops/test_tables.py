"""The tables that an algorithm has to be in, and what is said of one that was forgotten there."""

from __future__ import annotations

import re

import pytest

from awconv.ops import per_sample
from awconv.ops.choose import ALGORITHMS
from tests.documents import ROOT
from tests.ops.problems import TYPICAL, forgotten_entries


def test_every_algorithm_is_in_every_table() -> None:
    assert forgotten_entries() == []


def test_an_algorithm_without_a_typical_problem_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALGORITHMS, "pointwise", per_sample.ALGORITHM._replace(name="pointwise"))
    message = r"'pointwise' of ALGORITHMS .* has no entry in TYPICAL \(tests/ops/problems\.py\): add"
    (found,) = forgotten_entries()
    assert re.search(message, found)
    with pytest.raises(pytest.fail.Exception, match=message):
        TYPICAL["pointwise"]


def test_a_file_that_is_not_listed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(per_sample, "NEW", per_sample.ALGORITHM._replace(name="new"), raising=False)
    (found,) = forgotten_entries()
    assert found.startswith("the algorithm 'new' of awconv.ops.per_sample is not in ALGORITHMS (src/awconv/ops/choose")


def test_a_problem_that_the_algorithm_cannot_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TYPICAL, "output_gain", TYPICAL["per_tap"])
    (found,) = forgotten_entries()
    assert re.match("the problem of 'output_gain' in TYPICAL .* is one that it cannot run: .+; give it another", found)


def test_the_guide_has_a_row_for_every_algorithm() -> None:
    rows = re.findall(r"(?m)^\| `(\w+)` \|", (ROOT / "docs" / "operator.md").read_text())
    assert [name for name in ALGORITHMS if name not in rows] == [], "docs/operator.md: its first table lacks these"
