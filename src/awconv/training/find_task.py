"""Finds the data and the task of a command line: the data that it names last, in a recipe or in an argument."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from awconv.tasks import ClassificationTask, DetectionTask, Task
from awconv.yaml_files import parse_recipe, read_recipe

_TASKS: tuple[type[Task], ...] = (ClassificationTask, DetectionTask)
_RECIPE, _DATA = ("--config", "-c"), ("--data", "--data.class_path", "--data.help")


def find_task(arguments: Sequence[str]) -> type[Task]:
    """The task of the data that arguments name; classification if they name no known data.

    The command line's parser depends on the task. So this runs first, and leaves errors in the arguments to the parser.

    Raises:
        FileNotFoundError: a recipe is missing.
        ValueError: a recipe is not YAML, or not a mapping.
    """
    name = find_data(arguments)
    return next((task for task in _TASKS if name in _names(task.data_module)), ClassificationTask)


def data_sets() -> dict[type[Task], dict[str, type[Any]]]:
    """The classes of data by name, for each task."""
    found = {task: _classes(task.data_module) for task in _TASKS}
    return {task: {kind.__name__: kind for kind in kinds[1:]} for task, kinds in found.items()}


def recipes(arguments: Sequence[str]) -> list[str]:
    """The recipes that arguments name, in order."""
    return [value for option, value in _options(arguments) if option in _RECIPE]


def find_data(arguments: Sequence[str]) -> str | None:
    """The name of the class of data that arguments name last, without its module.

    Raises:
        FileNotFoundError: a recipe is missing.
        ValueError: a recipe is not YAML, or not a mapping.
    """
    data = None
    for option, value in _options(arguments):
        data = _data_of(value) or data if option in _RECIPE else value
    if isinstance(data, str) and data.lstrip().startswith("{"):
        data = parse_recipe(data, "--data", Path()).get("class_path")
    return None if data is None else str(data).rpartition(".")[2]


def _options(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """The options that name recipes or data, in order."""
    found: list[tuple[str, str]] = []

    class Keep(argparse.Action):
        def __call__(self, parser: Any, namespace: Any, value: Any, option: str | None = None) -> None:
            found.append((str(option), value))

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise argparse.ArgumentError(None, message)

    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument(*_RECIPE, *_DATA, action=Keep)
    with suppress(argparse.ArgumentError):  # an option without its value, of which the command's own parser speaks
        parser.parse_known_args(list(arguments))
    return found


def _names(kind: type[Any]) -> set[str]:
    return {one.__name__ for one in _classes(kind)}


def _classes(kind: type[Any]) -> list[type[Any]]:
    return [kind, *(one for subclass in kind.__subclasses__() for one in _classes(subclass))]


def _data_of(config: str) -> Any:
    """The data's class in a recipe, or None."""
    inline = config.lstrip().startswith("{")
    recipe = parse_recipe(config, "--config", Path()) if inline else read_recipe(Path(config))
    data = recipe.get("data")
    return data.get("class_path") if isinstance(data, dict) else data
