"""The convolutions of a network, and which of them a user selects."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from awconv.layers import AW_LAYERS
from awconv.odconv import WITH_BRANCHES

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Predicate = Callable[[str, nn.Module], bool]
Selection = str | re.Pattern[str] | Predicate


def convolutions(model: nn.Module) -> dict[str, Convolution]:
    """The convolutions of a model that are not AW-convolutions or parts of their branches, by name."""
    branches = parts_of_branches(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Convolution) and not isinstance(module, AW_LAYERS) and module not in branches
    }


def parts_of_branches(model: nn.Module) -> set[nn.Module]:
    """The modules in the attention branches of a model, those of ODConvs included."""
    layers = (module for module in model.modules() if isinstance(module, WITH_BRANCHES))
    branches: set[nn.Module] = {branch for layer in layers for branch in layer.branches()}
    return {part for branch in branches for part in branch.modules()}


def is_spatial(module: Convolution) -> bool:
    """Whether a convolution looks at more than one position."""
    return max(module.kernel_size) > 1


def stem(model: nn.Module) -> str | None:
    """The name of a model's first spatial convolution, AW or not; None for a model that is a convolution itself."""
    for name, module in model.named_modules():
        if name != "" and isinstance(module, Convolution) and is_spatial(module):
            return str(name)
    return None


def choose(
    model: nn.Module, candidates: dict[str, Convolution], select: Selection | Sequence[Selection] | None
) -> dict[str, Convolution]:
    """The convolutions that are selected, by name.

    Args:
        model: a network.
        candidates: its convolutions.
        select: as for :func:`awconv.convert`.

    Raises:
        TypeError: a selection is of another type.
        ValueError: a selection matches no convolution, or one that is an AW-convolution already.
    """
    if select is None:
        first = stem(model)
        return {name: module for name, module in candidates.items() if is_spatial(module) and name != first}
    # A shared module has several names, and candidates know it by its first.
    known = set(candidates.values())
    named = {name: module for name, module in model.named_modules(remove_duplicate=False) if module in known}
    several = isinstance(select, Sequence) and not isinstance(select, str)
    selections: Any = select if several else [select]
    chosen: set[nn.Module] = set()
    matches: Callable[[str], Any]
    for selection in selections:
        if isinstance(selection, str):
            pattern, matches = selection, functools.partial(fnmatchcase, pat=selection)
        elif isinstance(selection, re.Pattern):
            pattern, matches = selection.pattern, selection.fullmatch
        elif callable(selection) and not isinstance(selection, type):
            chosen |= {module for name, module in named.items() if selection(name, module)}
            continue
        else:
            raise TypeError(
                "convert: select must be a layer's name, a glob such as 'layer4.*', a compiled regular expression, a "
                "function of a layer's name and the layer such as lambda name, layer: layer.groups == 1, or a list of "
                f"these; got {selection!r}"
            )
        matched = {module for name, module in named.items() if matches(name)}
        if not matched and candidates:
            if any(matches(name) for name, module in model.named_modules() if isinstance(module, AW_LAYERS)):
                raise ValueError(f"convert: {pattern!r} is an AW-convolution already; leave it out of select")
            alike = ", ".join(map(repr, near(pattern, list(named))))
            raise ValueError(f"convert: no convolution is called {pattern!r}; near it: {alike}")
        chosen |= matched
    return {name: module for name, module in candidates.items() if module in chosen}


def near(pattern: str, names: list[str]) -> list[str]:
    """The names that a user may have meant: those below a module of that name, else those spelt alike."""
    below = [name for name in names if name.startswith(pattern.rstrip("*.\\$") + ".")]
    if below:
        return [pattern.rstrip("*.\\$") + ".*", *below[:5]]
    words = re.sub(r"[^\w.]+", "", pattern)
    alike = difflib.get_close_matches(words, names, n=6, cutoff=0.5)
    return alike or names[:6]


def nothing_selected(
    model: nn.Module,
    candidates: dict[str, Convolution],
    obstacles: dict[str, str | None],
    select: Selection | Sequence[Selection] | None,
) -> str:
    """What to tell a user whose selection leaves nothing to convert.

    Args:
        model: a network.
        candidates: its convolutions.
        obstacles: why each selected convolution cannot be converted, by name.
        select: as for :func:`awconv.convert`.
    """
    name = type(model).__name__
    there = sum(isinstance(module, AW_LAYERS) for module in model.modules())
    if not candidates and there:
        return (
            f"convert: {name} is converted already: it has AW-convolutions only ({there}). awconv.revert makes plain "
            "convolutions of them again"
        )
    if not candidates:
        return f"convert: no convolution of {name} was selected for conversion; it has none"
    if obstacles:
        listed = "; ".join(f"{name!r}: {obstacle}" for name, obstacle in list(obstacles.items())[:8])
        return f"convert: no convolution of {name} that was selected can be converted exactly: {listed}"
    listed = ", ".join(f"{name!r} ({module})" for name, module in list(candidates.items())[:8])
    if select is None and there:
        return (
            f"convert: {name} is converted already: its {there} AW-convolutions are all that convert selects by "
            f"default. select= converts others, too; there are {listed}. awconv.revert makes plain convolutions again"
        )
    default = ". By default only kernels larger than 1 are, without the first one; give select="
    already = f". {there} others are AW-convolutions already" if there else ""
    return f"convert: no convolution of {name} was selected for conversion; it has {listed}{already}" + (
        "" if select is not None else default
    )
