"""Training and evaluating a classifier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

import awconv  # which also registers its models with timm
from awconv.parameter_groups import branch_parameters

FROM_DATA = ("classes", "input_size", "crop_pct", "mean", "std")  # arguments of the task that its data decide


class ClassificationTask(pl.LightningModule):
    """A network that is trained with cross-entropy, a linear warm-up and a decay of the learning rate.

    Its checkpoints hold all that a prediction needs: the network's name and arguments, the classes and how images are
    normalised.

    Args:
        classes: the names of the classes, by index.
        input_size: channels, height and width of the images.
        crop_pct: what share of an image's shorter side is evaluated.
        mean: mean of each channel, of values from 0 to 1.
        std: deviation of each channel.
        network: a name that ``timm.create_model`` knows.
        network_args: further arguments of the network, such as ``{"aw_args": {"reduction": 8}}``.
        pretrained: what a training starts from: weights that timm has for the network (true), or a file of weights
            under the network's names (safetensors, or a state dict of torch). A classifier of other classes starts
            anew. A checkpoint needs them no more.
        convert: arguments of :func:`awconv.convert`, by which the network, with its pretrained weights, becomes an AW
            network: ``{"init": "identity"}``.
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
        label_smoothing: of the cross-entropy in training.
        mixup: arguments of ``timm.data.Mixup``, such as ``{"mixup_alpha": 0.2, "cutmix_alpha": 1.0}``.
        erasing: probability with which a rectangle of a training image is replaced by noise (``RandomErasing`` of
            timm).
        ema_decay: of an exponential moving average of the weights (``ModelEmaV3`` of timm), such as 0.9999: the network
            that is evaluated and predicts. None for none.
        channels_last: keep weights and images in that memory format.
        compile: run the network by ``torch.compile``.

    Raises:
        ValueError: timm does not know the network, or an argument is not what its taker takes.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        classes: Sequence[str],
        input_size: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        crop_pct: float = 1.0,
        network: str = "aw_resnet20_cifar",
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
        label_smoothing: float = 0.0,
        mixup: dict[str, Any] | None = None,
        erasing: float = 0.0,
        ema_decay: float | None = None,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if not timm.is_model(network):
            close = timm.list_models(f"*{network.removeprefix('aw_').split('_')[0]}*")[:8]
            raise ValueError(
                f"network must be a name that timm.create_model knows, got {network!r}"
                + (f"; near it: {', '.join(close)}" if close else "")
            )
        self.classes = list(classes)
        self.input_size = list(input_size)
        self.crop_pct = crop_pct
        self.network = self._build()
        self.ema = None if ema_decay is None else ModelEmaV3(self.network, decay=ema_decay)
        self.evaluates_pretrained = False  # set by the command line: a test right after a training must not load them
        self.memory_format = torch.channels_last if channels_last else torch.preserve_format
        self.mixup = self._mixup()
        self.register_buffer("mean", 255 * torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std)[:, None, None], persistent=False)
        self.accuracy = nn.ModuleDict(
            {split: MulticlassAccuracy(len(self.classes), average="micro") for split in ("val", "test")}
        )
        self.loss = nn.ModuleDict({split: MeanMetric() for split in ("val", "test")})

    def _build(self, **pretrained: Any) -> nn.Module:
        hparams = self.hparams
        _, _, tag = hparams["network"].partition(".")
        if tag and not timm.is_model_pretrained(hparams["network"]):
            tags = timm.list_pretrained(hparams["network"].partition(".")[0] + ".*")
            raise ValueError(
                f"network {hparams['network']!r} has no such weights; there are {', '.join(tags) or 'none'}"
            )
        network: nn.Module = timm.create_model(
            hparams["network"],
            num_classes=len(self.classes),
            in_chans=self.input_size[0],
            **pretrained,
            **(hparams["network_args"] or {}),
        )
        if hparams["convert"] is None:
            return network
        try:
            return awconv.convert(network, **hparams["convert"])
        except TypeError as error:
            raise ValueError(
                f"convert must hold arguments of awconv.convert, got {hparams['convert']}: {error}"
            ) from error

    def _mixup(self) -> Mixup | None:
        if self.hparams["mixup"] is None:
            return None
        try:
            return Mixup(
                **self.hparams["mixup"],
                num_classes=len(self.classes),
                label_smoothing=self.hparams["label_smoothing"],
            )
        except TypeError as error:
            raise ValueError(
                f"mixup must hold arguments of timm.data.Mixup, got {self.hparams['mixup']}: {error}"
            ) from error

    def setup(self, stage: str) -> None:
        """Loads the pretrained weights, where a training starts from them or they are evaluated, and compiles the
        network.

        Raises:
            FileNotFoundError: the file of weights is not there.
            ValueError: there are no such weights, or they are those of another network.
        """
        evaluates_them = stage != "fit" and self.evaluates_pretrained
        if self.hparams["pretrained"] and not self.trainer.ckpt_path and (stage == "fit" or evaluates_them):
            self._load_pretrained(self.hparams["pretrained"], whole=stage != "fit")
        self.network.to(memory_format=self.memory_format)
        if self.hparams["compile"]:
            self.network.compile()

    def _load_pretrained(self, weights: bool | str, whole: bool) -> None:
        if isinstance(weights, str) and not Path(weights).is_file():
            raise FileNotFoundError(f"pretrained must be true, false or a file of weights, got {weights!r}")
        try:
            overlay = self._describe(weights) if isinstance(weights, str) else None
            network = self._build(pretrained=True, pretrained_cfg_overlay=overlay)
            known: Any = network.pretrained_cfg
            if whole and known.get("num_classes") != len(self.classes):
                raise ValueError(f"they are of {known.get('num_classes')} classes, the data of {len(self.classes)}")
        except Exception as error:  # of timm, torch or safetensors
            raise ValueError(f"no pretrained weights for {self.hparams['network']} ({weights}): {error}") from error
        self.network.load_state_dict(network.state_dict())
        if self.ema is not None:
            self.ema.set(self.network)

    def _describe(self, weights: str) -> dict[str, Any]:
        """A file of weights as timm wants to know it, with the number of classes by which it drops the classifier.

        timm then takes what there is, and so it is checked here that nothing else is missing or left over.
        """
        state = timm.models.load_state_dict(weights)
        plain = timm.create_model(self.hparams["network"], **(self.hparams["network_args"] or {}))
        classifier = f"{plain.pretrained_cfg['classifier']}."  # type: ignore[index]  # a dictionary of timm's
        found, expected = (
            {key for key in keys if not key.startswith(classifier) and not key.endswith("num_batches_tracked")}
            for keys in (state, plain.state_dict())
        )
        if found != expected:
            differing = sorted(found ^ expected)
            raise ValueError(f"{len(differing)} names differ, such as {', '.join(differing[:4])}")
        overlay: dict[str, Any] = dict(file=weights)
        bias = state.get(f"{classifier}bias")
        return overlay if bias is None else overlay | dict(num_classes=len(bias))

    def forward(self, images: Tensor) -> Tensor:
        """Images, uint8 of shape (N, channels, H, W), to logits, shape (N, classes)."""
        return self._logits(self._normalised(images))

    def _normalised(self, images: Tensor) -> Tensor:
        return ((images - self.mean) / self.std).contiguous(memory_format=self.memory_format)

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated: the average of the weights, where there is one."""
        averaged: nn.Module = self.network if self.ema is None else self.ema.module
        return averaged

    def _logits(self, images: Tensor) -> Tensor:
        logits: Tensor = (self.network if self.training else self.evaluated)(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, targets = self._normalised(batch[0]), batch[1]
        if self.hparams["erasing"]:
            images = RandomErasing(self.hparams["erasing"], mode="pixel", device=str(images.device))(images)
        smoothing = self.hparams["label_smoothing"]
        if self.mixup is not None and self.mixup.mixup_enabled:
            if len(images) % 2:
                raise ValueError(f"mixup pairs the images of a batch: batch_size must be even, got {len(images)}")
            images, targets = self.mixup(images, targets)  # which smooths them, too
            smoothing = 0.0
        loss = F.cross_entropy(self._logits(images), targets, label_smoothing=smoothing)
        self.log("train/loss", loss, prog_bar=True, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """One step of the optimizer, and of the average of the weights."""
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update(self.network)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: tuple[Tensor, Tensor], split: str) -> None:
        images, targets = batch
        logits = self(images)
        self.loss[split](F.cross_entropy(logits, targets, reduction="none"))
        self.accuracy[split](logits, targets)
        self.log(f"{split}/loss", self.loss[split], on_step=False, on_epoch=True)  # type: ignore[arg-type]
        self.log(f"{split}/accuracy", self.accuracy[split], on_step=False, on_epoch=True, prog_bar=True)  # type: ignore[arg-type]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses weights of another network, and those that were trained on other classes or other images.

        Raises:
            ValueError: the checkpoint and this task differ in what the data decide, or in the network.
        """
        trained = checkpoint["hyper_parameters"]
        for name in FROM_DATA:
            if name in trained and not _equal(trained[name], self.hparams[name]):
                raise ValueError(
                    f"the checkpoint was trained with {name} {_shortened(trained[name])}, and the data have "
                    f"{_shortened(self.hparams[name])}; give the data and the arguments that it was trained with"
                )
        for name in ("network", "network_args", "convert", "ema_decay"):
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
        optimizer = create_optimizer_v2(
            self._parameter_groups(),
            opt=hparams["optimizer"],
            lr=hparams["lr"],
            momentum=hparams["momentum"],
            **(hparams["optimizer_args"] or {}),
        )
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


def _equal(one: Any, other: Any) -> bool:
    return list(one) == list(other) if isinstance(one, Sequence) else bool(one == other)


def _shortened(value: Any) -> str:
    if not isinstance(value, Sequence) or len(value) <= 10:
        return str(value if not isinstance(value, Sequence) else list(value))
    return f"{list(value[:10])} and {len(value) - 10} more"
