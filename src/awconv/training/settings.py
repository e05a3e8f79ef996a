"""The settings that decide what comes of a training, to tell whether two trainings are the same."""

from __future__ import annotations

import json
from pathlib import PurePath
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.trainer.states import TrainerFn

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
    "data": ("num_workers", "download", "inspect"),
    "": ("recent_checkpoint", "detections", "ckpt_path", "weights_only", "verbose", "config"),
}
# How many of a path's last names are compared: it begins otherwise on another machine.
_PATHS = {"root": 1, "train": 2, "val": 2, "test": 2}
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


def settings(parser: Any, config: Any) -> dict[str, str]:
    """The settings that decide what comes of a run, each by its dotted name, as text.

    Args:
        parser: of ``awconv fit``.
        config: what it parsed.
    """
    content = yaml.safe_load(parser.dump(config, skip_link_targets=True))
    for name in _ELSEWHERE[""]:
        content.pop(name, None)
    for name in _ELSEWHERE["trainer"]:
        content["trainer"].pop(name, None)
    data = content["data"].get("init_args", {})
    for name in _ELSEWHERE["data"]:
        data.pop(name, None)
    for name, count in _PATHS.items():
        if isinstance(data.get(name), str):
            data[name] = "/".join(PurePath(data[name]).parts[-count:])
    flat: dict[str, str] = {}

    def flatten(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                flatten(f"{prefix}.{key}" if prefix else str(key), inner)
        elif value not in (None, {}, []):
            flat[prefix] = json.dumps(value)

    flatten("", content)
    return flat


def differences(there: dict[str, str], now: dict[str, str]) -> list[str]:
    """What differs between two trainings, a phrase for each setting."""
    names = sorted(name for name in there.keys() | now.keys() if there.get(name) != now.get(name))
    return [f"{name} is {there.get(name, 'not set')} there, {now.get(name, 'not set')} now" for name in names]


class SameSettings(pl.Callback):
    """Keeps the settings in checkpoints, and refuses to go on from one of other settings.

    A training may become longer or shorter, and be logged or stopped in another way.

    Args:
        settings: of this training.
    """

    def __init__(self, settings: dict[str, str]) -> None:
        self.settings = settings

    def state_dict(self) -> dict[str, Any]:
        return {"settings": self.settings}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Compares, where a training goes on.

        Raises:
            ValueError: a setting differs that the weights or the rest of the steps depend on.
        """
        there = checkpoint["callbacks"].get(self.state_key)
        if trainer.state.fn != TrainerFn.FITTING or there is None:
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
