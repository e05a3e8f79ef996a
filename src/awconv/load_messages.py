"""What layers with attention say of weights that were loaded into them and leave it out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

_log = logging.getLogger("awconv.layers")


def warn_of_branches(layer: Any, state_dict: Mapping[str, Any], prefix: str, missing_keys: Sequence[str]) -> None:
    """Logs a warning if weights were loaded without those of a branch that changes what the layer computes.

    Args:
        layer: an AW-convolution.
        state_dict: what was loaded.
        prefix: of the layer's names in it.
        missing_keys: those found so far; other layers of the network have told of theirs.
    """
    if f"{prefix}weight" not in state_dict or any("attention." in key for key in missing_keys):
        return
    has_map = any(key.startswith(f"{prefix}attention.") for key in state_dict)
    has_gain = any(key.startswith(f"{prefix}input_attention.") for key in state_dict)
    if not has_map and not layer.is_identity():
        _log.warning(_PLAIN, prefix.rstrip("."))
    elif not has_gain and layer.input_attention is not None and not layer.input_attention.is_identity():
        _log.warning(_WITHOUT_GAIN, prefix.rstrip("."))


def warn_of_gains(state_dict: Mapping[str, Any], prefix: str, missing_keys: Sequence[str]) -> None:
    """Logs a warning if plain weights were loaded into an ODConv; its arguments are as in :func:`warn_of_branches`."""
    told = any("attention." in key for key in missing_keys if not key.startswith(f"{prefix}attention."))
    has_gains = any(key.startswith(f"{prefix}attention.") for key in state_dict)
    if f"{prefix}weight" in state_dict and not has_gains and not told:
        _log.warning(_WITHOUT_GAINS, prefix.rstrip("."))


_WITHOUT_GAINS = (
    "plain weights were loaded into ODConvs (the first is %r), which multiply them by gains of about an eighth: the "
    "network computes something else than the plain one. An ODConv has no start by identity: train it from scratch, or "
    'convert with awconv.convert(network, layer="aw", init="identity")'
)
_PLAIN = (
    "plain weights were loaded into AW-convolutions (the first is %r), whose branches keep what they were: "
    "the network computes with weight * (1 + a), not with these weights. To start from what the plain "
    'network computes, convert it with awconv.convert(network, init="identity"), before or after its '
    "weights are loaded"
)
_WITHOUT_GAIN = (
    "weights without a gain over input channels were loaded into AW-convolutions with input_gain (the first is %r), "
    "whose input_attention keeps what it was and scales the input: the network computes something else than the one "
    'that the weights are of. To start from that, convert with awconv.convert(network, init="identity", '
    "input_gain=True)"
)
