"""One training run, and the small file that keeps what came of it."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import timm
import torch
import yaml

from awconv.data import ImageDataModule
from awconv.models import TWINS
from awconv.training import TrainingCLI
from awconv.version import __version__


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave.

    Attributes:
        train_loss: mean cross-entropy over the training batches.
        val_accuracy: share of the validation images that were classified rightly; None without a validation split.
        seconds: time of the training batches, without validation and checkpoints.
    """

    train_loss: float
    val_accuracy: float | None
    seconds: float


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        variant: what distinguishes it from its twins, such as ``"plain"`` or ``"aw"``.
        network: name of the network.
        seed: of the initialisation, the order of the images and their augmentation.
        parameters: number of trained parameters.
        test_split: the split that it was tested on: ``"val"`` where the data set has no ``"test"``.
        test_accuracy: share of that split that the network of the last epoch classified rightly.
        epochs: the learning curve.
        recipe: all settings of the run.
        versions: of awconv, torch, timm and Python, and the machine.
    """

    variant: str
    network: str
    seed: int
    parameters: int
    test_split: str
    test_accuracy: float
    epochs: list[Epoch]
    recipe: dict[str, Any]
    versions: dict[str, str]

    @property
    def seconds_per_epoch(self) -> float:
        """Median time of an epoch; the first, which warms up, does not count where there are others."""
        return median(epoch.seconds for epoch in self.epochs[1:] or self.epochs)

    def save(self, path: Path) -> None:
        """Writes the run as JSON, wholly or not at all."""
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self), indent=1) + "\n")
        os.replace(partial, path)


_NETWORK = "--model.network="


def base_network(recipe: Path, overrides: Sequence[str]) -> str:
    """The network that a recipe or an override names, which is that of the variant ``plain``.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: the recipe names no network.
    """
    if not recipe.is_file():
        raise FileNotFoundError(f"recipe {recipe} is not a file; expected a YAML file such as those under recipes/")
    for override in reversed(overrides):
        if override.startswith(_NETWORK):
            return override.removeprefix(_NETWORK)
    content = yaml.safe_load(recipe.read_text())
    try:
        return str(content["model"]["network"])
    except (TypeError, KeyError):
        raise ValueError(f"recipe {recipe} must name a network under model.network") from None


@dataclass(frozen=True)
class Variant:
    """What distinguishes a run from its twins.

    Attributes:
        name: what it is called.
        overlay: a YAML file that is laid over the recipe, and under the arguments of all variants.
        network: in the place of the recipe's.
    """

    name: str
    overlay: Path | None = None
    network: str | None = None


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
    known = [name for name in TWINS if name.endswith(base)]
    return ["plain", *(name.removesuffix(base).rstrip("_") for name in known)]


def open_data(recipe: Path, overrides: Sequence[str]) -> ImageDataModule:
    """The data of a recipe. Nothing but the test images is decoded yet.

    Raises:
        ValueError: there is nothing to test on.
    """
    data: ImageDataModule = _parse(recipe, *overrides).datamodule
    if data.dataset("test") is None:
        raise ValueError("the data have neither a test nor a validation split; hold one out with data.val_fraction")
    return data


def _parse(recipe: Path, *arguments: str) -> TrainingCLI:
    _quieten_lightning()
    return TrainingCLI([f"--config={recipe}", *arguments], run=False, save_config=False)


def train(
    recipe: Path,
    variant: Variant,
    seed: int,
    folder: Path,
    data: ImageDataModule,
    overrides: Sequence[str] = (),
    on_progress: Callable[[float, int], None] = lambda epochs, of: None,
) -> Run:
    """Trains a network by a recipe and tests it after the last epoch.

    Args:
        recipe: a YAML file for ``awconv fit``.
        variant: what distinguishes the run from its twins.
        seed: in the place of the recipe's.
        folder: where the checkpoint goes.
        data: the recipe's data, of :func:`open_data`: runs share it, and it is decoded once.
        overrides: further arguments, as ``awconv fit`` takes them.
        on_progress: called after each batch with the epochs done so far and the number of all.

    Raises:
        KeyboardInterrupt: the user pressed Ctrl-C, which Lightning makes a SystemExit of.
    """
    cli = _parse(
        recipe,
        *([] if variant.overlay is None else [f"--config={variant.overlay}"]),
        *overrides,
        *([] if variant.network is None else [f"{_NETWORK}{variant.network}"]),
        f"--seed_everything={seed}",
        f"--trainer.default_root_dir={folder}",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
    )
    recorder = _Recorder(on_progress)
    cli.trainer.callbacks.append(recorder)  # type: ignore[attr-defined]
    try:
        cli.trainer.fit(cli.model, datamodule=data)
        (metrics,) = cli.trainer.test(cli.model, datamodule=data, verbose=False)
    except SystemExit as error:
        if cli.trainer.interrupted:
            raise KeyboardInterrupt from error
        raise
    return Run(
        variant=variant.name,
        network=cli.model.hparams["network"],
        seed=seed,
        parameters=sum(p.numel() for p in cli.model.parameters() if p.requires_grad),
        test_split=data.test_split,
        test_accuracy=metrics["test/accuracy"],
        epochs=recorder.epochs,
        recipe=yaml.safe_load(cli.parser.dump(cli.config, skip_link_targets=True)),
        versions={
            "awconv": __version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name() if cli.model.device.type == "cuda" else platform.machine(),
            "threads": str(torch.get_num_threads()),
        },
    )


class _Recorder(pl.Callback):
    """Keeps the learning curve, and times the batches of each epoch."""

    def __init__(self, on_progress: Callable[[float, int], None]) -> None:
        self.epochs: list[Epoch] = []
        self._on_progress = on_progress
        self._start = self._stop = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _synchronize(pl_module)
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        batches = trainer.num_training_batches
        if batch_idx + 1 == batches:
            _synchronize(pl_module)
        self._stop = time.perf_counter()
        self._on_progress(trainer.current_epoch + (batch_idx + 1) / batches, trainer.max_epochs or 0)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = trainer.callback_metrics
        accuracy = metrics.get("val/accuracy")
        self.epochs.append(
            Epoch(
                train_loss=metrics["train/loss"].item(),
                val_accuracy=None if accuracy is None else accuracy.item(),
                seconds=self._stop - self._start,
            )
        )


def _synchronize(module: pl.LightningModule) -> None:
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)


def _quieten_lightning() -> None:
    """Lightning speaks to the user of one run; many runs under one progress bar need none of it."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
