"""Classifiers that are an adapter on a base: what the adapter's file must tell, and how they are built again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from awconv.adapter import load_adapter, read_adapter
from awconv.tasks.classification import ClassificationTask

_ENTRY = "task"  # of the file's metadata, as JSON
_KINDS: dict[str, type | tuple[type, ...]] = {
    "network": str,
    "network_args": dict,
    "convert": (dict, type(None)),
    "classes": list,
    "input_size": list,
    "crop_pct": (int, float),
    "mean": list,
    "std": list,
    "pretrained": (bool, str),
}


def described(task: ClassificationTask) -> dict[str, str]:
    """What an adapter's metadata must hold to build its network again.

    Of a base that is a file, its name alone is told.
    """
    base = Path(task.pretrained).name if isinstance(task.pretrained, str) else task.pretrained
    told = dict(
        network=task.network_name,
        network_args=task.network_args,
        convert=task.conversion,
        classes=task.classes,
        input_size=task.input_size,
        crop_pct=task.crop_pct,
        mean=task.channel_means,
        std=task.channel_deviations,
        pretrained=base,
    )
    return {_ENTRY: json.dumps(told)}


def load_adapted(adapter: Path, pretrained: Path | None = None) -> ClassificationTask:
    """The classifier of an adapter that ``awconv publish`` wrote, on its base.

    Args:
        adapter: the file.
        pretrained: the base's weights, a file; by default timm's for the network, if the adapter was trained on them.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: the file is broken or no such adapter, or the base is another one or missing.
    """
    _, metadata = read_adapter(adapter)
    told = _told(adapter, metadata)
    base = told.pop("pretrained")
    if pretrained is None and isinstance(base, str):
        raise ValueError(f"{adapter} was trained on the weights {base!r}; give them with --pretrained=FILE")
    try:
        task = ClassificationTask(**told, pretrained=True if pretrained is None else os.path.expanduser(pretrained))
    except Exception as error:  # networks fail in ways of their own
        raise ValueError(f"the network of adapter {adapter} cannot be built: {error}") from error
    task.load_pretrained(whole=False)
    load_adapter(task.network, adapter)
    return task


def _told(adapter: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if _ENTRY not in metadata:
        raise ValueError(
            f"{adapter} does not tell its network and classes, as one of awconv publish does; build the network and "
            "call awconv.load_adapter"
        )
    try:
        told = json.loads(metadata[_ENTRY])
        wrong = [name for name, kind in _KINDS.items() if not isinstance(told.get(name), kind)]
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{adapter} has metadata that cannot be read: {error}") from error
    if wrong or set(told) != set(_KINDS):
        raise ValueError(
            f"{adapter} has metadata that cannot be: {', '.join(wrong or sorted(set(told) ^ set(_KINDS)))}"
        )
    return dict(told)
