"""The settings that decide what comes of a training, to tell whether two trainings are the same."""

from __future__ import annotations

import inspect
import json
import pydoc
from pathlib import PurePath
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.trainer.states import TrainerFn

from awconv.training.checkpoints import check_parts

# What does not change the result, or only in rounding.
_ELSEWHERE = {
    "trainer": (
        "accelerator",
        "default_root_dir",
        "logger",
        "enable_progress_bar",
        "enable_model_summary",
        "log_every_n_steps",
    ),
    "data": ("num_workers", "download", "inspect", "max_pixels", "max_annotations"),
    "": ("recent_checkpoint", "detections", "ckpt_path", "weights_only", "verbose", "config"),
}
# How many of a path's last names are compared: it begins otherwise on another machine.
_PATHS = {"root": 1, "train": 2, "val": 2, "test": 2}
_MOST_THREADS = 4096
# A longer training may go on from a shorter one; with these changed, its steps would be others.
_OF_STEPS = (
    "accumulate_grad_batches",
    "devices",
    "gradient_clip_algorithm",
    "gradient_clip_val",
    "limit_train_batches",
    "num_nodes",
    "overfit_batches",
    "precision",
    "sync_batchnorm",
)


def written(parser: Any, config: Any, none: bool = False) -> dict[str, Any]:
    """What a run's file keeps of a configuration: plain values.

    Args:
        parser: of ``awconv fit``.
        config: what it parsed.
        none: also what is not set.
    """
    content: dict[str, Any] = yaml.safe_load(parser.dump(config, skip_link_targets=True, skip_none=not none))
    return content


def defaults(parser: Any) -> dict[str, Any]:
    """The settings that there are, with what they are by default.

    Args:
        parser: of ``awconv fit``.
    """
    return written(parser, parser.get_defaults(skip_validation=True), none=True)


def settings(content: dict[str, Any]) -> dict[str, str]:
    """The settings that decide what comes of a run, each by its dotted name, as text.

    Args:
        content: by :func:`written`.
    """
    content = {name: value for name, value in content.items() if name not in _ELSEWHERE[""]}
    trainer, data = dict(content.get("trainer") or {}), _data(content)
    for name in _ELSEWHERE["trainer"]:
        trainer.pop(name, None)
    arguments = dict(data["init_args"])
    for name in _ELSEWHERE["data"]:
        arguments.pop(name, None)
    for name, count in _PATHS.items():
        if isinstance(arguments.get(name), str):
            arguments[name] = "/".join(PurePath(arguments[name]).parts[-count:])
    flat: dict[str, str] = {}

    def flatten(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                flatten(f"{prefix}.{key}" if prefix else str(key), inner)
        elif value not in (None, {}, []):
            flat[prefix] = json.dumps(value)

    flatten("", content | {"trainer": trainer, "data": data | {"init_args": arguments}})
    return flat


def completed(there: dict[str, Any], now: dict[str, Any], defaults: dict[str, Any]) -> dict[str, str] | None:
    """The settings of a run's file, with today's defaults for those that its version of awconv did not have.

    The file may be somebody else's: what it names is compared, and not imported.

    Args:
        there: the content of the file's recipe.
        now: the configuration that it is compared with, by :func:`written`.
        defaults: by :func:`defaults`.

    Returns:
        None if it has settings that there are no more.
    """
    filled: dict[str, Any] = {name: value for name, value in there.items() if name not in _ELSEWHERE[""]}
    for section in ("model", "trainer"):
        own = filled.get(section) or {}
        if not isinstance(own, dict) or _lost(own, defaults[section]):
            return None
        filled[section] = defaults[section] | own
    data, expected = _data(filled), _data(now)
    if data["class_path"] == expected["class_path"]:
        own, usual = data["init_args"], _defaults_of(expected["class_path"])
        if not isinstance(own, dict) or _lost(own, usual | expected["init_args"]):
            return None
        data = data | {"init_args": usual | own}
    return settings({"seed_everything": defaults.get("seed_everything")} | filled | {"data": data})


def _data(content: dict[str, Any]) -> dict[str, Any]:
    data = content.get("data") or {}
    return {"class_path": None, "init_args": {}} | (data if isinstance(data, dict) else {"class_path": data})


def _lost(there: dict[str, Any], known: dict[str, Any]) -> bool:
    return any(value is not None and name not in known for name, value in there.items())


def _defaults_of(data: str) -> dict[str, Any]:
    """The defaults of the arguments of a class of data, as they are written."""
    found = {
        name: parameter.default
        for name, parameter in parameters(pydoc.locate(data)).items()
        if parameter.default is not parameter.empty
    }
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def parameters(kind: Any) -> dict[str, inspect.Parameter]:
    """The arguments of a class, with those that it hands on to the classes it derives from."""
    found: dict[str, inspect.Parameter] = {}
    for one in reversed(inspect.getmro(kind)):
        if "__init__" in vars(one):
            found |= inspect.signature(one.__init__).parameters  # type: ignore[misc]
    return found


def check_nulls(group: str, kind: Any, arguments: dict[str, Any]) -> None:
    """Raises a ValueError for null where the class takes none; the parser lets it through."""
    for name, parameter in parameters(kind).items():
        if name in arguments and arguments[name] is None and "None" not in str(parameter.annotation):
            raise ValueError(f"{group}.{name} must not be null")


def differences(there: dict[str, str], now: dict[str, str]) -> list[str]:
    """What differs between two trainings, a phrase for each setting."""
    names = sorted(name for name in there.keys() | now.keys() if there.get(name) != now.get(name))
    return [f"{name} is {there.get(name, 'not set')} there, {now.get(name, 'not set')} now" for name in names]


class SameThreads(pl.Callback):
    """Keeps the number of threads in checkpoints, and goes on with as many: sums of more parts round otherwise.

    Attributes:
        threads: that this training computes with.
    """

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()

    def state_dict(self) -> dict[str, Any]:
        return {"threads": self.threads}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Takes the number of the training that goes on.

        Raises:
            ValueError: no machine has as many.
        """
        there = checkpoint["callbacks"].get(self.state_key)
        if trainer.state.fn == TrainerFn.FITTING and there is not None:
            threads = there["threads"]
            if not 1 <= threads <= _MOST_THREADS:
                raise ValueError(f"the checkpoint's number of threads must be from 1 to {_MOST_THREADS}, got {threads}")
            torch.set_num_threads(threads)
            self.threads = threads


class SameSettings(pl.Callback):
    """Keeps the settings in checkpoints, and refuses to go on from one of other settings.

    A training may become longer or shorter, and be logged or stopped in another way.

    Args:
        settings: of this training.

    Attributes:
        restoring: the training or evaluation is being set up, from a checkpoint where there is one, or makes its first
            step, which is the first to look into the state of an optimizer.
    """

    def __init__(self, settings: dict[str, str]) -> None:
        self.settings = settings
        self.restoring = False
        self._begun = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.restoring = True

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.restoring &= bool(trainer.sanity_checking)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.restoring = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begun = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self._begun:
            self.restoring = False

    def state_dict(self) -> dict[str, Any]:
        return {"settings": self.settings}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Compares, where a training goes on.

        Raises:
            ValueError: a setting differs that the weights or the rest of the steps depend on.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        check_parts(checkpoint, trainer)
        there = checkpoint["callbacks"].get(self.state_key)
        if there is None:
            return
        differing = differences(_of_steps(there["settings"]), _of_steps(self.settings))
        if differing:
            raise ValueError(
                f"the checkpoint is of a training with other settings: {'; '.join(differing[:3])}. Give those that it "
                "was trained with, or leave out --ckpt_path to start anew"
            )


def _of_steps(settings: dict[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in settings.items()
        if not name.startswith("trainer.") or name.removeprefix("trainer.") in _OF_STEPS
    }
