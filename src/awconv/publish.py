"""Writes a finished run's weights, or its adapter, with a model card."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from awconv.adapter import save_adapter
from awconv.extras import require

require("lightning", extra="train")

from awconv.compare.record import Record
from awconv.compare.recorder import recorded
from awconv.models.published import ADAPTER, CARD, CONFIG, FILE, WEIGHTS, sha256
from awconv.sources import load_task
from awconv.tables import markdown_cell
from awconv.tasks import ClassificationTask
from awconv.tasks.adapted import described, load_adapted
from awconv.terminal import printable
from awconv.training.checkpoints import find_last, read_checkpoint


def publish(
    run: Path, tag: str, data: str, recipe: str, out: Path = Path("weights"), license: str = "apache-2.0"
) -> int:
    """Writes a finished run's weights, their configuration and a model card.

    The folder has the layout of Hugging Face's hub. ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads
    it; once uploaded, ``hf-hub:NAME`` does too.

    Of a run whose ``train_only`` froze parameters, it writes what was trained, as ``adapter.safetensors``, which
    ``awconv predict`` and :func:`awconv.load_adapter` put on the pretrained base. The network may then be converted or
    have arguments.

    Args:
        run: the record of a run of ``awconv compare``, with its checkpoints beside it.
        tag: name of the weights after the network's name, such as ``cifar10``.
        data: the training data, in words.
        recipe: the recipe's path, as the card's command names it.
        out: the folder in which the folder ``NETWORK.TAG`` is made.
        license: the weights' licence, an SPDX identifier.

    Returns:
        The exit status, 0.

    Raises:
        FileNotFoundError: the record or its checkpoint is missing.
        ValueError: the file is not a record, its network has arguments of its own, the base of an adapter is not to be
            had, or a text does not fit into a card.
    """
    _check_texts(tag, license, data=data, recipe=recipe)
    record, task = _finished(run)
    network: Any = task.evaluated.cpu()
    name = f"{record.network}.{tag}"
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    adapts = _adapts(task)
    weights = folder / (ADAPTER if adapts else FILE)
    if adapts:
        _write_adapter(task, weights)
    else:
        save_file(network.state_dict(), weights)
    weights.chmod(0o644)  # for all who may use the package
    config = dict(
        architecture=record.network,
        num_classes=len(task.classes),
        num_features=getattr(network, "num_features", None),
        pretrained_cfg=_pretrained_cfg(network, task, tag, license),
        sha256=sha256(weights),
    )
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    packaged = out.resolve() == WEIGHTS.resolve()
    place = None if packaged else folder
    how = _adapting(task, weights) if adapts else _loading(record, name, recipe, place)
    (folder / CARD).write_text(_card(record, name, data, recipe, license, how))
    print(printable(f"{name}: {record.test_split} accuracy {100 * record.score:.2f} %, in {folder}"))
    return 0


def _check_texts(tag: str, license: str, **lines: str) -> None:
    """Raises a ValueError for a text that does not fit into a card or a folder's name."""
    if not re.fullmatch(r"\w[\w.-]{0,99}", tag, re.ASCII):
        raise ValueError(
            f"tag must be a name, without folders, of letters, digits, '.', '-' and '_', at most 100, got {tag[:120]!r}"
        )
    if not re.fullmatch(r"[\w.+() -]{1,200}", license, re.ASCII):
        raise ValueError(f"license must be an SPDX identifier such as apache-2.0, got {license[:120]!r}")
    for name, text in lines.items():
        if not text.strip() or not text.isprintable():
            raise ValueError(f"{name} must be one line of text, got {text[:120]!r}")


def _finished(run: Path) -> tuple[Record, ClassificationTask]:
    """A run's record and the task of its last checkpoint.

    Raises:
        FileNotFoundError: the record or its checkpoint is missing.
        ValueError: they do not belong together, or the network's name alone does not describe the network.
    """
    if not run.is_file():
        raise FileNotFoundError(f"run {run} is not a file; expected one of awconv compare, such as aw-seed0.json")
    if run.suffix != ".json":
        raise ValueError(f"run must be a record of awconv compare, such as runs/RECIPE/aw-seed0.json, got {run}")
    record, last = Record.load(run), find_last(run.with_suffix(""))
    if last is None:
        raise FileNotFoundError(f"there is no checkpoint under {run.with_suffix('')}, where the run's should be")
    checkpoint = read_checkpoint(last)
    if checkpoint["epoch"] + 1 != len(record.epochs) or recorded(checkpoint) != record.epochs:
        raise ValueError(f"{last} is not the last checkpoint of the run {run}: train the run anew")
    task = load_task(last)
    if not isinstance(task, ClassificationTask):
        raise ValueError(f"only classifiers are published, and {run} is of a detector")
    if record.network != task.network_name:
        raise ValueError(f"{run} says that its network is {record.network}, and {last} {task.network_name}")
    if _adapts(task) and not task.pretrained:
        raise ValueError(
            "an adapter needs its base, and that of a run with train_only and without pretrained was random; train on "
            f"--model.pretrained, or keep the checkpoint, {last}"
        )
    if not _adapts(task) and (task.network_args or task.conversion):
        raise ValueError(
            "a network with network_args or convert cannot be loaded by its name alone, so it is not published; keep "
            f"its checkpoint, {last}"
        )
    return record, task


def _pretrained_cfg(network: Any, task: ClassificationTask, tag: str, license: str) -> dict[str, Any]:
    """timm's configuration of the weights: classes and preprocessing."""
    cfg = {
        key: value
        for key, value in getattr(network, "pretrained_cfg", {}).items()
        if key not in ("url", "file", "hf_hub_id", "source", "architecture")
    }
    return cfg | dict(
        tag=tag,
        input_size=task.input_size,
        num_classes=len(task.classes),
        crop_pct=task.crop_pct,
        mean=task.channel_means,
        std=task.channel_deviations,
        label_names=task.classes,
        license=license,
    )


def _adapts(task: ClassificationTask) -> bool:
    """Whether a part of the parameters was trained; with all of them, there is no base."""
    return task.trained is not None and task.trained.trained < task.trained.parameters


def _write_adapter(task: ClassificationTask, file: Path) -> None:
    """Writes an adapter, and makes sure that it can be loaded on its base."""
    save_adapter(task.network, file, values=task.evaluated, metadata=described(task))
    try:
        load_adapted(file, Path(task.pretrained) if isinstance(task.pretrained, str) else None)
    except (ValueError, OSError):
        file.unlink()
        raise


def _card(record: Record, name: str, data: str, recipe: str, license: str, how: str) -> str:
    """The model card. ``how`` says what there is, how it is loaded, and where its figure comes from."""
    epochs = len(record.epochs)
    versions = markdown_cell(", ".join(f"{key} {value}" for key, value in record.versions.items()))
    validation = record.epochs[-1].val_score
    held_out = "" if validation is None else f" ({100 * validation:.2f} % on the images held out for validation)"
    return f"""---
license: {license}
library_name: timm
tags: [image-classification, timm, awconv]
---
# {name}

`{record.network}`, {record.parameters:,} parameters trained on {data} by awconv, a library for
[AW-convolution](https://arxiv.org/abs/2108.08205).

| | |
| --- | --- |
| {record.test_split} accuracy | {100 * record.score:.2f} %{held_out} |
| recipe | `{recipe}`, {epochs} epochs, the network of the last one |
| seed | {record.seed} |
| made with | {versions} |
| licence | {license} |

{how}"""


def _loading(record: Record, name: str, recipe: str, folder: Path | None) -> str:
    """How whole weights are loaded and tested. ``folder`` is None for those that the package ships, loaded by name."""
    return f"""```python
import awconv, timm

model = timm.create_model("{name if folder is None else f"local-dir:{folder}"}", pretrained=True)
```

The figure comes from

    {_command(record, name, recipe, folder)}

{_SPREAD}{_SMALL if folder is None else ""}
"""


def _adapting(task: ClassificationTask, file: Path) -> str:
    """How an adapter is put on its base."""
    arguments = dict(pretrained=True, num_classes=len(task.classes), in_chans=task.input_size[0]) | task.network_args
    given = "".join(f", {key}={value!r}" for key, value in arguments.items())
    base, imported, option = "timm's weights for it", "", ""
    if isinstance(task.pretrained, str):
        base, option = f"the weights `{task.pretrained}`", f" --pretrained={task.pretrained}"
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

    awconv predict --ckpt={file}{option} IMAGES

{_SPREAD.replace("It", "The figure", 1)}
"""


_SPREAD = "It is that of one run; the comparison that the run belongs to shows the spread over seeds."
_SMALL = (  # of those that the package ships
    " A small network on small images: made\nfor tests and demonstrations, not for use on pictures of another kind."
)


def _command(record: Record, name: str, recipe: str, folder: Path | None) -> str:
    weights = f"{name} --model.pretrained=true"
    if folder is not None:
        weights = f"{record.network} --model.pretrained={folder / FILE}"
    config = f"--config={recipe} " if recipe.endswith((".yaml", ".yml")) else ""  # the digits are the default
    return f"awconv {record.test_split.replace('val', 'validate')} {config}--model.network={weights}"
