"""The two forms of an attention branch: the paper's, and relative to the constant that it started as by identity."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from awconv.activation import Start


class BaseBranch(nn.Module):
    """What AW layers have under ``attention``: a map from the input to the compact attention map, in one of two forms.

    The buffer ``relative_to`` holds a0, the constant that the map is relative to, and is None in a branch of the
    paper's form. State dicts tell the form by it.

    Args:
        attention_size: the sizes (C2/r_C2, (C1/groups)/r_C1, h/r_hw, w/r_hw) of one sample's map.
        residual: the form of the layer's weights, on which the gain at the start depends.
    """

    relative_to: Tensor | None
    fused = False  # whether it is a branch of awconv.fuse's

    def __init__(self, attention_size: Sequence[int], residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.attention_size = tuple(attention_size)
        self.register_buffer("relative_to", None)

    @property
    def start(self) -> Start | None:
        """The constant that the branch starts as by identity; None if it isn't known."""
        raise NotImplementedError

    @property
    def relative(self) -> bool:
        """Whether the map is relative to the constant that the branch starts as."""
        return self._buffers["relative_to"] is not None

    def start_as_identity(self) -> None:
        """Starts as a constant for every input, to which the map is relative, with a gradient that leads away from it.

        Raises:
            ValueError: the branch cannot start as one.
        """
        raise NotImplementedError

    def is_identity(self) -> bool:
        """Whether the map is 0 for every input, as at the start by identity: the layer computes with its weights."""
        raise NotImplementedError

    @torch.no_grad()
    def _set_relative(self, relative: bool) -> None:
        if relative != self.relative:
            constant = self.start.attention if self.start is not None else math.nan  # until a state dict is loaded
            like = next((tensor for tensor in self.parameters() if tensor.is_floating_point()), torch.empty(0))
            self.relative_to = like.new_tensor(constant) if relative else None

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        """A state dict of a whole branch says which form it was trained in, and the branch takes that."""
        name = f"{prefix}relative_to"
        told = state_dict.get(name)
        if told is not None or self._is_whole(state_dict, prefix):
            statistics = any(buffer != "relative_to" for buffer, _ in self.named_buffers())
            if self.relative and told is None and not statistics:
                warnings.warn(_FORM_UNTOLD, stacklevel=2)
            self._set_relative(told is not None)
        if type(told) is Tensor and told.dim() == 0 and not told.is_meta and not self._starts_at(told.item()):
            error_messages = arguments[-1]
            starts = "no constant" if self.start is None else f"{self.start.attention:g}"
            error_messages.append(
                f"{name} is {told.item():g}, and this branch, of another activation or form, starts at {starts}: "
                "convert the network with the arguments that the saved one had"
            )
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _is_whole(self, state_dict: Any, prefix: str) -> bool:
        """Whether a state dict has all of the branch but its form, and not only its parameters, say."""
        left_out = ("relative_to", "num_batches_tracked")
        names = [name for name in self.state_dict() if not name.endswith(left_out)]
        return bool(names) and all(f"{prefix}{name}" in state_dict for name in names)

    def _starts_at(self, constant: float) -> bool:
        # averages of several networks' are rounded
        return self.start is not None and abs(constant - self.start.attention) < 0.01

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._buffers.setdefault("relative_to", None)  # pickled before there was one

    def extra_repr(self) -> str:
        return f"relative_to={self.start.attention:g}" if self.relative and self.start is not None else ""


_FORM_UNTOLD = (  # Norms with statistics tell parameters alone from a whole state dict.
    "weights without relative_to were loaded into attention branches that were converted by identity: they are taken "
    "as of the paper's form, K (1 + a). If they are parameters of a network that was converted by identity, add the "
    "buffers of its state_dict()"
)


def refuse_fused(model: nn.Module, function: str) -> None:
    """Raises a ValueError if a model was fused, which nothing can undo.

    Args:
        model: any module.
        function: the name of the public function, for the message.
    """
    if any(isinstance(module, BaseBranch) and module.fused for module in model.modules()):
        raise ValueError(
            f"{function}: {type(model).__name__} was fused for inference (awconv.fuse), which cannot be undone. Take "
            "the network from before it; awconv.fuse(copy.deepcopy(network)) keeps that"
        )
