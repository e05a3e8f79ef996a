"""Lightning's command line: builds trainer, task and data from a recipe (YAML) and overrides."""

from __future__ import annotations

import errno
import inspect
import os
import pydoc
import shlex
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from awconv.data import DataModule, ImageDataModule
from awconv.data.loading import Split
from awconv.own_code import as_names, import_own
from awconv.roles import Role
from awconv.tasks import ClassificationTask, DetectionTask, Task
from awconv.terminal import say
from awconv.training.checkpoints import AtomicCheckpointIO, RecentCheckpoint, find_last, read_checkpoint
from awconv.training.class_report import ClassReport
from awconv.training.detections import DetectionFile
from awconv.training.explain import explained
from awconv.training.find_task import find_task
from awconv.training.lean import NoProfiler, SkipEmptyHooks
from awconv.training.lengths import check_seed, check_steps
from awconv.training.lock import clear
from awconv.training.logs import LOGS, loggers
from awconv.training.notice import NoticeError, queue_again
from awconv.training.of_checkpoint import take_network, take_preprocessing
from awconv.training.processes import Processes
from awconv.training.same import SameSettings, SameThreads
from awconv.training.settings import Settings, check_nulls, data_of
from awconv.training.sharded import chosen
from awconv.training.spread import as_started
from awconv.training.stop import StopOnSigterm
from awconv.training.watch import Bar, EpochLosses, FiniteTraining, Pace, newest_checkpoint
from awconv.usage import Strict, UsageError, integers_first
from awconv.yaml_files import bounded_yaml

_CONFIG = "awconv_fit.yaml"
_OF_THE_FIRST_STEP = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    RuntimeError,
    TypeError,
)


class TrainingParser(Strict, LightningArgumentParser):
    """Raises errors in place of printing the usage."""


class TrainingCLI(LightningCLI):
    """Lightning's command line for our tasks and data. The data choose the task, and set its classes and image sizes.

    Defaults: the digits as ``data``, and 15 epochs. ``ckpt_path=last`` is the newest intact checkpoint below
    ``trainer.default_root_dir``; without one, a training starts anew.

    Args:
        args: the arguments, with the subcommand first if ``run`` is true.
        run: run a subcommand. False only builds ``trainer``, ``model`` and ``datamodule``.
        save_config: write the configuration beside the checkpoints, as ``awconv_fit.yaml``.
        task: the task; by default the one of the arguments' data.
    """

    def __init__(
        self, args: Sequence[str], run: bool = True, save_config: bool = True, task: type[Task] | None = None
    ) -> None:
        self._task = find_task(args) if task is None else task
        self._claimed: Path | None = None  # the folder of the logs
        super().__init__(
            self._task,
            self._task.data_module,
            args=list(args),
            run=run,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            # Checkpoints then hold plain values, which load_from_checkpoint needs no parser for.
            load_from_checkpoint_support=False,
            # The data divide themselves among processes: data/order.py.
            trainer_defaults={"max_epochs": 15, "use_distributed_sampler": False},
            save_config_callback=SaveConfigCallback if save_config else None,
            save_config_kwargs={"overwrite": True, "config_filename": _CONFIG},
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        with warnings.catch_warnings(), bounded_yaml():
            # Ours is a command among others, which hands its own arguments on.
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            try:
                super().parse_arguments(parser, args)
            except UsageError as error:
                given = list(args) if isinstance(args, list) else []
                raise UsageError(explained(str(error), given, self._options(given))) from error
        command = self.config.get("subcommand")
        config = self.config[command] if command else self.config
        import_own(as_names(config.get("import")))
        if config.trainer.default_root_dir:
            config.trainer.default_root_dir = os.path.expanduser(config.trainer.default_root_dir)
        check_seed(config.get("seed_everything"))
        if command in (None, "fit"):  # None is a run of a comparison
            check_steps(config.trainer)
            if self._task is ClassificationTask and (taken := take_network(config.model, config.data)):
                say(f"awconv {command or 'compare'}: {taken}")
        if command:
            self._find_checkpoint(config, command)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """The parser, and that of each subcommand."""
        parser = TrainingParser(**kwargs)
        parser.add_argument("-c", "--config", action="config", help="a recipe: a YAML file of these arguments")
        own = "files (.py) or modules that register networks of your own with timm; several with commas"
        parser.add_argument("--import", type=str | list[str] | None, help=own)
        return parser

    def _options(self, arguments: Sequence[str]) -> frozenset[str]:
        """The names of the options of the subcommand, or of a run of a comparison."""
        named = [argument for argument in arguments[:1] if argument in self.subcommands()]
        parser = self._parser(named[0]) if named and hasattr(self, "_subcommand_parsers") else self.parser
        return frozenset(name[2:] for name in parser._option_string_actions if name.startswith("--"))

    def _find_checkpoint(self, config: Any, command: str) -> None:
        root = Path(config.trainer.default_root_dir or ".")
        folders = (root / LOGS, root / "checkpoints")
        if command == "fit":
            _check_writable(root)
            for folder in folders:
                clear(folder)
        self._takes_last = config.ckpt_path == "last"
        if self._takes_last:
            found = find_last(*folders)
            config.ckpt_path = None if found is None else str(found)
            if found is None and command == "fit":
                say(f"awconv fit: there is no checkpoint under {root} yet; starting anew")
            elif found is None:
                raise FileNotFoundError(f"there is no checkpoint under {root}")
            else:
                say(f"awconv {command}: going on from {found}")
        elif config.ckpt_path:
            config.ckpt_path = os.path.expanduser(config.ckpt_path)
        if config.ckpt_path:
            checkpoint = read_checkpoint(Path(config.ckpt_path))  # an error now, and not after the data were read
            if command != "fit":
                take_preprocessing(config.data, checkpoint)

    def _parse_ckpt_path(self) -> None:
        """In an evaluation, the checkpoint's settings win. A training must be given the same ones, and compares."""
        if self.config.get("subcommand") != "fit":
            try:
                super()._parse_ckpt_path()
            except UsageError as error:
                path = self.config[self.config["subcommand"]]["ckpt_path"]
                raise ValueError(f"checkpoint {path} holds arguments that there are not") from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        if self._task.data_module is ImageDataModule:
            parser.set_defaults({"data": {"class_path": "awconv.data.Digits"}})
            parser.add_lightning_class_args(ClassReport, "report")
        else:
            parser.add_lightning_class_args(DetectionFile, "detections")
        for name in self._task.arguments_of(Role.DATA):
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")
        parser.add_class_arguments(RecentCheckpoint, "recent_checkpoint")
        parser.add_class_arguments(Processes, "processes")
        integers_first(parser)

    def instantiate_classes(self) -> None:
        """Builds what the configuration describes."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        import_own(as_names(config.get("import")))  # in another process than the one that has parsed them
        check_nulls("model", self._task, config.model.as_dict())
        check_nulls("data", pydoc.locate(config.data.class_path), config.data.get("init_args", Namespace()).as_dict())
        try:
            super().instantiate_classes()
        except ValueError as error:
            cause = error.__cause__ or error.__context__
            if cause is not None and str(error).startswith("Does not validate"):  # the parser lists all that it tried
                raise cause from error
            raise

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The trainer, with logs for TensorBoard and as CSV, and checkpoints that survive interruptions."""
        config = self._get(self.config_init, "trainer")
        kwargs |= as_started(config)
        self._processes = self._get(self.config_init, "processes")
        if (sharded := chosen(config.get("strategy"), self._processes.timeout)) is not None:
            kwargs["strategy"] = sharded
        ours = self._logs_are_ours(config)
        if ours:
            kwargs["logger"] = loggers(config["default_root_dir"] or ".")
        elif config.get("logger") is None:
            kwargs["logger"] = False  # an evaluation prints its figures
        kwargs["plugins"] = [*_as_list(config.get("plugins")), AtomicCheckpointIO()]
        now = self.config[self.subcommand] if self.subcommand else self.config
        self._same = SameSettings(settings_of(self._task, self._parser(self.subcommand), now))
        self._processes.settings = self._same.settings
        stop, self._pace, given = StopOnSigterm(self._processes), Pace(), _as_list(config.get("callbacks"))
        watching = [self._processes, self._same, SameThreads(), FiniteTraining(), self._pace, stop, SkipEmptyHooks()]
        callbacks = [EpochLosses(), *given, *watching]
        if config.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in given):
            callbacks.append(Bar())
        if config.get("profiler") is None:
            kwargs["profiler"] = NoProfiler()
        if config.get("enable_model_summary") is None and not any(isinstance(one, ModelSummary) for one in callbacks):
            kwargs["enable_model_summary"] = False  # which counts no operations; before_fit says what trains
        if config.get("enable_checkpointing") is not False:
            recent = self._get(self.config_init, "recent_checkpoint")
            recent.stop = stop
            callbacks.append(recent)
            callbacks.append(  # of the last two epochs
                ModelCheckpoint(
                    dirpath=None if ours else Path(config["default_root_dir"] or ".") / "checkpoints",
                    filename="{epoch}-{step}",
                    monitor="step",
                    mode="max",
                    save_top_k=2,
                    save_on_train_epoch_end=True,
                    enable_version_counter=False,
                )
            )
        try:
            trainer = super().instantiate_trainer(callbacks=callbacks, **kwargs)
        except Exception as error:  # Lightning's own, and what it does not expect
            defaults = inspect.signature(pl.Trainer).parameters
            given = [
                f"trainer.{name}={value}"
                for name, value in config.items()
                if isinstance(value, int | float | str | dict) and value != defaults[name].default
            ]
            raise ValueError(f"there is no such trainer: {error} (given: {', '.join(given)})") from error
        self._processes.limit(trainer)
        return trainer

    def _logs_are_ours(self, config: Any) -> bool:
        """Whether there are our logs: without a logger of the user, and in an evaluation only where asked for."""
        evaluates = self.subcommand not in (None, "fit")  # None is a run of a comparison
        return config.get("logger") is True or (config.get("logger") is None and not evaluates)

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            with self.naming(self._get(self.config, "ckpt_path")):
                super()._run_subcommand(subcommand)
        except (SIGTERMException, SystemExit) as error:  # which Lightning makes of Ctrl-C
            if subcommand == "fit" and self._pace.batches:
                self._say_what_is_next("stopped")
            if isinstance(error, NoticeError) and self._takes_last and self._pace.batches:
                say(f"awconv {subcommand}: SLURM does not queue the job again: {queue_again()}")
            raise
        finally:
            if self._claimed is not None and self._pace.batches == 0:
                shutil.rmtree(self._claimed, ignore_errors=True)
                with suppress(OSError):  # there are others
                    self._claimed.parent.rmdir()

    @contextmanager
    def naming(self, ckpt_path: str | None) -> Iterator[None]:
        """Tells the task whether it resumes, and names other processes that are lost. If the first step fails, names
        the checkpoint or the dictionaries of arguments that may be the reason.

        Args:
            ckpt_path: the checkpoint to resume from; None for a fresh start.

        Raises:
            LostError: other processes are lost.
            ValueError: instead of PyTorch's or Lightning's error.
        """
        self._processes.checkpoint = ckpt_path
        self.model.resumes = ckpt_path is not None
        try:
            yield
        except Exception as error:
            self._processes.after(error, self.trainer)
            if not isinstance(error, _OF_THE_FIRST_STEP) or isinstance(error, torch.OutOfMemoryError):
                raise
            if self._same.restoring and ckpt_path:
                raise ValueError(f"{ckpt_path} is a checkpoint that cannot be used here: {error!r}") from error
            given = self._dictionaries()
            if given and self.trainer.global_step == 0:  # they are looked into when they are used
                raise ValueError(f"the first step failed, perhaps by {', '.join(given)}: {error!r}") from error
            raise

    def _dictionaries(self) -> list[str]:
        """Options that are dictionaries of arguments, as they were given."""
        model, data = self._get(self.config, "model"), self._get(self.config, "data").get("init_args", {})
        return [
            f"{group}.{name}={value}"
            for group, options in (("model", model), ("data", data))
            for name, value in options.items()
            if isinstance(value, dict) and value
        ]

    def before_fit(self) -> None:
        """Claims a folder for the logs, says what trains, and silences warnings that do not apply."""
        config, first = self._get(self.config_init, "trainer"), rank_zero_only.rank == 0  # type: ignore[attr-defined]
        if self.trainer.loggers and self._logs_are_ours(config) and first:
            self.trainer.loggers = loggers(config["default_root_dir"] or ".", claim=True)
            self._claimed = Path(str(self.trainer.log_dir))
        if first and config.get("enable_model_summary") is None:
            parameters = sum(parameter.numel() for parameter in self.model.network.parameters())
            say(f"awconv fit: {self.model.network_name}, {parameters:,} parameters")
        if self.model.trained is not None and first:
            say(f"awconv fit: {self.model.trained}")
        if self.model.trained is not None or getattr(self.model, "ema", None) is not None:  # which stay in evaluation
            warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")

    def after_fit(self) -> None:
        """Says where the checkpoint is, and what can be done with it."""
        self._say_what_is_next("trained" if self._pace.batches else "there was nothing left to train")

    def _say_what_is_next(self, done: str) -> None:
        newest = newest_checkpoint(self.trainer) if self._pace.batches else self._get(self.config, "ckpt_path")
        if newest is None or rank_zero_only.rank != 0:  # type: ignore[attr-defined]
            return
        path = Path(newest)
        lines, config = [f"awconv fit: {done}; the checkpoint is {path}"], path.parent.parent / _CONFIG
        if config.is_file():
            lines.append(f"  awconv test --config={shlex.quote(str(config))} --ckpt_path={shlex.quote(str(path))}")
        named, own = shlex.quote(str(path)), ",".join(as_names(self._get(self.config, "import")))
        imported = shlex.quote(f"--import={own}") + " " if own else ""
        lines.append(f"  awconv predict {imported}--ckpt={named} IMAGES")
        if self._task is ClassificationTask:
            lines.append(f"  awconv publish {imported}{named} --tag=NAME --data='the training images, in words'")
        say(*lines)

    def before_validate(self) -> None:
        """Refuses to evaluate weights that were never trained."""
        self.model.evaluates_pretrained = self._get(self.config, "ckpt_path") is None
        if self.model.evaluates_pretrained and not self.model.pretrained:
            raise ValueError(
                "there is nothing to evaluate: give --ckpt_path, a checkpoint of awconv fit, or --model.pretrained"
            )
        if self.model.evaluates_pretrained and self._task is DetectionTask:
            raise ValueError("pretrained weights are of a detector's backbone alone: give --ckpt_path")
        self._check_split("test" if self.subcommand == "test" else "val")

    def _check_split(self, split: Split) -> None:
        if self.datamodule.dataset(split) is None:
            raise ValueError(f"the data have no {split} split to evaluate on; name one, or give data.val_fraction")

    def before_test(self) -> None:
        """Says so if the data have no test split."""
        self.before_validate()
        if self.datamodule.test_split == "val":
            say("awconv test: the data have no test split; this is their validation split")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        needless = {"model", "dataloaders", "datamodule"}
        return {
            "fit": needless | {"train_dataloaders", "val_dataloaders"},
            "validate": set(needless),
            "test": set(needless),
        }


def settings_of(task: type[Task], parser: LightningArgumentParser, config: Namespace) -> Settings:
    """A parsed configuration as settings."""
    content = plain(parser, config)
    content.pop("report", None)  # what an evaluation prints
    data: type[DataModule] = pydoc.locate(data_of(content)["class_path"])  # type: ignore[assignment]
    return Settings(task, data, content)


def plain(parser: LightningArgumentParser, config: Namespace) -> dict[str, Any]:
    """A parsed configuration as plain values by section, without unset ones."""
    content: dict[str, Any] = yaml.safe_load(parser.dump(config, skip_link_targets=True, skip_validation=True))
    return content


def _check_writable(folder: Path) -> None:
    """Raises a PermissionError if this user cannot write to a folder, or create it."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if there.is_dir() and not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(there))


def _as_list(given: Any) -> list[Any]:
    return list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]
