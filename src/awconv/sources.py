"""Where trained networks come from: checkpoints, folders, adapters and names (extra ``train``)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset

from awconv.adapter import is_adapter
from awconv.hub import downloaded, is_on_hub
from awconv.models.published import ADAPTER, CONFIG, FILE, PICKLED, verify
from awconv.rebuild import CONVERTED
from awconv.tasks import ClassificationTask, DetectionTask, Task
from awconv.tasks.adapted import load_adapted
from awconv.tasks.checks import check_network, near_networks
from awconv.terminal import say
from awconv.training.checkpoints import find_last, read_checkpoint

_CONFIG_BYTES = 2**24
_CLASSES = 1_000_000  # at most: more than any data set has
_CHANNELS = 4096  # of images, at most: more than any have
_MODES = ("bilinear", "bicubic", "nearest", "box", "hamming", "lanczos")  # of resizing, torchvision's and Pillow's


def load_task(
    source: str | os.PathLike[str], pretrained: str | os.PathLike[str] | None = None, image_size: int | None = None
) -> Task:
    """Loads a trained network for prediction, in evaluation mode on the CPU.

    Args:
        source: a checkpoint, the folder of a training, a folder or an adapter of ``awconv publish``, a folder of timm's
            ``save_for_hf``, a name with weights in timm, or ``hf-hub:OWNER/NAME``.
        pretrained: the base of an adapter, or the weights of a name, a file.
        image_size: height and width of a classifier's images, if not those that it was trained on.

    Raises:
        FileNotFoundError: there is no such file, folder or name.
        ValueError: it is broken or something else, the base is another one, or the network does not take the size; or
            the hub has no such repository, or cannot be reached.
    """
    source = downloaded(source) if is_on_hub(source) else source
    path = Path(os.path.expanduser(source))
    base = None if pretrained is None else Path(os.path.expanduser(pretrained))
    folder = path if path.is_dir() else path.parent
    if path.suffix == ".safetensors" and path.is_file() and not is_adapter(path) and (folder / CONFIG).is_file():
        path = folder
    task: Task
    if path.suffix == ".safetensors" or (path.is_dir() and (path / ADAPTER).is_file()):
        task = load_adapted(path / ADAPTER if path.is_dir() else path, base)
    elif not path.exists() and timm.is_model(os.fspath(source)):
        task = _named(os.fspath(source), True if base is None else str(base))
    elif base is not None:
        raise ValueError(f"pretrained is the base of an adapter or the weights of a name, and {source} has its own")
    elif path.is_dir():
        task = _published(path) if (path / CONFIG).is_file() else _checkpoint(_newest(path))
    else:
        _check_exists(path)
        task = _checkpoint(path)
    if image_size is not None:
        _resize(task, image_size)
    return task.eval()


def _check_exists(path: Path) -> None:
    if not path.exists():
        close = near_networks(path.name)
        raise FileNotFoundError(
            f"{path} is not there: expected a checkpoint of awconv fit, the folder of a training or of awconv publish, "
            "an adapter, or the name of a network with weights in timm"
            + (f"; near it: {', '.join(close)}" if close else "")
        )


def _newest(folder: Path) -> Path:
    found = find_last(folder)
    if found is None:
        raise FileNotFoundError(
            f"folder {folder} holds neither a checkpoint (.ckpt) nor what awconv publish writes ({CONFIG})"
        )
    return found


def _checkpoint(path: Path) -> Task:
    kind = DetectionTask if "detector" in read_checkpoint(path)["hyper_parameters"] else ClassificationTask
    try:
        task: Task = kind.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a checkpoint of any other network fails in ways of its own
        raise ValueError(f"{path} cannot be used, or is not a checkpoint of 'awconv fit': {error}") from error
    return task


def _published(folder: Path) -> ClassificationTask:
    """The classifier in a folder of ``awconv publish``, or another one in the layout of timm's."""
    config = _config(folder)
    weights = next((folder / name for name in (FILE, PICKLED) if (folder / name).is_file()), None)
    if weights is None:
        raise FileNotFoundError(f"{folder} has no {FILE}, which its {CONFIG} describes")
    verify(weights)
    network, arguments = config["architecture"], dict(config.get("model_args") or {})
    cfg = _for_channels(config["pretrained_cfg"], arguments.pop("in_chans", None))
    cfg = {name: config[name] for name in ("num_classes", "label_names") if name in config} | cfg
    arguments.pop("num_classes", None)
    convert = None
    if network == CONVERTED:
        convert = arguments.pop("convert", None)
        network, own = arguments.pop("network", None), arguments.pop("network_args", None) or {}
        if not isinstance(own, dict):
            raise ValueError(f"{folder / CONFIG}: network_args must be names and values, got {own!r}")
        arguments = {name: value for name, value in own.items() if name not in ("in_chans", "num_classes")} | arguments
    return _classifier(network, str(weights), cfg, arguments, convert, named=str(folder))


def _for_channels(cfg: Mapping[str, Any], channels: Any) -> dict[str, Any]:
    """timm's configuration for images of other channels: it then takes one mean and one deviation for all."""
    size: Any = cfg.get("input_size")
    if type(channels) is not int or not 1 <= channels <= _CHANNELS or not _are(int, size, 3) or size[0] == channels:
        return dict(cfg)
    given = {name: cfg.get(name) for name in ("mean", "std")}
    told = {name: v for name, v in given.items() if isinstance(v, list) and v and _are(int | float, v, len(v))}
    means = {name: [sum(values) / len(values)] * channels for name, values in told.items()}
    return dict(cfg) | means | dict(input_size=[channels, *size[1:]])


def _config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    try:
        if file.stat().st_size > _CONFIG_BYTES:
            raise ValueError(f"it has more than {_CONFIG_BYTES:,} bytes")
        config = json.loads(file.read_text())
        kinds = dict(architecture=str, pretrained_cfg=dict, model_args=dict)
        wrong = [name for name, kind in kinds.items() if not isinstance(config.get(name) or kind(), kind)]
        if wrong or not isinstance(config["architecture"], str) or not config["pretrained_cfg"]:
            raise TypeError(f"its {' and '.join(wrong) or 'pretrained_cfg'} cannot be")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is not a configuration of awconv publish or timm: {error!r}") from error
    return dict(config)


def _named(name: str, pretrained: bool | str) -> ClassificationTask:
    """A network of timm with its weights."""
    check_network(name)
    if pretrained is True and not timm.is_model_pretrained(name):
        tagged = timm.list_pretrained(f"{name}.*")
        raise ValueError(
            f"network {name} has no weights; "
            + (f"there are {', '.join(tagged)}" if tagged else "give a file of them, --pretrained=FILE")
        )
    cfg: Any = timm.get_pretrained_cfg(name)
    return _classifier(name, pretrained, cfg.to_dict(), {}, None, named=name)


def _classifier(
    network: Any,
    weights: bool | str,
    cfg: Mapping[str, Any],
    arguments: dict[str, Any],
    convert: dict[str, Any] | None,
    named: str,
) -> ClassificationTask:
    """A classifier by timm's configuration of its weights, ``cfg``."""
    _check_cfg(cfg, named)
    if cfg.get("crop_mode", "center") != "center":
        say(f"{named}: images are cropped at their centre, where timm's evaluation has {cfg['crop_mode']}")
    try:
        task = ClassificationTask(
            _labels(cfg),
            list(cfg["input_size"]),
            list(cfg["mean"]),
            list(cfg["std"]),
            cfg.get("crop_pct") or 1.0,
            network=network,
            network_args=arguments,
            convert=convert,
            pretrained=weights,
        )
        task.interpolation = cfg.get("interpolation", task.interpolation)
    except Exception as error:  # networks fail in ways of their own
        raise ValueError(f"the network of {named} cannot be built: {error}") from error
    task.load_pretrained(whole=True)
    return task


def _check_cfg(cfg: Mapping[str, Any], named: str) -> None:
    """Raises a ValueError for what cannot be used of timm's configuration of weights."""
    size: Any
    size, names, mode = cfg.get("input_size", ()), cfg.get("label_names"), cfg.get("interpolation", _MODES[0])
    if not _are(int, size, 3) or min(size) < 1 or size[1] != size[2]:
        raise ValueError(f"{named}: input_size must be channels and twice the side of a square, got {size!r}")
    for name, least in (("mean", -math.inf), ("std", 1e-6)):
        values: Any = cfg.get(name)
        if not _are(int | float, values, size[0]) or min(values) < least:
            raise ValueError(f"{named}: {name} must be a number for each of {size[0]} channels, got {values!r}")
    if not isinstance(names, list | tuple | None):
        raise ValueError(f"{named}: label_names must be a list of the classes' names, got {type(names).__name__}")
    classes = cfg.get("num_classes")
    if not names and classes and (type(classes) is not int or not 1 <= classes <= _CLASSES):
        raise ValueError(f"{named}: num_classes must be a number from 1 to {_CLASSES:,}, got {classes!r}")
    if not (names or classes):
        raise ValueError(f"{named} classifies nothing: its weights are of a network without classes")
    if mode not in _MODES:
        raise ValueError(f"{named}: interpolation must be one of {', '.join(_MODES)}, got {mode!r}")


def _are(kind: Any, values: Any, count: int) -> bool:
    return (
        isinstance(values, list | tuple)
        and len(values) == count
        and all(isinstance(value, kind) and math.isfinite(value) for value in values)
    )


def _labels(cfg: Mapping[str, Any]) -> list[str]:
    """The names of the classes; those of ImageNet where timm knows that they are."""
    given = cfg.get("label_names")
    if given:
        return [str(name) for name in given]
    subset = infer_imagenet_subset(dict(cfg))
    if subset:
        return list(ImageNetInfo(subset).label_descriptions())
    return [str(index) for index in range(cfg["num_classes"])]


def _resize(task: Task, image_size: int) -> None:
    """Lets a classifier take images of another size, if its network does."""
    if not isinstance(task, ClassificationTask):
        raise ValueError("image_size is a classifier's; a detector resizes images by its min_size and max_size")
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    task.input_size = [task.input_size[0], image_size, image_size]
    try:
        with torch.inference_mode():
            task.evaluated.eval()(task.example())
    except Exception as error:  # networks fail in ways of their own
        raise ValueError(f"{task.network_name} takes no images of {image_size}x{image_size} pixels: {error}") from error
