"""Other forwards for a while: what a library traces or differentiates in the place of a layer's own computation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


class StandIn:
    """The first base of a class that a layer has for a while; its second base is the layer's own class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are the layer, and not what runs meanwhile."""
        state: Any = super().__reduce_ex__(protocol)[2]
        return _empty, (type(self).__bases__[1],), state


def _empty(kind: type[nn.Module]) -> nn.Module:
    """A module without a state, which pickle gives it."""
    return kind.__new__(kind)


def made_class(stand_in: type[StandIn], kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a layer of a kind that runs as something else."""
    return type(f"{stand_in.__name__.strip('_')}{kind.__name__}", (stand_in, kind), {})


def refuse_nested(layers: Mapping[str, nn.Module], function: str) -> None:
    """Raises a ValueError if a layer runs as something else already.

    Args:
        layers: by name.
        function: the name of the public function, for the message.
    """
    for name, layer in layers.items():
        if isinstance(layer, StandIn):
            raise ValueError(
                f"{function}: the layer {name!r} is within such a context already, as a {type(layer).__name__}; leave "
                "that one first"
            )


@contextmanager
def standing_in(classes: Mapping[nn.Module, type[nn.Module]]) -> Iterator[None]:
    """Gives layers other classes, and their own ones in the end."""
    own = {layer: type(layer) for layer in classes}
    try:
        for layer, kind in classes.items():
            layer.__class__ = kind  # type: ignore[assignment]
        yield
    finally:
        for layer, kind in own.items():
            layer.__class__ = kind  # type: ignore[assignment]
