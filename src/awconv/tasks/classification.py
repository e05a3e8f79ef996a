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
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torchmetrics.classification import MulticlassAccuracy

import awconv  # which also registers its models with timm
from awconv.parameter_groups import branch_parameters

FROM_DATA = ("classes", "input_size", "mean", "std")  # arguments of the task that its data decide


class ClassificationTask(pl.LightningModule):
    """A network that is trained with cross-entropy, a linear warm-up and a cosine decay of the learning rate.

    Its checkpoints hold all that a prediction needs: the network's name and arguments, the classes and how images are
    normalised.

    Args:
        classes: the names of the classes, by index.
        input_size: channels, height and width of the images.
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
        lr: the highest learning rate.
        branch_lr_factor: what the learning rate of the attention branches is multiplied with.
        momentum: of the optimizer.
        weight_decay: of the optimizer.
        warmup_epochs: length of the linear warm-up, in epochs.
        label_smoothing: of the cross-entropy in training.

    Raises:
        ValueError: timm does not know the network, or ``convert`` is not what :func:`awconv.convert` takes.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        classes: Sequence[str],
        input_size: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        network: str = "aw_resnet20_cifar",
        network_args: dict[str, Any] | None = None,
        pretrained: bool | str = False,
        convert: dict[str, Any] | None = None,
        optimizer: str = "sgd",
        lr: float = 0.1,
        branch_lr_factor: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        warmup_epochs: float = 1.0,
        label_smoothing: float = 0.0,
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
        self.network = self._build()
        self.register_buffer("mean", 255 * torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std)[:, None, None], persistent=False)
        self.val_accuracy = MulticlassAccuracy(len(self.classes), average="micro")
        self.test_accuracy = MulticlassAccuracy(len(self.classes), average="micro")

    def _build(self, **pretrained: Any) -> nn.Module:
        hparams = self.hparams
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

    def setup(self, stage: str) -> None:
        """Loads the pretrained weights, where a training starts from them.

        Raises:
            FileNotFoundError: the file of weights is not there.
            ValueError: there are no such weights, or they are those of another network.
        """
        weights = self.hparams["pretrained"]
        if stage != "fit" or not weights or self.trainer.ckpt_path:
            return
        if isinstance(weights, str) and not Path(weights).is_file():
            raise FileNotFoundError(f"pretrained must be true, false or a file of weights, got {weights!r}")
        try:
            overlay = self._describe(weights) if isinstance(weights, str) else None
            network = self._build(pretrained=True, pretrained_cfg_overlay=overlay)
        except Exception as error:  # of timm, torch or safetensors
            raise ValueError(f"no pretrained weights for {self.hparams['network']} ({weights}): {error}") from error
        self.network.load_state_dict(network.state_dict())

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
        logits: Tensor = self.network((images - self.mean) / self.std)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        loss = F.cross_entropy(self(images), targets, label_smoothing=self.hparams["label_smoothing"])
        self.log("train/loss", loss, prog_bar=True, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_accuracy)

    def _evaluate(self, batch: tuple[Tensor, Tensor], split: str, accuracy: MulticlassAccuracy) -> None:
        images, targets = batch
        logits = self(images)
        accuracy(logits, targets)
        self.log(f"{split}/loss", F.cross_entropy(logits, targets), batch_size=len(targets))
        self.log(f"{split}/accuracy", accuracy, prog_bar=True)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses weights that were trained on other classes or other images.

        Raises:
            ValueError: the checkpoint and this task differ in what the data decide.
        """
        for name in FROM_DATA:
            trained, given = list(checkpoint["hyper_parameters"][name]), list(self.hparams[name])
            if trained != given:
                raise ValueError(
                    f"the checkpoint was trained with {name} {_shortened(trained)}, and the data have "
                    f"{_shortened(given)}; give the data and the arguments that it was trained with"
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
        rates = {False: hparams["lr"], True: hparams["lr"] * hparams["branch_lr_factor"]}
        split = [
            group | dict(params=[p for p in group["params"] if (p in branch) == inside], lr=rate)
            for group in groups
            for inside, rate in rates.items()
        ]
        return [group for group in split if group["params"]]

    def configure_optimizers(self) -> Any:
        hparams = self.hparams
        optimizer = create_optimizer_v2(
            self._parameter_groups(), opt=hparams["optimizer"], lr=hparams["lr"], momentum=hparams["momentum"]
        )
        self.trainer.fit_loop.setup_data()  # which counts the batches
        if math.isinf(self.trainer.estimated_stepping_batches):
            raise ValueError("the learning rate's schedule needs an end: give trainer.max_epochs or trainer.max_steps")
        steps = int(self.trainer.estimated_stepping_batches)
        steps_per_epoch = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        warmup = min(steps, round(hparams["warmup_epochs"] * steps_per_epoch))
        scheduler: Any = CosineAnnealingLR(optimizer, max(1, steps - warmup))
        if warmup:
            scheduler = SequentialLR(
                optimizer, [LinearLR(optimizer, 1 / (warmup + 1), 1.0, warmup), scheduler], milestones=[warmup]
            )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _shortened(values: list[Any]) -> str:
    return str(values) if len(values) <= 10 else f"{values[:10]} and {len(values) - 10} more"
