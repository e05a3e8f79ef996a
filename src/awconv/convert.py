"""Any CNN to its AW version, by replacing convolutions with their AW counterparts, or with a peer's."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from timm.layers import Conv2dSame
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from awconv.branch_spec import BranchSpec, NormLayer, check_make_branch
from awconv.custom_branch import BranchesOfNetwork
from awconv.folding import _lose_attention, keep_attention  # noqa: F401 - pickles of earlier versions name the first
from awconv.layers import AWConv1d, AWConv2d, AWConv2dSame, AWConv3d
from awconv.matching_norm import most_common_norm, norm_like
from awconv.odconv import ODConv2d
from awconv.rebuild import remember_conversion
from awconv.relative import BaseBranch, refuse_fused
from awconv.selection import Convolution, Selection, choose, convolutions, nothing_selected

COUNTERPARTS: dict[type[nn.Module], type[AWConv1d | AWConv2d | AWConv3d]] = {
    nn.Conv1d: AWConv1d,
    nn.Conv2d: AWConv2d,
    nn.Conv3d: AWConv3d,
    Conv2dSame: AWConv2dSame,
}
_KINDS: dict[str, Mapping[type[nn.Module], type[nn.Module]]] = {"aw": COUNTERPARTS, "odconv": {nn.Conv2d: ODConv2d}}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_log = logging.getLogger(__name__)


def convert(
    model: nn.Module,
    select: Selection | Sequence[Selection] | None = None,
    *,
    init: Literal["fresh", "identity"] = "fresh",
    norm_layer: NormLayer | Literal["match"] | None = "match",
    layer: Literal["aw", "odconv"] = "aw",
    **arguments: Any,
) -> nn.Module:
    """Replaces convolutions of a model by AW-convolutions, in place.

    The new layers keep the old ones' parameters (the same tensors, with their dtype, device and ``requires_grad``) and
    their training mode. A module that occurs in several places is replaced by one layer in all of them. A convolution
    that cannot be replaced exactly is left and logged: a subclass with a computation of its own, one with hooks, a
    parametrised or shared weight. :func:`awconv.summary` lists them all. Of a network of timm, ``save_for_hf`` and
    ``push_to_hf_hub`` write what builds the converted network again.

    RepVGG, MobileOne, RepViT and FastViT fold several layers into one plain convolution, which would lose the
    attention. After the conversion their methods (``reparameterize``, ``fuse``, ``fuse_convs``, ``switch_to_deploy``,
    ``convert_to_deploy``, ``merge_kernel`` and ``merge``, without arguments) raise a ValueError. Fold first, then
    convert. The ``fuse`` of a YOLO of Ultralytics folds norms, which keeps the attention, and works. If a convolution
    is converted by itself (``block.conv = convert(block.conv)``), the methods of its parents cannot be found: convert
    the whole network and select the layer by its name instead.

    Attributes that someone has put on a convolution stay on its AW layer, but for private ones (a layer that was
    compiled by itself must be compiled again) and those whose names the layer has a use for.

    Args:
        model: any module.
        select: the convolutions to convert: a name or a glob (``"layer4.*.conv2"``; ``*`` matches dots too), a compiled
            regular expression for whole names, a function of a name and a module, or a list of these. By default every
            spatial convolution (a kernel larger than 1) but the stem, which is the first of them.
        init: ``"fresh"`` for training from scratch: the branch starts at random. ``"identity"`` for pretrained
            networks: the network computes what it did, in training and evaluation, with the weights that it has, up to
            the order in which an algorithm adds. The branch starts as a constant a0, has a gradient from the first
            step, and gives its map relative to a0: weights K (1 + a) / (1 + a0), see
            :class:`awconv.layers.AttentionBranch`. Pretrained weights may be loaded before or after the conversion.
        norm_layer: the branch's norm: called with a number of channels, None for none, or ``"match"`` for the kind that
            the model has most of: BatchNorm, SyncBatchNorm, FrozenBatchNorm2d, or GroupNorm in one group (for LayerNorm
            and InstanceNorm too); BatchNorm where it has none.
        layer: ``"aw"``, or ``"odconv"`` for a peer from the literature, :class:`awconv.ODConv2d`, in the place of
            two-dimensional convolutions. It starts at random, and takes ``reduction`` alone of the arguments below.
        **arguments: ``reduction``, ``in_expansion``, ``out_expansion``, ``kernel_expansion``, ``activation``,
            ``residual``, ``input_gain``, ``pool`` and ``branch``, as for :class:`awconv.AWConv2d`.
            :class:`awconv.BranchSpec` says what ``branch`` gets and returns; one module that it returns for several
            layers is shared by them.

    Returns:
        The model; a new layer if the model is itself a convolution.

    Raises:
        TypeError: an argument is none of these.
        ValueError: nothing was selected, or a name, a glob or an expression matches no convolution, or an argument does
            not fit a selected layer. The model is left as it was.

    Examples:
        >>> import torch
        >>> import awconv
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 16, 3))
        >>> input = torch.randn(2, 3, 8, 8)
        >>> before = model(input)
        >>> [type(layer).__name__ for layer in awconv.convert(model, init="identity")]  # the first one is the stem
        ['Conv2d', 'ReLU', 'AWConv2d']
        >>> torch.allclose(model(input), before, atol=1e-5)
        True
    """
    given = dict(init=init, norm_layer=norm_layer, layer=layer)
    other = {name: value for name, value in given.items() if value != _DEFAULTS[name]} | arguments
    converted, names = replace_convolutions(model, select, init, norm_layer, layer, **arguments)
    remember_conversion(converted, names, other)
    return converted


def replace_convolutions(
    model: nn.Module,
    select: Selection | Sequence[Selection] | None = None,
    init: Literal["fresh", "identity"] = "fresh",
    norm_layer: NormLayer | Literal["match"] | None = "match",
    layer: Literal["aw", "odconv"] = "aw",
    **arguments: Any,
) -> tuple[nn.Module, list[str]]:
    """What :func:`convert` does, for who says in another way how the network is built again.

    Returns:
        The model, or a new layer, and the names of the convolutions that were replaced.
    """
    _check_arguments(model, init, norm_layer, arguments)
    if layer != "aw":
        _check_peer(layer, init, arguments)
    counterparts = _counterparts(model, select, norm_layer, layer, arguments)
    if init == "identity":
        _start_as_identity(model, counterparts)
    names = [name for name, module in model.named_modules() if module in counterparts]
    return _replaced(model, counterparts), names


_DEFAULTS = dict(init="fresh", norm_layer="match", layer="aw")


# The layer's arguments that nothing but the attention has; a counterpart takes the others over from its convolution.
# Text can say their values, but those of _MAKERS.
_MAKERS = ("pool", "branch")
ATTENTION_ARGUMENTS = tuple(
    name
    for name, parameter in inspect.signature(AWConv2d).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name not in ("norm_layer", "device", "dtype", *_MAKERS)
)


def _check_arguments(
    model: nn.Module, init: str, norm_layer: NormLayer | Literal["match"] | None, arguments: dict[str, Any]
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be an nn.Module, got {model!r}; timm.create_model makes one of a name")
    refuse_fused(model, "convert")
    unknown = [name for name in arguments if name not in ATTENTION_ARGUMENTS + _MAKERS]
    if unknown:
        known = ("select", "init", "norm_layer", *ATTENTION_ARGUMENTS, *_MAKERS, "layer")
        raise TypeError(f"convert: there is no argument {', '.join(unknown)}; there are {', '.join(known)}")
    if init not in ("fresh", "identity"):
        raise ValueError(f"convert: init must be 'fresh' or 'identity', got {init!r}")
    if isinstance(norm_layer, nn.Module) or not (norm_layer is None or norm_layer == "match" or callable(norm_layer)):
        raise TypeError(
            "convert: norm_layer must be 'match', None or something called with a number of channels, such as "
            f"nn.BatchNorm2d, got {norm_layer!r}"
        )
    check_make_branch("convert", arguments.get("branch"))


def _check_peer(layer: str, init: str, arguments: dict[str, Any]) -> None:
    if layer not in _KINDS:
        raise ValueError(f"convert: layer must be 'aw' or 'odconv', got {layer!r}")
    if init != "fresh":
        raise ValueError(
            "convert: layer='odconv' takes init='fresh' alone: an ODConv has no constant to start from that would "
            "leave a network as it is. layer='aw' has"
        )
    others = [name for name in arguments if name != "reduction"]
    if others:
        raise TypeError(
            f"convert: layer='odconv' takes reduction, select and norm_layer alone, got {', '.join(others)}. Leave it "
            "out, or convert with layer='aw'"
        )


def _counterparts(
    model: nn.Module,
    select: Selection | Sequence[Selection] | None,
    norm_layer: NormLayer | Literal["match"] | None,
    layer: str,
    arguments: dict[str, Any],
) -> dict[nn.Module, Any]:
    """The new layers, by the convolutions that they replace."""
    candidates = convolutions(model)
    chosen = choose(model, candidates, select)
    owners = weight_owners(model)
    kinds = _KINDS[layer]
    obstacles = {name: obstacle(module, owners, kinds) for name, module in chosen.items()}
    if all(obstacles.values()):
        raise ValueError(nothing_selected(model, candidates, obstacles, select))
    kind = most_common_norm(model)
    branch = arguments.pop("branch", None)
    branches = None if branch is None else BranchesOfNetwork(branch)
    counterparts: dict[nn.Module, Any] = {}
    for name, old in chosen.items():
        if obstacles[name]:
            _log.warning("convert: %s is left as it is: %s", name, obstacles[name])
        else:
            norm = norm_like(kind, len(old.kernel_size)) if norm_layer == "match" else norm_layer
            made = {} if branches is None else {"branch": functools.partial(_named_branch, branches, name)}
            counterparts[old] = _counterpart(name, old, kinds, norm_layer=norm, **made, **arguments)
    return counterparts


def _named_branch(branches: BranchesOfNetwork, name: str, spec: BranchSpec) -> BaseBranch:
    return branches(replace(spec, name=name))


def _start_as_identity(model: nn.Module, counterparts: Mapping[nn.Module, AWConv1d | AWConv2d | AWConv3d]) -> None:
    names = {module: name for name, module in model.named_modules()}
    started: set[BaseBranch] = set()  # layers may share one
    for old, layer in counterparts.items():
        for branch in layer.branches():
            if branch in started:
                continue
            started.add(branch)
            try:
                branch.start_as_identity()
            except ValueError as error:
                raise ValueError(f"convert: layer {names[old]!r}: {error}") from error


def _replaced(model: nn.Module, counterparts: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """The model with its layers' counterparts in their places, or its own counterpart."""
    if model in counterparts:
        return counterparts[model]
    keep_attention(model, set(counterparts))
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in counterparts:
                parent._modules[name] = counterparts[child]
    return model


def weight_owners(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """The modules that hold each parameter of a model, by name; a module that occurs twice counts once."""
    owners: dict[nn.Parameter, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(parameter, []).append(name)
    return owners


def obstacle(
    module: Convolution,
    owners: dict[nn.Parameter, list[str]],
    kinds: Mapping[type[nn.Module], type[nn.Module]] = COUNTERPARTS,
) -> str | None:
    """Why a convolution cannot be converted exactly; None if it can.

    Args:
        module: the convolution.
        owners: of its model, by :func:`weight_owners`.
        kinds: the layers that there are for each class of convolutions.
    """
    if isinstance(module, ODConv2d):
        return "it is an ODConv2d, which has attention of its own"
    if isinstance(module, LazyModuleMixin):
        return f"{type(module).__name__} is not initialised; call the model once"
    if is_parametrized(module):
        return "it is parametrised"
    if has_hooks(module):
        return "it has hooks"
    if not isinstance(module.weight, nn.Parameter):
        return f"its weight is a {type(module.weight).__name__}, not a parameter"
    if module.weight.dtype not in _DTYPES:
        return f"its weights are {module.weight.dtype}"
    if _plain_kind(module) is None:
        return f"{type(module).__name__} computes something of its own"
    if _plain_kind(module) not in kinds:
        return f"there is no such layer for {type(module).__name__}, only for {', '.join(k.__name__ for k in kinds)}"
    expected = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    if tuple(module.weight.shape) != expected:
        return f"its weight has shape {tuple(module.weight.shape)}, and its arguments say {expected}"
    if len(owners[module.weight]) > 1:
        return f"its weight is shared by {' and '.join(owners[module.weight])}"
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether something of a user's is called with a module, its backward or its state dict."""
    return any(getattr(module, hooks) for hooks in _HOOKS)


def _plain_kind(module: Convolution) -> type[nn.Module] | None:
    """The class whose computation a convolution's is; None for a subclass with its own."""
    if set(module._parameters) != {"weight", "bias"} or module._buffers or module._modules:
        return None
    for plain in type(module).__mro__:
        if plain in COUNTERPARTS:
            same = all(
                getattr(type(module), method) is getattr(plain, method)
                for method in ("forward", "_conv_forward", "__call__")
            )
            return plain if same and not {"forward", "_conv_forward"} & set(vars(module)) else None
    return None


def arguments_of(layer: Convolution) -> tuple[Any, ...]:
    """The arguments by which a convolution, plain or AW, is made again, in the order that all kinds share."""
    return (
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        layer.bias is not None,
    )


def carry_attributes(old: nn.Module, new: nn.Module, but: Collection[str] = ()) -> None:
    """Puts what someone has put on a layer on the one that takes its place.

    Left out are private attributes, by which libraries run something in the place of the old layer's forward, names
    that the new layer has a use for and the old one had not, and those named.
    """
    for name, value in vars(old).items():
        used = name in vars(new) or (hasattr(new, name) and not hasattr(type(old), name))
        if not (used or name.startswith("_") or name in but):
            vars(new)[name] = value


def _counterpart(
    name: str, old: Convolution, kinds: Mapping[type[nn.Module], type[nn.Module]], **arguments: Any
) -> nn.Module:
    plain = _plain_kind(old)
    assert plain is not None  # which would be an obstacle
    kind: Any = kinds[plain]
    try:
        new = kind(
            *arguments_of(old),
            padding_mode=old.padding_mode,
            device=old.weight.device,
            dtype=old.weight.dtype,
            **arguments,
        )
    except ValueError as error:
        raise ValueError(f"convert: layer {name!r}: {error}") from error
    new.weight = old.weight
    new.bias = old.bias
    new._reversed_padding_repeated_twice = old._reversed_padding_repeated_twice  # made when the old layer was
    carry_attributes(old, new)
    counterpart: nn.Module = new.train(old.training)
    return counterpart
