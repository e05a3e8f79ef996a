"""What AW-convolutions say of weights that were loaded into them and leave a branch out."""

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
