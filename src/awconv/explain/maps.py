"""The attention maps of a network, as it makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from awconv.evaluation_mode import evaluation_mode
from awconv.layers import AW_LAYERS, AWConv1d, AWConv2d, AWConv3d

AWConv = AWConv1d | AWConv2d | AWConv3d
See = Callable[[str, Tensor], Tensor | None]
_ADDED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # to names, by what is around modules
_AROUND = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)
_Inputs = TypeVar("_Inputs")


def attention_maps(model: nn.Module, images: Any) -> dict[str, Tensor]:
    """The attention maps of images, by the name of the AW-convolution that computes with them.

    The network runs once, in evaluation mode and without gradients. It is left as it was, also after an error: the mode
    of each module, hooks, parameters and statistics of norms. A compiled network runs eagerly, a fused one
    (:func:`awconv.fuse`) as it is. Of one in ``DataParallel`` or ``DistributedDataParallel``, the network inside runs.

    A map is that of the layer's ``attention``; gains over input channels (``input_gain``) are not among them. It is
    what the layer computes with, before Expand: A of K + A * K in the paper's form. In a network that was
    converted with ``init="identity"`` it is relative to the constant a0 that the branch started as (A' of
    :class:`awconv.layers.AttentionBranch`), so that 0 means "as the plain network did", and the weights are
    K (1 + A').

    Args:
        model: a network with AW-convolutions.
        images: what the network takes: a tensor, shape (N, C, H, W), or a detector's list of images. Tensors are moved
            to the network's device.

    Returns:
        For each layer, in the network's order, shape (N, C2/r_C2, (C1/groups)/r_C1, h/r_hw, w/r_hw), on the device and
        in the dtype of the network. Names are as in ``model.named_modules()``, without what compiling and wrapping add.
        A layer that runs several times in a pass, as a detector's head over a pyramid does, has the maps of the first
        call, then those of the next, along the first axis. A layer that does not run is left out.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it has no AW-convolution, or none of them runs.

    Examples:
        >>> import timm
        >>> import torch
        >>> import awconv
        >>> model = timm.create_model("aw_resnet8_cifar.digits", pretrained=True)
        >>> maps = awconv.attention_maps(model, torch.randn(4, 1, 8, 8))
        >>> {name: tuple(attention.shape) for name, attention in maps.items() if name.startswith("layer2")}
        {'layer2.0.conv1': (4, 32, 1, 3, 3), 'layer2.0.conv2': (4, 32, 1, 3, 3)}
    """
    network = unwrapped(model, "attention_maps")
    layers = aw_layers(network)
    if not layers:
        raise ValueError(
            f"attention_maps: {type(network).__name__} has no AW-convolution, so it has no attention maps; "
            'awconv.convert(model, init="identity") gives it some, which a training moves'
        )
    found = {name: maps for name, maps in maps_and_gains(network, layers, images).items() if name in layers}
    if not found:
        raise ValueError(
            f"attention_maps: none of the {len(layers)} AW-convolutions of {type(network).__name__} ran in evaluation "
            f"mode, the first of which is {next(iter(layers))!r}"
        )
    return found


def maps_and_gains(network: nn.Module, layers: Mapping[str, AWConv], images: Any) -> dict[str, Tensor]:
    """The maps of images by the name of their layer, and those of gains over input channels by :func:`gain_name`."""
    found: dict[str, list[Tensor]] = {key: [] for name in layers for key in (name, gain_name(name))}

    def keep(name: str, maps: Tensor) -> None:
        found[name].append(maps.detach())

    with running(network), torch.no_grad(), seeing_maps(layers, keep):
        network(on_device_of(network, images))
    return {name: maps[0] if len(maps) == 1 else torch.cat(maps) for name, maps in found.items() if maps}


def gain_name(layer: str) -> str:
    """By which the maps of a layer's gain over input channels go: the name of their branch in the network."""
    return f"{layer}.input_attention" if layer else "input_attention"


def unwrapped(model: nn.Module, function: str) -> nn.Module:
    """The network in what ``torch.compile`` and data parallelism put around it.

    Raises:
        TypeError: it is no module; the message has the name of the function that was called.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be an nn.Module, got {type(model).__name__}")
    while True:
        if "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, _AROUND):
            model = model.module
        else:
            return model


def aw_layers(network: nn.Module) -> dict[str, AWConv]:
    """The AW-convolutions of a network, by their names without what compiling adds."""
    return {plain_name(name): module for name, module in network.named_modules() if isinstance(module, AW_LAYERS)}


def plain_name(name: str) -> str:
    """A module's name without what compiling and wrapping add."""
    return ".".join(part for part in name.split(".") if part not in _ADDED)


@contextmanager
def running(network: nn.Module) -> Iterator[None]:
    """Evaluation mode, and eager: a compiled network, which would not see new hooks, runs as it was before."""
    with evaluation_mode(network), torch.compiler.set_stance("force_eager"):
        yield


def on_device_of(network: nn.Module, inputs: _Inputs) -> _Inputs:
    """Tensors, alone or in lists, on the device of a network's first parameter."""
    moved: Any = inputs
    if isinstance(inputs, Tensor):
        parameter = next(network.parameters(), None)
        moved = inputs if parameter is None else inputs.to(parameter.device)
    elif isinstance(inputs, list | tuple):
        moved = type(inputs)(on_device_of(network, one) for one in inputs)
    return moved  # type: ignore[no-any-return]


@contextmanager
def seeing_maps(layers: Mapping[str, AWConv], see: See) -> Iterator[None]:
    """Shows the maps of layers while their network runs, and puts others in their places.

    Args:
        layers: by name; they may share branches.
        see: called with a layer's name and the maps that its branch made, or with :func:`gain_name` and the maps of
            its gain over input channels; what it returns, if not None, is what the layer computes with.
    """
    within: list[str] = []  # the names of the layers whose forwards run now, the innermost last

    def show(branch: nn.Module, arguments: Any, maps: Tensor) -> Tensor | None:
        return see(within[-1], maps) if within else None  # else somebody calls the branch alone

    def show_gain(branch: nn.Module, arguments: Any, maps: Tensor) -> Tensor | None:
        return see(gain_name(within[-1]), maps) if within else None

    with ExitStack() as hooks:
        for name, layer in layers.items():
            enter, leave = _around(within, name)
            hooks.callback(layer.register_forward_pre_hook(enter).remove)
            hooks.callback(layer.register_forward_hook(leave, always_call=True).remove)
        for branch in {layer.attention: None for layer in layers.values()}:
            hooks.callback(branch.register_forward_hook(show).remove)
        for of_gain in {layer.input_attention: None for layer in layers.values()}:
            if of_gain is not None:
                hooks.callback(of_gain.register_forward_hook(show_gain).remove)
        yield


def _around(within: list[str], name: str) -> tuple[Any, Any]:
    def enter(*_: Any) -> None:
        within.append(name)

    def leave(*_: Any) -> None:
        del within[-1:]  # nothing, where another hook failed before this one's turn

    return enter, leave
