"""Which task a command line asks for: that of the data which it names last, in a recipe or by themselves."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from awconv.tasks import ClassificationTask, DetectionTask, Task
from awconv.yaml_files import parse_recipe, read_recipe

_TASKS: tuple[type[Task], ...] = (ClassificationTask, DetectionTask)
_RECIPE, _DATA = ("--config", "-c"), ("--data", "--data.class_path")


def find_task(arguments: Sequence[str]) -> type[Task]:
    """The task of the data that arguments name; classification where they name none, or none that there are.

    The command line's parser is made for a task, so this is known before it reads them, and says what is wrong.

    Raises:
        FileNotFoundError: a recipe is not there.
        ValueError: it is no YAML, or no mapping of settings.
    """
    data = None
    for option, value in _options(arguments):
        data = _data_of(value) or data if option in _RECIPE else value
    if isinstance(data, str) and data.lstrip().startswith("{"):
        data = parse_recipe(data, "--data", Path()).get("class_path")
    name = str(data).rpartition(".")[2]
    return next((task for task in _TASKS if name in _names(task.data_module)), ClassificationTask)


def _options(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """The recipes and data that arguments name, in their order."""
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
    return {kind.__name__}.union(*(_names(subclass) for subclass in kind.__subclasses__()))


def _data_of(config: str) -> Any:
    """The class of the data in a recipe; None where it names none."""
    inline = config.lstrip().startswith("{")
    recipe = parse_recipe(config, "--config", Path()) if inline else read_recipe(Path(config))
    data = recipe.get("data")
    return data.get("class_path") if isinstance(data, dict) else data
