"""Writes a finished run's weights, or its adapter, with a model card."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from awconv.adapter import save_adapter
from awconv.extras import require

require("lightning", extra="train")

from awconv.compare.record import Record
from awconv.compare.recorder import recorded
from awconv.model_card import Trained, adapting, card, loading
from awconv.models.published import ADAPTER, CARD, CONFIG, FILE, WEIGHTS, sha256
from awconv.rebuild import CONVERTED
from awconv.sources import load_task
from awconv.tasks import ClassificationTask
from awconv.tasks.adapted import described, load_adapted
from awconv.tasks.task import FIGURES
from awconv.terminal import printable
from awconv.training.checkpoints import find_last, read_checkpoint
from awconv.training.same import SameSettings


def publish(
    run: Path,
    tag: str,
    data: str,
    recipe: str | None = None,
    out: Path = Path("weights"),
    license: str = "apache-2.0",
    dataset: str | None = None,
) -> int:
    """Writes a trained network's weights, their configuration and a model card.

    The folder has the layout of Hugging Face's hub. :func:`awconv.load` and ``awconv predict --ckpt=FOLDER`` take it;
    after ``import awconv``, ``timm.create_model("local-dir:FOLDER", pretrained=True)`` does too, and once uploaded
    ``hf-hub:NAME``. A converted network is described by the network and the arguments of its conversion.

    Of a run whose ``train_only`` froze parameters, it writes what was trained, as ``adapter.safetensors``, which
    ``awconv predict`` and :func:`awconv.load_adapter` put on the pretrained base.

    Args:
        run: the record of a run of ``awconv compare``, with its checkpoints beside it, or a checkpoint of ``awconv
            fit``.
        tag: name of the weights after the network's name, such as ``cifar10``.
        data: the training data, in words.
        recipe: the recipe's path, as the card's command names it. A run of ``compare`` needs it; for a checkpoint, the
            data's settings are named without one.
        out: the folder in which the folder ``NETWORK.TAG`` is made.
        license: the weights' licence, an SPDX identifier.
        dataset: the training data's id on the hub, OWNER/NAME, for the card's metadata; CIFAR's is known.

    Returns:
        The exit status, 0.

    Raises:
        FileNotFoundError: the record or its checkpoint is missing.
        ValueError: the file is neither, the base of an adapter is not to be had, or a text does not fit into a card.
    """
    _check_texts(tag, license, data=data, **({} if recipe is None else {"recipe": recipe}))
    if dataset is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", dataset, re.ASCII):
        raise ValueError(f"dataset must be a data set's id on the hub, such as uoft-cs/cifar10, got {dataset[:120]!r}")
    trained = _of_checkpoint(run) if run.suffix == ".ckpt" else _of_run(run, recipe)
    trained = trained if dataset is None else replace(trained, dataset=dataset)
    _check_base(trained.task, run)
    task, name = trained.task, f"{trained.name}.{tag}"
    network: Any = task.evaluated.cpu()
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    adapts = _adapts(task)
    weights = folder / (ADAPTER if adapts else FILE)
    if adapts:
        _write_adapter(task, weights)
    else:
        save_file(_unshared(network.state_dict()), weights)
    weights.chmod(0o644)  # for all who may use the package
    config = dict(
        **_architecture(trained.name, task),
        num_classes=len(task.classes),
        label_names=task.classes,  # for transformers, which does not look into pretrained_cfg
        num_features=getattr(network, "num_features", None),
        pretrained_cfg=_pretrained_cfg(network, task, tag, license),
        sha256=sha256(weights),
    )
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    packaged = out.resolve() == WEIGHTS.resolve()
    place = None if packaged else folder
    how = adapting(task, weights) if adapts else loading(trained, name, recipe, place)
    (folder / CARD).write_text(card(trained, name, data, recipe, license, how, adapts))
    said = [f"{split} accuracy {100 * score:.2f} %, " for split, score in list(trained.scores.items())[:1]]
    print(printable(f"{name}: {''.join(said)}in {folder}"))
    return 0


def _architecture(name: str, task: ClassificationTask) -> dict[str, Any]:
    """The network and its arguments, as timm's configurations have them; transformers learns channels from these."""
    channels = dict(in_chans=task.input_size[0])
    if task.conversion is not None:
        arguments = dict(network=name, network_args=task.network_args, convert=task.conversion)
        return dict(architecture=CONVERTED, model_args=arguments | channels)
    return dict(architecture=name, model_args=task.network_args | channels)


def _unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict whose tensors share no memory, as safetensors demands: a branch may belong to several layers."""
    return {name: tensor.clone() for name, tensor in state.items()}


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


def _of_run(run: Path, recipe: str | None) -> Trained:
    """The network of a run's record, of its last checkpoint.

    Raises:
        FileNotFoundError: the record or its checkpoint is missing.
        ValueError: they do not belong together.
    """
    if not run.is_file():
        raise FileNotFoundError(
            f"run {run} is not a file; expected a record of awconv compare, such as aw-seed0.json, or a checkpoint"
        )
    if run.suffix != ".json":
        raise ValueError(
            "run must be a record of awconv compare, such as runs/RECIPE/aw-seed0.json, or a checkpoint (.ckpt), got "
            f"{run}"
        )
    record, last = Record.load(run), find_last(run.with_suffix(""))
    if last is None:
        raise FileNotFoundError(f"there is no checkpoint under {run.with_suffix('')}, where the run's should be")
    checkpoint = read_checkpoint(last)
    if checkpoint["epoch"] + 1 != len(record.epochs) or recorded(checkpoint) != record.epochs:
        raise ValueError(f"{last} is not the last checkpoint of the run {run}: train the run anew")
    task = _classifier(last)
    if record.network != task.network_name:
        raise ValueError(f"{run} says that its network is {record.network}, and {last} {task.network_name}")
    if recipe is None:
        raise ValueError(
            "recipe must be given for a run of awconv compare: the path of the recipe that it was trained by"
        )
    validation = record.epochs[-1].val_score
    held_out = {} if validation is None or record.test_split == "val" else {"val": validation}
    scores = {record.test_split: record.score} | held_out
    dataset = _on_hub(record.recipe.get("data"))
    return Trained(
        task, _untagged(record.network), record.seed, len(record.epochs), record.versions, scores, {}, dataset
    )


def _of_checkpoint(path: Path) -> Trained:
    """The network of a checkpoint of ``awconv fit``.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is something else.
    """
    checkpoint = read_checkpoint(path)
    task = _classifier(path)
    settings: dict[str, Any] = checkpoint["callbacks"].get(SameSettings.__qualname__, {}).get("settings", {})
    score = checkpoint.get(FIGURES, {}).get(f"val/{task.score}")
    return Trained(
        task,
        _untagged(task.network_name),
        int(settings.get("seed_everything", 0)),
        int(checkpoint.get("epoch", 0)) + 1,
        {},
        {} if score is None else {"val": float(score)},
        settings,
        _on_hub({"class_path": json.loads(settings.get("data.class_path", "null"))}),
    )


def _on_hub(data: Any) -> str | None:
    """The id on the hub of the data set that settings name, if it is known."""
    name = data.get("class_path") if isinstance(data, dict) else None
    return _ON_HUB.get(name) if isinstance(name, str) else None


_ON_HUB = {"awconv.data.Cifar10": "uoft-cs/cifar10", "awconv.data.Cifar100": "uoft-cs/cifar100"}


def _classifier(checkpoint: Path) -> ClassificationTask:
    task = load_task(checkpoint)
    if not isinstance(task, ClassificationTask):
        raise ValueError(f"only classifiers are published, and {checkpoint} is of a detector")
    return task


def _untagged(network: str) -> str:
    return network.partition(".")[0]


def _check_base(task: ClassificationTask, run: Path) -> None:
    if _adapts(task) and not task.pretrained:
        raise ValueError(
            "an adapter needs its base, and that of a run with train_only and without pretrained was random; train on "
            f"--model.pretrained, or keep the checkpoint, {run}"
        )


def _pretrained_cfg(network: Any, task: ClassificationTask, tag: str, license: str) -> dict[str, Any]:
    """timm's configuration of the weights: classes and preprocessing."""
    cfg = {
        key: value
        for key, value in getattr(network, "pretrained_cfg", {}).items()
        if not key.startswith(("test_", "label_", "hf_hub_")) and key not in _OF_OTHER_WEIGHTS
    }
    return cfg | dict(
        tag=tag,
        input_size=task.input_size,
        num_classes=len(task.classes),
        crop_pct=task.crop_pct,
        crop_mode="center",
        interpolation=task.interpolation,
        mean=task.channel_means,
        std=task.channel_deviations,
        label_names=task.classes,
        license=license,
    )


_OF_OTHER_WEIGHTS = ("url", "file", "source", "architecture", "state_dict", "custom_load", "origin_url", "license")


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
