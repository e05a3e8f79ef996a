"""Runs a classifier over images: statistics of its attention, and what this is worth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from awconv.explain.images import Images
from awconv.explain.maps import AWConv, aw_layers, gain_name, maps_and_gains
from awconv.explain.statistics import LayerStatistics, effective_kernel
from awconv.explain.worth import Change, Worth, adjusted, another_images, logits_of, mean_of, zero
from awconv.input_gain import unit_of
from awconv.relative import BaseBranch
from awconv.tasks import ClassificationTask

WITHOUT = {
    "mean": "each layer's map is its mean over the images",
    "another": "each image has another image's maps",
    "zero": "all maps are 0",
}
"""What all maps of a network are replaced by."""


@dataclass(frozen=True)
class Kernel:
    """A channel's kernel for one input channel, the one with the largest weights.

    Attributes:
        image: the index of the image that makes it.
        input: the input channel, of those of a group.
        static: K, by tap; shape of the kernel.
        effective: K (1 + A), or K A in the form without residual; times the gain over input channels, if there is one.
    """

    image: int
    input: int
    static: Tensor
    effective: Tensor


@dataclass(frozen=True)
class Channel:
    """An output channel of a layer, or several that share their attention.

    Attributes:
        number: its index in the attention map.
        up: how the image that moves it most upwards changes its kernel.
        down: likewise downwards.
    """

    number: int
    up: Kernel
    down: Kernel


@dataclass(frozen=True)
class Layer:
    """What was measured of an AW-convolution.

    Attributes:
        name: in the network.
        shape: of its weights.
        taps: the sizes (h/r_hw, w/r_hw) of its map.
        statistics: of its maps over the images.
        channels: those that move most.
        worth: of its maps beside their mean.
        p_value: of a difference at least as large by chance, adjusted for the number of layers; None without labels.
        input_variation: how much its gain over input channels varies between images, as the variation of the
            statistics; None for a layer without one. Worth counts that gain, and statistics do not.
    """

    name: str
    shape: tuple[int, ...]
    taps: tuple[int, ...]
    statistics: LayerStatistics
    channels: list[Channel]
    worth: Worth
    p_value: float | None
    input_variation: float | None = None


@dataclass(frozen=True)
class Measured:
    """What was measured of a network.

    Attributes:
        name: for people.
        logits: of each image, shape (N, classes).
        right: how many images are classified right; None without labels.
        layers: its AW-convolutions in order; none of a plain network.
        without: what all attention is worth beside :data:`WITHOUT`; nothing of a plain network.
        mean_predictions: the class of each image where each layer's map is its mean, shape (N,).
    """

    name: str
    logits: Tensor
    right: int | None
    layers: list[Layer]
    without: dict[str, Worth]
    mean_predictions: Tensor

    @property
    def predictions(self) -> Tensor:
        """The predicted class of each image, shape (N,)."""
        return self.logits.argmax(1)

    @property
    def accuracy(self) -> float | None:
        """In percent; None without labels."""
        return None if self.right is None else 100 * self.right / len(self.logits)


def measure(name: str, task: ClassificationTask, images: Images, batch_size: int, shown: int = 3) -> Measured:
    """Measures a network in as many passes over the images as it has AW-convolutions, and four.

    Args:
        name: for people.
        task: with the network, in evaluation mode.
        images: the images.
        batch_size: images a batch.
        shown: how many channels of a layer, and images of a channel, are looked at closely.

    Raises:
        ValueError: the network's outputs are not finite, or a layer has maps that belong to no image.
    """
    network, targets = task.evaluated, images.targets
    layers, parts = aw_layers(network), images.parts(batch_size)

    def predicted(change: Change | None) -> Tensor:
        return logits_of(network, images.batches(task, batch_size), layers, change)

    statistics, logits = _gathered(task, images, parts, layers, shown)
    before = logits.argmax(1)
    right = None if targets is None else int((before == targets).sum())
    layers = {name: layer for name, layer in layers.items() if name in statistics}
    if not layers:
        return Measured(name, logits, right, [], {}, before)
    branches = _branches(layers)
    means = {key: one.mean().reshape(1, *branches[key].attention_size) for key, one in statistics.items()}
    changes: dict[str, Change] = dict(zip(WITHOUT, (mean_of(means), another_images, zero), strict=True))
    after = {key: predicted(change) for key, change in changes.items()}
    alone = [Worth.of(logits, predicted(mean_of(means, name, gain_name(name))), targets) for name in layers]
    known = adjusted([p for worth in alone if (p := worth.p_value()) is not None])
    p_values: Sequence[float | None] = known or [None] * len(alone)
    channels = _channels(task, images, layers, statistics, batch_size, shown)
    found = [
        Layer(
            name,
            tuple(layer.weight.shape),
            tuple(layer.attention.attention_size[2:]),
            *(statistics[name], channels[name], worth, p_value),
            statistics[gain_name(name)].variation() if layer.input_gain else None,
        )
        for (name, layer), worth, p_value in zip(layers.items(), alone, p_values, strict=True)
    ]
    without = {key: Worth.of(logits, changed, targets) for key, changed in after.items()}
    return Measured(name, logits, right, found, without, after["mean"].argmax(1))


def _gathered(
    task: ClassificationTask, images: Images, parts: Sequence[range], layers: dict[str, AWConv], keep: int
) -> tuple[dict[str, LayerStatistics], Tensor]:
    """The statistics of the layers that run, and the logits."""
    found: dict[str, LayerStatistics] = {}
    branches = _branches(layers)
    current: list[range] = []

    def see(name: str, maps: Tensor) -> None:
        part = current[-1]
        if len(maps) != len(part):
            raise ValueError(
                f"the layer {name!r} makes {len(maps)} maps of {len(part)} images, so that a map is no image's; "
                "awconv.attention_maps gives such maps"
            )
        statistics = found.setdefault(name, LayerStatistics(unit_of(branches[name]), keep))
        statistics.add(maps, part, None if images.targets is None else images.targets[part.start : part.stop])

    def batches() -> Iterable[Tensor]:
        for part in parts:
            current.append(part)
            yield task.normalised(images.pixels[part.start : part.stop].to(task.device))

    logits = logits_of(task.evaluated, batches(), layers, see)
    return {name: found[name] for name in branches if name in found}, logits


def _branches(layers: dict[str, AWConv]) -> dict[str, BaseBranch]:
    """The branches of layers, by what their maps go by."""
    found = {name: layer.attention for name, layer in layers.items()}
    gains = {gain_name(name): layer.input_attention for name, layer in layers.items()}
    return found | {name: branch for name, branch in gains.items() if branch is not None}


def _channels(
    task: ClassificationTask,
    images: Images,
    layers: dict[str, AWConv],
    statistics: dict[str, LayerStatistics],
    batch_size: int,
    shown: int,
) -> dict[str, list[Channel]]:
    """The channels of each layer that move most, with their kernels for the images that move them most."""
    numbers = {
        name: statistics[name].channel_deviations().argsort(descending=True, stable=True)[:shown].tolist()
        for name in layers
    }
    wanted = {
        (name, number, up): statistics[name].extremes(number, up).images[0]
        for name, of_layer in numbers.items()
        for number in of_layer
        for up in (True, False)
    }
    rows = sorted(set(wanted.values()))
    kernels: dict[tuple[str, int, bool], Kernel] = {}
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        maps = maps_and_gains(task.evaluated, layers, task.normalised(images.pixels[batch].to(task.device)))
        for (name, number, up), image in wanted.items():
            if image in batch:
                own = {key: maps[key][batch.index(image)] for key in (name, gain_name(name)) if key in maps}
                kernels[name, number, up] = _kernel(layers[name], own[name], own.get(gain_name(name)), number, image)
    return {
        name: [Channel(number, kernels[name, number, True], kernels[name, number, False]) for number in of_layer]
        for name, of_layer in numbers.items()
    }


def _kernel(layer: AWConv, attention: Tensor, of_input: Tensor | None, number: int, image: int) -> Kernel:
    weight = layer.weight.detach()
    channel = number * (len(weight) // attention.shape[0])  # the first of those that share the attention
    input = int(weight[channel].flatten(1).norm(dim=1).argmax())
    static, effective = effective_kernel(weight, attention, unit_of(layer.attention), channel, input)
    if of_input is not None and layer.input_attention is not None:
        group = channel // (len(weight) // layer.groups)
        gain = of_input.flatten()[group * weight.shape[1] + input] + unit_of(layer.input_attention)
        effective = effective * gain
    return Kernel(image, input, *(one.float().cpu() for one in (static, effective)))


def compared(one: Measured, other: Measured, targets: Tensor | None) -> Worth:
    """The predictions of one network beside those of another: ``lost`` are the images that only the first has right."""
    return Worth.of(one.logits, other.logits, targets)


def probabilities(measured: Measured) -> Tensor:
    """The probability of each image's predicted class, shape (N,)."""
    return torch.softmax(measured.logits.double(), 1).amax(1)
