"""Variants of a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import timm

from awconv.models import BASELINES, variants
from awconv.training.recipe import Recipe
from awconv.yaml_files import read_recipe

_NETWORK = "--model.network"
_SILENCED = ("--trainer.logger", "--trainer.enable_progress_bar", "--trainer.enable_model_summary")
_INSTEAD = {
    "--seed_everything": "--seeds of the comparison counts them from 0",
    "--trainer.default_root_dir": "--out of the comparison names the folder of all",
    **dict.fromkeys(_SILENCED, "leave it out: the report has the curves, and one bar shows all runs"),
}


@dataclass(frozen=True)
class Variant:
    """A recipe with changes.

    Attributes:
        name: such as ``"aw"``.
        recipe: the recipe with the changes.
        tuned: the value of each setting that was chosen for this variant.
        tuned_epochs: number of epochs of the runs by which it was chosen.
        trial_of: the variant that this one tries a setting for; empty if it tries none.
    """

    name: str
    recipe: Recipe
    tuned: Mapping[str, float] = field(default_factory=dict)
    tuned_epochs: int = 0
    trial_of: str = ""

    @property
    def family(self) -> str:
        """The name of the variant whose runs take as long for each epoch."""
        return self.trial_of or self.name


@dataclass(frozen=True)
class Change:
    """What a variant changes in a recipe.

    Attributes:
        name: of the variant.
        overlay: a YAML file laid over the recipe; overrides of all variants come after it.
        network: replaces the recipe's.
        arguments: further arguments of ``awconv fit``.
    """

    name: str
    overlay: Path | None = None
    network: str | None = None
    arguments: tuple[str, ...] = ()

    def apply(self, recipe: Path, overrides: Sequence[str]) -> Variant:
        """Makes the variant of a recipe.

        Args:
            recipe: a YAML file for ``awconv fit``.
            overrides: further arguments of all variants.

        Raises:
            UsageError: the parser refused the settings.
        """
        parsed = Recipe.parse(
            [
                f"--config={recipe}",
                *([] if self.overlay is None else [f"--config={self.overlay}"]),
                *overrides,
                *([] if self.network is None else [f"{_NETWORK}={self.network}"]),
                *self.arguments,
                *(f"{silenced}=false" for silenced in _SILENCED),
            ]
        )
        return Variant(self.name, parsed)


def check_overrides(overrides: Sequence[str]) -> None:
    """Raises a ValueError for an override that the comparison itself sets for each run."""
    for override in overrides:
        name, _, value = override.partition("=")
        if name in _INSTEAD and not (name in _SILENCED and value.lower() == "false"):  # which they are
            raise ValueError(f"{name} cannot be given for the runs of a comparison; {_INSTEAD[name]}")


def read_base(recipe: Path, overrides: Sequence[str]) -> Recipe:
    """The recipe with overrides, before any change.

    Raises:
        FileNotFoundError: the recipe is missing.
        UsageError: the parser refused the settings.
        ValueError: the recipe names no network.
    """
    named = read_recipe(recipe).get("model", {}).get("network") is not None
    if not named and not any(override.partition("=")[0] == _NETWORK for override in overrides):
        raise ValueError(f"recipe {recipe} must name a network under model.network")
    return Recipe.parse([f"--config={recipe}", *overrides])


def find_change(base: str, given: str) -> Change:
    """What a variant changes, given its name.

    Args:
        base: the recipe's network.
        given: ``plain`` for the recipe as it is; ``aw``, ``se``, ``aw_se``, ... for the same network with that
            attention, ``aw`` of a network that has no AW version in timm by :func:`awconv.convert`; the name of another
            network of timm; or a YAML file laid over the recipe.

    Raises:
        FileNotFoundError: the YAML file is missing.
        ValueError: there is no such network.
    """
    if given.endswith((".yaml", ".yml")):
        path = Path(given)
        if not path.is_file():
            raise FileNotFoundError(f"variant {given} is not a file; expected YAML with what differs from the recipe")
        return Change(path.stem, overlay=path)
    networks = {"plain": base} | variants(base)
    if given == "aw" and given not in networks and base not in BASELINES:
        return Change(given, network=base, arguments=("--model.convert={}",))
    if given in networks or timm.is_model(given):
        return Change(given, network=networks.get(given, given))
    known = ", ".join(dict.fromkeys((*networks, "aw")))
    raise ValueError(
        f"there is no variant {given!r} of {base}; there are {known}, any other network of timm by its "
        "name, or a YAML file that is laid over the recipe, such as 'model: {convert: {init: fresh}}' for AW"
    )
