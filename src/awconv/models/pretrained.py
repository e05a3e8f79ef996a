"""Files of weights that networks start from."""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import timm
from timm.models import adapt_input_conv, load_state_dict
from torch import Tensor, nn

from awconv.models.squeeze_excite import IdentitySqueezeExcite
from awconv.odconv import ODAttention
from awconv.relative import BaseBranch
from awconv.train_only import head_parameters

_OF_FIT = ("ema.module.", "network.")  # of a network's names in a checkpoint of awconv fit; averaged weights first


def read_weights(file: str | Path, expected: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Reads a file of weights, and nothing that could run code.

    Of a training's checkpoint it takes the weights: averaged ones if there are some (``state_dict_ema``, ``model_ema``,
    or those of ``awconv fit``), without the prefixes of ``awconv fit``, Lightning modules, ``DataParallel`` and
    ``torch.compile``.

    Args:
        file: safetensors, a state dict of torch, or a checkpoint.
        expected: the new network's, by whose names a prefix is known, and of which a mask may hold infinities.

    Raises:
        ValueError: it has changed since it was written, as far as its format can tell, or holds what is no number.
    """
    if zipfile.is_zipfile(file):
        check_archive(Path(file))
    state = _without_prefix(load_state_dict(str(file), weights_only=True), expected or {})
    broken = not_finite(state, expected or {})
    if broken:
        raise ValueError(
            f"{file} has weights that are infinite or not a number, such as {', '.join(broken[:3])}; give another file"
        )
    return state


def _without_prefix(state: Mapping[str, Any], expected: Collection[str]) -> dict[str, Any]:
    """A state dict under a network's own names."""
    for prefix in _OF_FIT:
        inner = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if inner and not any(name in expected for name in state):
            return inner
    state = {name: value for name, value in state.items() if name != "n_averaged"}  # of torch's AveragedModel
    inner = state
    while inner and not any(name in expected for name in inner):  # such as "model._orig_mod." of a LightningModule
        first = {name.partition(".")[0] for name in inner}
        if len(first) > 1:
            return state
        inner = {name.partition(".")[2]: value for name, value in inner.items() if "." in name}
    return inner or state


def check_archive(path: Path) -> None:
    """Compares what :func:`torch.save` wrote with the checksums in it, at which torch does not look.

    Raises:
        ValueError: a part has changed since, or is compressed, which torch never does.
        zipfile.BadZipFile: it is no such file.
    """
    with zipfile.ZipFile(path) as archive:
        changed = archive.testzip() if all(not part.compress_type for part in archive.infolist()) else "compression"
    if changed is not None:
        raise ValueError(f"it has changed since it was written ({changed}); copy the file again, or use an earlier one")


def not_finite(there: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """The tensors that hold NaN or an infinity, by name, where those of a new network hold none.

    Args:
        there: a state dict.
        expected: the new network's.
    """
    return [
        name
        for name, tensor in there.items()
        if not _is_finite(tensor) and (name not in expected or _is_finite(expected[name]))
    ]


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    return bool((tensor if tensor.element_size() > 1 else tensor.float()).isfinite().all())  # torch asks no float8


def completed_by_identity(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Completes a plain network's weights by the attention of a new network that starts from them.

    Attention that starts as the identity changes nothing that the plain network computes: the relative branches of
    AW-convolutions (``init="identity"``), and :class:`IdentitySqueezeExcite`. A file has the weights of all modules of
    such a kind or of none of them; where it has none, those of the network are taken.

    Args:
        state: the weights that there are.
        network: a new one.

    Returns:
        The weights; what else is missing is missing still.
    """
    own = network.state_dict()
    completed = dict(state)
    for modules in _of_each_kind(network):
        names = _names_below(modules, own)
        if state.keys().isdisjoint(names) and all(module.is_identity() for module in modules.values()):
            completed |= {name: own[name] for name in names}
    return completed


def _of_each_kind(network: nn.Module) -> list[dict[str, Any]]:
    """What may start as the identity, by name: attention, gains over input channels, squeeze-and-excitation."""
    found: dict[str, dict[str, Any]] = {"attention": {}, "input_attention": {}, "se": {}}
    for name, module in network.named_modules():
        if isinstance(module, BaseBranch):
            found["input_attention" if _is_of_gain(name) else "attention"][name] = module
        elif isinstance(module, IdentitySqueezeExcite):
            found["se"][name] = module
    return list(found.values())


def _is_of_gain(branch: str) -> bool:
    return branch.rpartition(".")[2] == "input_attention"


def _names_below(modules: Iterable[str], names: Iterable[str]) -> set[str]:
    prefixes = tuple(f"{module}." for module in modules)
    return {name for name in names if name.startswith(prefixes)}


_NOT_COMPARED = ("num_batches_tracked", ".relative_to")  # branches take the form of the weights


def weights_overlay(network: str, file: str | Path, network_args: dict[str, Any] | None = None) -> dict[str, Any]:
    """A file of weights as ``timm.create_model`` takes it, in ``pretrained_cfg_overlay``.

    It has the weights' number of classes, so that timm drops a classifier of another number.

    Args:
        network: a name that timm knows.
        file: safetensors, a state dict of torch under the network's names, or a checkpoint.
        network_args: further arguments of the network.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it holds the weights of another network.
    """
    plain = timm.create_model(network, **(network_args or {}))
    state, classes = _read_for(plain, network, file)
    names = load_state_dict(str(Path(file).expanduser()), weights_only=True).keys()
    # timm reads the file itself where it can: the network's configuration then keeps no copy of the weights.
    overlay: dict[str, Any] = dict(file=str(Path(file).expanduser()))
    if not state.keys() >= names:
        overlay = dict(state_dict=state)
    return overlay if classes is None else overlay | dict(num_classes=classes)


def load_weights(network: nn.Module, name: str, file: str | Path, converted: bool = False) -> int | None:
    """Loads a file of weights into a network.

    Nothing may be missing or left over, but for a classifier of other classes, which stays as it is, and for
    :func:`completed_by_identity`.

    The first convolution of a file for coloured images is adapted to another number of channels, as timm does.

    Args:
        network: the network.
        name: its name in messages.
        file: safetensors, a state dict of torch under the network's names, or a checkpoint.
        converted: the network was converted after it was built, and will train: the file may be the plain network's.

    Returns:
        The file's number of classes; None if it has no classifier.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it holds the weights of another network. The network is left as it was.
    """
    state, classes = _read_for(network, name, file, converted)
    own = network.state_dict()
    stem = f"{_cfg(network).get('first_conv')}.weight"
    if stem in state and state[stem].dim() == 4 and state[stem].shape[1] == 3 != own[stem].shape[1]:
        state[stem] = adapt_input_conv(own[stem].shape[1], state[stem])
    heads = _classifier(network)
    state = {key: value for key, value in state.items() if key not in heads or own[key].shape == value.shape}
    differing = [key for key, value in state.items() if key in own and own[key].shape != value.shape]
    if differing:
        raise ValueError(
            f"{file} does not hold the weights of {name}: {differing[0]} has shape {tuple(state[differing[0]].shape)} "
            f"there and {tuple(own[differing[0]].shape)} in the network"
        )
    network.load_state_dict(state, strict=False)
    return classes


def _read_for(
    network: nn.Module, name: str, file: str | Path, converted: bool = False
) -> tuple[dict[str, Tensor], int | None]:
    """A file's weights for a network, completed, and its number of classes.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it holds the weights of another network.
    """
    file = Path(file).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"weights must be a file (safetensors, a state dict of torch, or a checkpoint), got {str(file)!r}"
        )
    own = network.state_dict()
    state = completed_by_identity(read_weights(file, own), network)
    heads = _classifier(network)
    found, expected = (
        {key for key in keys if key not in heads and not key.endswith(_NOT_COMPARED)} for keys in (state, own)
    )
    branches = _names_below(_branches(network), expected)
    peers = [name for name, module in network.named_modules() if isinstance(module, ODAttention)]
    with_peers = branches | _names_below(peers, expected)
    if converted and found.isdisjoint(with_peers):
        expected -= with_peers
    gains = _names_below(filter(_is_of_gain, _branches(network)), expected)
    if found != expected:
        differing = sorted(found ^ expected)
        raise ValueError(
            f"{file} does not hold the weights of {name}: {len(differing)} names differ, such as "
            f"{', '.join(differing[:4])}{_hint(found, expected, (branches, gains))}"
        )
    told = heads or set(own)  # where no classifier is known, all must fit, and the last matrix gives the logits
    logits = [len(state[key]) for key in own if key in told and key in state and state[key].dim() > 1]
    return state, logits[-1] if logits else None


def _hint(found: set[str], expected: set[str], branches: tuple[set[str], set[str]]) -> str:
    """What may be the reason that names differ; the names of all branches are given, and those of gains alone."""
    if found < expected and expected - found in branches:
        return (
            "; attention that starts as the identity needs none: the network_args "
            "{'aw_args': {'init': 'identity'}} make it so"
        )
    if expected < found and all("attention." in key for key in found - expected):
        return "; the file is of a converted network: give the same --model.convert, such as {init: identity}"
    return ""


def _branches(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules(remove_duplicate=False) if isinstance(module, BaseBranch)]


def _classifier(network: nn.Module) -> set[str]:
    """The names of a classifier's tensors in the network's state dict, as far as it is known."""
    told = _cfg(network).get("classifier") or ()
    prefixes = tuple(f"{one}." for one in ((told,) if isinstance(told, str) else told))
    heads = head_parameters(network)
    named = {name for name, parameter in network.named_parameters(remove_duplicate=False) if parameter in heads}
    return named | {name for name in network.state_dict() if prefixes and name.startswith(prefixes)}


def _cfg(network: nn.Module) -> dict[str, Any]:
    """timm's configuration of a network; empty for one that timm did not build."""
    return dict(getattr(network, "pretrained_cfg", None) or {})


_NOT_COMPARED = ("num_batches_tracked", ".relative_to")  # branches take the form of the weights
