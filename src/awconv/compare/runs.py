"""One training run, and the small file that keeps what came of it."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import lightning.pytorch as pl
import timm
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from awconv.data import DataModule
from awconv.models import BASELINES
from awconv.summary import summary
from awconv.training import TrainingCLI
from awconv.training.checkpoints import find_last, read_checkpoint
from awconv.training.yaml_files import read_recipe
from awconv.training.settings import SameSettings, completed, defaults, differences, settings, written
from awconv.version import __version__

Split = Literal["test", "val"]
Progress = Callable[[float, int], None]


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave.

    Attributes:
        train_loss: mean loss over the training batches.
        val_score: the metric on the validation split; None without one, and after an epoch without an evaluation.
        seconds: time of the training batches, without validation and checkpoints.
    """

    train_loss: float
    val_score: float | None
    seconds: float


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        variant: what distinguishes it from its twins, such as ``"plain"`` or ``"aw"``.
        network: name of the network.
        seed: of the initialisation, the order of the images and their augmentation.
        parameters: number of trained parameters.
        test_split: the split that it was tested on: ``"val"`` where the data set has no ``"test"``, or where choices
            are made by it.
        score: the metric of the network of the last epoch on that split, from 0 to 1.
        epochs: the learning curve.
        recipe: all settings of the run.
        versions: of awconv, torch, timm and Python, and the machine.
        operations: multiply-adds for one image; None in runs of versions that did not count them.
        jobs: how many runs shared the device.
        metric: ``"accuracy"``, the share of images that were classified rightly, or ``"box AP"`` (COCO's).
        figures: others by name, from 0 to 1, such as ``AP50``; negative where there is nothing to judge by.
    """

    variant: str
    network: str
    seed: int
    parameters: int
    test_split: str
    score: float
    epochs: list[Epoch]
    recipe: dict[str, Any]
    versions: dict[str, str]
    operations: int | None = None
    jobs: int = 1
    metric: str = "accuracy"
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def seconds_per_epoch(self) -> float:
        """Median time of an epoch; the first, which warms up, does not count where there are others."""
        return median(epoch.seconds for epoch in self.epochs[1:] or self.epochs)

    def save(self, path: Path) -> None:
        """Writes the run as JSON, wholly or not at all."""
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self), indent=1, allow_nan=False) + "\n")
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> Run:
        """Reads what :meth:`save` wrote.

        Raises:
            ValueError: the file is something else.
        """
        try:
            content = json.loads(path.read_text(), parse_constant=_refuse)
            run = cls(**(content | {"epochs": [Epoch(**epoch) for epoch in content["epochs"]]}))
            for part in (run, *run.epochs):
                _check_types(part)
            if run.test_split not in get_args(Split):
                raise ValueError(f"test_split cannot be {run.test_split[:80]!r}")
            if not run.epochs:
                raise ValueError("it has no epochs")
        except (ValueError, TypeError, KeyError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path} is not a run of awconv compare: {error}") from error
        return run


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


def _check_types(part: Any) -> None:
    """Raises a TypeError for an attribute of a dataclass whose value is not of its type, or no finite number."""
    types = get_type_hints(type(part))
    for one in fields(part):
        value = getattr(part, one.name)
        if not _is_a(value, types[one.name]):
            raise TypeError(f"{one.name} cannot be {str(value)[:80]!r}")


def _is_a(value: Any, kind: Any) -> bool:
    if isinstance(kind, UnionType):
        return any(_is_a(value, one) for one in get_args(kind))
    if get_origin(kind) is dict:
        names, values = get_args(kind)
        return isinstance(value, dict) and all(_is_a(k, names) and _is_a(v, values) for k, v in value.items())
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return kind is Any or isinstance(value, get_origin(kind) or kind)


_NETWORK = "--model.network"
_SEED = "--seed_everything"
_FOLDER = "--trainer.default_root_dir"
_SILENCED = ("--trainer.logger", "--trainer.enable_progress_bar", "--trainer.enable_model_summary")


def check_overrides(overrides: Sequence[str]) -> None:
    """Raises a ValueError for an override of what a comparison sets for each of its runs."""
    instead = {
        _SEED: "--seeds of the comparison counts them from 0",
        _FOLDER: "--out of the comparison names the folder of all",
        **dict.fromkeys(_SILENCED, "leave it out: the report has the curves, and one bar shows all runs"),
    }
    for override in overrides:
        name, _, value = override.partition("=")
        if name in instead and not (name in _SILENCED and value.lower() == "false"):  # which they are
            raise ValueError(f"{name} cannot be given for the runs of a comparison; {instead[name]}")


def base_network(recipe: Path, overrides: Sequence[str]) -> str:
    """The network that a recipe or an override names, which is that of the variant ``plain``.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: the recipe names no network.
    """
    named = read_recipe(recipe).get("model", {}).get("network") is not None
    if not named and not any(override.partition("=")[0] == _NETWORK for override in overrides):
        raise ValueError(f"recipe {recipe} must name a network under model.network")
    return str(parse(recipe, *overrides, build=False).config.model.network)


@dataclass(frozen=True)
class Variant:
    """What distinguishes a run from its twins.

    Attributes:
        name: what it is called.
        overlay: a YAML file that is laid over the recipe, and under the arguments of all variants.
        network: in the place of the recipe's.
        arguments: of its own, as ``awconv fit`` takes them.
    """

    name: str
    overlay: Path | None = None
    network: str | None = None
    arguments: tuple[str, ...] = ()


def find_variant(base: str, given: str) -> Variant:
    """A variant of a network by what the user calls it.

    Args:
        base: the recipe's network.
        given: ``plain`` for the recipe as it is, a prefix such as ``aw`` or ``aw_se`` for the network aw_BASE or
            aw_seBASE, or a YAML file that is laid over the recipe and whose name is the variant's.

    Raises:
        FileNotFoundError: there is no such YAML file.
        ValueError: timm has no such network.
    """
    if given.endswith((".yaml", ".yml")):
        path = Path(given)
        if not path.is_file():
            raise FileNotFoundError(f"variant {given} is not a file; expected YAML with what differs from the recipe")
        return Variant(path.stem, overlay=path)
    networks = [base] if given == "plain" else [f"{given}_{base}", f"{given}{base}"]
    known = [network for network in networks if given and timm.is_model(network)]
    if not known:
        raise ValueError(
            f"variant {given!r} of {base} would be the network {' or '.join(map(repr, networks))}, which "
            f"timm.create_model does not know; variants of it are {', '.join(_known_variants(base))}, or a YAML file "
            "that is laid over the recipe"
        )
    return Variant(given, network=known[0])


def _known_variants(base: str) -> list[str]:
    known = [name for name in BASELINES if name.endswith(base)]
    return ["plain", *(name.removesuffix(base).rstrip("_") for name in known)]


def parse(recipe: Path, *arguments: str, build: bool = True) -> TrainingCLI:
    """The settings of a recipe with further arguments, and its trainer, task and data where they are to be built."""
    return TrainingCLI([f"--config={recipe}", *arguments], run=False, save_config=False, build=build)


class OpenedData:
    """Data sets that runs share, so that they are decoded once."""

    def __init__(self) -> None:
        self._opened: dict[str, DataModule] = {}

    def of(self, cli: TrainingCLI, split: Split) -> DataModule:
        """The data of a run.

        Raises:
            ValueError: there is nothing to test on.
        """
        key = cli.parser.dump(cli.config.clone(), skip_link_targets=True, format="json")
        data = self._opened.setdefault(json.dumps(json.loads(key)["data"]), cli.datamodule)
        if data.dataset(split) is None:
            splits = {"test": "neither a test nor a validation split", "val": "no validation split"}
            raise ValueError(f"the data have {splits[split]}; hold one out with data.val_fraction")
        return data


@dataclass(frozen=True)
class Plan:
    """A run that is to be there in the end.

    Attributes:
        recipe: a YAML file for ``awconv fit``.
        variant: what distinguishes the run from its twins.
        seed: in the place of the recipe's.
        folder: of the comparison. The run's file goes there, and its checkpoints to a folder of the run's name.
        overrides: further arguments, as ``awconv fit`` takes them.
        split: what the network is tested on: ``"test"`` or ``"val"``.
        jobs: how many runs share the device.
    """

    recipe: Path
    variant: Variant
    seed: int
    folder: Path
    overrides: tuple[str, ...] = ()
    split: Split = "test"
    jobs: int = 1

    @property
    def name(self) -> str:
        """Of the run."""
        return f"{self.variant.name}-seed{self.seed}"

    @property
    def file(self) -> Path:
        """Where the finished run is kept."""
        return self.folder / f"{self.name}.json"

    def parse(self, build: bool = True) -> TrainingCLI:
        """The settings of the run, and its trainer, task and data where they are to be built."""
        overlay, network = self.variant.overlay, self.variant.network
        return parse(
            self.recipe,
            *([] if overlay is None else [f"--config={overlay}"]),
            *self.overrides,
            *([] if network is None else [f"{_NETWORK}={network}"]),
            *self.variant.arguments,
            f"{_SEED}={self.seed}",
            f"{_FOLDER}={self.folder / self.name}",
            *(f"{silenced}=false" for silenced in _SILENCED),
            build=build,
        )

    def check(self) -> None:
        """Raises a ValueError where the parser refuses the settings, after it has said why."""
        try:
            self.parse(build=False)
        except SystemExit as error:
            raise ValueError(f"the settings of variant {self.variant.name} are not those of a training") from error

    def finished(self) -> Run | None:
        """The run, if it is finished already.

        Raises:
            ValueError: the file holds a run of other settings, or no run.
        """
        if not self.file.is_file():
            return None
        run, cli = Run.load(self.file), self.parse(build=False)
        now = written(cli.parser, cli.config)
        known = completed(run.recipe, now, defaults(cli.parser))
        differing = ["its settings are no longer known"] if known is None else differences(known, settings(now))
        if (run.variant, run.seed) != (self.variant.name, self.seed):
            differing.append(f"it is {run.variant!r} of seed {run.seed} there, {self.name} now")
        expected = self.split
        if (expected, run.test_split) == ("test", "val"):  # right where there is no test split
            expected = self.parse().datamodule.test_split
        if run.test_split != expected:
            differing.append(f"it was tested on {run.test_split} there, on {expected} now")
        if differing:
            raise ValueError(
                f"{self.file} holds a run of other settings: {'; '.join(differing[:3])}. Name another folder with "
                "--out, or remove the file to train anew"
            )
        return run

    def train(self, opened: OpenedData, on_progress: Progress = lambda epochs, of: None) -> Run:
        """Trains the network, from where an interrupted run was, tests it after the last epoch and keeps the run.

        Args:
            opened: the data of other runs, which may be those of this one.
            on_progress: called after each batch with the epochs done so far and the number of all.

        Raises:
            KeyboardInterrupt: the user pressed Ctrl-C, which Lightning makes a SystemExit of.
            SIGTERMException: the process is to end.
            ValueError: there is nothing to test on, or an interrupted run was of other settings.
        """
        cli = self.parse()
        model, trainer, data = cli.model, cli.trainer, opened.of(cli, self.split)
        recorder = _Recorder(on_progress)
        trainer.callbacks.insert(0, recorder)  # type: ignore[attr-defined]  # before checkpoints are written
        try:
            content = written(cli.parser, cli.config)
            interrupted = self._interrupted(settings(content))
            with cli.naming(interrupted):
                trainer.fit(model, datamodule=data, ckpt_path=interrupted)
            evaluate = trainer.test if self.split == "test" else trainer.validate
            (metrics,) = evaluate(model, datamodule=data, verbose=False)
        except SIGTERMException:
            raise
        except SystemExit as error:
            if trainer.interrupted:
                raise KeyboardInterrupt from error
            raise
        model.cpu()
        run = Run(
            variant=self.variant.name,
            network=model.hparams["network"],
            seed=self.seed,
            parameters=sum(p.numel() for p in model.network.parameters() if p.requires_grad),
            operations=summary(model.network, model.example()).operations,
            test_split=data.test_split if self.split == "test" else self.split,
            score=metrics[f"{self.split}/{model.score}"],
            epochs=recorder.epochs,
            recipe=content,
            versions={
                "awconv": __version__,
                "torch": torch.__version__,
                "timm": timm.__version__,
                "python": platform.python_version(),
                "device": torch.cuda.get_device_name() if recorder.device == "cuda" else platform.machine(),
                "threads": str(torch.get_num_threads()),
            },
            jobs=self.jobs,
            metric=model.score_name,
            figures={name: metrics[f"{self.split}/{name}"] for name in model.further_figures},
        )
        if trainer.is_global_zero:
            run.save(self.file)
        return run

    def _interrupted(self, now: dict[str, str]) -> str | None:
        """The last checkpoint of this run.

        Raises:
            ValueError: it is of other settings.
        """
        last = find_last(self.folder / self.name)
        if last is None:
            return None
        there = read_checkpoint(last)["callbacks"].get(SameSettings.__qualname__, {}).get("settings", {})
        differing = differences(there, now)
        if differing:
            raise ValueError(
                f"{self.folder / self.name} holds checkpoints of other settings: {'; '.join(differing[:3])}. Name "
                "another folder with --out, or remove this one to train anew"
            )
        return str(last)


def recorded(checkpoint: dict[str, Any]) -> list[Epoch]:
    """The learning curve of the run that a checkpoint is of."""
    return [Epoch(**epoch) for epoch in checkpoint["callbacks"].get(_Recorder.__qualname__, {}).get("epochs", [])]


class _Recorder(pl.Callback):
    """Keeps the learning curve, in checkpoints too, and times the batches of each epoch."""

    def __init__(self, on_progress: Progress) -> None:
        self.epochs: list[Epoch] = []
        self.device = "cpu"
        self._on_progress = on_progress
        self._begun = 0.0
        self._seconds = 0.0  # in this epoch, and before an interruption of it
        self._losses: list[Tensor] = []
        self._score: float | None = None  # of an evaluation in this epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seconds, self._losses, self._score = 0.0, [], None
        self._begin(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.device = pl_module.device.type
        self._begin(pl_module)  # for the rest of an interrupted epoch, which does not start again

    def _begin(self, module: pl.LightningModule) -> None:
        _synchronize(module)
        self._begun = time.perf_counter() - self._seconds

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._losses.append(outputs["loss"].detach() * trainer.accumulate_grad_batches)  # which Lightning divides by
        batches = trainer.num_training_batches
        if batch_idx + 1 == batches:
            _synchronize(pl_module)
        self._seconds = time.perf_counter() - self._begun
        self._on_progress(trainer.current_epoch + (batch_idx + 1) / batches, trainer.max_epochs or 0)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        score = trainer.callback_metrics.get(f"val/{pl_module.score}")
        self._score = None if score is None else score.item()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epochs.append(
            Epoch(
                train_loss=torch.stack(self._losses).double().mean().item(),
                val_score=self._score,
                seconds=self._seconds,
            )
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "seconds": self._seconds,
            "losses": [loss.item() for loss in self._losses],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs = [Epoch(**epoch) for epoch in state_dict["epochs"]]
        self._seconds = state_dict["seconds"]
        self._losses = [torch.tensor(loss) for loss in state_dict["losses"]]


def _synchronize(module: pl.LightningModule) -> None:
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Lightning speaks to the user of one run; many runs under one progress bar need none of it."""
    loggers = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")]
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
