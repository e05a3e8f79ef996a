"""The page's sections, as HTML. Text from elsewhere is escaped, and pictures are within the page."""

from __future__ import annotations

import base64
import io
from html import escape

import torch
from PIL import Image
from torch import Tensor

from awconv.predictions import Detected, Prediction
from awconv.serve.looking import Gains

_MOVED = 6  # channels that are shown
_NUMBERED = 7  # taps of an axis up to which a kernel's gains are written out
_COLOURS = torch.tensor([[33, 102, 172], [146, 197, 222], [242, 242, 240], [244, 165, 130], [178, 24, 43]]) / 255
_CELL = 14  # pixels of a row
_TALLEST = 480  # pixels of a map

CSS = """
.aw { color: var(--body-text-color); font-size: 15px; line-height: 1.45; }
.aw h3 { margin: 1.4em 0 .4em; font-size: 1.1em; color: var(--body-text-color); }
.aw h3:first-child { margin-top: 0; }
.aw p { margin: .3em 0 .6em; }
.aw .faint, .aw figcaption, .aw .ends { opacity: .75; font-size: .9em; }
.aw .error { border-left: 4px solid #c0392b; padding: .5em .8em; background: var(--background-fill-secondary);
  overflow-wrap: anywhere; }
.aw .bars { display: grid; grid-template-columns: minmax(3em, max-content) 1fr 4.5em; gap: .35em .7em;
  align-items: center; }
.aw .bars .name { overflow-wrap: anywhere; max-width: 16em; }
.aw .bars .track { background: var(--background-fill-secondary); border-radius: 4px; height: 1em; }
.aw .bars .bar { background: #4f6bd8; border-radius: 4px; height: 100%; min-width: 2px; }
.aw .bars .number { text-align: right; font-variant-numeric: tabular-nums; }
.aw .pictures { display: flex; flex-wrap: wrap; gap: 1em; }
.aw figure { margin: 0; flex: 1 1 220px; max-width: 448px; }
.aw figure.wide { max-width: none; }
.aw figure img { width: 100%; height: auto; border-radius: 4px; display: block; }
.aw figcaption { margin-top: .3em; }
.aw img.map { width: 100%; image-rendering: pixelated; display: block; border: 1px solid var(--border-color-primary); }
.aw .ends { display: flex; justify-content: space-between; }
.aw .legend { display: grid; grid-template-columns: auto minmax(6em, 14em) auto; gap: .6em; align-items: center;
  margin: .5em 0; font-size: .85em; justify-content: start; }
.aw .legend .colours { height: .8em; border-radius: 3px; }
.aw .kernels { display: flex; flex-wrap: wrap; gap: .9em .7em; }
.aw .kernel table { border-collapse: collapse; margin: 0; }
.aw .kernel td { border: 1px solid var(--border-color-primary); min-width: 2.4em; height: 2.1em; padding: 0 .1em;
  text-align: center; font-size: .75em; font-variant-numeric: tabular-nums; }
.aw .kernel.dense td { min-width: .9em; height: .9em; padding: 0; }
.aw .scroll { overflow-x: auto; }
.aw .objects { border-collapse: collapse; margin-top: .8em; }
.aw .objects td, .aw .objects th { padding: .2em .7em; text-align: left; }
"""


def page(*sections: str) -> str:
    """Sections one below the other."""
    return f'<div class="aw">{"".join(sections)}</div>'


def error(message: str) -> str:
    """Why there is no answer."""
    return page(f'<p class="error" role="alert">{escape(message)}</p>')


def classes(prediction: Prediction) -> str:
    """The most probable classes, with bars."""
    rows = [
        f'<div class="name">{escape(label)}</div><div class="track"><div class="bar" style="width: '
        f'{100 * probability:.1f}%"></div></div><div class="number">{100 * probability:.1f} %</div>'
        for label, probability in prediction.top
    ]
    return f'<h3 id="aw-class">{escape(prediction.top[0][0])}</h3><div class="bars">{"".join(rows)}</div>'


def objects(detected: Detected, picture: Image.Image) -> str:
    """A picture with boxes, and the objects in a table."""
    rows = []
    for one in detected.detections:
        box = ", ".join(f"{edge:.0f}" for edge in one.box)
        rows.append(f"<tr><td>{escape(one.label)}</td><td>{one.score:.2f}</td><td>{box}</td></tr>")
    count = len(rows)
    table = (
        '<div class="scroll"><table class="objects"><tr><th>class</th><th>score</th><th>box: x1, y1, x2, y2</th></tr>'
        f"{''.join(rows)}</table></div>"
    )
    shown = f'<figure class="wide"><img alt="the image with boxes" src="{_embedded(picture)}"></figure>'
    title = f'<h3 id="aw-objects">{count} object{"" if count == 1 else "s"}</h3>'
    return f"{title}{shown}{table if rows else ''}"


def places(label: str, seen: Image.Image, heated: Image.Image | None) -> str:
    """What the network sees of the image, and where it finds the class."""
    figures = _figure(seen, "what the network sees: the image resized, and its centre")
    if heated is None:
        note = '<p class="faint">No Grad-CAM: for such images, the network has no feature map of several pixels.</p>'
        return f'<h3>The image</h3><div class="pictures">{figures}</div>{note}'
    figures += _figure(heated, f"Grad-CAM of {escape(label)}: bright places speak for it")
    return f'<h3>Where it finds {escape(label)}</h3><div class="pictures">{figures}</div>'


_STILL = "the image moves no weight of this layer."


def attention(gains: Gains) -> str:
    """A layer's map, and the kernels that it moves most."""
    blocks, in_blocks, *kernel = gains.values.shape
    of = "" if gains.out_expansion == 1 else f" in blocks of {gains.out_expansion}"
    rows = "taps of the kernel, row by row" + (f", for {in_blocks} blocks of input channels" if in_blocks > 1 else "")
    title = f"<h3>Attention of {escape(gains.layer)}</h3>"
    low, high = float(gains.values.min()), float(gains.values.max())
    start = "1, with which the plain network computes" if gains.is_relative else f"their mean, {gains.neutral:.3f}"
    text = (
        f"{blocks * gains.out_expansion} output channels{of}, kernel {'x'.join(map(str, kernel))}. Each weight is "
        f"multiplied by a gain; this image's go from {low:.3f} to {high:.3f}."
    )
    if gains.input_gain:
        text += " The layer's gain over input channels, by which they are multiplied too, is not shown."
    if gains.reach == 0:
        still = "the map moves no weight of this layer." if gains.input_gain else _STILL
        return f"{title}<p>{text} All are {gains.neutral:g}: {still}</p>"
    values = gains.rows()
    pixels = _coloured(values, gains).mul(255).round().to(torch.uint8).numpy()
    height = min(_CELL * len(values), _TALLEST)
    drawn = (
        f'<img class="map" style="height: {height}px" alt="map of {escape(gains.layer)}" '
        f'src="{_embedded(Image.fromarray(pixels), lossless=True)}">'
        f'<div class="ends"><span>channel 0</span><span>channel {blocks * gains.out_expansion - 1}</span></div>'
    )
    kernels = "".join(_kernel(gains, block) for block in gains.moved(_MOVED))
    return (
        f"{title}<p>{text} Across: output channels; down: {rows}.</p>{_legend(gains)}{drawn}"
        f'<p>The most moved channels, whose gains are farthest from {start}:</p><div class="kernels">{kernels}</div>'
    )


def _kernel(gains: Gains, block: int) -> str:
    values = gains.values[block].mean(0)  # over blocks of input channels
    values = values.flatten(0, -2) if values.dim() > 1 else values[None]
    dense = max(values.shape) > _NUMBERED
    rows = []
    for row, colours in zip(values, _coloured(values, gains), strict=True):
        cells = (
            f'<td style="background: {_css(colour)}; color: {_ink(colour)}">{"" if dense else f"{value:.2f}"}</td>'
            for value, colour in zip(row.tolist(), colours, strict=True)
        )
        rows.append(f"<tr>{''.join(cells)}</tr>")
    first = block * gains.out_expansion
    name = f"channel {first}" if gains.out_expansion == 1 else f"channels {first} to {first + gains.out_expansion - 1}"
    kind = "kernel dense" if dense else "kernel"
    return f'<div class="{kind}"><table>{"".join(rows)}</table><div class="faint">{name}</div></div>'


def _legend(gains: Gains) -> str:
    stops = ", ".join(_css(colour) for colour in _COLOURS)
    return (
        f'<div class="legend"><span>{gains.neutral - gains.reach:.2f}</span>'
        f'<span class="colours" style="background: linear-gradient(to right, {stops})"></span>'
        f"<span>{gains.neutral + gains.reach:.2f}</span></div>"
    )


def _coloured(values: Tensor, gains: Gains) -> Tensor:
    """Colours of gains: shape (..., 3), from 0 to 1."""
    place = ((values - gains.neutral) / gains.reach + 1) / 2 * (len(_COLOURS) - 1)
    lower = place.floor().clamp(0, len(_COLOURS) - 2)
    share = (place - lower)[..., None]
    return _COLOURS[lower.long()] * (1 - share) + _COLOURS[lower.long() + 1] * share


def _css(colour: Tensor) -> str:
    return f"rgb({', '.join(str(round(255 * part)) for part in colour.tolist())})"


def _ink(colour: Tensor) -> str:
    """Black or white, whichever reads better on a colour."""
    red, green, blue = colour.tolist()
    return "#000" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#fff"


def _figure(picture: Image.Image, caption: str) -> str:
    return f'<figure><img alt="" src="{_embedded(picture)}"><figcaption>{caption}</figcaption></figure>'


def _embedded(picture: Image.Image, lossless: bool = False) -> str:
    """A picture as an address that holds it."""
    file = io.BytesIO()
    kind = "PNG" if lossless else "JPEG"
    picture.convert("RGB").save(file, kind, **({} if lossless else {"quality": 88}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
