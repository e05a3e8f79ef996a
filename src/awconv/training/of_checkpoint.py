"""Settings that a checkpoint knows, and a command line need not repeat."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

from awconv.tasks import ClassificationTask
from awconv.training.checkpoints import read_checkpoint


def take_preprocessing(data: Any, checkpoint: dict[str, Any]) -> list[str]:
    """Gives the data a checkpoint's image size and normalisation, where they have not got their own.

    Args:
        data: the configuration of the data, which is changed.
        checkpoint: what :func:`read_checkpoint` has read.

    Returns:
        The names of what was taken.
    """
    trained, arguments = checkpoint["hyper_parameters"], data.get("init_args")
    if "input_size" not in trained or arguments is None or "image_size" not in arguments:
        return []
    values = {"image_size": trained["input_size"][1], "mean": trained.get("mean"), "std": trained.get("std")}
    taken = []
    for name, value in values.items():
        if arguments.get(name) is None and value is not None:
            arguments[name] = value if name == "image_size" else list(value)
            taken.append(name)
    if arguments.get("crop_pct") == 1.0 and "image_size" in taken:  # the default
        arguments["crop_pct"] = trained.get("crop_pct", 1.0)
    return taken


def take_network(model: Any, data: Any) -> str | None:
    """Of a training that starts from a checkpoint of awconv (``model.pretrained``), the network and the preprocessing.

    Args:
        model: the configuration of the task, which is changed where it names no network.
        data: that of the data.

    Returns:
        What was taken, in words; None for other weights.
    """
    path = model.get("pretrained")
    if not isinstance(path, str) or not path.endswith(".ckpt"):
        return None
    try:
        checkpoint = read_checkpoint(Path(os.path.expanduser(path)))
    except ValueError:  # somebody else's, of which the weights are read later
        return None
    trained = checkpoint["hyper_parameters"]
    if "network" not in trained or "input_size" not in trained:  # a detector's
        return None
    words = []
    if model.get("network") == inspect.signature(ClassificationTask).parameters["network"].default:
        for name in ("network", "network_args", "convert"):
            if name == "network" or not model.get(name):
                model[name] = trained.get(name)
        words.append(f"the network, {model['network']}" + (", converted" if model.get("convert") is not None else ""))
    if "image_size" in take_preprocessing(data, checkpoint):
        words.append(f"the image size, {trained['input_size'][1]}")
    return f"{' and '.join(words)}: as in {path}" if words else None
