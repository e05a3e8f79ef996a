"""The option ``--data`` of commands that evaluate a network on images, as ``awconv fit`` has it."""

from __future__ import annotations

from collections.abc import Sequence
from pydoc import locate
from typing import Any

from awconv.data import ImageDataModule
from awconv.tasks import ClassificationTask
from awconv.training.explain import explained
from awconv.training.find_task import data_sets
from awconv.training.of_checkpoint import take_preprocessing
from awconv.training.settings import check_nulls


def add_data(parser: Any, required: bool = True) -> None:
    """Adds the option to a parser of jsonargparse. Parsed, it is a class and its arguments, for :func:`open_data`.

    Args:
        parser: of the command.
        required: whether it must be given; if it is not, it is None.
    """
    named = "the data set, such as Digits; --data.help=NAME lists its options"
    parser.add_subclass_arguments(ImageDataModule, "data", required=required, help=named)


def explained_option(message: str, arguments: Sequence[str], options: frozenset[str]) -> str:
    """A line or two in the place of a message of jsonargparse, by :func:`awconv.training.explain.explained`."""
    return explained(message, arguments, options, data_sets()[ClassificationTask])


def open_data(data: dict[str, Any], task: ClassificationTask) -> ImageDataModule:
    """The data set, with a network's image size and normalisation where it was not given others.

    Args:
        data: the class (``class_path``) and its arguments (``init_args``), to which those are added.
        task: with the network.

    Raises:
        ValueError: an argument is out of its range, or classes, channels or normalisation are not the network's.
    """
    trained: dict[str, Any] = dict(input_size=task.input_size, crop_pct=task.crop_pct)
    trained |= dict(mean=task.channel_means, std=task.channel_deviations)
    taken = take_preprocessing(data, {"hyper_parameters": trained})
    kind: Any = locate(data["class_path"])
    arguments = data["init_args"]
    check_nulls("data", kind, arguments)
    try:
        opened: ImageDataModule = kind(**arguments)
    except ValueError:  # the network's mean may be of other channels than the data's
        _check_kind(task, kind(**{name: value for name, value in arguments.items() if name not in taken}))
        raise
    _check_kind(task, opened)
    _check(mean=(task.channel_means, opened.mean), std=(task.channel_deviations, opened.std))
    return opened


def _check_kind(task: ClassificationTask, opened: ImageDataModule) -> None:
    _check(classes=(task.classes, opened.classes), channels=(task.input_size[:1], opened.input_size[:1]))


def _check(**pairs: tuple[list[Any], list[Any]]) -> None:
    """Raises a ValueError for the first pair of a network's and the data's that are not the same."""
    for name, (own, there) in pairs.items():
        if own != there:
            raise ValueError(
                f"the network has {name} {_shortened(own)}, and the data have {_shortened(there)}; give data as it was "
                "trained on"
            )


def _shortened(values: list[Any]) -> str:
    return f"{values[:10]}" + (f" and {len(values) - 10} more" if len(values) > 10 else "")
