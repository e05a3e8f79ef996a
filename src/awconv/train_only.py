"""Trains parts of a network and freezes the rest, statistics of norms included."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from timm.layers import EvoNorm2dB0, EvoNorm2dB1, EvoNorm2dB2, RmsNorm, RmsNorm2d
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from awconv.relative import refuse_fused
from awconv.selection import near, parts_of_branches

_WITH_STATISTICS = (_NormBase, EvoNorm2dB0, EvoNorm2dB1, EvoNorm2dB2)
_NORMS = (*_WITH_STATISTICS, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, RmsNorm, RmsNorm2d)
_CLASSIFIERS = ("fc", "classifier", "head", "heads")  # torchvision's names


@dataclass(frozen=True)
class TrainedParts:
    """What trains of a network; printed, a line.

    Attributes:
        parts: number of parameters that each part trains. One that is in several parts counts for the first of them.
        parameters: of the whole network.
        held_norms: number of norms that keep their statistics, in evaluation mode.

    Examples:
        >>> from awconv.train_only import TrainedParts
        >>> print(TrainedParts({"branch": 30, "head": 10}, parameters=1000, held_norms=2))
        trains 40 of 1,000 parameters (4.00 %): branch 30 (3.00 %), head 10 (1.00 %); 2 norms keep their statistics
    """

    parts: Mapping[str, int]
    parameters: int
    held_norms: int

    @property
    def trained(self) -> int:
        """Number of parameters that train."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {self._share(number)}" for part, number in self.parts.items())
        norms = f"{self.held_norms} norm{' keeps its' if self.held_norms == 1 else 's keep their'} statistics"
        total = f"{self.trained:,} of {self.parameters:,} parameters ({100 * self.trained / self.parameters:.2f} %)"
        return f"trains {total}: {parts}" + (f"; {norms}" if self.held_norms else "")

    def _share(self, number: int) -> str:
        return f"{number:,} ({100 * number / self.parameters:.2f} %)"


def train_only(model: nn.Module, *parts: str) -> TrainedParts:
    """Lets parts of a network train, and freezes the rest.

    What is frozen requires no gradient, and its norms with statistics (BatchNorm) stay in evaluation mode whatever
    ``model.train()`` says, in copies and pickles too: a training changes no bit of them. Dropout follows
    ``model.train()`` as before. A further call replaces the former one, and ``train_only(model, "*")`` lets all train
    again. Call it after :func:`awconv.convert` and ``nn.SyncBatchNorm.convert_sync_batchnorm``, which make other
    layers, and before the network is wrapped for several processes.

    Args:
        model: a network.
        *parts: ``"branch"``, the attention branches with their norms; ``"head"``, the classifier (timm's
            ``get_classifier()``, or torchvision's ``fc``, ``classifier``, ``head`` or ``heads``); ``"norm"``,
            parameters and statistics of the norms outside the branches; or names or globs of modules and parameters,
            such as ``"layer4.*"`` (``*`` matches dots too). A module trains with all below it and its statistics, a
            parameter alone.

    Returns:
        What trains, and how many parameters that are.

    Raises:
        TypeError: the model is no module, or a part is no string.
        ValueError: no part is given, or the network has no such part. The network is left as it was.

    Examples:
        >>> import timm
        >>> import awconv
        >>> model = awconv.convert(timm.create_model("resnet18", num_classes=10), init="identity")
        >>> print(awconv.train_only(model, "branch", "head"))  # doctest: +NORMALIZE_WHITESPACE
        trains 160,434 of 11,336,946 parameters (1.42 %):
            branch 155,304 (1.37 %), head 5,130 (0.05 %); 20 norms keep their statistics
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"train_only: model must be an nn.Module, got {model!r}; timm.create_model makes one of a name")
    if not parts:
        raise ValueError('train_only: name what trains: "branch", "head", "norm", a name or a glob; "*" is all')
    model = unwrapped(model)
    refuse_fused(model, "train_only")
    for part in parts:
        if not isinstance(part, str):
            raise TypeError(f'train_only: each part must be a string, as in train_only(model, "head"), got {part!r}')
    trained: set[nn.Parameter] = set()
    moving: set[nn.Module] = set()  # norms whose statistics follow the images
    counts = {}
    for part in dict.fromkeys(parts):
        parameters, norms = _members(model, part)
        counts[part] = sum(parameter.numel() for parameter in parameters - trained)
        trained |= parameters
        moving |= norms
    for parameter in model.parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(parameter in trained)
        if parameter not in trained:
            parameter.grad = None  # with one, an optimiser that there is already would go on
    held = norms_with_statistics(model) - moving
    for norm in held:
        _hold(norm)
    for norm in moving:
        _release(norm, model.training)
    return TrainedParts(counts, sum(parameter.numel() for parameter in model.parameters()), len(held))


def _members(model: nn.Module, part: str) -> tuple[set[nn.Parameter], set[nn.Module]]:
    """The parameters of a part, and its norms with statistics."""
    modules: set[nn.Module]
    loose: set[nn.Parameter] = set()
    if part == "branch":
        modules = parts_of_branches(model)
    elif part == "head":
        modules = {below for module in classifiers(model) for below in module.modules()}
    elif part == "norm":
        modules = {module for module in set(model.modules()) - parts_of_branches(model) if isinstance(module, _NORMS)}
    else:
        matched = [m for name, m in model.named_modules(remove_duplicate=False) if name and fnmatchcase(name, part)]
        modules = {below for module in matched for below in module.modules()}
        loose = {p for name, p in model.named_parameters(remove_duplicate=False) if fnmatchcase(name, part)}
    parameters = loose | {parameter for module in modules for parameter in module.parameters(recurse=False)}
    norms = modules & norms_with_statistics(model)
    if not parameters and not norms:
        raise ValueError(f"train_only: {_nothing_of(model, part, bool(modules))}")
    return parameters, norms


def _nothing_of(model: nn.Module, part: str, there: bool) -> str:
    """What to tell a user whose part has nothing to train."""
    name = type(model).__name__
    if part == "branch":
        return f'{name} has no AW-convolution; convert it first: awconv.convert(model, init="identity")'
    if part == "head" and there:
        return f"the classifier of {name} has no parameters; timm's model.reset_classifier(classes) makes one"
    if part == "head":
        children = ", ".join(repr(child) for child, _ in model.named_children())
        return (
            f"{name} has no classifier under get_classifier(), {', '.join(_CLASSIFIERS)}; name its modules in place "
            f"of 'head' ({name} has {children or 'none'})"
        )
    if part == "norm":
        return f"{name} has no norm outside attention branches that could train"
    if there:
        return f"{part!r} has neither parameters nor statistics"
    names = [name for name, _ in model.named_modules() if name] + [name for name, _ in model.named_parameters()]
    alike = ", ".join(map(repr, near(part, names)))
    return f'no module and no parameter is called {part!r}; near it: {alike}; or "branch", "head", "norm"'


def unwrapped(model: nn.Module) -> nn.Module:
    """The network in what ``torch.compile`` or processes that train together have wrapped around it."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return unwrapped(model.module)
    inner = model._modules.get("_orig_mod")  # of torch.compile
    return model if inner is None else unwrapped(inner)


def classifiers(model: Any) -> list[nn.Module]:
    """A network's classifier, or its several ones; none if it isn't known."""
    if callable(getattr(model, "get_classifier", None)):
        found = model.get_classifier()
        return [one for one in (found if isinstance(found, Sequence) else [found]) if isinstance(one, nn.Module)]
    there = [getattr(model, name, None) for name in _CLASSIFIERS]
    return [one for one in there if isinstance(one, nn.Module)][:1]


def head_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of a network's classifier; none if it isn't known."""
    return {parameter for module in classifiers(model) for parameter in module.parameters()}


def norms_with_statistics(model: nn.Module) -> set[nn.Module]:
    """The norms of a model with statistics that follow the images in training, attention branches included."""
    return {
        module
        for module in model.modules()
        if isinstance(module, _WITH_STATISTICS) and getattr(module, "running_var", None) is not None
    }


def is_held(norm: nn.Module) -> bool:
    """Whether a norm keeps its statistics, by :func:`train_only`."""
    return getattr(norm.__dict__.get("train"), "func", None) is _stay_in_evaluation


def _hold(norm: nn.Module) -> None:
    norm.train = functools.partial(_stay_in_evaluation, norm)  # type: ignore[method-assign]  # stays in copies, pickles
    norm.train()


def _release(norm: nn.Module, training: bool) -> None:
    if is_held(norm):
        del norm.train
        norm.train(training)


def _stay_in_evaluation(norm: nn.Module, mode: bool = True) -> nn.Module:
    type(norm).train(norm, mode)
    norm.training = False
    return norm
