"""Training and evaluating a classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

import awconv
from awconv.data import ImageDataModule
from awconv.models.pretrained import load_weights
from awconv.roles import Role
from awconv.tasks.checks import check_numbers
from awconv.tasks.task import Task
from awconv.train_only import classifiers, head_parameters

CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
# The largest that some of timm.data.Mixup's arguments can be: a probability, or a parameter of a beta distribution.
_OF_MIXUP = {"prob": 1, "switch_prob": 1, "mixup_alpha": 1e6, "cutmix_alpha": 1e6}


class ClassificationTask(Task):
    """Trains a classifier with cross-entropy.

    A checkpoint holds all that a prediction needs: the network's name and arguments, the classes, and how images are
    normalised.

    Args:
        classes: the names of the classes, by index.
        input_size: channels, height and width of the images.
        crop_pct: share of an image's shorter side that is evaluated.
        mean: mean of each channel; values are from 0 to 1.
        std: standard deviation of each channel.
        network: a name that ``timm.create_model`` knows.
        network_args: further arguments of the network, such as ``{"aw_args": {"reduction": 8}}``.
        pretrained: weights to start from: timm's for the network (true), or a file with the network's names
            (safetensors, a state dict of torch, or a checkpoint, such as one of ``awconv fit`` for other classes, whose
            averaged weights are taken if there are some). A classifier for other classes starts at zeros, so that the
            first gradients do not spoil the rest: the first loss is ln(classes). Checkpoints do not need the weights
            again.
        convert: arguments of :func:`awconv.convert`, such as ``{"init": "identity"}``: the network is converted after
            its pretrained weights are loaded.
        label_smoothing: label smoothing of the cross-entropy in training, from 0 to 1.
        mixup: arguments of ``timm.data.Mixup``, such as ``{"mixup_alpha": 0.2, "cutmix_alpha": 1.0}``.
        erasing: probability of replacing a rectangle of a training image by noise (timm's ``RandomErasing``).
        ema_decay: decay of an exponential moving average of the weights (timm's ``ModelEmaV3``), such as 0.9999. The
            averaged network is evaluated and predicts. null switches it off.
        channels_last: use that memory format.
        compile: use ``torch.compile``: true, or one of its modes. A small network's step on a GPU takes as long as its
            launches: ``"reduce-overhead"`` records them as CUDA graphs.
        **kwargs: as for :class:`Task`.

    Raises:
        ValueError: timm does not know the network, or an argument has a wrong value.
    """

    data_module = ImageDataModule
    roles: ClassVar[Mapping[str, Role]] = {
        **dict.fromkeys(("classes", "input_size", "crop_pct", "mean", "std"), Role.DATA),
        **dict.fromkeys(("network", "network_args", "convert", "ema_decay"), Role.NETWORK),
    }
    score, score_name = "accuracy", "accuracy"

    interpolation = "bilinear"
    """How images are resized: the data sets' way. timm's own weights have another."""
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
        label_smoothing: float = 0.0,
        mixup: dict[str, Any] | None = None,
        erasing: float = 0.0,
        ema_decay: float | None = None,
        channels_last: bool = False,
        compile: bool | CompileMode = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(network=network, network_args=network_args, pretrained=pretrained, convert=convert, **kwargs)
        if not isinstance(crop_pct, int | float):
            raise ValueError(f"crop_pct must be a number, got {crop_pct!r}")
        check_numbers(crop_pct=(crop_pct, 0.01, 1))
        check_numbers(label_smoothing=(label_smoothing, 0, 1), erasing=(erasing, 0, 1), ema_decay=(ema_decay, 0, 1))
        self.classes = list(classes)
        self.input_size = list(input_size)
        self.crop_pct = crop_pct
        self.channel_means, self.channel_deviations = list(mean), list(std)  # of values from 0 to 1
        self.label_smoothing, self.erasing, self.compiles = label_smoothing, erasing, compile
        self.network = self._build()
        self.freeze_rest()
        self.ema = None if ema_decay is None else ModelEmaV3(self.network, decay=ema_decay)
        if self.ema is not None:
            self.ema.module.requires_grad_(False)  # several processes would wait for its gradients
        self.memory_format = torch.channels_last if channels_last else torch.preserve_format
        self.mixup = self._make_mixup(mixup)
        self.register_buffer("mean", 255 * torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std)[:, None, None], persistent=False)
        self.accuracy = nn.ModuleDict(
            {split: MulticlassAccuracy(len(self.classes), average="micro") for split in ("val", "test")}
        )
        self.loss = nn.ModuleDict({split: MeanMetric() for split in ("val", "test")})

    def _build(self, **pretrained: Any) -> nn.Module:
        try:
            network: nn.Module = timm.create_model(
                self.network_name,
                num_classes=len(self.classes),
                in_chans=self.input_size[0],
                **pretrained,
                **self.network_args,
            )
        except Exception as error:  # of any network
            if pretrained:
                raise
            raise ValueError(
                f"network {self.network_name} cannot be built with network_args {self.network_args}: {error}"
            ) from error
        return network if self.conversion is None else self._converted(network, self.conversion)

    def _converted(self, network: nn.Module, arguments: dict[str, Any]) -> nn.Module:
        try:
            return awconv.convert(network, **arguments)
        except TypeError as error:
            raise ValueError(f"convert must hold arguments of awconv.convert, got {arguments}: {error}") from error

    def _make_mixup(self, arguments: dict[str, Any] | None) -> Mixup | None:
        if arguments is None:
            return None
        for name, value in arguments.items():
            if name in _OF_MIXUP and isinstance(value, int | float):
                check_numbers(**{f"mixup.{name}": (value, 0, _OF_MIXUP[name])})
        try:
            return Mixup(**arguments, num_classes=len(self.classes), label_smoothing=self.label_smoothing)
        except Exception as error:  # timm's asserts, too
            raise ValueError(f"mixup must hold arguments of timm.data.Mixup, got {arguments}: {error}") from error

    def setup(self, stage: str) -> None:
        """Loads pretrained weights, if they are needed, and compiles the network.

        Raises:
            FileNotFoundError: the file of weights is not there.
            ValueError: there are no such weights, or they belong to another network.
        """
        super().setup(stage)
        if self.loads_pretrained:
            self.load_pretrained(whole=stage != "fit")
        self.network.to(memory_format=self.memory_format)
        if self.compiles:
            self.network.compile(mode=None if self.compiles is True else self.compiles)

    def load_pretrained(self, whole: bool) -> None:
        """Loads the pretrained weights into the network.

        Args:
            whole: nothing will be trained: refuse weights of other classes, and those of the plain network for
                branches that start at random, instead of starting from them.

        Raises:
            FileNotFoundError: the file of weights is not there.
            ValueError: there are no such weights, they belong to another network, or a classifier of zeros would stay.
        """
        try:
            network, classes = self._build_pretrained(whole)
            of_others = classes != len(self.classes)
            if whole and of_others:
                raise ValueError(f"they are of {classes} classes, the data of {len(self.classes)}")
        except Exception as error:  # of timm, torch or safetensors
            self.refuse_weights(error)
        if of_others:
            if self.parts is not None and not any(p.requires_grad for p in head_parameters(self.network)):
                raise ValueError(
                    f"train_only must have 'head', got {self.parts}: the weights are of {classes} "
                    f"classes and the data of {len(self.classes)}, so the classifier is a new one"
                )
            self._make_logits_zero(network)
        self.network.load_state_dict(network.state_dict())
        if self.ema is not None:
            self.ema.module.load_state_dict(network.state_dict())  # its branches take the weights' form, too

    def _build_pretrained(self, whole: bool) -> tuple[nn.Module, int | None]:
        """The network with its pretrained weights, and their number of classes."""
        if isinstance(self.pretrained, str):
            network, of_plain = self._build(), self.conversion is not None and not whole
            return network, load_weights(network, self.network_name, self.pretrained, of_plain)
        network = self._build(pretrained=True)
        known: Any = network.pretrained_cfg
        return network, known.get("num_classes")

    def _make_logits_zero(self, network: nn.Module) -> None:
        """Makes zeros of the layers that give logits; norms before them (RepViT's) stay, or nothing would learn."""
        for part in classifiers(network):
            for layer in part.modules():
                weight = getattr(layer, "weight", None)
                if isinstance(weight, nn.Parameter) and weight.dim() > 1 and len(weight) == len(self.classes):
                    for parameter in layer.parameters(recurse=False):
                        nn.init.zeros_(parameter)

    def forward(self, images: Tensor) -> Tensor:
        """Images, uint8 of shape (N, channels, H, W), to logits, shape (N, classes)."""
        return self._logits(self.normalised(images))

    def normalised(self, images: Tensor) -> Tensor:
        return ((images - self.mean) / self.std).to(memory_format=self.memory_format)

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated: the averaged one, if there is one."""
        averaged: nn.Module = self.network if self.ema is None else self.ema.module
        return averaged

    def configure_model(self) -> None:
        super().configure_model()
        if self.ema is not None and self.device_mesh is not None:
            self.ema.foreach = False  # which takes no buffers beside parameters that are shared out

    def sharded(self) -> list[nn.Module]:
        """The network, and the averaged one."""
        return [self.network] if self.ema is None else [self.network, self.ema.module]

    def example(self) -> Tensor:
        """An image of zeros, shape (1, channels, H, W)."""
        return torch.zeros(1, *self.input_size, device=self.device)

    def _logits(self, images: Tensor) -> Tensor:
        if self.compiles:
            torch.compiler.cudagraph_mark_step_begin()  # what the last step returned may be written over
        logits: Tensor = (self.network if self.training else self.evaluated)(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, targets = self.normalised(batch[0]), batch[1]
        if self.erasing:
            images = RandomErasing(self.erasing, mode="pixel", device=str(images.device))(images)
        smoothing = self.label_smoothing
        if self.mixup is not None and self.mixup.mixup_enabled:
            if len(images) == 1:
                raise ValueError("mixup pairs the images of a batch: batch_size must be at least 2, got 1")
            even = len(images) // 2 * 2  # broken images may have been left out
            images, targets = images[:even], targets[:even]
            images, targets = self.mixup(images, targets)  # which smooths them, too
            smoothing = 0.0
        loss = F.cross_entropy(self._logits(images), targets, label_smoothing=smoothing)
        self.losses.add({"loss": loss}, len(images))
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Updates the weights, and their average."""
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update(self.network)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, "test")

    def _evaluate(self, batch: tuple[Tensor, Tensor], split: str) -> dict[str, Tensor]:
        """Logs the figures of a batch, and returns its true and predicted classes."""
        images, targets = batch
        logits = self(images)
        self.loss[split](F.cross_entropy(logits, targets, reduction="none"))
        self.accuracy[split](logits, targets)
        self.log(f"{split}/loss", self.loss[split], on_step=False, on_epoch=True)  # type: ignore[arg-type]
        self.log(f"{split}/accuracy", self.accuracy[split], on_step=False, on_epoch=True, prog_bar=True)  # type: ignore[arg-type]
        return {"targets": targets, "predicted": logits.argmax(1)}
