"""The short help of the commands that train and evaluate: what people use, by topic."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator

import lightning.pytorch as pl

from awconv.data import DetectionDataModule, ImageDataModule
from awconv.tasks import ClassificationTask, DetectionTask
from awconv.training.checkpoints import RecentCheckpoint
from awconv.training.explain import descriptions
from awconv.training.find_task import data_sets

_WIDTH = 118
_NAME = 38
# By topic: what describes the options, and which of them people use.
_TOPICS: tuple[tuple[str, str, type, str], ...] = (
    ("Data of classification", "data", ImageDataModule, "image_size batch_size val_fraction num_workers transform"),
    ("Data of detection", "data", DetectionDataModule, "augmentation images_without_boxes"),
    (
        "Network",
        "model",
        ClassificationTask,
        "network pretrained convert train_only channels_last",
    ),
    ("Network of detection", "model", DetectionTask, "detector norm min_size detector_args"),
    (
        "Training",
        "model",
        ClassificationTask,
        "lr branch_lr_factor head_lr_factor optimizer weight_decay warmup_epochs decay_epochs "
        "label_smoothing mixup ema_decay",
    ),
    (
        "Trainer (Lightning's)",
        "trainer",
        pl.Trainer,
        "max_epochs max_steps precision accelerator devices accumulate_grad_batches gradient_clip_val "
        "limit_train_batches check_val_every_n_epoch callbacks",
    ),
    ("Checkpoints", "recent_checkpoint", RecentCheckpoint, "every_n_steps"),
    ("Logs", "trainer", pl.Trainer, "default_root_dir logger log_every_n_steps enable_progress_bar"),
)
_SAID = {  # what the library's words do not say
    "trainer.max_epochs": "Epochs to train, 15 by default.",
    "trainer.precision": "32, bf16-mixed, 16-mixed and others.",
    "trainer.accelerator": "cpu, gpu, mps; the best that there is by default.",
    "trainer.devices": "A number of devices, or a list of their numbers.",
    "trainer.accumulate_grad_batches": "Batches of a training step.",
    "trainer.gradient_clip_val": "The largest norm of the gradient.",
    "trainer.limit_train_batches": "Batches of an epoch: a number, or a share such as 0.1.",
    "trainer.check_val_every_n_epoch": "Epochs between evaluations.",
    "trainer.callbacks": "Lightning's callbacks, such as EarlyStopping.",
    "trainer.default_root_dir": "The folder of logs and checkpoints; the current one by default.",
    "trainer.logger": "true, false, or one of Lightning's loggers.",
    "trainer.log_every_n_steps": "Training steps between lines of the log.",
    "trainer.enable_progress_bar": "true or false.",
}
_COMMANDS = {
    "fit": "Trains a network",
    "validate": "Evaluates on the validation split",
    "test": "Evaluates on the test split",
}


def help_page(command: str) -> str:
    """A page about ``fit``, ``validate`` or ``test``: a line for each option that people use."""
    return "\n".join(_lines(command)) + "\n"


def _lines(command: str) -> Iterator[str]:
    yield f"usage: awconv {command} [--config=RECIPE] [--OPTION=VALUE ...]"
    yield ""
    yield f"{_COMMANDS[command]}. A recipe is a YAML file of these options; those of the command line override it."
    yield ""
    yield "Data sets (--data=NAME; --data.help=NAME lists the options of one):"
    for kinds in data_sets().values():
        yield from (_row(name, inspect.getdoc(kind) or "") for name, kind in kinds.items())
    for topic, section, kind, names in _TOPICS:
        words = descriptions(kind)
        yield ""
        yield f"{topic}:"
        if section == "recent_checkpoint":
            yield _row("--ckpt_path", "A checkpoint to go on from or to evaluate; last is the newest one.")
        for name in names.split():
            yield _row(f"--{section}.{name}", _SAID.get(f"{section}.{name}") or words[name])
    yield ""
    yield f"awconv {command} --help-all lists all options, Lightning's included."


def _row(name: str, words: str) -> str:
    """A name and the first sentence about it, which fit into a line."""
    text = re.sub(r":\w+:`~?([^`]*)`", r"\1", " ".join(words.split("\n\n")[0].split())).replace("``", "")
    sentence = re.split(r"(?<=[^.]\.) (?=[A-Z])", text)[0].removesuffix(".")
    room = _WIDTH - _NAME
    if len(sentence) > room:
        sentence = sentence.split("; ")[0]
    return f"  {name:<{_NAME - 2}}{textwrap.shorten(sentence, room, placeholder=' ...')}"
