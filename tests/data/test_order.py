"""The images of each batch, for any sizes and numbers of processes."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from awconv.data.order import WINDOW, EvaluationBatches, Share, TrainingBatches, chunks_of, derive_seed, seed_all

sizes, batch_sizes, processes = st.integers(1, 300), st.integers(1, 40), st.integers(1, 5)


@given(sizes, batch_sizes, processes)
def test_an_evaluation_sees_every_image_once_in_as_many_batches_everywhere(size: int, batch: int, of: int) -> None:
    try:
        shares = [list(EvaluationBatches(size, batch, Share(rank, of))) for rank in range(of)]
    except ValueError:
        assert size < of  # nothing else is refused
        return
    assert sorted(index for share in shares for part in share for index in part) == list(range(size))
    assert len({len(share) for share in shares}) == 1
    # Batches of one cannot be as many everywhere, where a process has an image more than another.
    assert all(1 <= len(part) <= max(batch, 2) for share in shares for part in share)
    if batch > 1 or size % of == 0:
        assert all(len(part) <= batch for share in shares for part in share)


@given(sizes, batch_sizes, processes, st.integers(0, 3))
def test_processes_share_the_batches_of_one(size: int, batch: int, of: int, epoch: int) -> None:
    alone = TrainingBatches(size, batch * of, seed=7)
    alone.sampler.set_epoch(epoch)
    shares = [TrainingBatches(size, batch, Share(rank, of), seed=7) for rank in range(of)]
    for share in shares:
        share.sampler.set_epoch(epoch)
        assert len(share) == len(alone) == size // (batch * of)
    for whole, *parts in zip(alone, *shares, strict=True):
        assert sorted(whole) == sorted(draw for part in parts for draw in part)
    drawn = [draw.image for whole in alone for draw in whole]
    assert len(set(drawn)) == len(drawn) == len(alone) * batch * of


def test_a_later_start_leaves_out_what_was_done() -> None:
    whole = list(TrainingBatches(100, 8, seed=3))
    assert list(TrainingBatches(100, 8, seed=3, start=lambda: 5)) == whole[5:]


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        batches = TrainingBatches(64, 64, seed=seed)
        batches.sampler.set_epoch(epoch)
        return [draw.image for batch in batches for draw in batch]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert len({derive_seed(*numbers) for numbers in np.ndindex(9, 9, 9)}) == 9**3


@given(st.lists(st.integers(1, 12), min_size=1, max_size=40))
def test_chunks_are_read_window_by_window(stored: list[int]) -> None:
    indices = [index for index in range(sum(stored)) if index % 3]  # a split of them
    if not indices:
        return
    chunks = chunks_of(stored, indices)
    order = [draw.image for batch in TrainingBatches(len(indices), 1, chunks=chunks) for draw in batch]
    assert sorted(order) == list(range(len(indices)))
    # At any time, no more than WINDOW chunks are begun and not finished.
    last = {chunk: position for position, chunk in enumerate(chunks[order])}
    begun: set[int] = set()
    for position, chunk in enumerate(chunks[order]):
        begun.add(chunk)
        assert len(begun) <= WINDOW
        begun = {other for other in begun if last[other] > position}


@given(st.lists(st.integers(1, 12), min_size=1, max_size=40), batch_sizes, processes, st.integers(0, 9))
def test_processes_share_the_batches_of_one_within_chunks_and_from_anywhere_on(
    stored: list[int], batch: int, of: int, done: int
) -> None:
    chunks = chunks_of(stored, range(sum(stored)))
    alone = TrainingBatches(sum(stored), batch * of, chunks=chunks, seed=7)
    shares = [
        TrainingBatches(sum(stored), batch, Share(rank, of), seed=7, chunks=chunks, start=lambda: done)
        for rank in range(of)
    ]
    whole = list(alone)
    drawn = [draw.image for part in whole for draw in part]
    assert len(set(drawn)) == len(drawn) == len(alone) * batch * of  # every image once, but those that fill no batch
    for together, *parts in zip(whole[done:], *shares, strict=True):
        assert sorted(together) == sorted(draw for part in parts for draw in part)


def test_epochs_mix_other_chunks_with_each_other() -> None:
    chunks = chunks_of([10] * 64, range(640))
    batches = TrainingBatches(640, 40, chunks=chunks)
    together = []
    for epoch in range(3):
        batches.sampler.set_epoch(epoch)
        drawn = [[int(chunks[draw.image]) for draw in part] for part in batches]
        # Of 40 images that are drawn from 8 chunks alike, fewer than 5 chunks have none once in 10^8.
        assert all(len(set(part)) >= 4 for part in drawn)
        together.append({frozenset(part) for part in drawn})
    assert not together[0] & together[1]
    assert not together[1] & together[2]


def test_too_few_images_for_so_many_processes() -> None:
    with pytest.raises(ValueError, match=r"3 images cannot be evaluated by 4 processes: take fewer devices"):
        EvaluationBatches(3, 10, Share(0, 4))


def test_all_random_numbers_are_those_of_the_libraries_own_seeds() -> None:
    seed = derive_seed(3, 4)
    seed_all(seed)
    drawn = random.random(), np.random.rand(), torch.rand(3).tolist()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    assert drawn == (random.random(), np.random.rand(), torch.rand(3).tolist())


@pytest.mark.gpu
def test_a_gpus_random_numbers_are_those_of_its_seed() -> None:
    seed_all(7)
    drawn = torch.rand(3, device="cuda")
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3, device="cuda"))
