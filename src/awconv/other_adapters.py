"""Adapters of other libraries, such as peft's LoRA, which attention would spoil."""

from __future__ import annotations

import torch
from torch import nn

from awconv.custom_branch import is_part_of_custom_branch
from awconv.layers import AW_LAYERS
from awconv.relative import BaseBranch


def _refuse_adapter(module: nn.Module, name: str, child: nn.Module | None) -> None:
    """Refuses what peft puts around a convolution, with the convolution as its ``base_layer``.

    A layer is not told that it becomes a part of another module, so that this is called of every module that becomes
    one.

    Raises:
        ValueError: the convolution is an AW layer, or belongs to a branch.
    """
    if name == "base_layer" and isinstance(child, AW_LAYERS):
        raise ValueError(
            f"{_qualified_name(module)} cannot adapt an {type(child).__name__}: merged into the weights, the adapter "
            "would be multiplied by the attention. Build the network anew and target other layers (exclude_modules), "
            "train the branches instead (awconv.train_only), or adapt the plain network, merge, and then convert it "
            '(awconv.convert(network, init="identity"))'
        )
    of_branch = isinstance(module, BaseBranch) or is_part_of_custom_branch(module)
    if of_branch and isinstance(getattr(child, "base_layer", None), nn.Module):
        raise ValueError(
            f"{_qualified_name(child)} would adapt {name} of an attention branch, which its targets match by name. "
            r'Build the network anew and leave branches out, exclude_modules=r".*\.(input_)?attention\..*", or '
            'train them whole, modules_to_save=["attention"]'
        )


def _qualified_name(module: nn.Module | None) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


torch.nn.modules.module.register_module_module_registration_hook(_refuse_adapter)
