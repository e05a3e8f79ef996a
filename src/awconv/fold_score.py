"""How well a classifier does on images, for a choice of layers to fold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Score:
    """What a pass over the images gave.

    Attributes:
        correct: how many images were classified right.
        images: how many there are.
        cross_entropy: the mean, in nats.
    """

    correct: int
    images: int
    cross_entropy: float

    @property
    def accuracy(self) -> float:
        """The top-1 accuracy, in percent."""
        return 100 * self.correct / self.images


def check_data(data: Any) -> None:
    """Raises a TypeError for what cannot be iterated several times."""
    expected = "fold: data must be batches (images, labels) that can be iterated several times: a DataLoader or a list"
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise TypeError(f"{expected}; got {type(data).__name__}")
    if isinstance(data, Iterator):
        raise TypeError(f"{expected}; got a {type(data).__name__}, which is used up by one pass; list(data) keeps it")


def evaluate(model: nn.Module, data: Iterable[Any]) -> Score:
    """A pass over the data.

    Raises:
        ValueError: the data are empty or not batches ``(images, labels)``, or the outputs are no logits, or not finite.
    """
    device = next(model.parameters()).device
    correct = images = 0
    loss = 0.0
    for number, batch in enumerate(data):
        inputs, labels = _images_and_labels(batch, number)
        logits = model(inputs.to(device))
        _check_logits(logits, inputs, labels, number)
        logits, labels = logits.detach().cpu().double(), labels.cpu().long()
        correct += int((logits.argmax(1) == labels).sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        images += len(labels)
    if not images:
        raise ValueError("fold: data must hold images, and they are empty")
    return Score(correct, images, loss / images)


def _images_and_labels(batch: Any, number: int) -> tuple[Tensor, Tensor]:
    expected = (
        "fold: data must be batches (images, labels), tensors of shapes (N, ...) and (N,), with whole numbers as "
        f"labels; got for batch {number}"
    )
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ValueError(f"{expected}: {_described(batch)}")
    images, labels = batch
    if (
        not isinstance(images, Tensor)
        or not isinstance(labels, Tensor)
        or images.dim() < 2
        or labels.shape != images.shape[:1]
        or labels.dtype not in _WHOLE
    ):
        raise ValueError(f"{expected}: {_described(images)} and {_described(labels)}")
    return images, labels


_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, tuple | list) else type(value).__name__


def _check_logits(logits: Any, images: Tensor, labels: Tensor, number: int) -> None:
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(images):
        raise ValueError(
            f"fold: the model must be a classifier, whose outputs are logits of shape ({len(images)}, classes) for "
            f"batch {number}; got {_described(logits)}"
        )
    if not logits.isfinite().all():
        raise ValueError(
            f"fold: the network's outputs for batch {number} are not finite; its weights are damaged, or its training "
            "diverged, or images are not what it takes"
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise ValueError(
            f"fold: labels must be from 0 to {logits.shape[1] - 1}, the model's classes; batch {number} has "
            f"{int(labels.min())} to {int(labels.max())}"
        )
