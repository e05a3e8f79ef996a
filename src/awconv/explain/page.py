"""The page of an explanation and the files beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import markupsafe
from torch import Tensor

from awconv.explain.figures import comparison_figures, figures_of
from awconv.explain.images import Images
from awconv.explain.layer_section import LayerSections
from awconv.explain.measure import Layer, Measured, compared, probabilities
from awconv.explain.overview import draw_overview
from awconv.explain.photographs import Heat
from awconv.explain.pictures import data_uri, heated, legend, photograph, thumbnail
from awconv.explain.words import (
    interval,
    percent,
    probability,
    sentences,
    share,
    signed,
    without_rows,
    worth_headings,
    worth_row,
)
from awconv.terminal import visible
from awconv.version import __version__

_DISAGREEMENTS = 50
TOOL = "awconv explain"
_ZEROS = "Maps of zeros leave the weights as they stand, for which the norms behind them were not trained."
_NOTHING = "In the form without residual, maps of zeros leave no weights at all."


@dataclass(frozen=True)
class Explanation:
    """All that a page is made of.

    Attributes:
        measured: the network.
        other: a network to compare it with.
        images: what both were measured on.
        classes: their names.
        shown: the indices of the images that are shown large.
        heat: Grad-CAM of these, by the network and by the other one.
        command: the command line.
    """

    measured: Measured
    other: Measured | None
    images: Images
    classes: Sequence[str]
    shown: list[int]
    heat: list[Heat]
    command: str


def files_of(explanation: Explanation) -> dict[str, bytes]:
    """The files of an explanation's folder, by name: ``index.html``, ``explain.json`` and PNG files."""
    measured, images, classes = explanation.measured, explanation.images, explanation.classes
    files: dict[str, bytes] = {}
    sections = LayerSections(measured.layers, images, classes)
    context = _head(explanation) | dict(
        picture=_picture(measured, files, "overview"),
        other=None if explanation.other is None else _other(explanation, explanation.other, files),
        photos=_photos(explanation, files),
        layers=sections.sections(),
        layers_headings=["layer", "weights change by", *worth_headings(images.targets is not None)],
        layers_rows=[_layer_row(layer) for layer in measured.layers],
        thumbnails=[
            dict(index=index, png=data_uri(thumbnail(images.pixels[index]))) for index in sorted(sections.thumbnails)
        ],
    )
    files |= sections.files
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("awconv.explain", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
    )
    files["index.html"] = _text(environment.get_template("page.html.j2").render(context))
    content: dict[str, Any] = dict(tool=TOOL, version=__version__, command=visible(explanation.command))
    content |= figures_of(measured, images, classes)
    if explanation.other is not None:
        content["compare"] = comparison_figures(measured, explanation.other, images, classes)
    content["files"] = sorted([*files, "explain.json"])
    files["explain.json"] = _text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    return files


def _shown(value: Any) -> Any:
    """Marks that would turn the text round, and the like, as escapes."""
    return visible(value) if isinstance(value, str) and not isinstance(value, markupsafe.Markup) else value


def _text(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")  # a file's name need not be UTF-8


def _head(explanation: Explanation) -> dict[str, Any]:
    measured, images = explanation.measured, explanation.images
    labelled = images.targets is not None
    obstacle = explanation.heat[0].obstacle
    pictures = 1 + len(explanation.heat)
    return dict(
        title=f"Where attention acts: {measured.name}",
        network=measured.name,
        images=images.source[:1].upper() + images.source[1:],
        accuracy=_accuracy(measured),
        command=explanation.command,
        sentences=sentences(measured, images),
        labelled=labelled,
        without_headings=["all layers at once", *worth_headings(labelled)],
        without_rows=without_rows(measured),
        zeros=_ZEROS if measured.layers[0].statistics.unit else _NOTHING,
        photos_width=5.5 * pictures + 4,
        photo_pictures=pictures,
        obstacle=obstacle,
        heat_legend=_HEAT_LEGEND,
        photos_note=obstacle
        or "Grad-CAM, for the class that is predicted: which places of the image speak for it. The images that tell "
        "most come first: those whose class "
        + ("the networks see differently" if explanation.other is not None else "attention decides")
        + (", then wrong ones, which have an edge." if labelled else "."),
        version=__version__,
    )


def _accuracy(measured: Measured) -> str:
    if measured.accuracy is None:
        return ""
    return f"{measured.accuracy:.2f} % ({measured.right:,} of {len(measured.logits):,} images)"


def _picture(measured: Measured, files: dict[str, bytes], name: str) -> dict[str, Any]:
    files[f"{name}.png"], files[f"{name}_dark.png"] = (draw_overview(measured, theme) for theme in ("light", "dark"))
    told = "; ".join(
        f"{layer.name} {percent(layer.statistics.variation())}"
        + ("" if layer.worth.points is None else f", worth {signed(layer.worth.points)} points")
        for layer in measured.layers
    )
    return dict(
        light=data_uri(files[f"{name}.png"]),
        dark=data_uri(files[f"{name}_dark.png"]),
        least=max(640, 17 * len(measured.layers)),
        alt=f"Layer by layer: how much an image changes the weights, what that is worth, and the mean pattern. {told}.",
    )


def _layer_row(layer: Layer) -> list[str]:
    return [layer.name, f"{100 * layer.statistics.variation():.2f} %", *worth_row(layer.worth, layer.p_value)]


def _photos(explanation: Explanation, files: dict[str, bytes]) -> list[dict[str, Any]]:
    images, classes = explanation.images, explanation.classes
    networks = [one for one in (explanation.measured, explanation.other) if one is not None]
    certain = [probabilities(one) for one in networks]
    photos = []
    for place, index in enumerate(explanation.shown):
        pixels = images.pixels[index]
        file = f"photo-{place + 1:02}"
        png = files[f"{file}.png"] = photograph(pixels)
        name = images.names[index]
        pictures = [dict(png=data_uri(png), alt=name, caption="image")]
        lines = [name] if images.targets is None else [f"{classes[int(images.targets[index])]} ({name})"]
        for number, (one, heat) in enumerate(zip(networks, explanation.heat, strict=True)):
            predicted = classes[int(one.predictions[index])]
            who = one.name if explanation.other is not None else "predicted"
            lines.append(f"{who}: {predicted}, {share(float(certain[number][index]))}")
            if heat.maps is not None:
                png = files[f"{file}-cam{'' if number == 0 else '-other'}.png"] = heated(pixels, heat.maps[place])
                alt = f"{name} under the heat of Grad-CAM for {predicted}, by {one.name}: {_where(heat.maps[place])}"
                caption = one.name if explanation.other is not None else f"for {predicted}"
                pictures.append(dict(png=data_uri(png), alt=alt, caption=caption))
        mean = int(explanation.measured.mean_predictions[index])
        if mean != int(explanation.measured.predictions[index]):
            lines.append(f"with mean attention: {classes[mean]}")
        wrong = images.targets is not None and int(networks[0].predictions[index]) != int(images.targets[index])
        photos.append(dict(pictures=pictures, lines=lines, wrong=wrong))
    return photos


def _where(heat: Tensor) -> str:
    """Where the hottest place is, in words."""
    row, column = divmod(int(heat.argmax()), heat.shape[1])
    if not float(heat.max()):
        return "nowhere"
    words = [
        ("above", "in the middle", "below")[min(2, 3 * row // heat.shape[0])],
        ("left", "in the middle", "right")[min(2, 3 * column // heat.shape[1])],
    ]
    return "hottest " + " ".join(dict.fromkeys(words))


def _other(explanation: Explanation, other: Measured, files: dict[str, bytes]) -> dict[str, Any]:
    measured, images, classes = explanation.measured, explanation.images, explanation.classes
    worth = compared(measured, other, images.targets)
    differ = (measured.predictions != other.predictions).nonzero().flatten().tolist()
    rows = [[one.name, _accuracy(one) or "unknown", str(len(one.layers))] for one in (measured, other)]
    labelled = [] if images.targets is None else ["class"]
    disagreements = [
        [
            images.names[index],
            *([] if images.targets is None else [classes[int(images.targets[index])]]),
            classes[int(measured.predictions[index])],
            classes[int(other.predictions[index])],
        ]
        for index in differ
    ]
    return dict(
        name=other.name,
        sentence=_compared_in_words(measured, other, explanation),
        headings=["network", "accuracy", "AW-convolutions"],
        rows=rows,
        picture=_picture(other, files, "overview_other") if other.layers else None,
        sentences=sentences(other, images) if other.layers else [],
        disagreement_headings=["image", *labelled, measured.name, other.name],
        disagreements=disagreements[:_DISAGREEMENTS],
        disagreeing=worth.changed,
        more=max(0, worth.changed - _DISAGREEMENTS),
        layers_headings=["layer", *(f"{what}, {one.name}" for what in _BOTH for one in (measured, other))],
        layers_rows=_both(measured, other),
    )


_BOTH = ("weights change by", "worth")


def _both(measured: Measured, other: Measured) -> list[list[str]]:
    """The layers that two networks have by the same name, side by side."""
    others = {layer.name: layer for layer in other.layers}
    pairs = [(layer, others[layer.name]) for layer in measured.layers if layer.name in others]
    return [
        [
            pair[0].name,
            *(f"{100 * layer.statistics.variation():.2f} %" for layer in pair),
            *(_short_worth(layer) for layer in pair),
        ]
        for pair in pairs
    ]


def _short_worth(layer: Layer) -> str:
    if layer.worth.points is None:
        return f"{layer.worth.changed} predictions"
    return f"{signed(layer.worth.points)} ({interval(layer.worth)})"


def _compared_in_words(measured: Measured, other: Measured, explanation: Explanation) -> str:
    worth = compared(measured, other, explanation.images.targets)
    agree = f"They agree on the class of {worth.images - worth.changed:,} of {worth.images:,} images."
    if worth.points is None:
        return agree
    p_value = worth.p_value()
    noise = (
        ""
        if not worth.points or (p_value is not None and p_value < 0.05)
        else " That is within what chance does on so few images."
    )
    more = f"has {abs(worth.points):.2f} points {'more' if worth.points > 0 else 'less'} accuracy than"
    return (
        f"{measured.name} {more if worth.points else 'is as accurate as'} {other.name} (95 % interval of the "
        f"difference {interval(worth)}, p {probability(p_value)}): {worth.lost} images are right only with the first, "
        f"{worth.gained} only with the second.{noise} {agree}"
    )


_HEAT_LEGEND = dict(
    png=data_uri(legend("inferno")),
    low="0",
    high="1",
    alt="the colours of the heat, from dark to bright yellow",
    what="of the most that speaks for the class in each image",
)
