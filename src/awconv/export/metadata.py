"""What an exported file says of its network."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

KEY = "awconv"  # under which a file holds it, as JSON
LIMIT = 2**24  # bytes of it
_LARGEST = 2**16  # pixels of a side, and images of a batch
_MODES = ("bilinear", "bicubic", "nearest", "box", "hamming", "lanczos")


@dataclass(frozen=True)
class Metadata:
    """What a prediction needs to know.

    Attributes:
        awconv: the version that exported it.
        kind: of network.
        network: its name.
        classes: the names of its classes, by index; of a detector, ``classes[label - 1]``.
        input_size: channels, height and width of its images; with ``dynamic_size``, those that it was made for.
        dynamic_size: whether it takes any height and width.
        batch: the number of images that it takes; None for any.
        uint8: whether it takes bytes, which it normalises itself.
        precision: of what it computes.
        mean: of each channel, of values from 0 to 1.
        std: standard deviation of each channel.
        crop_pct: share of an image's shorter side that is seen.
        interpolation: how images are resized.
        score_threshold: the lowest score of an object that a detector gives; 0 for a classifier.
        min_size: length of the shorter side to which a detector for any size takes images, in pixels; 0 for others.
        max_size: the largest length of the longer side, likewise.
        stretched: whether images are resized to a detector's input whatever their aspect, as SSD300's are.
        operator: whether its sessions need awconv's operator for ONNX Runtime.
    """

    awconv: str
    kind: Literal["classifier", "detector"]
    network: str
    classes: tuple[str, ...]
    input_size: tuple[int, int, int]
    dynamic_size: bool
    batch: int | None
    uint8: bool
    precision: Literal["fp32", "fp16", "int8"]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: str
    score_threshold: float = 0.0
    min_size: int = 0
    max_size: int = 0
    stretched: bool = False
    operator: bool = False

    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))


def parsed(text: str | None, file: Path) -> Metadata:
    """Reads what :meth:`Metadata.text` wrote, and believes none of it unseen.

    Args:
        text: the JSON; None if the file holds none.
        file: for errors.

    Raises:
        ValueError: it is missing or something else, or a value is out of its range.
    """
    if text is None:
        raise ValueError(f"{file} was not written by 'awconv export': it has no metadata named {KEY}")
    try:
        if len(text) > LIMIT:
            raise ValueError(f"it has more than {LIMIT:,} characters")
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("it is no mapping")
        known = {field.name for field in fields(Metadata)}
        if known != set(content):
            raise ValueError(
                f"it must have {', '.join(sorted(known))}, got {', '.join(map(str, sorted(content)))[:300]}"
            )
        _check(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: its metadata {KEY} are damaged, or of another version of awconv: {error}") from error
    lists = {name: tuple(content[name]) for name in ("classes", "input_size", "mean", "std")}
    return Metadata(**(content | lists))


def _check(content: Mapping[str, Any]) -> None:
    size, batch = content["input_size"], content["batch"]
    wanted = {
        "awconv": isinstance(content["awconv"], str),
        "kind": content["kind"] in ("classifier", "detector"),
        "network": isinstance(content["network"], str),
        "classes": _are(str, content["classes"]) and len(content["classes"]) > 0,
        "input_size": _are(int, size)
        and len(size) == 3
        and size[0] in (1, 3)
        and 1 <= min(size) <= max(size) <= _LARGEST,
        "dynamic_size": isinstance(content["dynamic_size"], bool),
        "batch": batch is None or (_are(int, [batch]) and 1 <= batch <= _LARGEST),
        "uint8": isinstance(content["uint8"], bool),
        "precision": content["precision"] in ("fp32", "fp16", "int8"),
        "mean": _are(float, content["mean"]) and len(content["mean"]) == size[0],
        "std": _are(float, content["std"]) and len(content["std"]) == size[0] and min(content["std"]) >= 1e-6,
        "crop_pct": _are(float, [content["crop_pct"]]) and 0.01 <= content["crop_pct"] <= 1,
        "interpolation": content["interpolation"] in _MODES,
        "min_size": _are(int, [content["min_size"]]) and 0 <= content["min_size"] <= _LARGEST,
        "max_size": _are(int, [content["max_size"]]) and 0 <= content["max_size"] <= _LARGEST,
        "stretched": isinstance(content["stretched"], bool),
        "operator": isinstance(content["operator"], bool),
        "score_threshold": _are(float, [content["score_threshold"]]) and 0 <= content["score_threshold"] <= 1,
    }
    wrong = [name for name, right in wanted.items() if not right]
    if wrong:
        raise ValueError(f"its {wrong[0]} cannot be {content[wrong[0]]!r:.100}")


def _are(kind: type[Any], values: Any) -> bool:
    """Whether it is a list of texts, of whole numbers, or of finite numbers."""
    if not isinstance(values, list):
        return False
    if kind is float:
        return all(type(value) in (int, float) and math.isfinite(value) for value in values)
    return all(type(value) is kind for value in values)
