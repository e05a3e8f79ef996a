"""What the training of every kind of network shares: its optimisation, and which checkpoints it goes on from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import lightning.pytorch as pl
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from awconv.data import DataModule
from awconv.models.pretrained import not_finite
from awconv.roles import Role
from awconv.tasks.checks import check_network
from awconv.tasks.optimization import Optimization


class Task(pl.LightningModule):
    """A network that is trained with a linear warm-up and a decay of the learning rate.

    A subclass makes ``self.network``, and names the roles of its arguments and what it is judged by. Its checkpoints
    hold all that a prediction needs.

    Args:
        network: a name that ``timm.create_model`` knows.
        network_args: further arguments of the network.
        pretrained: weights that a training starts from: timm's (true), or a file.
        convert: arguments of :func:`awconv.convert`; None leaves the network as it is.
        optimizer: a name that ``timm.optim.create_optimizer_v2`` knows. Biases and norms are not decayed.
        optimizer_args: further arguments of the optimizer, such as ``{"betas": [0.9, 0.99]}``.
        lr: the highest learning rate.
        branch_lr_factor: what the learning rate of the attention branches is multiplied with.
        momentum: of the optimizer.
        weight_decay: of the optimizer.
        branch_weight_decay: that of the attention branches; None for ``weight_decay``.
        warmup_epochs: length of the linear warm-up, in epochs.
        decay_epochs: after which epochs the learning rate is multiplied with ``decay_rate``; a cosine decay to 0 where
            there are none.
        decay_rate: see there.

    Raises:
        ValueError: timm does not know the network, or a number is out of its range.
    """

    data_module: ClassVar[type[DataModule]]
    """What the task is trained on."""
    roles: ClassVar[Mapping[str, Role]]
    """Of the arguments that decide more than the steps; the data module has those that the data decide."""
    score: ClassVar[str]
    """The figure by which networks are compared, a share of 1 that grows; it is logged as ``SPLIT/score``."""
    score_name: ClassVar[str]
    """What a table calls it, in percent."""
    further_figures: ClassVar[tuple[str, ...]] = ()
    """Others of that kind which a table gives beside it; negative where there is nothing to judge by."""

    network: nn.Module

    def __init__(
        self,
        network: str,
        network_args: dict[str, Any] | None = None,
        pretrained: bool | str = False,
        convert: dict[str, Any] | None = None,
        optimizer: str = "sgd",
        optimizer_args: dict[str, Any] | None = None,
        lr: float = 0.1,
        branch_lr_factor: float = 1.0,
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
        self.optimization = Optimization(
            optimizer,
            dict(optimizer_args or {}),
            lr,
            branch_lr_factor,
            momentum,
            weight_decay,
            branch_weight_decay,
            warmup_epochs,
            tuple(decay_epochs),
            decay_rate,
        )
        self.evaluates_pretrained = False  # set by the command line: a test right after a training must not load them

    @classmethod
    def arguments_of(cls, role: Role) -> list[str]:
        """The names of the arguments that have a role."""
        return [name for name, its in cls.roles.items() if its is role]

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated."""
        return self.network

    def example(self) -> Any:
        """What the network is called with for one image, to count its operations."""
        raise NotImplementedError

    @property
    def loads_pretrained(self) -> bool:
        """Whether pretrained weights are due: before a training that does not go on from a checkpoint, or where they
        are what is evaluated."""
        if not self.pretrained or self.trainer.ckpt_path:
            return False
        return bool(self.trainer.training) or self.evaluates_pretrained

    def refuse_weights(self, error: Exception) -> NoReturn:
        """Says that pretrained weights could not be loaded.

        Raises:
            FileNotFoundError: their file is not there.
            ValueError: anything else was in the way, such as a hub that cannot be reached.
        """
        if isinstance(error, FileNotFoundError) and self.pretrained is not True:
            raise error
        mend = "; --model.pretrained=FILE takes them from a file" if self.pretrained is True else ""
        raise ValueError(f"no pretrained weights for {self.network_name} ({self.pretrained}): {error}{mend}") from error

    def setup(self, stage: str) -> None:
        """Takes the precision of the training before weights are loaded, which would be rounded to single else."""
        if self.trainer.precision == "64-true":
            self.double()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses weights of another network, those that were trained on other classes or other images, and those that
        are no numbers.

        Raises:
            ValueError: the checkpoint and this task differ in what the data decide, or in the network, or its weights
                are infinite or NaN.
        """
        broken = not_finite(checkpoint["state_dict"], self.state_dict())
        if broken:
            raise ValueError(
                f"the checkpoint has weights that are infinite or not a number, such as {', '.join(broken[:3])}; take "
                "an earlier one"
            )
        trained = checkpoint["hyper_parameters"]
        for name in self.arguments_of(Role.DATA):
            if name in trained and not _equal(trained[name], self.hparams[name]):
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

    def configure_optimizers(self) -> Any:
        optimizer = self.optimization.make_optimizer(self.network)
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
