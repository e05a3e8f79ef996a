"""Files of weights that networks start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
from timm.models import load_state_dict


def weights_overlay(network: str, file: str | Path, network_args: dict[str, Any] | None = None) -> dict[str, Any]:
    """A file of weights as ``timm.create_model`` takes it, in ``pretrained_cfg_overlay``.

    It has the number of the weights' classes, by which timm drops a classifier of others. timm then takes what there
    is, and so it is checked here that nothing else is missing or left over.

    Args:
        network: a name that timm knows.
        file: safetensors, or a state dict of torch, under the network's names.
        network_args: further arguments of the network.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it holds the weights of another network.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"weights must be a file (safetensors, or a state dict of torch), got {str(file)!r}")
    state = load_state_dict(str(file), weights_only=True)
    plain = timm.create_model(network, **(network_args or {}))
    classifier = f"{plain.pretrained_cfg['classifier']}."  # type: ignore[index]  # a dictionary of timm's
    found, expected = (
        {key for key in keys if not key.startswith(classifier) and not key.endswith("num_batches_tracked")}
        for keys in (state, plain.state_dict())
    )
    if found != expected:
        differing = sorted(found ^ expected)
        raise ValueError(
            f"{file} does not hold the weights of {network}: {len(differing)} names differ, such as "
            f"{', '.join(differing[:4])}"
        )
    overlay: dict[str, Any] = dict(file=str(file))
    bias = state.get(f"{classifier}bias")
    return overlay if bias is None else overlay | dict(num_classes=len(bias))
