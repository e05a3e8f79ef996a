"""What was trained of a network whose rest is frozen, as a small file: one backbone serves many tasks."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from awconv.branch import AttentionBranch
from awconv.convert import ATTENTION_ARGUMENTS
from awconv.layers import AW_LAYERS
from awconv.relative import BaseBranch
from awconv.train_only import head_parameters, is_held, norms_with_statistics, unwrapped
from awconv.version import __version__

_KIND, _FORMAT = "awconv adapter", 1
_OURS = ("kind", "format", "awconv", "base", "checksum", "branches")  # what save_adapter says in the file's metadata


def adapter_state_dict(model: nn.Module, *, values: nn.Module | None = None) -> dict[str, Tensor]:
    """The tensors that train: parameters that require a gradient, statistics of norms that are not held, and the whole
    of each attention branch of which something trains.

    Args:
        model: a network after :func:`awconv.train_only`.
        values: a network with the same names whose tensors are taken, such as a moving average of the model's; the
            model itself by default.

    Returns:
        Copies of the tensors by their names in ``model.state_dict()``.

    Raises:
        TypeError: the model is no module.
        ValueError: nothing of the model trains, or nothing is frozen; or ``values`` has other names.

    Examples:
        >>> import timm
        >>> import awconv
        >>> model = timm.create_model("resnet18", num_classes=10)
        >>> trained = awconv.train_only(model, "head")
        >>> {name: tuple(tensor.shape) for name, tensor in awconv.adapter_state_dict(model).items()}
        {'fc.weight': (10, 512), 'fc.bias': (10,)}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"adapter: model must be an nn.Module, got {model!r}")
    model = unwrapped(model)
    there = [parameter.requires_grad for parameter in model.parameters()]
    if not any(there):
        raise ValueError("adapter: nothing of the model trains; awconv.train_only says what does")
    if all(there):
        raise ValueError(
            "adapter: all of the model trains, so there is no base to adapt; freeze the rest with awconv.train_only, "
            "or save model.state_dict()"
        )
    names, own = _trained_names(model), _tensors(model)
    state = own if values is None else _tensors(unwrapped(values))
    differing = sorted(own.keys() ^ state.keys())
    if differing:
        raise ValueError(
            f"adapter: values must have the model's names, and {len(differing)} differ, such as "
            f"{', '.join(differing[:4])}; of a moving average, give the network in it (its module)"
        )
    return {name: state[name].detach().clone() for name in own if name in names}


def save_adapter(
    model: nn.Module,
    file: str | os.PathLike[str],
    *,
    values: nn.Module | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes what :func:`adapter_state_dict` gives, as safetensors.

    The file's metadata hold the fingerprint of the base, the frozen rest, so that :func:`load_adapter` can tell whether
    a network is the one that the adapter was trained on.

    Args:
        model: a network after :func:`awconv.train_only`.
        file: the path to write to.
        values: as for :func:`adapter_state_dict`.
        metadata: further entries.

    Raises:
        OSError: the file cannot be written.
        TypeError: the model is no module.
        ValueError: nothing of the model trains, or nothing is frozen; or ``values`` has other names, or an entry has a
            name that is taken.

    Examples:
        >>> import tempfile
        >>> import timm
        >>> import awconv
        >>> model = awconv.convert(timm.create_model("resnet18", num_classes=10), init="identity")
        >>> trained = awconv.train_only(model, "branch", "head")
        >>> file = f"{tempfile.mkdtemp()}/flowers.safetensors"
        >>> awconv.save_adapter(model, file)  # after its training
        >>> model = awconv.load_adapter(model, file)
    """
    tensors, model = adapter_state_dict(model, values=values), unwrapped(model)
    taken = sorted(set(metadata or {}) & set(_OURS))
    if taken:
        raise ValueError(f"save_adapter: metadata must leave {', '.join(taken)} to save_adapter")
    ours = {
        "kind": _KIND,
        "format": str(_FORMAT),
        "awconv": __version__,
        "base": fingerprint(model, tensors),
        "branches": json.dumps({name: _arguments(layer) for name, layer in _layers_of(model, tensors).items()}),
    }
    told = {**(metadata or {}), **ours}
    told["checksum"] = _digest(tensors, told)
    partial = Path(f"{os.fspath(file)}.partial")
    partial.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}, told))
    os.replace(partial, file)  # so that a file that is there is whole


def read_adapter(file: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file of :func:`save_adapter`. Nothing in it could run code.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it is something else, or has changed since it was written.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"adapter {file} is not a file; expected one of awconv.save_adapter")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # it is no mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file} is broken, or not an adapter of awconv.save_adapter: {error}") from error
    if metadata.get("kind") != _KIND:
        raise ValueError(
            f"{file} is not an adapter of awconv.save_adapter; whole weights are loaded by model.load_state_dict or "
            "timm.create_model"
        )
    if metadata.get("format") != str(_FORMAT):
        raise ValueError(
            f"{file} has format {metadata.get('format')}, and this awconv reads {_FORMAT}: it was written by awconv "
            f"{metadata.get('awconv')}, which reads it"
        )
    if metadata.pop("checksum", None) != _digest(tensors, metadata):
        raise ValueError(f"{file} has changed since it was written; copy it again")
    return tensors, metadata


def is_adapter(file: str | os.PathLike[str]) -> bool:
    """Whether a file says that it is one of :func:`save_adapter`."""
    try:
        with safe_open(file, framework="pt") as opened:
            return (opened.metadata() or {}).get("kind") == _KIND
    except (SafetensorError, OSError, ValueError):
        return False


def load_adapter(model: nn.Module, adapter: str | os.PathLike[str] | Mapping[str, Tensor]) -> nn.Module:
    """Loads what was trained of a network into another one with the same base.

    All is checked before anything changes. Several adapters may be loaded in turn. If one of them trained more parts
    than the next, those parts are not the base's any more, and the next is refused: load the base's weights again.

    Args:
        model: the base, converted as the network was that the adapter is of, with as many classes. It stays in its
            training mode, and what requires a gradient stays so.
        adapter: a file of :func:`save_adapter`, or a dictionary of :func:`adapter_state_dict`. That has no fingerprint:
            only names and shapes are compared.

    Returns:
        The model.

    Raises:
        FileNotFoundError: the file is not there.
        TypeError: the model is no module.
        ValueError: the file is broken or no adapter, or the model is not converted, has another base, or lacks a
            tensor, or a tensor has another shape. The model is left as it was.

    Examples:
        >>> import timm
        >>> import awconv
        >>> model = timm.create_model("resnet18", num_classes=10)
        >>> trained = awconv.train_only(model, "head")
        >>> flowers = awconv.adapter_state_dict(model)
        >>> model = awconv.load_adapter(model, flowers)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_adapter: model must be an nn.Module, got {model!r}")
    network = unwrapped(model)
    tensors, metadata = (dict(adapter), None) if isinstance(adapter, Mapping) else read_adapter(adapter)
    if metadata is not None:
        _check_branches(network, metadata)
    _check_tensors(network, tensors)
    if metadata is not None and metadata.get("base") != fingerprint(network, tensors):
        raise ValueError(
            "load_adapter: the adapter was trained on another base: what the adapter leaves alone differs from the "
            "model in names, dtypes, shapes or values. Load the weights that its training started from; load them "
            "again if another adapter has changed more than this one does"
        )
    network.load_state_dict(tensors, strict=False)
    return model


def fingerprint(model: nn.Module, adapter: Iterable[str]) -> str:
    """The SHA-256 of a network without an adapter's tensors, in hexadecimal digits.

    It is that of the names, dtypes, shapes and bytes of the state dict's tensors, wherever they are, without counts of
    batches and without attention branches at their start, which change nothing.

    Args:
        model: a network.
        adapter: names of the adapter's tensors.
    """
    left_out = set(adapter)
    for name, layer in _layers(model).items():
        if not left_out.isdisjoint(_names_below(layer, name)):
            left_out |= _names_below(layer, name)
        for prefix, branch in _branches(layer, name).items():
            if branch.is_identity():
                left_out |= {prefix + key for key in branch.state_dict()}
    return _digest(
        {
            name: tensor
            for name, tensor in _tensors(model).items()
            if name not in left_out and not name.endswith("num_batches_tracked")
        }
    )


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    digest = hashlib.sha256(json.dumps(metadata or {}, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _trained_names(model: nn.Module) -> set[str]:
    names = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    for name, layer in _layers_of(model, names).items():
        names |= _names_below(layer, name)
    whole = {part for layer in _layers(model).values() for branch in layer.branches() for part in branch.modules()}
    moving = {norm for norm in norms_with_statistics(model) - whole if not is_held(norm)}
    for name, module in model.named_modules(remove_duplicate=False):
        if module in moving:
            names |= {f"{name}.{buffer}" for buffer, _ in module.named_buffers(recurse=False)}
    return names


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _layers(model: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_modules(remove_duplicate=False) if isinstance(layer, AW_LAYERS)}


def _layers_of(model: nn.Module, names: Iterable[str]) -> dict[str, Any]:
    """The AW-convolutions of whose branches an adapter has something, by name."""
    there = set(names)
    return {name: layer for name, layer in _layers(model).items() if not there.isdisjoint(_names_below(layer, name))}


def _names_below(layer: Any, name: str) -> set[str]:
    """The names of the tensors of a layer's branches, in the state dict of its network."""
    return {prefix + key for prefix, branch in _branches(layer, name).items() for key in branch.state_dict()}


def _branches(layer: Any, name: str) -> dict[str, BaseBranch]:
    """The branches of a layer, by what their tensors' names begin with."""
    layer_prefix = f"{name}." if name else ""
    named = zip(("attention", "input_attention"), layer.branches(), strict=False)
    return {f"{layer_prefix}{own}.": branch for own, branch in named}


def _arguments(layer: Any) -> dict[str, Any]:
    """What decides a branch's computation and not the names and shapes of its tensors."""
    arguments = {argument: getattr(layer, argument) for argument in ATTENTION_ARGUMENTS}
    if not arguments["input_gain"]:
        del arguments["input_gain"]  # which earlier adapters do not tell
    branch = layer.attention
    if not isinstance(branch, AttentionBranch):
        return arguments | {"branch": type(branch.branch).__qualname__}
    if branch.pool is not None:
        pool: Any = branch.pool
        arguments["pool"] = " ".join(repr(pool).split()) if isinstance(pool, nn.Module) else _name_of(pool)
    norm = branch.norm2
    return arguments | {"norm_groups": norm.num_groups} if isinstance(norm, nn.GroupNorm) else arguments


def _name_of(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _check_branches(model: nn.Module, metadata: Mapping[str, str]) -> None:
    """Raises a ValueError if AW-convolutions that an adapter's file tells of are not there, or have other arguments."""
    there = _layers(model)
    try:
        told = {name: dict(arguments) for name, arguments in json.loads(metadata.get("branches", "{}")).items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"load_adapter: the adapter has metadata that cannot be read: {error}") from error
    for name, arguments in told.items():
        if name not in there:
            _refuse_plain(name)
        own, arguments = ({"input_gain": False} | one for one in (_arguments(there[name]), arguments))
        differing = {key: arguments.get(key) for key in own | arguments if own.get(key) != arguments.get(key)}
        if differing:
            now = ", ".join(f"{key}={own.get(key)!r}" for key in differing)
            given = ", ".join(f"{key}={value!r}" for key, value in differing.items())
            same = "norm_layer=..." if "norm_groups" in differing else given
            raise ValueError(
                f"load_adapter: the adapter's layer {name!r} has {given}, and the model's {now}; convert the base with "
                f'awconv.convert(model, init="identity", {same})'
            )


def _refuse_plain(name: str) -> NoReturn:
    raise ValueError(
        f"load_adapter: the adapter has an attention branch for {name!r}, which is no AW-convolution of the model; "
        'convert the base first, with the same arguments as then: awconv.convert(model, init="identity")'
    )


def _check_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raises a ValueError for a tensor that does not fit, or is missing from a branch."""
    there, layers = _tensors(model), _layers_of(model, tensors)
    branches: dict[str, Any]
    lost = [name for name in tensors if name not in there]
    for name, layer in layers.items():
        branches = {f"{prefix}relative_to": branch for prefix, branch in _branches(layer, name).items()}
        missing = sorted(_names_below(layer, name) - set(tensors) - branches.keys())
        if missing:
            raise ValueError(
                f"load_adapter: the adapter lacks {', '.join(missing[:4])} of the model's attention branches; convert "
                "the base with the same arguments as then"
            )
        for start, branch in branches.items():
            known = branch.start
            if start in tensors and known is not None and tensors[start].tolist() != known.attention:
                raise ValueError(
                    f"load_adapter: {start} is {tensors[start].tolist()} in the adapter, and the model's branch, of "
                    f"another activation or form, starts at {known.attention:g}; convert the base with the "
                    "same arguments as then"
                )
        lost = [name for name in lost if name not in branches]  # a branch takes the adapter's form
    if lost:
        _refuse_names(lost, layers)
    for name, tensor in there.items():
        if name in tensors and tensors[name].shape != tensor.shape:
            _refuse_shape(model, name, tensors[name], tensor)


def _refuse_names(names: list[str], layers: Mapping[str, Any]) -> NoReturn:
    for name in names:
        layer, inside, _ = f".{name}".rpartition(".attention.conv1.")
        if inside and layer.lstrip(".") not in layers:
            _refuse_plain(layer.lstrip("."))
    raise ValueError(
        f"load_adapter: the adapter has {len(names)} tensors that the model has not, such as {', '.join(names[:4])}; "
        "build the network that it was trained on, and convert it with the same arguments"
    )


def _refuse_shape(model: nn.Module, name: str, tensor: Tensor, there: Tensor) -> NoReturn:
    parameter = dict(model.named_parameters(remove_duplicate=False)).get(name)
    mend = (
        f"the adapter is of {len(tensor)} classes: model.reset_classifier({len(tensor)})"
        if parameter in head_parameters(model)
        else "build and convert the network as it was trained"
    )
    raise ValueError(
        f"load_adapter: {name} has shape {tuple(tensor.shape)} in the adapter and {tuple(there.shape)} in the model; "
        f"{mend}"
    )
