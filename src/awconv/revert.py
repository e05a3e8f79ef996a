"""Whether a model was converted, and back: AW-convolutions to plain ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from awconv.convert import ATTENTION_ARGUMENTS, COUNTERPARTS, arguments_of, carry_attributes, has_hooks
from awconv.folding import keeps_attention
from awconv.layers import AW_LAYERS, AWConv1d, AWConv2d, AWConv3d
from awconv.rebuild import forget_conversions
from awconv.relative import refuse_fused

_PLAIN = {counterpart: plain for plain, counterpart in COUNTERPARTS.items()}


def is_converted(model: nn.Module) -> bool:
    """Whether a model has AW-convolutions, or is one. :func:`awconv.summary` lists them.

    Raises:
        TypeError: the model is no module.

    Examples:
        >>> import torch
        >>> import awconv
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 16, 3))
        >>> awconv.is_converted(model), awconv.is_converted(awconv.convert(model))
        (False, True)
    """
    _check_module(model, "is_converted")
    return any(isinstance(module, AW_LAYERS) for module in model.modules())


def _check_module(model: nn.Module, function: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be an nn.Module, got {model!r}")


def revert(model: nn.Module, *, drop_attention: bool = False) -> nn.Module:
    """Replaces the AW-convolutions of a model by plain convolutions with their weights, in place.

    The new layers keep the old ones' parameters (the same tensors), their training mode and ``requires_grad``. It is
    exact where every branch is still the identity, as after ``awconv.convert(model, init="identity")`` before a
    training. Elsewhere the weights change with each image, which a plain convolution cannot do. Methods that fold
    layers (``reparameterize``, ``fuse``, ...), which :func:`awconv.convert` makes errors of, work again.

    Args:
        model: a network with AW-convolutions.
        drop_attention: whether a branch that is not the identity may be lost. The network then computes something else:
            with K in the place of K (1 + A).

    Returns:
        The model; a new layer if the model is itself an AW-convolution.

    Raises:
        TypeError: the model is no module.
        ValueError: it has no AW-convolution, or a branch is not the identity and ``drop_attention`` is false, or a
            layer has hooks, is parametrised or is of a class of its own. The model is left as it was.

    Examples:
        >>> import torch
        >>> import awconv
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 16, 3))
        >>> model = awconv.convert(model, init="identity")
        >>> [type(layer).__name__ for layer in awconv.revert(model)]
        ['Conv2d', 'Conv2d']
    """
    layers = replaceable_layers(model, "revert")
    learned = [name for name, layer in layers.items() if not layer.is_identity()]
    if not drop_attention:
        refuse_fused(model, "revert")
    if learned and not drop_attention:
        raise ValueError(
            f"revert: the attention of {len(learned)} of {len(layers)} AW-convolutions is not the identity, such as of "
            f"{', '.join(map(repr, learned[:4]))}, and would be lost: plain weights are the same for each image. "
            "revert(model, drop_attention=True) loses it; to keep it, keep the network as it is (awconv.train_only and "
            "export work with it)"
        )
    plain: dict[nn.Module, nn.Module] = {layer: plain_layer(layer) for layer in layers.values()}
    if model in plain:
        return plain[model]
    replace_layers(model, plain)
    restore_folding(model)
    forget_conversions(model)
    return model


def replaceable_layers(model: nn.Module, function: str) -> dict[str, AWConv1d | AWConv2d | AWConv3d]:
    """The AW-convolutions of a model, by name, each of which a plain convolution can replace.

    Args:
        model: a network.
        function: the name of the public function, for messages.

    Raises:
        TypeError: the model is no module.
        ValueError: it has no AW-convolution, or a layer has hooks, is parametrised or is of a class of its own.
    """
    _check_module(model, function)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, AW_LAYERS)}
    if not layers:
        raise ValueError(f"{function}: {type(model).__name__} has no AW-convolution, so there is nothing to {function}")
    for name, layer in layers.items():
        obstacle = _obstacle(layer)
        if obstacle is not None:
            raise ValueError(f"{function}: the layer {name!r} {obstacle}")
    return layers


def _obstacle(layer: AWConv1d | AWConv2d | AWConv3d) -> str | None:
    if type(layer) not in _PLAIN:
        return f"is a {type(layer).__name__}, of a class of its own; replace it yourself"
    if is_parametrized(layer):
        return "is parametrised; remove the parametrisation (torch.nn.utils.parametrize.remove_parametrizations)"
    if has_hooks(layer):
        return "has hooks, which the plain convolution would lack; remove them"
    if {"forward", "_conv_forward"} & vars(layer).keys():
        return "has a forward of its own, which the plain convolution would lack; remove it"
    return None


def plain_layer(old: AWConv1d | AWConv2d | AWConv3d) -> nn.Module:
    """The plain convolution with an AW-convolution's weight and bias (the same tensors) and its training mode."""
    with torch.device("meta"):  # for its own weights are not needed
        new: Any = _PLAIN[type(old)](*arguments_of(old))
    new.padding_mode = old.padding_mode
    new.weight, new.bias = old.weight, old.bias
    new._reversed_padding_repeated_twice = old._reversed_padding_repeated_twice
    carry_attributes(old, new, but=(*ATTENTION_ARGUMENTS, "input_attention"))
    plain: nn.Module = new.train(old.training)
    return plain


def replace_layers(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Puts layers in the places of others below a model, and nothing else: the other way round undoes it."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None and child in replacements:
                module._modules[name] = replacements[child]


def restore_folding(model: nn.Module) -> None:
    """Lets methods that fold layers work again, which :func:`awconv.convert` changed, in modules that have no
    AW-convolution below them any more."""
    for module in model.modules():
        changed = [name for name, value in vars(module).items() if keeps_attention(value)]
        if changed and not any(isinstance(part, AW_LAYERS) for part in module.modules()):
            for name in changed:
                delattr(module, name)
