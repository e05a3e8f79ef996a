"""A recipe: the settings of a training, parsed once, of which many trainings can be made."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from jsonargparse import Namespace
from lightning.pytorch.cli import ArgsType, LightningArgumentParser

from awconv.roles import Role
from awconv.tasks import Task
from awconv.training.cli import TrainingCLI, plain, settings_of
from awconv.training.find_task import find_task
from awconv.training.settings import Settings


@dataclass(frozen=True)
class Recipe:
    """The settings of a training, parsed and checked. Nothing is built yet, and no data are looked at.

    Attributes:
        settings: plain values, which a record keeps, and by which two trainings are told apart.
    """

    settings: Settings
    _config: Namespace  # is copied before it is used

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> Recipe:
        """Reads arguments as ``awconv fit`` takes them, recipes (``--config=FILE``) among them.

        Raises:
            FileNotFoundError: a recipe is not there.
            SystemExit: the parser refuses an argument, after it has said why.
            ValueError: a recipe is no YAML, or a number is out of its range.
        """
        task = find_task(arguments)
        parser = _Parser.of(task)
        config = parser.parse(arguments)
        return cls(settings_of(task, parser.parser, config), config)

    @property
    def network(self) -> str:
        """Its name in timm."""
        return str(self._config.model.network)

    @property
    def network_args(self) -> dict[str, Any]:
        """Further arguments of the network."""
        return dict(self._config.model.network_args or {})

    def for_run(self, seed: int, folder: Path) -> Recipe:
        """The same with another seed, and with another folder for its checkpoints."""
        config, content = self._config.clone(), copy.deepcopy(dict(self.settings.content))
        for values in (config, content):
            values["seed_everything"] = seed
            values["trainer"]["default_root_dir"] = str(folder)
        return Recipe(replace(self.settings, content=content), config)

    def build(self) -> TrainingCLI:
        """Seeds, and makes the trainer, the task and the data."""
        return _Parser.of(self.settings.task).build(self._config.clone())

    def differences(self, there: Mapping[str, Any]) -> list[str]:
        """What differs from the settings of a run, a phrase for each.

        Args:
            there: the content that its record keeps. Settings that its version of awconv did not have are today's
                defaults.
        """
        known = self.settings.completed(there, _Parser.of(self.settings.task).defaults())
        return ["its settings are no longer known"] if known is None else self.settings.differences(known)


class _Parser(TrainingCLI):
    """The command line of a task, which parses and builds trainings one by one, and runs none."""

    _made: ClassVar[dict[type[Task], _Parser]] = {}

    @classmethod
    def of(cls, task: type[Task]) -> _Parser:
        """The parser of a task, made once."""
        if task not in cls._made:
            cls._made[task] = cls(task)
        return cls._made[task]

    def __init__(self, task: type[Task]) -> None:
        super().__init__([], run=False, save_config=False, task=task)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses nothing yet."""
        self.config = Namespace()

    def _set_seed(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        """Makes nothing yet."""

    def parse(self, arguments: Sequence[str]) -> Namespace:
        """Settings of a training."""
        parsed = copy.copy(self)
        TrainingCLI.parse_arguments(parsed, self.parser, list(arguments))
        config: Namespace = parsed.config
        return config

    def defaults(self) -> dict[str, Any]:
        """The settings that there are by section, with what they are by default; None for those that are not set."""
        parsed = self.parser.get_defaults(skip_validation=True)
        content = plain(self.parser, parsed)
        for section in ("model", "trainer"):
            content[section] = dict.fromkeys(parsed[section].as_dict()) | content.get(section, {})
        for name in self._task.arguments_of(Role.DATA):
            content["model"].pop(name, None)
        return content

    def build(self, config: Namespace) -> TrainingCLI:
        """Seeds, and makes what the settings describe."""
        built = copy.copy(self)
        built.config = config
        TrainingCLI._set_seed(built)
        TrainingCLI.instantiate_classes(built)
        return built
