"""Checkpoints: written atomically, read safely, found again."""

from __future__ import annotations

import math
import os
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from awconv.models.pretrained import check_archive
from awconv.tasks.checks import check_network
from awconv.terminal import say
from awconv.training.lock import PARTIAL, locked
from awconv.training.stop import StopOnSigterm, ends_step

RECENT = "recent.ckpt"
_VERSION = "pytorch-lightning_version"
# Of what a checkpoint holds, the types that are relied on.
_PARTS: dict[str, type] = {
    "state_dict": dict,
    "hyper_parameters": dict,
    "callbacks": dict,
    "epoch": int,
    "global_step": int,
    "loops": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    _VERSION: str,
}
_NEEDED = ("state_dict", "hyper_parameters", "callbacks")
_FORMER = ("hparams", "module_arguments")  # where Lightning would look for hyper-parameters, too


def check_parts(checkpoint: dict[str, Any], trainer: pl.Trainer) -> None:
    """Raises a ValueError if a part is missing or damaged that a training needs to resume.

    Without the part, Lightning would silently start anew.
    """
    missing = [name for name in _PARTS if name not in checkpoint]
    if missing:
        raise ValueError(f"the checkpoint has no {' and no '.join(missing)}; a training cannot go on from it")
    wrong = _unlike(checkpoint["loops"], {"fit_loop": trainer.fit_loop.state_dict()}, "loops")
    wrong += [f"optimizer_states.{n}" for n, one in enumerate(checkpoint["optimizer_states"]) if not _optimizes(one)]
    wrong += [f"lr_schedulers.{n}" for n, one in enumerate(checkpoint["lr_schedulers"]) if not _schedules(one)]
    if wrong:
        raise ValueError(
            f"the checkpoint is damaged: its {', '.join(wrong[:4])} cannot be; give an earlier one, or leave out "
            "--ckpt_path to start anew"
        )


def _unlike(there: Any, fresh: Any, name: str) -> list[str]:
    """Names of parts whose type differs from a fresh training's, or whose number is negative."""
    if isinstance(fresh, dict):
        if not isinstance(there, dict):
            return [name]
        return [part for key in fresh if key in there for part in _unlike(there[key], fresh[key], f"{name}.{key}")]
    right = type(there) is type(fresh) and (not isinstance(there, int) or there >= 0)
    return [] if right else [name]


def _optimizes(state: Any) -> bool:
    """Whether this can be an optimizer's state: dictionaries by parameter, and parameter groups.

    A parameter is a number, or a name if processes share the parameters.
    """
    return (
        isinstance(state, dict)
        and isinstance(state.get("state"), dict)
        and all(isinstance(of, dict) and isinstance(key, int | str) for key, of in state["state"].items())
        and isinstance(state.get("param_groups"), list)
        and all(isinstance(group, dict) and _are_numbers([group.get("lr")]) for group in state["param_groups"])
    )


def _schedules(state: Any) -> bool:
    """Whether this can be the state of a learning rate schedule: rates and the current step."""
    return (
        isinstance(state, dict)
        and all(_are_numbers(state.get(name)) for name in ("base_lrs", "_last_lr"))
        and all(type(state.get(name)) is int and state[name] >= 0 for name in ("last_epoch", "_step_count"))
    )


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) for value in values
    )


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file beside it and renames it. Reads plain values and tensors only.

    Lightning's own writes to the system's temporary folder, and copies if that is on another disk.

    Attributes:
        writing: whether a checkpoint is being written.
    """

    def __init__(self) -> None:
        self.writing = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}{PARTIAL}")
        self.writing = True
        try:
            with open(partial, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            self.writing = False

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        return _load(Path(path), map_location)


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Reads a checkpoint of a training; cannot run code.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is broken or something else.
    """
    checkpoint = _load(path, map_location)
    missing = [name for name in _NEEDED if name not in checkpoint]
    if missing:
        raise ValueError(f"{path} is not a checkpoint of awconv fit: it has no {' and no '.join(missing)}")
    wrong = [name for name, kind in _PARTS.items() if name in checkpoint and not isinstance(checkpoint[name], kind)]
    wrong += [name for name in _FORMER if name in checkpoint]
    if not wrong:
        wrong += [name for name, value in checkpoint["state_dict"].items() if not isinstance(value, Tensor)]
        # Lightning would import what a name with an underscore says.
        wrong += [name for name in checkpoint["hyper_parameters"] if not str(name).isidentifier() or name[0] == "_"]
        wrong += [version for version in [checkpoint.get(_VERSION, "2.0")] if not re.match(r"\d+\.\d+", version)]
    if wrong:
        raise ValueError(f"{path} is not a checkpoint of awconv fit: its {', '.join(map(str, wrong[:4]))} cannot be")
    arguments = checkpoint["hyper_parameters"]
    if "network" in arguments:
        try:
            check_network(arguments["network"], arguments.get("network_args"))
        except (ValueError, TypeError) as error:
            raise ValueError(f"checkpoint {path}: {error}") from error
    return checkpoint


def _load(path: Path, map_location: Any) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} is not a file")
    try:
        check_archive(path)
        checkpoint: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
        if not isinstance(checkpoint, dict):
            raise TypeError(f"it holds a {type(checkpoint).__name__}")
    except Exception as error:  # broken files fail in ways of their own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"checkpoint {path} is broken, or not a checkpoint: {reason}") from error
    return checkpoint


def find_last(*folders: Path) -> Path | None:
    """The newest intact checkpoint below some folders, or None. Broken ones are reported."""
    found = [path for folder in folders for path in folder.rglob("*.ckpt")]
    for path in sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            read_checkpoint(path)
        except ValueError as error:
            say(f"{error}; taking the one before it")
        else:
            return path
    return None


class RecentCheckpoint(Checkpoint):
    """Writes a further checkpoint within long epochs and on SIGTERM.

    It is written between steps of the optimizer, so that no accumulated gradient is lost. Only one training writes to a
    folder at a time.

    Args:
        every_n_steps: number of the optimizer's steps between two checkpoints.
    """

    def __init__(self, every_n_steps: int = 1000) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.path = Path(RECENT)
        self.stop: StopOnSigterm | None = None
        self._saved = 0
        self._lock = ExitStack()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not ends_step(trainer, batch_idx) or trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return  # the end of an epoch has a checkpoint of its own
        due = trainer.global_step - self._saved >= self.every_n_steps
        if due or (self.stop is not None and self.stop.agreed):
            trainer.save_checkpoint(self.path)
            self._saved = trainer.global_step

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        beside = [
            callback.dirpath for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)
        ]
        self.path = Path(beside[0] or trainer.default_root_dir) / RECENT
        self._saved = trainer.global_step
        if trainer.is_global_zero:
            self._lock.enter_context(locked(self.path.parent))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._lock.close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._lock.close()
