"""Checks of a trainer's settings."""

from __future__ import annotations

import math
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Timer

from awconv.data.loading import most_processes

_SEEDS = 2**32  # of NumPy
_MOST = 2**31 - 1


def check_steps(trainer: Any) -> None:
    """Raises a ValueError for settings with which a trainer would train nothing, or fail."""
    for name in ("max_epochs", "max_steps", "limit_train_batches", "max_time"):
        if trainer.get(name) is not None and _nothing(name, trainer[name]):
            raise ValueError(f"trainer.{name} must be more than 0 to train anything, got {trainer[name]}")
    for name in ("accumulate_grad_batches", "check_val_every_n_epoch", "log_every_n_steps"):
        number = trainer.get(name)
        least = 0 if name == "log_every_n_steps" else 1  # 0 logs nothing
        if number is not None and not least <= number <= _MOST:
            raise ValueError(f"trainer.{name} must be from {least} to {_MOST:,}, got {number}")
    share = trainer.get("overfit_batches")
    if isinstance(share, float) and not 0 <= share <= 1:
        raise ValueError(f"trainer.overfit_batches must be a number of batches, or a share from 0 to 1, got {share}")
    clip = trainer.get("gradient_clip_val")
    if isinstance(clip, int | float) and not 0 <= clip < math.inf:
        raise ValueError(f"trainer.gradient_clip_val must be a number of at least 0, got {clip}")
    devices, most = str(trainer.get("devices")), most_processes()
    if devices.isdecimal() and int(devices) > most:
        raise ValueError(f"trainer.devices must be at most {most} (4 for each core, or 32), got {devices[:20]}")
    interval = trainer.get("val_check_interval")
    if isinstance(interval, int | float) and interval <= 0:
        raise ValueError(f"trainer.val_check_interval must be more than 0, got {interval}")


def _nothing(name: str, value: Any) -> bool:
    if name != "max_time":
        return bool(value == 0)
    try:
        left = Timer(duration=value).time_remaining()
    except (MisconfigurationException, AttributeError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"trainer.max_time must be days, hours, minutes and seconds, DD:HH:MM:SS: {error}") from error
    return left is not None and left <= 0


def check_seed(seed: Any) -> None:
    """Raises a ValueError for a seed that NumPy does not take."""
    if isinstance(seed, int) and not 0 <= seed < _SEEDS:
        raise ValueError(f"seed_everything must be from 0 to {_SEEDS - 1:,}, got {seed}")
