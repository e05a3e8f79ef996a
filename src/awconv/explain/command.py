"""``awconv explain``: a page that shows where a classifier's attention acts, and what it is worth."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from awconv.data.classification import check_batch
from awconv.data.images import MAX_PIXELS
from awconv.explain.maps import aw_layers
from awconv.extras import require
from awconv.sources import load_task
from awconv.tasks import ClassificationTask
from awconv.tasks.checks import check_numbers
from awconv.terminal import printable, say
from awconv.training.checkpoints import find_last, read_checkpoint
from awconv.training.data_option import open_data
from awconv.training.find_task import data_sets
from awconv.training.same import SameSettings
from awconv.training.settings import parameters
from awconv.usage import UsageError


def explain(
    ckpt: str,
    out: Path,
    files: Sequence[Path] = (),
    data: dict[str, Any] | None = None,
    split: Literal["val", "test", "train"] = "val",
    images: int = 500,
    shown: int = 8,
    compare: str | None = None,
    batch_size: int = 64,
    max_pixels: int = MAX_PIXELS,
    pretrained: Path | None = None,
    compare_pretrained: Path | None = None,
    command: str = "",
) -> int:
    """Shows where a classifier's attention acts, and what it is worth, on a page with Grad-CAM.

    It needs images: files, whose classes are not known, or a data set, which also tells what attention is worth in
    accuracy and how classes differ. The network runs over them as many times as it has AW-convolutions, and four.

    Args:
        ckpt: a checkpoint of ``awconv fit`` or ``compare``, a training's folder, what ``publish`` wrote, a name with
            weights in timm, or a network on the hub, hf-hub:OWNER/NAME.
        out: the folder to write, with index.html, explain.json and PNG files. A former explanation there is replaced,
            and nothing else.
        files: image files, and folders to search for them.
        data: the class of the data and its arguments, as in a recipe, in the place of files. Image size and
            normalisation are the network's, if not given. Without both, the data set of the checkpoint, if that needs
            no folder.
        split: which images of a data set.
        images: at most so many, chosen at random, the same each time. They are kept in memory, as bytes.
        shown: how many of them are shown with Grad-CAM.
        compare: another network for the same images and classes, beside the first: AW or plain, from anywhere where
            ``ckpt`` may be from.
        batch_size: images that go through the network at once.
        max_pixels: the most that an image file may have.
        pretrained: a file of weights: those that an adapter was trained on, or a name's, in the place of timm's.
        compare_pretrained: likewise, of the other network.
        command: what was typed, for the page.

    Returns:
        The exit status: 0, or 1 if an image file was broken.

    Raises:
        FileExistsError: ``out`` holds something else than a former explanation.
        FileNotFoundError: the checkpoint, a file or the data are missing.
        ModuleNotFoundError: the extra ``explain`` is not installed.
        ValueError: ``ckpt`` is not a classifier with AW-convolutions, or the data or the other network are of other
            classes or normalisation, or an argument is out of its range.
    """
    require("pytorch_grad_cam", extra="explain")
    require("jinja2", extra="explain")
    from awconv.explain.folder import check_folder, write_folder
    from awconv.explain.page import files_of

    check_numbers(images=(images, 2, 1_000_000), shown=(shown, 1, 200), batch_size=(batch_size, 2, 65536))
    if max_pixels < 1:
        raise ValueError(f"max_pixels must be at least 1, got {max_pixels}")
    if files and data is not None:
        raise UsageError("either image files or --data name the images, got both")
    out = Path(os.path.expanduser(out))
    check_folder(out)
    task = _classifier(ckpt, pretrained)
    if not aw_layers(task.evaluated):
        raise ValueError(
            f"{ckpt} has no AW-convolution, so it has no attention to explain; give a network with attention, and this "
            "one as --compare"
        )
    other = None if compare is None else _classifier(compare, compare_pretrained)
    if other is not None:
        _check_alike(task, other, str(compare))
    check_batch(min(images, batch_size), task.input_size[0], task.input_size[1])
    found, given = _images(task, ckpt, files, data, split, images, max_pixels, out)
    explanation = _explained((ckpt, task), (compare, other), found, batch_size, shown, command)
    write_folder(out, files_of(explanation))
    say(f"awconv explain: the page is {out / 'index.html'}")
    print(printable(" ".join(_summary(explanation))))
    return int(len(found) < given)


def _classifier(source: str, pretrained: Path | None) -> ClassificationTask:
    task = load_task(source, pretrained)
    if not isinstance(task, ClassificationTask):
        raise ValueError(
            f"only classifiers are explained, and {source} is a detector; awconv.attention_maps(network, images) gives "
            "the maps of its AW-convolutions"
        )
    task.ready()
    return task


def _check_alike(one: ClassificationTask, other: ClassificationTask, named: str) -> None:
    """Two networks on the same images: they take these alike and know the same classes."""
    for what in ("classes", "input_size", "crop_pct", "interpolation"):
        own, there = getattr(one, what), getattr(other, what)
        if own != there:
            raise ValueError(
                f"networks are compared on the same images, and {named} has {what} {_short(there)}, the first "
                f"{_short(own)}; compare networks of one data set"
            )


def _short(value: Any) -> str:
    more = len(value) - 10 if isinstance(value, list) else 0
    return f"{value[:10]} and {more} more" if more > 0 else f"{value}"


def _images(
    task: ClassificationTask,
    ckpt: str,
    files: Sequence[Path],
    data: dict[str, Any] | None,
    split: Literal["val", "test", "train"],
    most: int,
    max_pixels: int,
    out: Path,
) -> tuple[Any, int]:
    """The images, and how many of them were to be read."""
    from awconv.explain.images import images_of_data, images_of_files
    from awconv.predict import image_files

    if files:
        written = Path(os.path.realpath(out))  # by a former run, and no images of the user's
        all_files = [file for file in image_files(files) if written not in Path(os.path.realpath(file)).parents]
        return images_of_files(task, all_files, most, max_pixels), min(most, len(all_files))
    try:
        opened = open_data(_own_data(ckpt) if data is None else data, task)
    except TypeError as error:  # of an argument that the parser has not seen
        raise ValueError(f"the data of {ckpt} cannot be opened: {error}; give --data") from error
    return images_of_data(opened, split, most)


def _own_data(ckpt: str) -> dict[str, Any]:
    """The data set that a checkpoint was trained on, if it needs no folder, of which a checkpoint knows but a part.

    It is one of awconv's, or one that the user has imported: names in a file are compared, not imported.

    Raises:
        UsageError: it is not known, or needs a folder.
    """
    path = Path(os.path.expanduser(ckpt))
    file = find_last(path) if path.is_dir() else path
    settings: Any = {}
    if file is not None and file.suffix == ".ckpt" and file.is_file():
        settings = read_checkpoint(file)
        for part in ("callbacks", SameSettings.__qualname__, "settings"):
            settings = settings.get(part) if isinstance(settings, dict) else None
    known = str(_value(settings, "data.class_path")).rpartition(".")[2]
    kind = data_sets()[ClassificationTask].get(known)
    if kind is None:
        raise UsageError("missing: images, or --data: the data set, such as --data=Digits")
    names = [name for name in parameters(kind) if name not in ("self", "kwargs")]
    arguments = {name: value for name in names if (value := _value(settings, f"data.init_args.{name}")) is not None}
    if any(name in kind.compared_names for name in names):
        raise UsageError(
            f"missing: images, or --data: the data set; it was trained on {known}, whose folder is not known"
        )
    say(f"awconv explain: the images are those of {known}, which the checkpoint was trained on")
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}


def _value(settings: Any, name: str) -> Any:
    """A setting of a checkpoint, which is JSON there; None if there is none."""
    try:
        return json.loads(settings[name])
    except (KeyError, TypeError, ValueError):
        return None


def _explained(
    first: tuple[str, ClassificationTask],
    second: tuple[str | None, ClassificationTask | None],
    images: Any,
    batch_size: int,
    shown: int,
    command: str,
) -> Any:
    from awconv.explain.measure import measure
    from awconv.explain.page import Explanation
    from awconv.explain.photographs import chosen, heat_of

    names = _names(first[0], second[0])
    tasks = [task for _, task in (first, second) if task is not None]
    measured = [measure(name, task, images, batch_size) for name, task in zip(names, tasks, strict=False)]
    other = measured[1] if len(measured) > 1 else None
    indices = chosen(images, measured[0], other, shown)
    heat = [heat_of(task, images, indices, batch_size) for task in tasks]
    return Explanation(measured[0], other, images, tasks[0].classes, indices, heat, command)


def _names(one: str, other: str | None) -> tuple[str, str]:
    """Short names of two sources that differ: the last part of their paths, or the whole."""
    short = [Path(source).name or source for source in (one, other or "")]
    return (short[0], short[1]) if short[0] != short[1] else (one, other or "")


def _summary(explanation: Any) -> list[str]:
    from awconv.explain.words import sentences

    return sentences(explanation.measured, explanation.images)
