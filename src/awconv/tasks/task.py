"""What all tasks share: the optimisation, and which checkpoints they accept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import awconv
from awconv.data import DataModule
from awconv.models.pretrained import not_finite
from awconv.roles import Role
from awconv.tasks.checks import check_network
from awconv.tasks.means import EpochMeans
from awconv.tasks.optimization import Optimization
from awconv.tasks.sharding import shard
from awconv.train_only import TrainedParts

FIGURES = "figures"  # in checkpoints


class Task(pl.LightningModule):
    """Trains a network.

    A subclass builds ``self.network`` and declares its data, the roles of its arguments and its score. Its checkpoints
    hold all that a prediction needs.

    Args:
        network: a name that ``timm.create_model`` knows.
        network_args: further arguments of the network.
        pretrained: weights to start from: timm's (true), or a file.
        convert: arguments of :func:`awconv.convert`. None leaves the network as it is.
        train_only: the parts that train, as for :func:`awconv.train_only`, such as ``["branch", "head"]``; all else is
            frozen, statistics of norms included. None trains all.
        optimizer: a name that ``timm.optim.create_optimizer_v2`` knows. Biases and norms have no weight decay.
        optimizer_args: further arguments of the optimizer, such as ``{"betas": [0.9, 0.99]}``.
        lr: the highest learning rate.
        branch_lr_factor: factor of the attention branches' learning rate, and of squeeze-and-excitation that was given
            to a pretrained network.
        head_lr_factor: factor of the classifier's learning rate. A new classifier on a pretrained network learns best
            at ten times the rate of the rest or more.
        momentum: the optimizer's momentum.
        weight_decay: the optimizer's weight decay.
        branch_weight_decay: weight decay of what ``branch_lr_factor`` is for. None takes ``weight_decay``.
        warmup_epochs: length of the linear warm-up, in epochs.
        decay_epochs: epochs after which the learning rate is multiplied by ``decay_rate``. If empty, the rate decays to
            0 as a cosine.
        decay_rate: factor at each of ``decay_epochs``.

    Attributes:
        trained: what trains, if ``train_only`` is given.

    Raises:
        ValueError: timm does not know the network, the network has no such part, or a number is out of its range.
    """

    data_module: ClassVar[type[DataModule]]
    """The kind of data that the task is trained on."""
    roles: ClassVar[Mapping[str, Role]]
    """Roles of arguments; the others decide the steps. Arguments that the data decide are properties of the data."""
    score: ClassVar[str]
    """Name of the figure by which networks are compared, from 0 to 1. It is logged as ``SPLIT/score``."""
    score_name: ClassVar[str]
    """Its name in tables, which give percents."""
    further_figures: ClassVar[tuple[str, ...]] = ()
    """Other figures for tables, from 0 to 1; negative if there is nothing to evaluate."""

    network: nn.Module

    def __init__(
        self,
        network: str,
        network_args: dict[str, Any] | None = None,
        pretrained: bool | str = False,
        convert: dict[str, Any] | None = None,
        train_only: Sequence[str] | None = None,
        optimizer: str = "sgd",
        optimizer_args: dict[str, Any] | None = None,
        lr: float = 0.1,
        branch_lr_factor: float = 1.0,
        head_lr_factor: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        branch_weight_decay: float | None = None,
        warmup_epochs: float = 1.0,
        decay_epochs: Sequence[float] = (),
        decay_rate: float = 0.1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()  # those of the subclass, too
        check_network(network, network_args)
        self.network_name, self.pretrained = network, pretrained
        self.network_args: dict[str, Any] = dict(network_args or {})
        self.conversion = convert
        if isinstance(train_only, str):
            raise ValueError(f"train_only must be a list of parts, such as [branch, head], got {train_only!r}")
        self.parts = None if train_only is None else list(train_only)
        self.trained: TrainedParts | None = None
        self.optimization = Optimization(
            optimizer,
            dict(optimizer_args or {}),
            lr,
            branch_lr_factor,
            head_lr_factor,
            momentum,
            weight_decay,
            branch_weight_decay,
            warmup_epochs,
            tuple(decay_epochs),
            decay_rate,
        )
        self.losses = EpochMeans()
        self.evaluates_pretrained = False  # set by the command line: a test right after a training must not load them
        self.resumes = False  # set by the command line: Lightning knows its checkpoint only after setup

    @classmethod
    def arguments_of(cls, role: Role) -> list[str]:
        """The names of the arguments that have a role."""
        return [name for name, its in cls.roles.items() if its is role]

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated."""
        return self.network

    def example(self) -> Any:
        """The network's input for one image, to count its multiply-adds."""
        raise NotImplementedError

    def freeze_rest(self) -> None:
        """Freezes what ``train_only`` leaves out of ``self.network``, once it is built.

        Raises:
            ValueError: the network has no such part.
        """
        if self.parts is not None:
            self.trained = awconv.train_only(self.network, *self.parts)

    def configure_model(self) -> None:
        """Shares out the parameters among the processes, where the strategy does so (``--trainer.strategy=fsdp``)."""
        mesh = self.device_mesh
        if mesh is not None:
            for network in self.sharded():
                shard(network, mesh["data_parallel"])

    def sharded(self) -> list[nn.Module]:
        """The networks whose parameters can be shared out."""
        return [self.network]

    def on_fit_start(self) -> None:
        """Freezes again: the trainer's ``sync_batchnorm`` has put other norms in the places of those that are held."""
        self.freeze_rest()

    def on_train_epoch_start(self) -> None:
        self.losses.clear()

    def on_train_epoch_end(self) -> None:
        self.log_losses()

    def log_losses(self) -> None:
        """Logs the means of the epoch's losses, over all processes, if that was not done yet.

        Lightning calls callbacks before the task, and those of users may look for ``train/loss``: a callback before
        them (:class:`awconv.training.watch.EpochLosses`) asks for it.
        """
        for name, mean in self.losses.take().items():
            value = torch.tensor(mean, device=self.device)
            self.log(f"train/{name}", value, prog_bar=name == "loss", sync_dist=True)

    @property
    def loads_pretrained(self) -> bool:
        """Whether pretrained weights are loaded now: at the start of a training without a checkpoint, and to evaluate
        them."""
        if not self.pretrained or self.resumes or self.trainer.ckpt_path:
            return False
        return bool(self.trainer.training) or self.evaluates_pretrained

    def ready(self) -> Task:
        """The task in evaluation mode, on the accelerator if there is one."""
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self.eval().to(device or "cpu")
        return self

    def refuse_weights(self, error: Exception) -> NoReturn:
        """Reports that pretrained weights could not be loaded.

        Raises:
            FileNotFoundError: their file is missing.
            ValueError: for any other reason, such as a hub that cannot be reached.
        """
        if isinstance(error, FileNotFoundError) and self.pretrained is not True:
            raise error
        mend = (
            "; --model.pretrained=FILE takes them from a file (of awconv predict: --pretrained=FILE)"
            if self.pretrained is True
            else ""
        )
        raise ValueError(f"no pretrained weights for {self.network_name} ({self.pretrained}): {error}{mend}") from error

    def setup(self, stage: str) -> None:
        """Takes the training's precision before weights are loaded; later, they would have been rounded."""
        if self.trainer.precision == "64-true":
            self.double()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the figures of the last evaluation, for a model card."""
        figures = {} if self._trainer is None else self._trainer.callback_metrics
        checkpoint[FIGURES] = {name: value.item() for name, value in figures.items() if name.startswith("val/")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses weights that do not fit.

        Raises:
            ValueError: the checkpoint's network, classes or images differ from this task's, or its weights are infinite
                or NaN.
        """
        broken = not_finite(checkpoint["state_dict"], self.state_dict())
        if broken:
            raise ValueError(
                f"the checkpoint has weights that are infinite or not a number, such as {', '.join(broken[:3])}; take "
                "an earlier one"
            )
        trained = checkpoint["hyper_parameters"]
        for name in self.arguments_of(Role.DATA):
            if name in trained and not self._fits(name, trained[name], self.hparams[name]):
                raise ValueError(
                    f"the checkpoint was trained with {name} {_shortened(trained[name])}, and the data have "
                    f"{_shortened(self.hparams[name])}; give the data and the arguments that it was trained with"
                )
        for name in self.arguments_of(Role.NETWORK):
            if (trained.get(name) or None) != (self.hparams[name] or None):
                raise ValueError(
                    f"the checkpoint was trained with --model.{name}={trained.get(name)}, and this training has "
                    f"{self.hparams[name]}; give the arguments that it was trained with"
                )

    def _fits(self, name: str, trained: Any, now: Any) -> bool:
        """Whether what the data decide suits a checkpoint. An evaluation may have another resolution."""
        if _equal(trained, now):
            return True
        if self.trainer.state.fn == TrainerFn.FITTING or name not in ("input_size", "crop_pct"):
            return False
        return name == "crop_pct" or bool(trained[0] == now[0])

    def configure_optimizers(self) -> Any:
        # Lightning clips no gradients that a fused optimizer has yet to unscale.
        fused = self.device.type == "cuda" and self.trainer.precision != "16-mixed"
        optimizer = self.optimization.make_optimizer(self.network, fused)
        rate = self.optimization.schedule(*self._count_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, rate), "interval": "step"}}

    def _count_steps(self) -> tuple[float, float]:
        """The optimizer's steps in an epoch and in the whole training.

        Lightning's own count would make the loaders' iterators, before a resumed training knows where it was.
        """
        trainer = self.trainer
        batches, limit = len(trainer.datamodule.train_dataloader()), trainer.limit_train_batches  # type: ignore[attr-defined]
        if isinstance(limit, int):
            batches = min(batches, limit)
        else:
            batches = int(batches * limit)
        per_epoch = math.ceil(batches / trainer.accumulate_grad_batches)
        epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
        steps = math.inf if trainer.max_steps == -1 else trainer.max_steps
        return per_epoch, min(per_epoch * epochs, steps)


def _equal(one: Any, other: Any) -> bool:
    return list(one) == list(other) if isinstance(one, Sequence) else bool(one == other)


def _shortened(value: Any) -> str:
    if not isinstance(value, Sequence) or len(value) <= 10:
        return str(value if not isinstance(value, Sequence) else list(value))
    return f"{list(value[:10])} and {len(value) - 10} more"
