"""Figures of an explanation in words, and as text of a table."""

from __future__ import annotations

from awconv.explain.images import Images
from awconv.explain.measure import WITHOUT, Measured
from awconv.explain.worth import Worth

_SURE = 0.05


def percent(value: float) -> str:
    """A share in percent, with two digits that say something."""
    return f"{100 * value:.0f} %" if value >= 0.1 else f"{100 * value:.2g} %"


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign, a minus as typographers have it; what rounds to 0 has none."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def significant(value: float) -> str:
    """A number with its sign and two digits that say something."""
    text = f"{value:+.2g}" if abs(value) < 10 else f"{value:+.0f}"
    return "0" if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def interval(worth: Worth) -> str:
    """The 95 % interval of a difference in accuracy."""
    ends = worth.interval()
    return "" if ends is None else f"{signed(ends[0])} to {signed(ends[1])}"


def probability(p_value: float | None) -> str:
    """A p value."""
    return "" if p_value is None else "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def share(value: float) -> str:
    """A probability in percent."""
    return f"{100 * value:.0f} %" if value >= 0.01 else "below 1 %"


def sentences(measured: Measured, images: Images) -> list[str]:
    """Where attention acts, and what it is worth."""
    most = max(measured.layers, key=lambda layer: layer.statistics.variation())
    gains = [layer.input_variation for layer in measured.layers if layer.input_variation is not None]
    if not most.statistics.variation() and not any(gains):
        return [
            "Attention does not depend on the image in any layer: every image has the same weights, as in a plain "
            "network."
        ]
    least = min(measured.layers, key=lambda layer: layer.statistics.variation())
    acts = (
        f"Attention acts most in {most.name}: from image to image it changes the weights by "
        f"{percent(most.statistics.variation())} (root mean square)"
    )
    acts += "." if least is most else f", and least in {least.name}, by {percent(least.statistics.variation())}."
    if gains:
        acts += (
            f" These figures, and the patterns, are of the maps alone. Gains over input channels change the weights by "
            f"{percent(min(gains))} to {percent(max(gains))} beside; what attention is worth counts them."
        )
    together = measured.without["mean"]
    if together.points is None:
        return [acts, _decided(measured, together)]
    return [acts, _together(together), _alone(measured)]


def _decided(measured: Measured, together: Worth) -> str:
    best = max(measured.layers, key=lambda layer: layer.worth.changed)
    alone = (
        f"a single layer's at most {best.worth.changed} ({best.name})"
        if best.worth.changed
        else "no single layer's any"
    )
    return (
        f"The mean maps in the place of each image's own change {together.changed:,} of {together.images:,} "
        f"predictions, {alone}. Without labels nothing says which predictions are right."
    )


def _together(worth: Worth) -> str:
    assert worth.points is not None
    p_value = worth.p_value()
    sure = p_value is not None and p_value < _SURE
    noise = "" if sure else " That is within what chance does on so few images"
    if noise and worth.loss is not None and abs(worth.loss) > (worth.loss_margin or 0.0):
        noise += (
            f"; but the cross-entropy, which shows less, is {abs(worth.loss):.3f} \N{PLUS-MINUS SIGN} "
            f"{worth.loss_margin:.3f} {'lower' if worth.loss > 0 else 'higher'} with it"
        )
    noise += "." if noise else ""
    return (
        f"All attention together is worth {signed(worth.points)} points of accuracy beside its mean over the images "
        f"(95 % interval {interval(worth)}): {worth.lost:,} of {worth.images:,} images are right only with it, "
        f"{worth.gained:,} only without.{noise}"
    )


def _alone(measured: Measured) -> str:
    best = max(measured.layers, key=lambda layer: (layer.worth.points or 0.0, layer.worth.loss or 0.0))
    sure = [layer for layer in measured.layers if layer.p_value is not None and layer.p_value < _SURE]
    helpful = [layer for layer in sure if (layer.worth.points or 0.0) > 0]
    harmful = [layer for layer in sure if (layer.worth.points or 0.0) < 0]
    worth = f"{best.name}'s is worth most, {signed(best.worth.points or 0.0)} points"
    if helpful:
        named = ", ".join(layer.name for layer in helpful)
        which = f"that of {named} is" if len(helpful) < 4 else f"those of {len(helpful)} are"
        which = "each one's is" if len(helpful) == len(measured.layers) else which
        said = f"Of single layers, {worth}; {which} more than noise."
    elif not best.worth.points or best.worth.points < 0:
        said = "No single layer's attention is worth anything that these images show."
    else:
        said = f"Of single layers, {worth}, but no layer's alone is worth more than noise on these images."
    if harmful:
        harms = ", ".join(f"that of {layer.name} {signed(layer.worth.points or 0.0)} points" for layer in harmful)
        said += f" Some does harm, more than noise: {harms}."
    return said


def worth_row(worth: Worth, p_value: float | None) -> list[str]:
    """The cells of a table of :func:`worth_headings`."""
    if worth.points is None:
        return [f"{worth.changed:,}"]
    return [
        signed(worth.points),
        interval(worth),
        f"{worth.lost:,}",
        f"{worth.gained:,}",
        probability(p_value),
        f"{signed(worth.loss or 0.0, 4)} ± {worth.loss_margin:.4f}",
    ]


def worth_headings(labelled: bool) -> list[str]:
    """Of the columns of what attention is worth."""
    if not labelled:
        return ["predictions that change"]
    return [
        "worth, points",
        "95 % interval",
        "right only with it",
        "right only without",
        "p",
        "rise of cross-entropy (95 %)",
    ]


def without_rows(measured: Measured) -> list[list[str]]:
    """A row for each change of all maps."""
    return [[WITHOUT[key], *worth_row(worth, worth.p_value())] for key, worth in measured.without.items()]
