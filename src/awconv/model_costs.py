"""What each model with attention costs beside its twin without."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Literal

import timm
import torch
from rich.table import Table

from awconv import terminal
from awconv.models.registry import BASELINES
from awconv.summary import summary


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


HEADINGS = ("name", "twin without", "image", "parameters", "added", "multiply-adds, M", "added")


def cells(name: str) -> tuple[str, ...]:
    """The row of a model with attention, by ``HEADINGS``."""
    model, twin = model_cost(name), model_cost(BASELINES[name])
    return (
        name,
        twin.name,
        str(model.image_size),
        f"{model.parameters:,}",
        f"{100 * (model.parameters / twin.parameters - 1):.2f} %",
        f"{model.operations / 1e6:,.2f}",
        f"{100 * (model.operations / twin.operations - 1):.2f} %",
    )


def markdown_table(names: Sequence[str]) -> str:
    """The table as Markdown."""
    rows = [HEADINGS, ("---", "---", *["---:"] * (len(HEADINGS) - 2))]
    rows += [(f"`{name}`", f"`{twin}`", *rest) for name, twin, *rest in map(cells, names)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def models(filter: str = "*", format: Literal["table", "markdown", "json"] = "table") -> int:
    """Prints the models with attention, and what they cost beside their twins without.

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
        pairs = [asdict(model_cost(name)) | {"twin": asdict(model_cost(BASELINES[name]))} for name in names]
        print(json.dumps(pairs, indent=1))
    elif format == "markdown":
        print(markdown_table(names), end="")
    else:
        table = Table(box=None, pad_edge=False)
        for index, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="left" if index < 2 else "right", no_wrap=True)
        for name in names:
            table.add_row(*cells(name))
        terminal.console().print(table)
    return 0
