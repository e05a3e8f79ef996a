"""The section of a page about a layer, as values for the template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from awconv.explain.figures import channels_of
from awconv.explain.images import Images
from awconv.explain.measure import Channel, Layer
from awconv.explain.overview import as_grid, pattern_limit, pattern_of
from awconv.explain.pictures import DIVERGING, SEQUENTIAL, colours, data_uri, legend, squares
from awconv.explain.statistics import PARTS
from awconv.explain.words import interval, percent, probability, signed, significant

_CLASSES, _BAR = 12, 12.0  # rows of a table of classes; rem


class LayerSections:
    """Makes the sections of the layers of a network.

    Args:
        layers: all of them, whose patterns share their colours.
        images: the images.
        classes: their names.

    Attributes:
        files: PNG files, by name.
        thumbnails: the indices of the images that are shown small.
    """

    def __init__(self, layers: Sequence[Layer], images: Images, classes: Sequence[str]) -> None:
        self.layers, self.images, self.classes = layers, images, classes
        self.files: dict[str, bytes] = {}
        self.thumbnails: set[int] = set()
        self._limit = pattern_limit(layers)

    def sections(self) -> list[dict[str, Any]]:
        """A section for each layer."""
        return [self._section(number, layer) for number, layer in enumerate(self.layers, 1)]

    def _section(self, number: int, layer: Layer) -> dict[str, Any]:
        found = layer.statistics
        variance = found.variance()
        whole = sum(variance.values())
        facts = [f"changes its weights by {percent(found.variation())}"]
        if layer.input_variation is not None:
            facts = [
                f"its map changes its weights by {percent(found.variation())}",
                f"its gain over input channels changes them by {percent(layer.input_variation)}",
            ]
        if layer.worth.points is None:
            facts.append(f"decides {layer.worth.changed} of {layer.worth.images} predictions")
        else:
            facts.append(f"worth {signed(layer.worth.points)} points ({interval(layer.worth)})")
            facts.append(f"p {probability(layer.p_value)}")
        shares = [(PARTS[key], value / whole if whole else 0.0) for key, value in variance.items()]
        return dict(
            name=layer.name,
            facts=facts,
            shape=f"Weights {_times(layer.shape)}; map {_times((*found.mean().shape[:2], *layer.taps))}: "
            f"{whole**0.5:.3g} is the standard deviation of its values over images, channels and taps.",
            parts=[
                dict(name=name, share=f"{100 * share:.1f} %", width=f"{_BAR * share:.2f}") for name, share in shares
            ],
            patterns=self._patterns(number, layer),
            channels=[self._channel(number, layer, channel) for channel in layer.channels],
            classes=None if self.images.targets is None else self._class_table(layer),
        )

    def _patterns(self, number: int, layer: Layer) -> list[dict[str, Any]]:
        """The mean pattern, and its spreads over images and over channels."""
        _, over_images, over_channels = (as_grid(one, layer.taps) for one in layer.statistics.pattern())
        spread = max(float(over_images.max()), float(over_channels.max()))
        mean = self._squares(f"layer-{number:02}-pattern.png", pattern_of(layer), self._limit, "mean over the images")
        mean["legend"] = _legend(self._limit, True, "less its mean over the taps; the same colours for all layers")
        made = [mean]
        for name, values in (("images", over_images), ("channels", over_channels)):
            one = self._squares(
                f"layer-{number:02}-over-{name}.png", values, spread, f"standard deviation over {name}", False
            )
            made.append(one | dict(legend=_legend(spread, False, "")))
        return made

    def _squares(
        self, file: str, values: Tensor, limit: float, caption: str, diverging: bool = True, side: int = 28
    ) -> dict[str, Any]:
        png = self.files[file] = squares(values, limit, diverging, side)
        rows = "; ".join(" ".join(significant(value) for value in row) for row in values.tolist())
        return dict(png=data_uri(png), caption=caption, alt=f"{caption}, row by row: {rows}")

    def _channel(self, number: int, layer: Layer, channel: Channel) -> dict[str, Any]:
        found = layer.statistics
        name = channels_of(layer, channel.number)
        kernels: list[dict[str, Any]] = []
        pairs = ((channel.up, "up"), (channel.down, "down"))
        size = max(float(one.abs().max()) for kernel, _ in pairs for one in (kernel.static, kernel.effective))
        moved = max(float((kernel.effective - kernel.static).abs().max()) for kernel, _ in pairs)
        file = f"layer-{number:02}-channel-{channel.number}"
        static = channel.up.static
        kernels.append(self._squares(f"{file}-k.png", as_grid(static, static.shape), size, "K, as it stands", side=20))
        for kernel, direction in pairs:
            image = self.images.names[kernel.image]
            for key, values, limit, what in (
                ("k", kernel.effective, size, f"K with the attention of {image} ({direction})"),
                ("difference", kernel.effective - kernel.static, moved, "its difference to K"),
            ):
                grid = as_grid(values, values.shape)
                kernels.append(self._squares(f"{file}-{direction}-{key}.png", grid, limit, what, side=20))
        return dict(
            name=name,
            deviation=f"{float(found.channel_deviations()[channel.number]):.3g}",
            up=self._thumbs(layer, channel, True),
            down=self._thumbs(layer, channel, False),
            kernels_title=f"Output channel {name.split()[0]}, the input channel with its largest weights "
            f"({channel.up.input} of its group):",
            kernels=kernels,
            legends=[_legend(size, True, "weights"), _legend(moved, True, "differences")],
        )

    def _thumbs(self, layer: Layer, channel: Channel, upwards: bool) -> list[dict[str, Any]]:
        found = layer.statistics.extremes(channel.number, upwards)
        self.thumbnails.update(found.images)
        return [
            dict(index=index, distance=significant(distance), alt=self.described(index))
            for index, distance in zip(found.images, found.distances, strict=True)
        ]

    def described(self, index: int) -> str:
        """An image's name, and its class if that is known."""
        name = self.images.names[index]
        return name if self.images.targets is None else f"{self.classes[int(self.images.targets[index])]}: {name}"

    def _class_table(self, layer: Layer) -> dict[str, Any]:
        """How the channels that move most differ in the classes that differ most."""
        found = layer.statistics
        numbers = [channel.number for channel in layer.channels]
        means = found.classes()
        most = sorted(means, key=lambda target: -float(means[target].channels.square().mean()))[:_CLASSES]
        limit = max(float(means[target].channels[numbers].abs().max()) for target in most)
        rows = []
        for target in sorted(most):
            values = means[target].channels[numbers]
            shades = colours(values[None], limit)[0].tolist()
            cells = [_cell(value, shade) for value, shade in zip(values.tolist(), shades, strict=True)]
            rows.append(dict(name=self.classes[target], images=means[target].images, cells=cells))
        by_chance = (len(means) - 1) / (found.count - 1)
        note = (
            "The mean attention of a class's images in the channels that move most, less that of all images. "
            f"{100 * found.share_of_classes():.0f} % of the variance between images, over all channels, is between "
            f"classes; of maps that know nothing of the classes, {100 * by_chance:.0f} % would be."
        )
        if len(means) > len(rows):
            note += f" The {len(rows)} of {len(means)} classes that differ most; all are in explain.json."
        names = [f"channel {channels_of(layer, number)}" for number in numbers]
        return dict(headings=["class", "images", *names], rows=rows, note=note)


def _times(sizes: Sequence[int]) -> str:
    return "\N{MULTIPLICATION SIGN}".join(map(str, sizes))


def _cell(value: float, shade: Sequence[int]) -> dict[str, str]:
    red, green, blue = shade
    bright = 0.299 * red + 0.587 * green + 0.114 * blue > 128
    return dict(text=significant(value), back=f"rgb({red}, {green}, {blue})", ink="#111" if bright else "#fff")


def _legend(limit: float, diverging: bool, what: str) -> dict[str, str]:
    low = significant(-limit) if diverging else "0"
    middle = "0 in the middle, " if diverging else ""
    return dict(
        png=_LEGENDS[diverging],
        low=low,
        high=significant(limit) if diverging else significant(limit)[1:],
        alt=f"the colours from {low} to {significant(limit)}, {middle}brightest at {'0' if diverging else 'the end'}",
        what=what,
    )


_LEGENDS = {diverging: data_uri(legend(DIVERGING if diverging else SEQUENTIAL)) for diverging in (True, False)}
