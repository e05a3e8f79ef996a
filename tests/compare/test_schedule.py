"""Which run of a comparison starts next, and how long all of them take."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from awconv.compare.record import EpochRecord, Record
from awconv.compare.schedule import Planned, Took, expected_seconds, last_end, next_run


def runs(*seconds: float | None, variants: int = 2) -> list[Planned]:
    """Runs in the order of a comparison: all variants of a seed, then those of the next."""
    return [Planned(f"run{i}", i // variants, one) for i, one in enumerate(seconds)]


def name(found: Planned | None) -> str | None:
    return None if found is None else found.name


def test_as_long_as_nothing_is_known_runs_start() -> None:
    assert name(next_run(runs(None, None), [], complete=False, left=1, jobs=1)) == "run0"
    assert next_run(runs(None, None), [], complete=False, left=0, jobs=1) is None


def test_a_run_that_cannot_end_in_time_does_not_start() -> None:
    assert name(next_run(runs(10, 20), [], complete=False, left=10, jobs=1)) == "run0"
    assert next_run(runs(10, 20), [], complete=False, left=9.9, jobs=1) is None
    # Without a complete seed, the shorter run of the pair is better than none.
    assert name(next_run(runs(20, 10), [], complete=False, left=15, jobs=1)) == "run1"


def test_once_a_seed_is_complete_a_seed_is_begun_only_if_all_its_runs_can_end() -> None:
    assert name(next_run(runs(10, 20), [], complete=True, left=30, jobs=1)) == "run0"
    assert next_run(runs(10, 20), [], complete=True, left=29, jobs=1) is None
    assert name(next_run(runs(10, 20), [], complete=True, left=20, jobs=2)) == "run0"  # side by side


def test_beside_the_first_seed_another_one_is_begun_only_if_all_its_runs_can_end() -> None:
    first = [Planned("a0", 0, 10.0), Planned("b0", 0, 10.0)]
    second = [Planned("a1", 1, 10.0), Planned("b1", 1, 10.0)]
    assert next_run(second, first, complete=False, left=19, jobs=3) is None  # its second run would start after 10
    assert name(next_run(second, first, complete=False, left=20, jobs=3)) == "a1"
    assert name(next_run(second, first, complete=False, left=10, jobs=4)) == "a1"
    unknown = runs(None, None, None, None)
    assert name(next_run(unknown[2:], unknown[:2], complete=False, left=1, jobs=3)) == "run2"


def test_a_seed_waits_for_the_workers_that_are_busy() -> None:
    busy = [Planned("busy", 0, 15.0)]
    assert next_run(runs(10, 20), busy, complete=True, left=25, jobs=2) is None  # 20 seconds from 10 or from 15
    assert name(next_run(runs(10, 20), busy, complete=True, left=30, jobs=2)) == "run0"
    assert next_run(runs(10, 20), busy, complete=True, left=100, jobs=1) is None  # there is no worker


def test_the_rest_of_a_seed_does_not_start_if_its_running_run_comes_too_late() -> None:
    late = [Planned("late", 0, 50.0)]
    assert next_run([Planned("rest", 0, 5.0)], late, complete=True, left=40, jobs=2) is None
    # The time goes to another seed, which can still be completed.
    waiting = [Planned("rest", 0, 5.0), Planned("other", 1, 5.0)]
    assert name(next_run(waiting, late, complete=True, left=40, jobs=2)) == "other"


@given(
    costs=st.lists(st.floats(1, 20), min_size=1, max_size=3),
    seeds=st.integers(1, 4),
    jobs=st.integers(1, 7),
    limit=st.floats(0, 200),
)
def test_a_cut_leaves_whole_seeds_and_no_run_too_late(costs: list[float], seeds: int, jobs: int, limit: float) -> None:
    """Plays a whole comparison in which every run takes what is expected, and one seed is complete before."""
    waiting = [Planned(f"{seed}-{v}", seed, cost) for seed in range(1, seeds + 1) for v, cost in enumerate(costs)]
    running: list[tuple[float, Planned]] = []  # with their ends
    now, finished = 0.0, list[Planned]()
    while True:
        active = [replace(run, seconds=end - now) for end, run in running]
        found = next_run(waiting, active, True, limit - now, jobs)
        if found is not None:
            assert len(running) < jobs
            waiting.remove(found)
            running.append((now + (found.seconds or 0), found))
        elif running:
            now, ended = min(running, key=lambda one: one[0])
            running.remove((now, ended))
            finished.append(ended)
        else:
            break
    assert now <= limit + 1e-6
    for _, group in itertools.groupby(sorted(finished, key=lambda run: run.seed), key=lambda run: run.seed):
        assert len(list(group)) == len(costs)
    if waiting:  # what was left would not have fitted behind the others on one worker that is free at once
        assert last_end(costs, [], jobs) > limit - now


@given(st.lists(st.floats(0, 50), max_size=6), st.lists(st.floats(0, 50), max_size=3), st.integers(3, 5))
def test_the_last_end_lies_between_the_bounds_of_all_schedules(
    waiting: list[float], running: list[float], jobs: int
) -> None:
    end = last_end(waiting, running, jobs)
    assert end >= max(waiting, default=0.0)
    total = sum(waiting) + sum(running)
    assert end <= total + 1e-6  # one worker could do all
    if waiting:
        # Graham's bound for lists (1966): the mean load, and the longest run once more
        assert end <= total / jobs + max([*waiting, *running]) + 1e-6


def record(variant: str, epochs: list[float], seconds: float | None) -> Record:
    curve = [EpochRecord(1.0, 0.5, one) for one in epochs]
    return Record(variant, variant, 0, 1, "test", 0.5, curve, {}, {}, seconds=seconds)


def test_a_run_takes_what_its_variant_took() -> None:
    took = {"plain": [Took.of(record("plain", [2.0] * 10, 30.0))], "aw": [Took.of(record("aw", [3.0] * 10, 44.0))]}
    assert expected_seconds("plain", 10, took) == pytest.approx(1.1 * 30)  # with a tenth in reserve
    assert expected_seconds("aw", 10, took) == pytest.approx(1.1 * 44)
    # Five further epochs: each of 2 seconds, and 15 % for its validation.
    assert expected_seconds("plain", 15, took) == pytest.approx(1.1 * (30 + 5 * 2.3))
    # A variant of which nothing is known takes what the slowest one does.
    assert expected_seconds("se", 10, took) == pytest.approx(1.1 * 44)
    assert expected_seconds("se", 10, {}) is None
    assert expected_seconds("plain", None, took) == pytest.approx(1.1 * 30)


def test_runs_of_the_same_length_count_more_than_trials() -> None:
    trial, whole = Took.of(record("aw", [2.0, 2.0], 20.0)), Took.of(record("aw", [2.0] * 10, 31.0))
    assert expected_seconds("aw", 10, {"aw": [trial, whole, trial]}) == pytest.approx(1.1 * 31)


def test_records_of_older_versions_have_the_time_of_their_epochs() -> None:
    old = Took.of(record("aw", [2.0] * 10, None))
    assert old.seconds == pytest.approx(1.15 * 20)
    assert math.isclose(old.with_epochs(5), 1.15 * 10)
