"""What each model with attention costs beside its baseline, the same network without."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Literal

import timm
import torch

from awconv.models.registry import BASELINES
from awconv.summary import summary
from awconv.tables import Table


@dataclass(frozen=True)
class ModelCost:
    """What a network costs.

    Attributes:
        name: of the network.
        image_size: height and width of the images for which operations are counted.
        parameters: number of them.
        operations: multiply-adds for one image, as :func:`awconv.summary` counts them.
    """

    name: str
    image_size: int
    parameters: int
    operations: int


@functools.cache
def model_cost(name: str) -> ModelCost:
    """Counts a network that timm knows, on the device ``meta``: nothing is computed."""
    with torch.device("meta"):
        model = timm.create_model(name)
        channels, height, width = model.pretrained_cfg["input_size"]  # type: ignore[index]  # a dictionary of timm's
        counts = summary(model, torch.zeros(1, channels, height, width))
    assert counts.operations is not None
    return ModelCost(name, height, counts.parameters, counts.operations)


def cost_table(names: Sequence[str], quote: str = "") -> Table:
    """What networks with attention cost, beside their baselines.

    Args:
        names: of the networks with attention.
        quote: stands around the names, such as a backtick in Markdown.
    """
    headings = ("name", "baseline", "image", "parameters", "added", "multiply-adds, M", "added")
    return Table(headings, [_cells(model_cost(name), model_cost(BASELINES[name]), quote) for name in names])


def _cells(model: ModelCost, baseline: ModelCost, quote: str) -> tuple[str, ...]:
    return (
        f"{quote}{model.name}{quote}",
        f"{quote}{baseline.name}{quote}",
        str(model.image_size),
        f"{model.parameters:,}",
        f"{100 * (model.parameters / baseline.parameters - 1):.2f} %",
        f"{model.operations / 1e6:,.2f}",
        f"{100 * (model.operations / baseline.operations - 1):.2f} %",
    )


def models(filter: str = "*", format: Literal["table", "markdown", "json"] = "table") -> int:
    """Prints the models with attention, and what they cost beside the same networks without.

    Args:
        filter: a glob that the name must match, such as ``aw_*cifar``.
        format: a table, the same as Markdown, or JSON.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: no model matches.
    """
    names = [name for name in BASELINES if fnmatchcase(name, filter)]
    if not names:
        raise ValueError(f"no model matches {filter!r}; there are {', '.join(BASELINES)}")
    if format == "json":
        pairs = [asdict(model_cost(name)) | {"baseline": asdict(model_cost(BASELINES[name]))} for name in names]
        print(json.dumps(pairs, indent=1))
    else:
        cost_table(names, quote="`" if format == "markdown" else "").print(format)
    return 0
