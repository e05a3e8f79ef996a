"""Settings of a training as plain values, and how they differ from another training's."""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from awconv.data import DataModule
from awconv.roles import Role
from awconv.tasks import Task

# Arguments of Lightning's trainer; the others decide the result, not the steps.
_TRAINER = {
    **dict.fromkeys(
        (
            "accelerator",
            "default_root_dir",
            "enable_model_summary",
            "enable_progress_bar",
            "log_every_n_steps",
            "logger",
        ),
        Role.NOTHING,
    ),
    **dict.fromkeys(
        (
            "accumulate_grad_batches",
            "devices",
            "gradient_clip_algorithm",
            "gradient_clip_val",
            "limit_train_batches",
            "num_nodes",
            "overfit_batches",
            "precision",
            "sync_batchnorm",
        ),
        Role.STEPS,
    ),
}
# Sections and arguments of the command line without an influence on the result.
_BESIDE = (
    "import",
    "report",
    "recent_checkpoint",
    "processes",
    "detections",
    "ckpt_path",
    "weights_only",
    "verbose",
    "config",
)


@dataclass(frozen=True)
class Settings:
    """The settings of a training, and the classes that declare their roles.

    Attributes:
        task: class of the task.
        data: class of the data.
        content: plain values by section (``model``, ``data``, ``trainer``, ...), without unset ones.
    """

    task: type[Task]
    data: type[DataModule]
    content: Mapping[str, Any]

    def role(self, name: str) -> Role:
        """The role of a setting, given its dotted name, such as ``trainer.max_epochs``."""
        section, _, rest = name.partition(".")
        if section in _BESIDE:
            return Role.NOTHING
        argument = rest.removeprefix("init_args.").partition(".")[0]
        if section == "trainer":
            return _TRAINER.get(argument, Role.RESULT)
        owners: dict[str, Mapping[str, Role]] = {"model": self.task.roles, "data": self.data.roles}
        return owners.get(section, {}).get(argument, Role.STEPS)

    def deciding(self, least: Role) -> dict[str, str]:
        """The settings with at least this role: dotted names and values as JSON."""
        return self._flat(self.content, least)

    def _flat(self, content: Mapping[str, Any], least: Role) -> dict[str, str]:
        data = data_of(content)
        arguments = dict(data["init_args"])
        for name, count in self.data.compared_names.items():
            if isinstance(arguments.get(name), str):
                arguments[name] = "/".join(PurePath(arguments[name]).parts[-count:])
        flat = _flattened(dict(content) | {"data": data | {"init_args": arguments}})
        return {name: value for name, value in flat.items() if self.role(name) >= least}

    def differences(self, there: Mapping[str, str], least: Role = Role.RESULT) -> list[str]:
        """The differences from another training, a phrase for each setting with at least this role.

        Args:
            there: the other training's settings, by :meth:`deciding`.
            least: the role.
        """
        now, there = self.deciding(least), {name: text for name, text in there.items() if self.role(name) >= least}
        names = sorted(name for name in there.keys() | now.keys() if there.get(name) != now.get(name))
        return [f"{name} is {there.get(name, 'not set')} there, {now.get(name, 'not set')} now" for name in names]

    def of_checkpoint(self, there: Mapping[str, str], arguments: Collection[str]) -> dict[str, str]:
        """A checkpoint's settings, with today's defaults for arguments of the task that its version did not have.

        Args:
            there: its settings, by :meth:`deciding`.
            arguments: the names of those that it had.
        """
        new = {name: value for name, value in _defaults_of(self.task).items() if name not in arguments}
        return _flattened({"model": new}) | dict(there)

    def completed(self, there: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, str] | None:
        """The settings that decided a recorded run. Those that its version of awconv did not have are today's defaults.

        Names in the record are compared, not imported: the record may be somebody else's.

        Args:
            there: the settings in the run's record.
            defaults: the default of every setting, by section.

        Returns:
            None if a recorded setting no longer exists.
        """
        filled = dict(there)
        for section in ("model", "trainer"):
            own = filled.get(section) or {}
            if not isinstance(own, dict) or _lost(own, defaults[section]):
                return None
            filled[section] = defaults[section] | own
        data, expected = data_of(filled), data_of(self.content)
        own = data["init_args"]
        if not isinstance(own, dict):
            return None
        if data["class_path"] == expected["class_path"]:
            usual = _defaults_of(self.data)
            if _lost(own, usual | expected["init_args"]):
                return None
            data = data | {"init_args": usual | own}
        filled = {"seed_everything": defaults.get("seed_everything")} | filled | {"data": data}
        return self._flat(filled, Role.RESULT)


def _flattened(content: Mapping[str, Any]) -> dict[str, str]:
    """Dotted names and values as JSON, without unset and empty values."""
    flat: dict[str, str] = {}

    def flatten(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                flatten(f"{prefix}.{key}" if prefix else str(key), inner)
        elif value not in (None, {}, []):
            flat[prefix] = json.dumps(value)

    flatten("", dict(content))
    return flat


def data_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """The section of the data, with its ``class_path`` and ``init_args``."""
    data = content.get("data") or {}
    return {"class_path": None, "init_args": {}} | (data if isinstance(data, dict) else {"class_path": data})


def _lost(there: dict[str, Any], known: dict[str, Any]) -> bool:
    return any(value is not None and name not in known for name, value in there.items())


def _defaults_of(kind: type[DataModule] | type[Task]) -> dict[str, Any]:
    """The defaults of a class's arguments, as plain values."""
    found = {
        name: parameter.default
        for name, parameter in parameters(kind).items()
        if parameter.default is not parameter.empty
    }
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def parameters(kind: Any) -> dict[str, inspect.Parameter]:
    """The arguments of a class and of its base classes."""
    found: dict[str, inspect.Parameter] = {}
    for one in reversed(inspect.getmro(kind)):
        if "__init__" in vars(one):
            found |= inspect.signature(one.__init__).parameters  # type: ignore[misc]
    return found


def check_nulls(group: str, kind: Any, arguments: dict[str, Any]) -> None:
    """Raises a ValueError for an argument that is null and must not be; the parser accepts it."""
    for name, parameter in parameters(kind).items():
        if name in arguments and arguments[name] is None and "None" not in str(parameter.annotation):
            raise ValueError(f"{group}.{name} must not be null")
