"""Training and evaluating a detector."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from awconv.data import BrokenImageError, DetectionDataModule
from awconv.extras import require
from awconv.models.detection import DETECTORS, TORCHVISIONS_INPUT
from awconv.models.detection.faster_rcnn import Norm
from awconv.roles import Role
from awconv.tasks.checks import check_numbers
from awconv.tasks.coco import Evaluated, Figures, coco_figures
from awconv.tasks.task import Task
from awconv.terminal import printable

Detections = list[dict[str, Tensor]]
_SHORTER, _LONGER = 4096, 8192  # pixels of the sides, at most: a backbone's first maps are some times as large


class DetectionTask(Task):
    """Trains one of torchvision's detectors on a network of timm, and evaluates it by COCO's twelve metrics.

    A checkpoint holds all that a prediction needs: the network's name and arguments, and the categories.

    Args:
        classes: the names of the categories, without the background.
        category_ids: their numbers in the data set, for written detections.
        detector: ``"faster_rcnn"`` with a feature pyramid, or ``"ssd300"``.
        network: the backbone's name. Faster R-CNN takes any network of timm with ``features_only``, SSD300 takes
            ``vgg16`` and ``aw_vgg16``.
        network_args: further arguments of the backbone, such as ``{"aw_args": {"reduction": 8}}``. SSD300 takes
            ``aw_args`` only.
        pretrained: the backbone's weights to start from, those of a classifier: timm's (torchvision's for VGG; true),
            or a file. Checkpoints do not need them again.
        trainable_layers: number of the backbone's stages that are trained, counted from the last. None trains all
            without pretrained weights, and the usual number with them. ``train_only`` takes its place.
        convert: arguments of :func:`awconv.convert`, such as ``{"init": "identity"}``: the backbone is converted after
            its pretrained weights are loaded.
        norm: of Faster R-CNN's backbone: ``"batch"``, ``"sync"``, ``"frozen"`` or ``"group"``. None is ``"frozen"``
            with pretrained weights and ``"batch"`` without.
        min_size: length to which Faster R-CNN resizes an image's shorter side, in pixels. Of several lengths, training
            draws one for each image, and evaluation takes the last.
        max_size: the largest length of the longer side, in pixels.
        detector_args: further arguments of torchvision's detector, such as ``{"box_score_thresh": 0.01}``.
        lr: the highest learning rate. The default suits a batch of 2 images; 0.02 suits 16.
        weight_decay: the optimizer's weight decay.
        **kwargs: as for :class:`Task`.

    Raises:
        ValueError: timm does not know the backbone, its norms would be frozen before training, or an argument has a
            wrong value.
    """

    data_module = DetectionDataModule
    roles: ClassVar[Mapping[str, Role]] = {
        **dict.fromkeys(("classes", "category_ids"), Role.DATA),
        **dict.fromkeys(("detector", "network", "network_args", "convert"), Role.NETWORK),
        **dict.fromkeys(("norm", "min_size", "max_size", "detector_args"), Role.NETWORK),
    }
    score, score_name = "AP", "box AP"
    further_figures = ("AP50", "AP75", "AP_small", "AP_medium", "AP_large")

    def __init__(
        self,
        classes: Sequence[str],
        category_ids: Sequence[int],
        detector: Literal["faster_rcnn", "ssd300"] = "faster_rcnn",
        network: str = "aw_resnet50",
        network_args: dict[str, Any] | None = None,
        pretrained: bool | str = False,
        trainable_layers: int | None = None,
        convert: dict[str, Any] | None = None,
        norm: Norm | None = None,
        min_size: int | list[int] = 800,
        max_size: int = 1333,
        detector_args: dict[str, Any] | None = None,
        lr: float = 0.0025,
        weight_decay: float = 1e-4,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            network=network,
            network_args=network_args,
            pretrained=pretrained,
            convert=convert,
            lr=lr,
            weight_decay=weight_decay,
            **kwargs,
        )
        require("faster_coco_eval", extra="detection")
        sizes = min_size if isinstance(min_size, Sequence) else [min_size]
        if not sizes:
            raise ValueError("min_size must be a size in pixels, or several, got none")
        for name, size, most in [*(("min_size", size, _SHORTER) for size in sizes), ("max_size", max_size, _LONGER)]:
            check_numbers(**{name: (size, 1, most)})
        if norm == "frozen" and not pretrained:
            raise ValueError("norm must be 'batch', 'sync' or 'group' without pretrained weights, got 'frozen'")
        self.classes, self.category_ids = list(classes), list(category_ids)
        self.detector: Literal["faster_rcnn", "ssd300"] = detector
        self.detector_args: dict[str, Any] = dict(detector_args or {})
        self.norm, self.trainable_layers = norm, trainable_layers
        self.min_size: int | tuple[int, ...] = tuple(min_size) if isinstance(min_size, Sequence) else min_size
        self.max_size = max_size
        if self.parts is not None and trainable_layers is not None:
            raise ValueError("trainable_layers must be left out with train_only, which names all that trains")
        self.network = self._build(False)
        self.freeze_rest()
        self.evaluation: list[Evaluated] = []

    def _build(self, weights: bool | str) -> nn.Module:
        taken = [name for name in self.detector_args if name in _OPTIONS]
        if taken:
            raise ValueError(
                f"detector_args must leave {', '.join(taken)} to {', '.join(_OPTIONS[name] for name in taken)}"
            )
        arguments: dict[str, Any] = self.detector_args | dict(
            num_classes=len(self.classes) + 1,
            pretrained=weights,
            # Of weights that are only loaded later, too.
            trainable_layers="usual" if self.trainable_layers is None and self.pretrained else self.trainable_layers,
            network_args=self.network_args,
            convert=self.conversion,
        )
        if self.detector == "faster_rcnn":
            arguments |= dict(
                norm=self.norm or ("frozen" if self.pretrained else "batch"),
                min_size=self.min_size,
                max_size=self.max_size,
            )
        else:
            self._refuse_faster_rcnns()
            if self.pretrained is True:  # of weights that are only loaded later, too
                arguments = TORCHVISIONS_INPUT | arguments
        try:
            return DETECTORS[self.detector](self.network_name, **arguments)
        except Exception as error:  # of torchvision, timm or any network
            if weights:
                raise
            shown = f" (detector_args={self.detector_args})" if self.detector_args else ""
            raise ValueError(f"the arguments of a {self.detector} do not fit: {error}{shown}") from error

    def _refuse_faster_rcnns(self) -> None:
        """Raises a ValueError for an option that SSD300 does not have."""
        defaults = inspect.signature(DetectionTask).parameters
        given = [name for name in ("norm", "min_size", "max_size") if getattr(self, name) != defaults[name].default]
        if given:
            raise ValueError(f"{', '.join(given)} must be left out with ssd300, which has no such option")

    def setup(self, stage: str) -> None:
        """Loads the backbone's pretrained weights, if they are needed.

        Raises:
            FileNotFoundError: the file of weights is not there.
            ValueError: there are no such weights, or they belong to another network.
        """
        super().setup(stage)
        if not self.loads_pretrained:
            return
        try:
            loaded = self._build(self.pretrained)
        except Exception as error:  # of timm, torch or safetensors
            self.refuse_weights(error)
        # What comes after the backbone stays as the seed has made it.
        self.network.backbone.load_state_dict(loaded.backbone.state_dict())  # type: ignore[union-attr,operator]

    def example(self) -> tuple[list[Tensor]]:
        """A list of one image of zeros, as large as images become."""
        if self.detector == "ssd300":
            return ([torch.zeros(3, 300, 300)],)
        height = self.min_size[-1] if isinstance(self.min_size, tuple) else self.min_size
        return ([torch.zeros(3, height, self.max_size)],)

    def forward(self, images: Sequence[Tensor]) -> Detections:
        """Images, uint8 of shape (3, H, W) and any sizes, to a dictionary for each: ``boxes`` (x1, y1, x2, y2 in its
        pixels), ``labels`` (from 1) and ``scores``, best first."""
        detections: Detections = self.network(list(images))
        return detections

    def training_step(self, batch: tuple[list[Tensor], list[dict[str, Tensor]]], batch_idx: int) -> Tensor:
        images, targets = batch
        losses: dict[str, Tensor] = self.network(images, targets)
        loss = torch.stack(list(losses.values())).sum()
        self.losses.add(losses | {"loss": loss}, len(images))
        return loss

    def on_validation_epoch_start(self) -> None:
        self.evaluation = []

    def on_test_epoch_start(self) -> None:
        self.evaluation = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch)

    def _evaluate(self, batch: tuple[list[Tensor], list[dict[str, Tensor]]]) -> None:
        images, targets = batch
        if not images:  # broken ones were left out
            return
        for detections, target in zip(self(images), targets, strict=True):
            self.evaluation.append(
                Evaluated(
                    int(target.pop("image_id")), *({k: v.cpu() for k, v in d.items()} for d in (detections, target))
                )
            )

    def on_validation_epoch_end(self) -> None:
        self._log_figures("val")

    def on_test_epoch_end(self) -> None:
        figures = self._log_figures("test")
        self.log_dict({f"test/AP/{printable(name)}": value for name, value in figures.per_class.items()})

    def _log_figures(self, split: str) -> Figures:
        self.evaluation = _gathered(self.evaluation)
        if not self.evaluation and not self.trainer.sanity_checking:
            raise BrokenImageError(
                f"none of the images that were to be evaluated ({split}) can be decoded; the log names them"
            )
        figures = coco_figures(self.evaluation, self.classes, per_class=split == "test")
        self.log_dict({f"{split}/{name}": value for name, value in figures.overall.items()})
        return figures


def _gathered(images: list[Evaluated]) -> list[Evaluated]:
    """The images of all processes in COCO's order, by their numbers. The processes may have unequal shares."""
    shares = [images]
    if torch.distributed.is_initialized():
        shares = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(shares, images)
    return sorted((image for share in shares for image in share), key=lambda image: image.image_id)


_OPTIONS = {  # what torchvision's arguments are given by
    "num_classes": "the data",
    "backbone": "--model.network",
    "network": "--model.network",
    "network_args": "--model.network_args",
    "pretrained": "--model.pretrained",
    **{name: f"--model.{name}" for name in ("trainable_layers", "convert", "norm", "min_size", "max_size")},
}
