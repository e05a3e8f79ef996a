"""Folds attention of a trained classifier on held-out images, and writes the network as a checkpoint."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Collection, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from pydoc import locate
from typing import Any, Literal

import timm
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from awconv.data import ImageDataModule
from awconv.data.datasets import InMemoryImages
from awconv.data.loading import Split
from awconv.data.order import ALONE, EvaluationBatches
from awconv.fold import FoldReport
from awconv.fold import fold as fold_network
from awconv.layers import AW_LAYERS
from awconv.models import BASELINES
from awconv.roles import Role
from awconv.sources import load_task
from awconv.tasks import ClassificationTask
from awconv.tasks.checks import check_numbers
from awconv.terminal import say
from awconv.training.checkpoints import AtomicCheckpointIO, find_last, read_checkpoint
from awconv.training.data_option import open_data
from awconv.training.same import SameSettings
from awconv.training.settings import Settings


def fold(
    ckpt: str,
    data: dict[str, Any],
    out: Path,
    max_drop: float = 0.1,
    split: Literal["val", "test", "train"] = "val",
    format: Literal["table", "json"] = "table",
    pretrained: Path | None = None,
) -> int:
    """Makes plain convolutions of a classifier's AW-convolutions whose attention matters least, and writes the network.

    The images that it is measured on choose what is folded: they must be held out from those that you report on. See
    :func:`awconv.fold` for the measure and its cost, which is twice as many passes over the images as there are
    AW-convolutions.

    Args:
        ckpt: a checkpoint of ``awconv fit`` or ``compare``, a training's folder, what ``publish`` wrote, or a name with
            weights in timm.
        data: the class of the data and its arguments, as in a recipe. Image size and normalisation are the network's,
            if not given.
        out: the file to write, a checkpoint (.ckpt), which ``predict``, ``test``, ``publish`` and
            ``--model.pretrained`` take. It must not be there yet.
        max_drop: how much the accuracy may fall, in percentage points; at 100 every layer is folded.
        split: the images that it is measured on: those held out for validation, and not those of the test that you
            report.
        format: a table, or JSON.
        pretrained: a file of weights: those that the adapter was trained on, or a name's, in the place of timm's.

    Returns:
        The exit status, 0.

    Raises:
        FileExistsError: ``out`` is there already.
        FileNotFoundError: the checkpoint or the data are missing.
        ValueError: ``ckpt`` is not a classifier with AW-convolutions, or its classes or normalisation are not the
            data's, or the data lack the split, or an argument is out of its range.
    """
    check_numbers(max_drop=(max_drop, 0, 100))
    _check_out(out)
    task = load_task(ckpt, pretrained)
    if not isinstance(task, ClassificationTask):
        raise ValueError(f"only classifiers are folded, by their accuracy, and {ckpt} is a detector")
    whole = set(_aw_layers(task.evaluated))
    images = _Images(task, open_data(data, task), split)
    report = fold_network(task.ready().evaluated, images, max_drop)
    folded = _rebuilt(task, whole - set(report.folded), whole, next(iter(images))[0])
    AtomicCheckpointIO().save_checkpoint(_checkpoint(folded, Path(os.path.expanduser(ckpt)), data), out)
    _print(report, format)
    say(f"awconv fold: the folded network is {out}")
    return 0


def _check_out(out: Path) -> None:
    if out.suffix != ".ckpt":
        raise ValueError(f"out must be the name of a checkpoint, which ends in .ckpt, got {out}")
    if out.exists() or out.is_symlink():
        raise FileExistsError(
            f"{out} is there already, and no checkpoint is overwritten; give another name, or move it"
        )


def _print(report: FoldReport, format: str) -> None:
    if format == "json":
        print(json.dumps(asdict(report), indent=1, allow_nan=False))
    else:
        report.table().print()


class _Images:
    """A split's images as a network takes them, in the same order and without augmentation in each pass.

    Args:
        task: which normalises them.
        data: the data.
        split: the split.
    """

    def __init__(self, task: ClassificationTask, data: ImageDataModule, split: Split) -> None:
        dataset = data.dataset(split)
        if dataset is None:
            raise ValueError(f"the data have no {split} split; name one, give another --split, or data.val_fraction")
        if split == "test" and data.test_split == "val":
            say("awconv fold: the data have no test split; this is their validation split")
        if split != "train":
            self._loader: Any = data.val_dataloader() if split == "val" else data.test_dataloader()
        elif isinstance(dataset, InMemoryImages):
            batches: Any = EvaluationBatches(len(dataset), data.batch_size, ALONE)
            self._loader = DataLoader(dataset, batch_sampler=batches, collate_fn=_as_it_is)
        else:
            raise ValueError(
                "training images that are not kept in memory are augmented; give --data.in_memory=true without "
                "data.transform, or fold on images that are held out, --split=val"
            )
        self._task = task

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, targets in self._loader:
            yield self._task.normalised(images.to(self._task.device)), targets


def _as_it_is(batch: Any) -> Any:
    return batch


def _aw_layers(network: torch.nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, AW_LAYERS)]


def _rebuilt(
    task: ClassificationTask, left: Collection[str], whole: Collection[str], images: Tensor
) -> ClassificationTask:
    """The folded network as a task whose arguments describe it, so that its checkpoint builds it again.

    Args:
        task: after folding.
        left: the names of the layers that are AW-convolutions still.
        whole: the names of those that were.
        images: normalised images, of which both must give the same logits.

    Raises:
        ValueError: no arguments describe it.
    """
    arguments = dict(task.hparams) | _described(task, left, whole)
    folded = ClassificationTask(**arguments)
    folded.interpolation = task.interpolation
    try:
        folded.network.load_state_dict(task.evaluated.state_dict())
    except RuntimeError as error:
        raise ValueError(f"the folded network cannot be built by its name and arguments: {error}") from error
    folded.eval().to(task.device)
    with torch.no_grad():
        same = torch.allclose(folded.network(images), task.evaluated(images), rtol=1e-4, atol=1e-4)
    if _aw_layers(folded.network) != _aw_layers(task.evaluated) or not same:
        raise ValueError(
            "the folded network cannot be built by its name and arguments: built so, it computes something else; fold "
            "it in Python, with awconv.fold"
        )
    if folded.interpolation != ClassificationTask.interpolation:
        say(
            f"awconv fold: images were resized {folded.interpolation} by {task.network_name}, and are resized "
            f"{ClassificationTask.interpolation} by a checkpoint"
        )
    return folded


def _described(task: ClassificationTask, left: Collection[str], whole: Collection[str]) -> dict[str, Any]:
    """The arguments of a task that differ for the folded network.

    AW-convolutions come from the network's own conversion (``aw_resnet50``), from ``convert``, or from both in turn;
    each now selects those of its layers that are left.
    """
    network, _, _ = task.network_name.partition(".")
    arguments, convert = dict(task.network_args), task.conversion
    own = set(whole)
    if convert is not None:
        classes, channels = len(task.classes), task.input_size[0]
        own = set(_aw_layers(timm.create_model(network, num_classes=classes, in_chans=channels, **arguments)))
        if others := set(whole) - own:
            selected = _selected(task, others & set(left))
            convert = {**convert, "select": selected} if selected else None
    if own - set(left):
        if not network.startswith("aw_") or network not in BASELINES:
            raise ValueError(
                f"network {network} makes AW-convolutions by code of its own, so that none can be left out of it; fold "
                "it in Python, with awconv.fold"
            )
        selected = _selected(task, own & set(left))
        attention = arguments.pop("aw_args", None) or {}
        if selected:
            arguments["aw_args"] = {**attention, "select": selected}
        else:
            network = BASELINES[network]
    return dict(
        network=network,
        network_args=arguments or None,
        convert=convert,
        pretrained=False,
        train_only=None,  # it was that of an adapter, whose base has changed
        ema_decay=None,
    )


def _selected(task: ClassificationTask, names: Collection[str]) -> list[str]:
    """Names of layers as globs, in the network's order."""
    return [glob.escape(name) for name, _ in task.evaluated.named_modules() if name in names]


def _checkpoint(folded: ClassificationTask, source: Path, data: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of the folded network, without figures: those of the network before it are not its own.

    Args:
        folded: the task that it describes.
        source: where the network came from, of whose training the epochs and the seed are kept.
        data: the configuration of the data.
    """
    file = find_last(source) if source.is_dir() else source
    trained = read_checkpoint(file) if file is not None and file.suffix == ".ckpt" and file.is_file() else {}
    before = trained.get("callbacks", {}).get(SameSettings.__qualname__, {}).get("settings", {})
    kind: Any = locate(data["class_path"])
    settings = Settings(ClassificationTask, kind, {"data": data}).deciding(Role.RESULT)
    if "seed_everything" in before:
        settings["seed_everything"] = before["seed_everything"]
    return {
        **{name: trained[name] for name in ("epoch", "global_step") if name in trained},
        "state_dict": {name: tensor.cpu() for name, tensor in folded.state_dict().items()},
        "hyper_parameters": dict(folded.hparams),
        "callbacks": {SameSettings.__qualname__: {"settings": settings}},
        "pytorch-lightning_version": version("lightning"),
    }
