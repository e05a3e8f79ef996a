"""The images that an explanation shows."""

from __future__ import annotations

from typing import Any

import torch

from awconv.explain.images import Images
from awconv.explain.measure import Measured
from awconv.explain.photographs import chosen


def measured(predictions: list[int], with_mean: list[int]) -> Measured:
    logits = torch.nn.functional.one_hot(torch.tensor(predictions), 4).float()
    return Measured("a", logits, None, [], {}, torch.tensor(with_mean))


def images(targets: list[int] | None, count: int = 12) -> Images:
    labels: Any = None if targets is None else torch.tensor(targets)
    return Images(torch.zeros(count, 1, 2, 2, dtype=torch.uint8), [str(i) for i in range(count)], labels, "")


TARGETS = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3]
PREDICTED = [0, 0, 0, 3, 1, 1, 0, 1, 2, 2, 2, 3]  # wrong: 3, 6
MEAN = [0, 0, 1, 2, 1, 0, 0, 1, 2, 1, 2, 3]  # other than predicted: 2, 3 (both wrong), 5, 9


def test_first_come_those_that_attention_makes_right_or_wrong_then_wrong_ones_then_new_classes() -> None:
    network = measured(PREDICTED, MEAN)
    assert chosen(images(TARGETS), network, None, 8) == [2, 5, 9, 3, 6, 11, 0, 1]
    assert chosen(images(TARGETS), network, None, 4) == [2, 5, 3, 8]
    assert chosen(images(TARGETS), network, None, 1) == [0]
    assert sorted(chosen(images(TARGETS), network, None, 99)) == list(range(12))


def test_without_labels_any_change_counts() -> None:
    assert chosen(images(None), measured(PREDICTED, MEAN), None, 4)[:2] == [2, 3]


def test_beside_another_network_disagreements_come_first() -> None:
    other = measured([0, 0, 0, 3, 1, 1, 1, 1, 2, 2, 2, 0], MEAN)
    assert chosen(images(TARGETS), measured(PREDICTED, MEAN), other, 4)[:2] == [6, 11]
