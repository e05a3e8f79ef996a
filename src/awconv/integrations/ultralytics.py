"""AW-convolutions in the YOLOs of Ultralytics: a trainer that keeps them, and AW blocks in YAML files.

Ultralytics is no dependency of awconv: it is AGPL-3.0. ``pip install ultralytics`` installs it.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from awconv.branch import AttentionBranch
from awconv.convert import ATTENTION_ARGUMENTS, arguments_of, convert
from awconv.folding import keep_attention
from awconv.layers import AW_LAYERS
from awconv.revert import replace_layers
from awconv.selection import convolutions, is_spatial

_log = logging.getLogger(__name__)


def trainer(yolo: Any, base: type | None = None) -> type:
    """The trainer of a YOLO, changed so that it trains the AW-convolutions of ``yolo.model``.

    ``yolo.train`` builds its network anew, from the YAML description, for each training and each ``resume``; a
    conversion of ``yolo.model`` is lost without a word. The trainer that this function returns builds the network as
    Ultralytics does, weights included, and puts the AW-convolutions of ``yolo.model`` in the places of its
    convolutions: branches as they are, trained or not. If the new network has another size there, as a head has for
    another number of classes, a new branch starts with the same settings.

    Args:
        yolo: a YOLO of Ultralytics whose model is converted, or is the checkpoint of one.
        base: a trainer of your own to change. The default is that of the YOLO's task.

    Returns:
        A class, for ``yolo.train(trainer=...)``. It knows the model that the YOLO has now.

    Raises:
        TypeError: ``yolo`` has no network, as after ``YOLO("model.onnx")``.
        ValueError: its network has no AW-convolution. Later, in ``yolo.train``: the network that the trainer builds
            has no such convolution, or one of another size whose branch cannot be made again.

    Examples:
        >>> import awconv
        >>> from awconv.integrations.ultralytics import trainer
        >>> from ultralytics import YOLO
        >>> yolo = YOLO("yolo11n.yaml")
        >>> _ = awconv.convert(yolo.model)
        >>> trainer(yolo).__name__  # yolo.train(trainer=trainer(yolo), data="coco128.yaml", epochs=100)
        'AWDetectionTrainer'
    """
    network = getattr(yolo, "model", None)
    if not isinstance(network, nn.Module):
        raise TypeError(
            f"trainer: yolo must be a YOLO of Ultralytics with a network of PyTorch, such as YOLO('yolo11n.pt'), got "
            f"{yolo!r}"
        )
    layers = _aw_layers(network)
    if not layers:
        raise ValueError(
            f"trainer: {type(network).__name__} has no AW-convolution; convert it first: awconv.convert(yolo.model)"
        )
    plain: Any = yolo.task_map[yolo.task]["trainer"] if base is None else base

    def get_model(self: Any, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
        """The network of the plain trainer, with AW-convolutions."""
        built: nn.Module = plain.get_model(self, cfg=cfg, weights=weights, verbose=verbose)
        of_weights = _aw_layers(weights) if isinstance(weights, nn.Module) else {}
        there = dict(built.named_modules())
        return _graft(built, {**layers, **{name: layer for name, layer in of_weights.items() if name in there}})

    return type(f"AW{plain.__name__}", (plain,), {"get_model": get_model, "__doc__": trainer.__doc__})


def _aw_layers(network: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in network.named_modules() if isinstance(module, AW_LAYERS)}


def _graft(network: nn.Module, layers: Mapping[str, Any]) -> nn.Module:
    """Puts copies of AW-convolutions in the places of a network's convolutions, whose weights they take."""
    there = dict(network.named_modules())
    missing = [name for name in layers if not isinstance(there.get(name), nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    if missing:
        raise ValueError(
            f"trainer: the network that was built has no convolution {missing[0]!r}, which yolo.model has, "
            f"{len(missing)} in all. The YAML or the weights given to train() are those of another network: load these "
            "as a YOLO, convert its model, and make the trainer of that YOLO"
        )
    grafts: dict[nn.Module, nn.Module] = {}
    for name, layer in copy.deepcopy(dict(layers)).items():  # together: layers may share a branch
        old: Any = there[name]
        if arguments_of(layer) != arguments_of(old):
            layer = _made_again(name, layer, old)
        layer.to(old.weight.device, old.weight.dtype).requires_grad_(True).train(old.training)
        layer.weight, layer.bias = old.weight, old.bias
        grafts[old] = layer
    replace_layers(network, grafts)
    keep_attention(network, set(grafts.values()))
    _log.info("trainer: %d AW-convolutions, as in yolo.model", len(grafts))
    return network


def _made_again(name: str, layer: Any, old: Any) -> Any:
    """An AW-convolution with the settings of another one for a convolution of another size."""
    if isinstance(old, AW_LAYERS):
        return copy.deepcopy(old)
    sizes = f"{tuple(layer.weight.shape)} in yolo.model and {tuple(old.weight.shape)} in the network that was built"
    if (layer.bias is None) != (old.bias is None):
        raise ValueError(
            f"trainer: the layer {name!r} has weights {sizes}, and only one of them has a bias. A fused network cannot "
            "be trained: load its checkpoint again, and train before fuse()"
        )
    options = {name: getattr(layer, name) for name in ATTENTION_ARGUMENTS if name != "in_expansion"}
    if layer.in_expansion != layer.in_channels // layer.groups:
        options["in_expansion"] = layer.in_expansion
    init: Any = "identity" if layer.attention.relative else "fresh"
    try:
        if type(layer.attention) is not AttentionBranch or layer.attention.pool is not None:
            raise ValueError("it has a branch or a pool of a user's own")
        norm: Any = type(layer.attention.norm1)
        norm_layer = None if norm is nn.Identity else norm
        again = convert(copy.deepcopy(old), lambda name, conv: True, init=init, norm_layer=norm_layer, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"trainer: the branch of the layer {name!r} cannot be made again for weights {sizes}: {error}. Give the "
            "YAML the number of classes (nc) of your data, and convert the YOLO of that YAML"
        ) from error
    _log.info("trainer: a new branch for %s, whose weights are %s", name, sizes)
    return again


def register() -> None:
    """Lets YAML files of Ultralytics name AW blocks: ``AWConv``, ``AWC3k2``, and so on for each of its blocks.

    ``AW`` and the name of a block of Ultralytics is that block with AW-convolutions in the place of its spatial
    convolutions. It takes the block's arguments. The key ``awconv`` of the YAML file, if there is one, holds arguments
    of :func:`awconv.convert` for all of them, such as ``{reduction: 8, init: identity}``. Call it in each process
    before a YOLO of such a file is built. What such a file describes is built again by every training.

    Raises:
        ModuleNotFoundError: Ultralytics is not installed.
        RuntimeError: this version of Ultralytics builds networks in another way. Nothing was changed.

    Examples:
        >>> from awconv.integrations.ultralytics import register
        >>> from ultralytics.nn.tasks import DetectionModel
        >>> register()
        >>> backbone = [[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "AWConv", [32, 3, 2]]]
        >>> head = [[[1], 1, "Detect", ["nc"]]]
        >>> network = DetectionModel({"nc": 2, "backbone": backbone, "head": head}, verbose=False)
        >>> type(network.model[1].conv).__name__
        'AWConv2d'
    """
    tasks = _imported("ultralytics.nn.tasks")
    parse = getattr(tasks, "parse_model", None)
    if getattr(parse, "func", None) is _parse_model:
        return
    version = getattr(_imported("ultralytics"), "__version__", "of an unknown version")
    trouble = (
        f"register: Ultralytics {version} is not known to awconv: {{}}. Convert the network instead, with "
        "awconv.convert(yolo.model) and yolo.train(trainer=awconv.integrations.ultralytics.trainer(yolo))"
    )
    if not callable(parse) or list(inspect.signature(parse).parameters)[:2] != ["d", "ch"]:
        raise RuntimeError(trouble.format("ultralytics.nn.tasks.parse_model(d, ch) does not exist"))
    tasks.parse_model = functools.partial(_parse_model, parse, tasks)
    tiny = {"nc": 1, "backbone": [[-1, 1, "AWConv", [8, 3, 2]]], "head": [[[0], 1, "Detect", ["nc"]]]}
    try:
        found = _aw_layers(tasks.DetectionModel(tiny, verbose=False))
    except Exception as error:
        tasks.parse_model = parse
        raise RuntimeError(trouble.format(f"a network with AWConv is not built ({error!r})")) from error
    if list(found) != ["model.0.conv"]:
        tasks.parse_model = parse
        raise RuntimeError(trouble.format(f"AWConv was to be model.0.conv, and there is {list(found) or 'none'}"))


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "ultralytics":
            raise
        raise ModuleNotFoundError(
            "awconv.integrations.ultralytics needs Ultralytics, which is not installed: pip install ultralytics (its "
            "licence is AGPL-3.0)",
            name=error.name,
        ) from error


def _parse_model(parse: Any, tasks: Any, d: dict[str, Any], ch: int, *arguments: Any, **options: Any) -> Any:
    """In the place of Ultralytics' function of that name: builds plain blocks, and converts those that are AW blocks.

    Whether a row is one of a block is asked nowhere but here, so that its lists of blocks do not matter.
    """
    d = {**d, **{part: [list(row) for row in d[part]] for part in ("backbone", "head")}}
    of_convert = d.get("awconv") or {}
    if not isinstance(of_convert, Mapping):
        raise TypeError(f"awconv: in the YAML file must hold arguments of awconv.convert, got {of_convert!r}")
    if "select" in of_convert:
        raise TypeError(
            "awconv: in the YAML file must not hold select: the rows that name AW blocks say what to convert"
        )
    names: dict[int, str] = {}
    for index, row in enumerate(d["backbone"] + d["head"]):
        if isinstance(row[2], str) and row[2].startswith("AW") and not hasattr(tasks, row[2]):
            names[index], row[2] = row[2], _block(tasks, row[2])
    layers, save = parse(d, ch, *arguments, **options)
    for index, name in names.items():
        if not any(map(is_spatial, convolutions(layers[index]).values())):
            raise ValueError(
                f"layer {index} of the YAML file, {name}: its convolutions all have a kernel of size 1, which stays "
                f"plain; write {name.removeprefix('AW')}"
            )
        try:
            convert(layers[index], lambda name, module: is_spatial(module), **of_convert)
        except (TypeError, ValueError) as error:
            raise type(error)(f"layer {index} of the YAML file, {name}: {error}") from error
        layers[index].type = name
        layers[index].np = sum(parameter.numel() for parameter in layers[index].parameters())
    return layers, save


def _block(tasks: Any, name: str) -> str:
    """The name of the plain block that an AW block is made of."""
    plain = name.removeprefix("AW")
    block = getattr(tasks, plain, None)
    if not (isinstance(block, type) and issubclass(block, nn.Module)):
        raise ValueError(
            f"the YAML file names {name!r}: AW and the name of a block of Ultralytics, such as AWConv or AWC3k2, but "
            f"there is no block {plain!r}"
        )
    return plain
