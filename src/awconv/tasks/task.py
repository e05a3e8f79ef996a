"""What the training of every kind of network shares: its optimisation, and which checkpoints it goes on from."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import lightning.pytorch as pl
import timm
from timm.models import build_model_with_cfg
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import awconv  # which also registers its models with timm
from awconv.models.pretrained import not_finite
from awconv.parameter_groups import branch_parameters

# What timm takes beside a network's own arguments: where weights come from, and how a network is built. A checkpoint
# of somebody else's must not decide it.
_NOT_THE_NETWORKS = {
    name
    for function in (timm.create_model, build_model_with_cfg)
    for name, parameter in inspect.signature(function).parameters.items()
    if parameter.kind is not parameter.VAR_KEYWORD
} | {"num_classes", "in_chans", "features_only"}

_MOST = 1e18  # products of two such numbers are finite in single precision


class Task(pl.LightningModule):
    """A network that is trained with a linear warm-up and a decay of the learning rate.

    A subclass makes ``self.network``, and names what its data decide and what it is judged by. Its checkpoints hold all
    that a prediction needs.

    Args:
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
    """

    from_data: ClassVar[tuple[str, ...]]
    """Arguments that the data decide, each a property of the data module."""
    same_network: ClassVar[tuple[str, ...]]
    """Arguments without which a checkpoint's weights are those of another network."""
    score: ClassVar[str]
    """The figure by which networks are compared, a share of 1 that grows; it is logged as ``SPLIT/score``."""
    score_name: ClassVar[str]
    """What a table calls it, in percent."""
    further_figures: ClassVar[tuple[str, ...]] = ()
    """Others of that kind which a table gives beside it; negative where there is nothing to judge by."""

    network: nn.Module

    def __init__(
        self,
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
        check_numbers(
            lr=(lr, 0, _MOST),
            branch_lr_factor=(branch_lr_factor, 0, _MOST),
            momentum=(momentum, 0, 1),
            weight_decay=(weight_decay, 0, _MOST),
            branch_weight_decay=(branch_weight_decay, 0, _MOST),
            warmup_epochs=(warmup_epochs, 0, _MOST),
            decay_rate=(decay_rate, 0, 100 * _MOST),
            **{f"decay_epochs[{index}]": (epoch, 0, _MOST) for index, epoch in enumerate(decay_epochs)},
        )
        self.evaluates_pretrained = False  # set by the command line: a test right after a training must not load them

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
        if not self.hparams["pretrained"] or self.trainer.ckpt_path:
            return False
        return bool(self.trainer.training) or self.evaluates_pretrained

    def refuse_weights(self, weights: bool | str, error: Exception) -> NoReturn:
        """Says that pretrained weights could not be loaded.

        Raises:
            FileNotFoundError: their file is not there.
            ValueError: anything else was in the way, such as a hub that cannot be reached.
        """
        if isinstance(error, FileNotFoundError) and weights is not True:
            raise error
        mend = "; --model.pretrained=FILE takes them from a file" if weights is True else ""
        raise ValueError(f"no pretrained weights for {self.hparams['network']} ({weights}): {error}{mend}") from error

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
        for name in self.from_data:
            if name in trained and not _equal(trained[name], self.hparams[name]):
                raise ValueError(
                    f"the checkpoint was trained with {name} {_shortened(trained[name])}, and the data have "
                    f"{_shortened(self.hparams[name])}; give the data and the arguments that it was trained with"
                )
        for name in self.same_network:
            if (trained.get(name) or None) != (self.hparams[name] or None):
                raise ValueError(
                    f"the checkpoint was trained with --model.{name}={trained.get(name)}, and this training has "
                    f"{self.hparams[name]}; give the arguments that it was trained with"
                )

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """timm's groups, with and without weight decay, each apart from what of it belongs to attention branches."""
        hparams = self.hparams
        groups: list[dict[str, Any]] = param_groups_weight_decay(
            self.network,
            hparams["weight_decay"],
            no_weight_decay_list=getattr(self.network, "no_weight_decay", set)(),
        )
        branch = branch_parameters(self.network)
        own_decay = hparams["branch_weight_decay"]
        split = []
        for group in groups:
            decay = group["weight_decay"] and (group["weight_decay"] if own_decay is None else own_decay)
            inside, outside = (
                dict(lr=hparams["lr"] * hparams["branch_lr_factor"], weight_decay=decay),
                dict(lr=hparams["lr"]),
            )
            split.append(group | outside | dict(params=[p for p in group["params"] if p not in branch]))
            split.append(group | inside | dict(params=[p for p in group["params"] if p in branch]))
        return [group for group in split if group["params"]]

    def configure_optimizers(self) -> Any:
        hparams = self.hparams
        arguments = hparams["optimizer_args"] or {}
        try:
            optimizer = create_optimizer_v2(
                self._parameter_groups(),
                opt=hparams["optimizer"],
                lr=hparams["lr"],
                momentum=hparams["momentum"],
                **arguments,
            )
        except Exception as error:  # of timm, or of any optimizer
            raise ValueError(
                f"optimizer must be a name of timm.optim.list_optimizers(), and optimizer_args its arguments, got "
                f"{hparams['optimizer']!r} and {arguments}: {error}"
            ) from error
        steps_per_epoch, steps = self._count_steps()
        if hparams["decay_epochs"]:
            boundaries = [epoch * steps_per_epoch for epoch in hparams["decay_epochs"]]
        elif math.isinf(steps):
            raise ValueError("a cosine decay needs an end: give trainer.max_epochs or trainer.max_steps")
        warmup = int(min(steps, round(hparams["warmup_epochs"] * steps_per_epoch)))

        def rate(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            if hparams["decay_epochs"]:
                return float(hparams["decay_rate"] ** sum(step >= boundary for boundary in boundaries))
            return (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1.0, steps - warmup)))) / 2

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


def check_numbers(**numbers: tuple[float | None, float, float]) -> None:
    """Raises a ValueError for a number that is not finite, or out of its range.

    Args:
        **numbers: by the argument's name: the number, or None for one that is not given; the least and the largest.
    """
    for name, (number, least, most) in numbers.items():
        if number is not None and not least <= number <= most:  # which NaN is not, either
            raise ValueError(f"{name} must be a number from {least:g} to {most:g}, got {number}")


def check_network(name: str, arguments: Mapping[str, Any] | None = None) -> None:
    """Raises a ValueError that names near ones where timm knows no such network, or no such weights of it, or where an
    argument is not the network's own."""
    if not isinstance(arguments, Mapping | None):
        raise ValueError(f"network_args must be a mapping, got {type(arguments).__name__}")
    taken = sorted(key for key in arguments or {} if key in _NOT_THE_NETWORKS or str(key).startswith("pretrained"))
    if taken:
        raise ValueError(
            f"network_args must be the network's own arguments, got {', '.join(taken)}; weights are given by "
            "--model.pretrained, the classes by the data"
        )
    if not isinstance(name, str) or not timm.is_model(name):
        close = timm.list_models(f"*{str(name).removeprefix('aw_').split('_')[0]}*")[:8]
        raise ValueError(
            f"network must be a name that timm.create_model knows, got {name!r}"
            + (f"; near it: {', '.join(close)}" if close else "")
        )
    base, _, tag = name.partition(".")
    if tag and not timm.is_model_pretrained(name):
        tags = timm.list_pretrained(base + ".*")
        raise ValueError(f"network {name!r} has no such weights; there are {', '.join(tags) or 'none'}")


def convert(network: nn.Module, arguments: dict[str, Any] | None) -> nn.Module:
    """:func:`awconv.convert` by the arguments of a recipe; None leaves the network as it is.

    Raises:
        ValueError: there is no such argument.
    """
    if arguments is None:
        return network
    try:
        return awconv.convert(network, **arguments)
    except TypeError as error:
        raise ValueError(f"convert must hold arguments of awconv.convert, got {arguments}: {error}") from error


def _equal(one: Any, other: Any) -> bool:
    return list(one) == list(other) if isinstance(one, Sequence) else bool(one == other)


def _shortened(value: Any) -> str:
    if not isinstance(value, Sequence) or len(value) <= 10:
        return str(value if not isinstance(value, Sequence) else list(value))
    return f"{list(value[:10])} and {len(value) - 10} more"
