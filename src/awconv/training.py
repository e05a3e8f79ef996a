"""From a recipe (YAML and overrides) to a trainer, a task and its data, by Lightning's command line."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback

from awconv.data import ImageDataModule
from awconv.tasks.classification import FROM_DATA, ClassificationTask


class TrainingCLI(LightningCLI):
    """Lightning's command line over our tasks and data, which tells the task what the data are.

    Without ``data`` it takes the digits, and without ``trainer.max_epochs`` 15 epochs.

    Args:
        args: the arguments, with the subcommand first where ``run`` is true.
        run: run a subcommand; false only builds ``trainer``, ``model`` and ``datamodule``.
        save_config: write the configuration beside the checkpoints, as ``awconv_fit.yaml``.
    """

    def __init__(self, args: Sequence[str], run: bool = True, save_config: bool = True) -> None:
        super().__init__(
            ClassificationTask,
            ImageDataModule,
            args=list(args),
            run=run,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            # Checkpoints then hold plain values, which load_from_checkpoint needs no parser for.
            load_from_checkpoint_support=False,
            trainer_defaults={"max_epochs": 15},
            save_config_callback=SaveConfigCallback if save_config else None,
            save_config_kwargs={"overwrite": True, "config_filename": "awconv_fit.yaml"},
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        with warnings.catch_warnings():
            # Ours is a command among others, which hands its own arguments on.
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            super().parse_arguments(parser, args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults({"data": {"class_path": "awconv.data.Digits"}})
        for name in FROM_DATA:
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")

    def before_validate(self) -> None:
        """Refuses to evaluate weights that were never trained."""
        if self._get(self.config, "ckpt_path") is None:
            raise ValueError("there is nothing to evaluate: give --ckpt_path, a checkpoint of awconv fit")

    def before_test(self) -> None:
        """Says so where the data have no test split."""
        self.before_validate()
        if self.datamodule.test_split == "val":
            print("awconv test: the data have no test split; this is their validation split", file=sys.stderr)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        needless = {"model", "dataloaders", "datamodule"}
        return {
            "fit": needless | {"train_dataloaders", "val_dataloaders"},
            "validate": set(needless),
            "test": set(needless),
        }
