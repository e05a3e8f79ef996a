"""The thread that runs requests together."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import TimeoutError as Late  # another one before Python 3.11
from contextlib import ExitStack

import pytest

from awconv.serve.batching import Batcher, FullError

LONG = 60.0  # seconds: a test that would wait so long fails


class Doubling:
    """Doubles numbers, keeps what it was given, and waits until it may go on."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.goes_on = threading.Event()
        self.goes_on.set()

    def __call__(self, numbers: Sequence[int]) -> list[int]:
        self.batches.append(list(numbers))
        assert self.goes_on.wait(LONG)
        if 13 in numbers:
            raise RuntimeError("unlucky")
        return [2 * number for number in numbers]


@pytest.fixture
def run() -> Doubling:
    return Doubling()


@pytest.fixture
def batcher(run: Doubling) -> Iterator[Batcher[int, int]]:
    batcher: Batcher[int, int] = Batcher(run, batch_size=3, max_wait=LONG, limit=8)
    batcher.start()
    yield batcher
    run.goes_on.set()
    batcher.close(LONG)


def test_what_comes_together_runs_together_and_gets_its_own_result(batcher: Batcher[int, int], run: Doubling) -> None:
    with ExitStack() as stack:
        admissions = [stack.enter_context(batcher.admitted()) for _ in range(7)]
        futures = [admission.submit(number) for number, admission in enumerate(admissions)]
        assert [future.result(LONG) for future in futures] == [0, 2, 4, 6, 8, 10, 12]
    assert run.batches == [[0, 1, 2], [3, 4, 5], [6]]


def test_who_is_alone_waits_for_nobody(batcher: Batcher[int, int], run: Doubling) -> None:
    with batcher.admitted() as admission:
        assert admission.submit(4).result(LONG / 2) == 8
    assert run.batches == [[4]]


def test_an_item_waits_for_a_request_on_its_way_and_no_longer_when_that_fails(
    batcher: Batcher[int, int], run: Doubling
) -> None:
    with batcher.admitted() as first:
        with batcher.admitted():
            future = first.submit(1)
            with pytest.raises(Late):
                future.result(0.05)
        assert future.result(LONG / 2) == 2


def test_an_item_waits_no_longer_than_it_may(run: Doubling) -> None:
    batcher: Batcher[int, int] = Batcher(run, batch_size=3, max_wait=0.01, limit=8)
    batcher.start()
    with batcher.admitted() as first, batcher.admitted():
        assert first.submit(1).result(LONG) == 2
    batcher.close(LONG)


def test_an_error_fails_its_batch_and_the_thread_goes_on(batcher: Batcher[int, int]) -> None:
    with batcher.admitted() as admission, pytest.raises(RuntimeError, match="unlucky"):
        admission.submit(13).result(LONG)
    with batcher.admitted() as admission:
        assert admission.submit(1).result(LONG) == 2


def test_more_than_the_limit_are_refused_until_one_is_answered(batcher: Batcher[int, int]) -> None:
    with ExitStack() as stack:
        for _ in range(7):
            stack.enter_context(batcher.admitted())
        with batcher.admitted():
            assert batcher.busy == 8
            with pytest.raises(FullError), batcher.admitted():
                pass
        with batcher.admitted():
            pass
    assert batcher.busy == 0


def test_a_function_runs_alone_and_in_its_turn(batcher: Batcher[int, int], run: Doubling) -> None:
    order = []
    run.goes_on.clear()
    with ExitStack() as stack:
        admissions = [stack.enter_context(batcher.admitted()) for _ in range(3)]
        first = admissions[0].submit(0)
        for admission in admissions[1:]:
            admission.arrived()
        while not run.batches:
            pass
        with ExitStack() as later:
            futures = [later.enter_context(batcher.admitted()).submit(1)]
            called = batcher.call(lambda: order.append(len(run.batches)) or threading.current_thread().name)
            futures.append(later.enter_context(batcher.admitted()).submit(2))
            run.goes_on.set()
            assert [future.result(LONG) for future in (first, *futures)] == [0, 2, 4]
    assert called.result(LONG) == "awconv-serve"
    assert order == [2]
    assert run.batches == [[0], [1], [2]]


def test_what_was_submitted_before_the_end_is_run_and_nothing_after(run: Doubling) -> None:
    batcher: Batcher[int, int] = Batcher(run, batch_size=1, max_wait=0, limit=8)
    batcher.start()
    run.goes_on.clear()
    with ExitStack() as stack:
        futures = [stack.enter_context(batcher.admitted()).submit(number) for number in range(4)]
        closing = threading.Thread(target=batcher.close, args=(LONG,))
        closing.start()
        while batcher.ready:
            pass
        with batcher.admitted() as late, pytest.raises(FullError):
            late.submit(9)
        run.goes_on.set()
        closing.join(LONG)
        assert [future.result(0) for future in futures] == [0, 2, 4, 6]
