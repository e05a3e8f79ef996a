"""The card of published weights: text for people, and a table of figures for Hugging Face's hub."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import yaml

from awconv.models.published import CONFIG, FILE
from awconv.own_code import imported_for
from awconv.tables import markdown_cell
from awconv.tasks import ClassificationTask


@dataclass(frozen=True)
class Trained:
    """A network to publish, and what its card says of the training.

    Attributes:
        task: with the weights.
        name: of the network, without a tag.
        seed: of the run.
        epochs: that were trained.
        versions: of awconv, torch, timm and Python, where they are known.
        scores: the accuracy, from 0 to 1, by the name of its split; empty if none was evaluated.
        settings: of the training, dotted names and values as JSON; empty for a run with a recipe.
        dataset: the data set's id on Hugging Face's hub, or None.
    """

    task: ClassificationTask
    name: str
    seed: int
    epochs: int
    versions: Mapping[str, str]
    scores: Mapping[str, float]
    settings: Mapping[str, str]
    dataset: str | None = None

    @property
    def split(self) -> str:
        """The split of the first score, on which the command of the card evaluates."""
        return next(iter(self.scores), "test")


_SPLITS = {"test": "test", "val": "validation"}


def card(trained: Trained, name: str, data: str, recipe: str | None, license: str, how: str, adapts: bool) -> str:
    """The model card.

    Args:
        trained: the network.
        name: of the weights, the network's with a tag.
        data: the training data, in words.
        recipe: the recipe's path, or None.
        license: an SPDX identifier.
        how: what there is, how it is loaded, and where its figure comes from, by :func:`loading` or :func:`adapting`.
        adapts: the weights are an adapter.
    """
    parameters = sum(parameter.numel() for parameter in trained.task.network.parameters() if parameter.requires_grad)
    rows = [(f"{_SPLITS[split]} accuracy", f"{100 * score:.2f} %") for split, score in trained.scores.items()]
    rows.append(("recipe", f"`{recipe}`, {trained.epochs} epochs, the network of the last one"))
    if recipe is None:
        rows[-1] = ("epochs", str(trained.epochs))
    rows.append(("seed", str(trained.seed)))
    if trained.versions:
        rows.append(("made with", ", ".join(f"{key} {version}" for key, version in trained.versions.items())))
    rows.append(("licence", license))
    table = "\n".join(f"| {heading} | {markdown_cell(cell)} |" for heading, cell in rows)
    converted = "" if trained.task.conversion is None else ", converted by awconv"
    return f"""---
{_metadata(trained, name, data, license, adapts)}---
# {name}

`{trained.name}`{converted}, {parameters:,} parameters trained on {data} by awconv, a library for
[AW-convolution](https://arxiv.org/abs/2108.08205).

| | |
| --- | --- |
{table}

{how}"""


def _metadata(trained: Trained, name: str, data: str, license: str, adapts: bool) -> str:
    """What the hub reads of a card: YAML, whose keys and model index are the hub's."""
    told: dict[str, Any] = dict(
        license=license,
        library_name="timm",
        pipeline_tag=_TASK,
        tags=[_TASK, "timm", "awconv", *(["adapter"] if adapts else [])],
    )
    if trained.dataset is not None:
        told["datasets"] = [trained.dataset]
    base = _base(trained.task)
    if base is not None:
        told |= dict(base_model=base, base_model_relation="adapter" if adapts else "finetune")
    if trained.scores:
        # A figure without a data set of the hub is listed under a name of its own.
        kind = trained.dataset or re.sub(r"[^a-z0-9]+", "-", data.lower()).strip("-")[:60] or "unknown"
        results = [
            dict(
                task=dict(type=_TASK, name="Image classification"),
                dataset=dict(type=kind, name=data, split=_SPLITS[split]),
                metrics=[dict(type="accuracy", name="accuracy", value=round(score, 4))],
            )
            for split, score in trained.scores.items()
        ]
        told["model-index"] = [dict(name=name, results=results)]
    return yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=120)


_TASK = "image-classification"


def _base(task: ClassificationTask) -> str | None:
    """The id on the hub of the weights that a training started from, if they are timm's."""
    cfg: Any = timm.get_pretrained_cfg(task.network_name) if task.pretrained is True else None
    hub_id = getattr(cfg, "hf_hub_id", None)
    return hub_id if isinstance(hub_id, str) else None


def loading(trained: Trained, name: str, recipe: str | None, folder: Path | None) -> str:
    """How whole weights are loaded and tested. ``folder`` is None for those that the package ships, loaded by name."""
    source = name if folder is None else str(folder)
    figure = "The first figure comes from" if trained.scores else "This evaluates it:"
    return f"""```python
import awconv, timm

loaded = awconv.load({json.dumps(source, ensure_ascii=False)})  # loaded.network, loaded.classes, loaded.transform
model = timm.create_model("{name if folder is None else f"local-dir:{folder}"}", pretrained=True)
```

{figure}

    {_command(trained, name, recipe, folder)}

{_SPREAD if recipe is not None else _ALONE}{_SMALL if folder is None else ""}
"""


def adapting(task: ClassificationTask, file: Path) -> str:
    """How an adapter is put on its base."""
    arguments = dict(pretrained=True, num_classes=len(task.classes), in_chans=task.input_size[0]) | task.network_args
    given = "".join(f", {key}={value!r}" for key, value in arguments.items())
    base, imported, option = "timm's weights for it", "", ""
    if isinstance(task.pretrained, str):
        base, option = f"the weights `{task.pretrained}`", f" {shlex.quote(f'--pretrained={task.pretrained}')}"
        imported = "from awconv.models.pretrained import weights_overlay\n"
        given += f", pretrained_cfg_overlay=weights_overlay({task.network_name!r}, {task.pretrained!r})"
    lines = [f"model = timm.create_model({task.network_name!r}{given})"]
    if task.conversion is not None:
        lines.append(f"awconv.convert(model, **{task.conversion!r})")
    lines.append(f"awconv.load_adapter(model, {str(file)!r}).eval()")
    code = "\n".join(lines)
    return f"""`{file.name}` is an adapter: what was trained of the network on
{base}. It {task.trained}.

```python
import awconv, timm
{imported}
{code}
```

The classes are `label_names` in `{CONFIG}`. This predicts images:

    awconv predict {shlex.quote(f"--ckpt={file}")}{option} IMAGES

{_SPREAD.replace("It", "The figure", 1)}
"""


_SPREAD = "It is that of one run; the comparison that the run belongs to shows the spread over seeds."
_ALONE = "One run shows no spread: `awconv compare` trains several."
_SMALL = (  # of those that the package ships
    " A small network on small images: made\nfor tests and demonstrations, not for use on pictures of another kind."
)


def _command(trained: Trained, name: str, recipe: str | None, folder: Path | None) -> str:
    task, weights = trained.task, f"{name} --model.pretrained=true"
    own = ",".join(imported_for(trained.name))
    imported = f"{shlex.quote(f'--import={own}')} " if own else ""
    if folder is not None:
        weights = f"{trained.name} {shlex.quote(f'--model.pretrained={folder / FILE}')}"
    for option, value in (("network_args", task.network_args), ("convert", task.conversion)):
        if value or (option == "convert" and value is not None):
            weights += f" {shlex.quote(f'--model.{option}={json.dumps(value)}')}"
    config = (
        f"{shlex.quote(f'--config={recipe}')} " if recipe and recipe.endswith((".yaml", ".yml")) else ""
    )  # digits are the default
    command = "validate" if trained.split == "val" else trained.split
    return f"awconv {command} {imported}{config}{_data(trained)}--model.network={weights}"


def _data(trained: Trained) -> str:
    """The arguments that name the data of a checkpoint's training."""
    given = {name.removeprefix("data."): value for name, value in trained.settings.items() if name.startswith("data.")}
    kind = json.loads(given.pop("class_path", '""')).rpartition(".")[2]
    if not kind:
        return ""
    chosen = {name.removeprefix("init_args."): json.loads(value) for name, value in given.items()}
    named = [shlex.quote(f"--data.{name}={chosen[name]}") for name in _DATA if name in chosen]
    return " ".join([f"--data={kind}", *named, ""])


_DATA = ("root", "train", "val", "test", "image_size", "crop_pct", "val_fraction", "split_seed")
