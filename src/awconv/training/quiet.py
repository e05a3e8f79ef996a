"""Silences messages of libraries, inside commands."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# How warnings begin that are not about what the user does.
_WARNINGS = (
    r"Experiment logs directory .* exists and is not empty",  # Lightning; the folder was just made for this run
    r"Checkpoint directory .* exists and is not empty",  # Lightning; checkpoints of earlier runs are kept
    r"The dirpath has changed from",  # Lightning; a resumed training logs to a folder of its own
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # torch, by Lightning
    r"The number of training batches \(\d+\) is smaller than the logging interval",  # Lightning; epochs are logged
    r"The '\w+' does not have many workers",  # Lightning; images in memory need none
    r"You're resuming from a checkpoint that ended before the epoch",  # Lightning; the data know where they were
    r"This DataLoader will create \d+ worker processes",  # torch; data.num_workers suits larger machines too
    r"`?weights_only`? was not set",  # Lightning
    r"The `srun` command is available on your system but is not used",  # Lightning; not every training is a job
)
# The same, of what is logged.
_LOGS = re.compile(
    r"GPU available: False|[TH]PU available: False|Seed set to |Restor(ing|ed all) states |Loaded model weights "
    r"|`Trainer\.\w+` stopped: |LOCAL_RANK: \d+ - CUDA_VISIBLE_DEVICES|.{0,3}Tip: For seamless "
)
_LIBRARIES = ("lightning.pytorch", "lightning.fabric")


@contextmanager
def without_noise() -> Iterator[None]:
    """Inside, messages of Lightning and torch that say nothing about what the user does are left out."""
    handlers = [handler for name in _LIBRARIES for handler in logging.getLogger(name).handlers]
    with warnings.catch_warnings():
        for message in _WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        for handler in handlers:
            handler.addFilter(_says_something)
        try:
            yield
        finally:
            for handler in handlers:
                handler.removeFilter(_says_something)


def _says_something(record: logging.LogRecord) -> bool:
    return _LOGS.match(record.getMessage()) is None


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Inside, Lightning prints errors only: its messages suit one run, not many under one progress bar."""
    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
