"""What the attention maps of a layer have in common, and how they differ, over many images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from awconv.moments import Moments

PARTS = {
    "image": "image: all weights of the kernel alike",
    "image_channel": "image, by output channel",
    "image_tap": "image, by tap",
    "image_rest": "image, the rest",
    "channel": "output channel",
    "tap": "tap",
    "rest": "the rest",
}
"""The parts of a map's variance: the first four differ between images, the last three are the same for all of them."""


@dataclass(frozen=True)
class Extremes:
    """The images that move a channel's mean attention most, the most moving one first.

    Attributes:
        images: their indices.
        distances: from the mean over all images.
    """

    images: list[int]
    distances: list[float]


@dataclass(frozen=True)
class ClassMeans:
    """How the maps of a class's images differ from those of all images.

    Attributes:
        images: how many there are.
        channels: of the mean over input channels and taps, shape (C2/r_C2,).
        taps: of the mean over channels, shape (taps,).
    """

    images: int
    channels: Tensor
    taps: Tensor


class LayerStatistics:
    """Statistics of a layer's maps, which come batch by batch and are not kept. All sums are float64.

    Its memory does not grow with the images: some maps' worth of numbers, a row of them for each class, and for each
    channel the ``keep`` images that move it most.

    Args:
        unit: what is added to the map to get the gain of the weights: 1 in K + A * K and in the relative form, else 0.
        keep: how many images are named for each channel and direction.
    """

    def __init__(self, unit: int = 1, keep: int = 3) -> None:
        self.unit, self.keep = unit, keep
        self._whole, self._image, self._channel, self._tap = (Moments() for _ in range(4))
        self._classes: dict[int, tuple[Moments, Moments]] = {}
        self._extremes: dict[bool, tuple[Tensor, Tensor]] = {}

    def add(self, maps: Tensor, images: Sequence[int], targets: Tensor | None = None) -> None:
        r"""Adds the maps of a batch.

        Args:
            maps: shape (N, C2/r_C2, (C1/groups)/r_C1, \*taps).
            images: the index of each.
            targets: the class of each, shape (N,), if it is known.
        """
        values = maps.detach().cpu().double().flatten(3)
        channels, taps = values.mean((2, 3)), values.mean((1, 2))
        self._whole.add(values)
        self._image.add(values.mean((1, 2, 3)))
        self._channel.add(channels)
        self._tap.add(taps)
        for largest in (True, False):
            self._keep(channels, torch.tensor(images), largest)
        for target in [] if targets is None else targets.unique().tolist():
            of_channels, of_taps = self._classes.setdefault(target, (Moments(), Moments()))
            of_channels.add(channels[targets.cpu() == target])  # type: ignore[union-attr]
            of_taps.add(taps[targets.cpu() == target])  # type: ignore[union-attr]

    def _keep(self, channels: Tensor, images: Tensor, largest: bool) -> None:
        numbers = images[:, None].expand(-1, channels.shape[1])
        if largest in self._extremes:
            before, their_numbers = self._extremes[largest]
            channels, numbers = torch.cat((before, channels)), torch.cat((their_numbers, numbers))
        # Stable, so that of images alike the first is named, however they are batched.
        order = channels.sort(dim=0, descending=largest, stable=True).indices[: self.keep]
        self._extremes[largest] = channels.gather(0, order), numbers.gather(0, order)

    @property
    def count(self) -> int:
        """How many maps there were."""
        return self._whole.count

    def mean(self) -> Tensor:
        """The mean map, shape (C2/r_C2, (C1/groups)/r_C1, taps)."""
        return self._whole.mean()

    def variance(self) -> dict[str, float]:
        """The map's variance over images, channels and taps in seven parts, :data:`PARTS`, whose sum it is.

        With x[n, p, c, t] for image, output channel, input channel and tap, and a dot for the mean over an axis: the
        variance between images is the mean over p, c, t of Var_n(x). Of it, ``image`` is Var_n(x[n...]),
        ``image_channel`` the mean over p of Var_n(x[n, p..]) less ``image``, ``image_tap`` the mean over t of
        Var_n(x[n..t]) less ``image``, and ``image_rest`` what remains. The variance of the mean map m = x[.pct] is the
        other part of the whole: ``channel`` is Var_p(m[p..]), ``tap`` is Var_t(m[..t]), and ``rest`` what remains: taps
        that differ from channel to channel, and input channels. The terms are orthogonal, as in an analysis of variance
        of a balanced design, so that none is negative.
        """
        mean, between = self.mean(), float(self._whole.variance().mean())
        image = float(self._image.variance())
        of_channels = float(self._channel.variance().mean()) - image
        of_taps = float(self._tap.variance().mean()) - image
        channel, tap = (float(mean.mean(axes).var(correction=0)) for axes in ((1, 2), (0, 1)))
        parts = (
            *(image, of_channels, of_taps, between - image - of_channels - of_taps),
            *(channel, tap, float(mean.var(correction=0)) - channel - tap),
        )
        return dict(zip(PARTS, (max(0.0, part) for part in parts), strict=True))

    def variation(self) -> float:
        """How much an image changes the layer's weights, from 0 to 1: :attr:`awconv.fold.FoldTrial.variation`.

        The standard deviation of the gain over the images, root mean square over its values, relative to the gain's
        root mean square over images and values.
        """
        between = self._whole.variance()
        square = float(((self.mean() + self.unit).square() + between).mean())
        return (float(between.mean()) / square) ** 0.5 if square else 0.0

    def pattern(self) -> tuple[Tensor, Tensor, Tensor]:
        """For each tap, shape (taps,): the mean, its standard deviation over images, and that over output channels.

        The deviation over images is that of an image's mean over all channels; the one over channels that of a
        channel's mean over all images.
        """
        mean = self.mean()
        return self._tap.mean(), self._tap.variance().sqrt(), mean.mean(1).std(0, correction=0)

    def channel_deviations(self) -> Tensor:
        """How much each channel's mean over input channels and taps varies over images: shape (C2/r_C2,)."""
        return self._channel.variance().sqrt()

    def extremes(self, channel: int, upwards: bool) -> Extremes:
        """The images that move a channel most, up or down."""
        values, images = self._extremes[upwards]
        distances = values[:, channel] - self._channel.mean()[channel]
        return Extremes(images[:, channel].tolist(), distances.tolist())

    def classes(self) -> dict[int, ClassMeans]:
        """Those that occur, by index."""
        channels, taps = self._channel.mean(), self._tap.mean()
        return {
            target: ClassMeans(own.count, own.mean() - channels, of_taps.mean() - taps)
            for target, (own, of_taps) in sorted(self._classes.items())
        }

    def share_of_classes(self) -> float:
        """How much of the variance over images, channel by channel, is between classes, from 0 to 1.

        Maps that know nothing of the classes have (classes - 1) / (images - 1) on average.
        """
        whole = float(self._channel.variance().sum())
        between = sum(one.images / self.count * float(one.channels.square().sum()) for one in self.classes().values())
        return min(1.0, between / whole) if whole else 0.0


def effective_kernel(weight: Tensor, attention: Tensor, unit: int, channel: int, input: int) -> tuple[Tensor, Tensor]:
    r"""A slice of a kernel as it stands, and as an image makes it: K and K (1 + A), shape (\*taps).

    Args:
        weight: K, shape (C2, C1/groups, \*taps).
        attention: an image's map before Expand, shape (C2/r_C2, (C1/groups)/r_C1, \*(taps/r_hw)).
        unit: 1 for K (1 + A), 0 for K A.
        channel: which output channel.
        input: which input channel of its group.
    """
    rates = [size // blocks for size, blocks in zip(weight.shape, attention.shape, strict=True)]
    gain = attention[channel // rates[0], input // rates[1]] + unit
    for axis, rate in enumerate(rates[2:]):
        gain = gain.repeat_interleave(rate, dim=axis)
    static = weight[channel, input]
    return static, static * gain
