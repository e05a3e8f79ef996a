"""The paired difference of scores from elsewhere."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from awconv.compare import paired

A, B = [71.2, 70.6, 71.4, 70.9], [73.9, 73.7, 74.3, 70.8]


def csv(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_interval_is_students_for_the_mean_of_b_minus_a() -> None:
    found = paired(A, B)
    test = stats.ttest_rel(B, A)
    interval = test.confidence_interval(0.95)
    assert found.mean == pytest.approx(np.mean(B) - np.mean(A))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.spread == pytest.approx(np.std(np.subtract(B, A), ddof=1))
    assert (found.seeds, found.warning) == (4, None)


def test_the_interval_holds_the_true_difference_in_95_of_100_cases() -> None:
    draw = random.Random(0)
    held = 0
    for _ in range(2000):
        common = [draw.gauss(0, 5) for _ in range(3)]
        a = [one + draw.gauss(0, 1) for one in common]
        b = [one + 0.7 + draw.gauss(0, 1) for one in common]
        found = paired(a, b)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 0.7 <= found.high
    assert 0.935 < held / 2000 < 0.965


@pytest.mark.parametrize("kind", [tuple, np.array, torch.tensor, lambda scores: [np.float32(one) for one in scores]])
def test_sequences_arrays_and_tensors_are_the_same(kind: Callable[[list[float]], Any]) -> None:
    assert paired(kind(A), kind(B)).mean == pytest.approx(paired(A, B).mean, rel=1e-5)


def test_mappings_are_paired_by_seed_and_seeds_without_a_partner_are_named() -> None:
    found = paired({3: 0.5, 1: 0.75, 2: 0.5, 7: 0.1}, {1: 0.875, 2: 0.75, 3: 0.625, 8: 0.9})
    assert (found.seeds, found.mean) == (3, pytest.approx(0.5 / 3))
    assert found.warning == "seeds without a partner are left out: 7 (only in a), 8 (only in b)"


def test_files_are_paired_by_seed(tmp_path: Path) -> None:
    a = csv(tmp_path / "a.csv", "\ufeffseed,score\n0,0.5\n1,0.625\n2,0.5\n")  # as spreadsheets write it
    b = csv(tmp_path / "b.csv", "loss,score,seed\n9,0.75,2\n9,0.625, 1\n9,0.5,0\n")
    found = paired(a, str(b))
    assert found == paired({0: 0.5, 1: 0.625, 2: 0.5}, b)
    assert (found.seeds, found.mean, found.warning) == (3, pytest.approx(0.25 / 3), None)


@pytest.mark.parametrize("seeds", [2, 5])
def test_an_interval_without_width_carries_a_warning(seeds: int) -> None:
    a = [0.7 + 0.013 * seed for seed in range(seeds)]
    found = paired(a, [score + 0.01 for score in a])  # equal up to rounding
    assert found.low == found.high == found.mean == pytest.approx(0.01)
    assert found.is_constant
    assert found.warning == (
        f"all {seeds} differences are equal: the interval has no width and says nothing about the spread; probably the "
        "scores are rounded, or the test images are few"
    )
    assert str(found.warning) in str(found)


def test_one_image_in_ten_thousand_is_a_spread() -> None:
    found = paired([0.7, 0.8, 0.9], [0.71, 0.81, 0.9101])
    assert not found.is_constant
    assert found.warning is None


def test_few_pairs_carry_a_warning() -> None:
    one, two = paired([0.5], [0.75]), paired([0.5, 0.5], [0.75, 0.625])
    assert (one.mean, one.low, one.high, one.spread, one.warning) == (
        0.25,
        None,
        None,
        None,
        "one pair has no interval",
    )
    assert str(one) == "mean difference +0.25, 1 pair; one pair has no interval"
    assert two.warning == "an interval from 2 pairs is very wide"


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        ([1, 2], [1, 2, 3], ValueError, "got 2 scores in a and 3 in b. Give mappings from seeds"),
        ([], [], ValueError, "at least one seed with a score in both"),
        ({0: 1.0}, {1: 1.0}, ValueError, "at least one seed with a score in both, got 0 in a and 1 in b"),
        ({0: 1.0}, [1.0], ValueError, "scores_a has seeds, scores_b has none"),
        ([1.0], {0: 1.0}, ValueError, "scores_b has seeds, scores_a has none"),
        ([1.0, float("nan")], [1.0, 2.0], ValueError, "finite, got nan in scores_a at 1"),
        ({0: 1.0}, {0: float("inf")}, ValueError, "finite, got inf in scores_b at 0"),
        ([[1.0], [2.0]], [1.0, 2.0], TypeError, "one number for each seed"),
        (np.ones((2, 2)), [1.0, 2.0], TypeError, "one number for each seed"),
        (["0.7"], [1.0], TypeError, "one number for each seed, got '0.7' at 0"),
        ({0.5, 0.6}, [1.0, 2.0], TypeError, "scores_a must be a sequence or an array of scores.*got set"),
        (np.float64(0.7), [0.8], TypeError, "scores_a must be a sequence or an array.*got float64"),
    ],
)
def test_wrong_scores_are_refused(a: Any, b: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        paired(a, b)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it lacks score and seed"),
        ("seed,accuracy\n0,0.5\n", "must have the columns seed and score in its first line.*it lacks score"),
        ("seed;score\n0;0.5\n", "separated by commas"),
        ("seed,score\n0,0.5\n0,0.6\n", "line 3: seed 0 is there twice"),
        ("seed,score\n0,high\n", "line 2: expected a seed and a finite score, got '0' and 'high'"),
        ("seed,score\n0,nan\n", "line 2: expected a seed and a finite score"),
        ("seed,score\n0\n", "line 2: expected a seed and a finite score, got '0' and None"),
    ],
)
def test_wrong_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        paired(csv(tmp_path / "a.csv", text), {0: 1.0})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there"):
        paired(tmp_path / "there.csv", {0: 1.0})


def test_it_needs_no_training() -> None:
    code = (
        "import sys; sys.modules['lightning'] = None; from awconv.compare import paired; print(paired([1, 2], [2, 4]))"
    )
    printed = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert printed.startswith("mean difference +1.5 (95 % interval -4.853 to +7.853), 2 pairs")
