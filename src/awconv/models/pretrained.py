"""Files of weights that networks start from."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import timm
from timm.models import load_state_dict
from torch import Tensor, nn

from awconv.models.squeeze_excite import IdentitySqueezeExcite
from awconv.relative import BaseBranch


def read_weights(file: str | Path, expected: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Reads a file of weights, and nothing that could run code.

    Args:
        file: safetensors, or a state dict of torch.
        expected: the new network's, of which a mask may hold infinities.

    Raises:
        ValueError: it has changed since it was written, as far as its format can tell, or holds what is no number.
    """
    if zipfile.is_zipfile(file):
        check_archive(Path(file))
    state: dict[str, Tensor] = load_state_dict(str(file), weights_only=True)
    broken = not_finite(state, expected or {})
    if broken:
        raise ValueError(
            f"{file} has weights that are infinite or not a number, such as {', '.join(broken[:3])}; give another file"
        )
    return state


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
    for kind in _STARTS_AS_IDENTITY:
        modules: dict[str, Any] = {name: module for name, module in network.named_modules() if isinstance(module, kind)}
        names = _names_below(modules, own)
        if state.keys().isdisjoint(names) and all(module.is_identity() for module in modules.values()):
            completed |= {name: own[name] for name in names}
    return completed


_STARTS_AS_IDENTITY = (BaseBranch, IdentitySqueezeExcite)


def _names_below(modules: Iterable[str], names: Iterable[str]) -> set[str]:
    prefixes = tuple(f"{module}." for module in modules)
    return {name for name in names if name.startswith(prefixes)}


_NOT_COMPARED = ("num_batches_tracked", ".relative_to")  # branches take the form of the weights


def weights_overlay(network: str, file: str | Path, network_args: dict[str, Any] | None = None) -> dict[str, Any]:
    """A file of weights as ``timm.create_model`` takes it, in ``pretrained_cfg_overlay``.

    It has the weights' number of classes, so that timm drops a classifier of another number. timm loads whatever fits;
    this function checks that nothing else is missing or left over, but for :func:`completed_by_identity`.

    Args:
        network: a name that timm knows.
        file: safetensors, or a state dict of torch, under the network's names.
        network_args: further arguments of the network.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it holds the weights of another network.
    """
    file = Path(file).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"weights must be a file (safetensors, or a state dict of torch), got {str(file)!r}")
    plain = timm.create_model(network, **(network_args or {}))
    state = completed_by_identity(read_weights(file, plain.state_dict()), plain)
    classifier = f"{plain.pretrained_cfg['classifier']}."  # type: ignore[index]  # a dictionary of timm's
    found, expected = (
        {key for key in keys if not key.startswith(classifier) and not key.endswith(_NOT_COMPARED)}
        for keys in (state, plain.state_dict())
    )
    if found != expected:
        differing = sorted(found ^ expected)
        hint = ""
        branches = [name for name, module in plain.named_modules() if isinstance(module, BaseBranch)]
        if found < expected and set(differing) == _names_below(branches, expected):
            hint = (
                "; attention that starts as the identity needs none: the network_args "
                "{'aw_args': {'init': 'identity'}} make it so"
            )
        raise ValueError(
            f"{file} does not hold the weights of {network}: {len(differing)} names differ, such as "
            f"{', '.join(differing[:4])}{hint}"
        )
    overlay: dict[str, Any] = dict(file=str(file))
    bias = state.get(f"{classifier}bias")
    return overlay if bias is None else overlay | dict(num_classes=len(bias))
