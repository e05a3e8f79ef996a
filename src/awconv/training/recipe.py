"""A recipe: the settings of a training, parsed once, from which many trainings can be built."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from jsonargparse import Namespace
from lightning.pytorch.cli import ArgsType, LightningArgumentParser

from awconv.own_code import as_names, import_own
from awconv.roles import Role
from awconv.tasks import Task
from awconv.training.cli import TrainingCLI, plain, settings_of
from awconv.training.find_task import find_task
from awconv.training.settings import Settings


@dataclass(frozen=True)
class Recipe:
    """The settings of a training, parsed and checked. Nothing is built and no data are read.

    Attributes:
        settings: the settings as plain values, which a record keeps and two trainings are compared by.
    """

    settings: Settings
    _config: Namespace  # copied before use

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> Recipe:
        """Parses arguments of ``awconv fit``, such as ``--config=FILE``.

        Raises:
            FileNotFoundError: a recipe is missing.
            UsageError: the parser refused an argument.
            ValueError: a recipe is not YAML, or a number is out of its range.
        """
        task = find_task(arguments)
        parser = _Parser.of(task)
        config = parser.parse(arguments)
        return cls(settings_of(task, parser.parser, config), config)

    @property
    def network(self) -> str:
        """The network's name in timm."""
        return str(self._config.model.network)

    @property
    def network_args(self) -> dict[str, Any]:
        """Further arguments of the network."""
        return dict(self._config.model.network_args or {})

    @property
    def conversion(self) -> dict[str, Any] | None:
        """Arguments of :func:`awconv.convert`; None for a network that is not converted."""
        given = self._config.model.convert
        return None if given is None else dict(given)

    @property
    def epochs(self) -> int | None:
        """The number of epochs; None if something else may end the training before."""
        trainer = self._config.trainer
        ends_otherwise = trainer.max_steps not in (None, -1) or trainer.max_time is not None
        return trainer.max_epochs if not ends_otherwise and (trainer.max_epochs or 0) > 0 else None

    @property
    def own_code(self) -> dict[str, str]:
        """The SHA-256 of the files with networks of one's own, by their names."""
        return import_own(as_names(self._config.get("import")))

    def for_run(self, seed: int, folder: Path) -> Recipe:
        """The recipe with a seed, and a folder for checkpoints."""
        config, content = self._config.clone(), copy.deepcopy(dict(self.settings.content))
        for values in (config, content):
            values["seed_everything"] = seed
            values["trainer"]["default_root_dir"] = str(folder)
        return Recipe(replace(self.settings, content=content), config)

    def build(self) -> TrainingCLI:
        """Sets the seed and builds trainer, task and data."""
        return _Parser.of(self.settings.task).build(self._config.clone())

    def differences(self, there: Mapping[str, Any]) -> list[str]:
        """The differences from a run's settings, a phrase for each.

        Args:
            there: the settings in the run's record. Those that its version of awconv did not have count as today's
                defaults.
        """
        known = self.settings.completed(there, _Parser.of(self.settings.task).defaults())
        return ["its settings are no longer known"] if known is None else self.settings.differences(known)


class _Parser(TrainingCLI):
    """A task's command line that parses and builds trainings, and runs none."""

    _made: ClassVar[dict[type[Task], _Parser]] = {}

    @classmethod
    def of(cls, task: type[Task]) -> _Parser:
        """A task's parser, made once."""
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
        """Parses the arguments of a training."""
        parsed = copy.copy(self)
        TrainingCLI.parse_arguments(parsed, self.parser, list(arguments))
        config: Namespace = parsed.config
        return config

    def defaults(self) -> dict[str, Any]:
        """The default of every setting, by section; None if unset."""
        parsed = self.parser.get_defaults(skip_validation=True)
        content = plain(self.parser, parsed)
        for section in ("model", "trainer"):
            content[section] = dict.fromkeys(parsed[section].as_dict()) | content.get(section, {})
        for name in self._task.arguments_of(Role.DATA):
            content["model"].pop(name, None)
        return content

    def build(self, config: Namespace) -> TrainingCLI:
        """Sets the seed and builds what a configuration describes."""
        built = copy.copy(self)
        built.config = config
        TrainingCLI._set_seed(built)
        TrainingCLI.instantiate_classes(built)
        return built
