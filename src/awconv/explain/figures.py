"""The figures of an explanation as plain values, for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from awconv.explain.images import Images
from awconv.explain.measure import Channel, Kernel, Layer, Measured, compared
from awconv.explain.words import sentences
from awconv.explain.worth import Worth


def figures_of(measured: Measured, images: Images, classes: Sequence[str]) -> dict[str, Any]:
    """What was measured of a network."""
    content = dict(
        network=measured.name,
        images=len(images),
        source=images.source,
        accuracy=measured.accuracy,
        predictions=[
            dict(image=name, predicted=classes[predicted])
            | ({} if images.targets is None else {"class": classes[int(images.targets[index])]})
            for index, (name, predicted) in enumerate(zip(images.names, measured.predictions.tolist(), strict=True))
        ],
    )
    if not measured.layers:
        return content
    return content | dict(
        summary=" ".join(sentences(measured, images)),
        without={key: worth_figures(worth, worth.p_value()) for key, worth in measured.without.items()},
        layers=[_layer(layer, images, classes) for layer in measured.layers],
    )


def comparison_figures(one: Measured, other: Measured, images: Images, classes: Sequence[str]) -> dict[str, Any]:
    """Two networks on the same images; ``points`` is by how much the first is better."""
    worth = compared(one, other, images.targets)
    return dict(
        other=figures_of(other, images, classes),
        difference=worth_figures(worth, worth.p_value()),
        disagreements=[images.names[index] for index in (one.predictions != other.predictions).nonzero().flatten()],
    )


def worth_figures(worth: Worth, p_value: float | None) -> dict[str, Any]:
    """A difference between predictions."""
    return asdict(worth) | dict(points=worth.points, interval=worth.interval(), p_value=p_value)


def channels_of(layer: Layer, number: int) -> str:
    """The output channels of a value of the attention, counted from 0."""
    each = layer.shape[0] // len(layer.statistics.mean())
    return f"{number}" if each == 1 else f"{number * each} to {(number + 1) * each - 1}"


def _layer(layer: Layer, images: Images, classes: Sequence[str]) -> dict[str, Any]:
    found = layer.statistics
    mean, over_images, over_channels = (_plain(one.reshape(layer.taps)) for one in found.pattern())
    numbers = [channel.number for channel in layer.channels]
    return dict(
        layer=layer.name,
        weights=list(layer.shape),
        variation=found.variation(),
        input_variation=layer.input_variation,
        variance=found.variance(),
        pattern=dict(mean=mean, over_images=over_images, over_channels=over_channels),
        channel_deviations=_plain(found.channel_deviations()),
        channels=[_channel(layer, channel, images) for channel in layer.channels],
        share_of_classes=None if images.targets is None else found.share_of_classes(),
        classes={
            classes[target]: dict(
                images=one.images,
                channels=dict(zip(map(str, numbers), one.channels[numbers].tolist(), strict=True)),
                taps=_plain(one.taps.reshape(layer.taps)),
            )
            for target, one in found.classes().items()
        },
        worth=worth_figures(layer.worth, layer.p_value),
    )


def _channel(layer: Layer, channel: Channel, images: Images) -> dict[str, Any]:
    content: dict[str, Any] = dict(channels=channels_of(layer, channel.number))
    for upwards, name, kernel in ((True, "up", channel.up), (False, "down", channel.down)):
        extremes = layer.statistics.extremes(channel.number, upwards)
        content[name] = dict(
            images=[images.names[index] for index in extremes.images],
            distances=extremes.distances,
            kernel=_kernel(kernel, images),
        )
    return content


def _kernel(kernel: Kernel, images: Images) -> dict[str, Any]:
    return dict(
        image=images.names[kernel.image],
        input_channel=kernel.input,
        static=_plain(kernel.static),
        effective=_plain(kernel.effective),
    )


def _plain(values: Tensor) -> Any:
    return values.tolist()
