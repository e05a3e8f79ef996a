"""What attention is worth: how a classifier does with other maps in the places of its own, on the same images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from scipy.stats import binom
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from awconv.explain.maps import AWConv, on_device_of, running, seeing_maps

Change = Callable[[str, Tensor], Tensor | None]
_NORMAL = 1.959964  # 97.5 % of a standard normal distribution are below it


@dataclass(frozen=True)
class Worth:
    """The predictions of a network, beside those of the same network with something changed, on the same images.

    Attributes:
        images: how many there are.
        changed: of how many the predicted class is another one after the change.
        lost: how many are right before and wrong after it; None without labels.
        gained: how many are wrong before and right after it; None without labels.
        loss: how much the change raises the mean cross-entropy, in nats, which shows what is too little to change a
            prediction; None without labels.
        loss_margin: half of its 95 % interval, from the differences of the images.
    """

    images: int
    changed: int
    lost: int | None = None
    gained: int | None = None
    loss: float | None = None
    loss_margin: float | None = None

    @classmethod
    def of(cls, before: Tensor, after: Tensor, targets: Tensor | None) -> Worth:
        """Compares logits, shape (N, classes), N at least 2, with the classes, shape (N,), if they are known."""
        changed = int((before.argmax(1) != after.argmax(1)).sum())
        if targets is None:
            return cls(len(before), changed)
        right, still = before.argmax(1) == targets, after.argmax(1) == targets
        losses = [cross_entropy(logits.double(), targets, reduction="none") for logits in (after, before)]
        difference = losses[0] - losses[1]
        margin = _NORMAL * float(difference.std()) / sqrt(len(before))
        lost, gained = int((right & ~still).sum()), int((~right & still).sum())
        return cls(len(before), changed, lost, gained, float(difference.mean()), margin)

    @property
    def points(self) -> float | None:
        """How much accuracy the change costs, in percentage points; negative where it is better."""
        if self.lost is None or self.gained is None:
            return None
        return 100 * (self.lost - self.gained) / self.images

    def interval(self) -> tuple[float, float] | None:
        """A 95 % interval for :attr:`points`, which has a width even where nothing changed.

        The adjusted Wald interval for paired proportions of Bonett and Price 2012, doi 10.3102/1076998611411915.
        """
        if self.lost is None or self.gained is None:
            return None
        lost, gained = ((count + 1) / (self.images + 2) for count in (self.lost, self.gained))
        margin = _NORMAL * sqrt((lost + gained - (lost - gained) ** 2) / (self.images + 2))
        return 100 * max(-1.0, lost - gained - margin), 100 * min(1.0, lost - gained + margin)

    def p_value(self) -> float | None:
        """How probable a difference at least as large is by chance: the exact test of McNemar, two-sided.

        Of the images whose correctness changes, half would change in each direction.
        """
        if self.lost is None or self.gained is None:
            return None
        tail = binom.cdf(min(self.lost, self.gained), self.lost + self.gained, 0.5)
        return float(min(1.0, 2 * tail))


def adjusted(p_values: Sequence[float]) -> list[float]:
    """P values of several tests such that one below 0.05 is rare in all of them together (Holm 1979)."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    found, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        found[index] = largest
    return found


def logits_of(
    network: nn.Module, batches: Iterable[Tensor], layers: Mapping[str, AWConv], change: Change | None = None
) -> Tensor:
    """The logits of images, with changed maps.

    Args:
        network: a classifier.
        batches: images as it takes them.
        layers: its AW-convolutions, by name.
        change: what a layer computes with in the place of a batch's maps; None leaves them.

    Returns:
        float32, shape (N, classes), on the CPU.

    Raises:
        ValueError: they are not finite.
    """
    found = []
    with running(network), torch.inference_mode(), seeing_maps(layers, change or (lambda name, maps: None)):
        for batch in batches:
            found.append(network(on_device_of(network, batch)).float().cpu())
    logits = torch.cat(found)
    if not logits.isfinite().all():
        raise ValueError(
            "the network's outputs are not finite; its weights are damaged, or its training diverged, or images are "
            "not what it takes"
        )
    return logits


def mean_of(means: Mapping[str, Tensor], *names: str) -> Change:
    """Puts the mean map in the place of each image's.

    Args:
        means: by layer, shape (1, C2/r_C2, (C1/groups)/r_C1, h/r_hw, w/r_hw), as the layer computes; of gains over
            input channels, by the names that these go by.
        *names: of the layers and gains; none given are all.
    """

    def change(name: str, maps: Tensor) -> Tensor | None:
        return means[name].to(maps).expand_as(maps) if not names or name in names else None

    return change


def another_images(name: str, maps: Tensor) -> Tensor:
    """Gives each image of a batch the map of the one before it."""
    return maps.roll(1, 0)


def zero(name: str, maps: Tensor) -> Tensor:
    """Maps of zeros: the weights K, as they stand (0 in the form without residual)."""
    return torch.zeros_like(maps)
