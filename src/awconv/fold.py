"""Folds attention that hardly depends on the image into the weights: AW-convolutions back to plain ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import nn

from awconv.evaluation_mode import evaluation_mode
from awconv.fold_layers import AWConv, GainStatistics, folded_layer, gathered
from awconv.fold_score import Score, check_data, evaluate
from awconv.rebuild import forget_layers
from awconv.revert import replace_layers, replaceable_layers, restore_folding
from awconv.tables import Table

__all__ = ["FoldReport", "FoldTrial", "fold"]


@dataclass(frozen=True)
class FoldTrial:
    """What folding one AW-convolution does to the network.

    Attributes:
        layer: its name.
        shape: of its weights, (C2, C1/groups, \\*kernel).
        variation: how much its gain varies between images, from 0 to 1: the standard deviation over the images, root
            mean square over the gain's values, relative to the gain's root mean square over images and values.
        spread: how much its gain varies between channels and taps: the standard deviation over the values of the mean
            over the images, relative to the same. Folding keeps this.
        accuracy_alone: of the network with this layer alone folded, in percent.
        accuracy_so_far: of the network with this layer and all those folded that stand before it in the report, in
            percent.
        folded: whether it was folded; if not, ``accuracy_so_far`` was too low.
    """

    layer: str
    shape: tuple[int, ...]
    variation: float
    spread: float
    accuracy_alone: float
    accuracy_so_far: float
    folded: bool


@dataclass(frozen=True)
class FoldReport:
    """What :func:`awconv.fold` measured and did; printed, a table.

    Attributes:
        trials: each AW-convolution that there was, in the order in which they were tried.
        images: on how many images the accuracies were measured.
        max_drop: how many percentage points of accuracy might be lost.
        accuracy_before: of the network as it was, in percent.
        accuracy_after: of the folded network, in percent.
        parameters_before: of the network as it was.
        parameters_after: of the folded network.
    """

    trials: tuple[FoldTrial, ...]
    images: int
    max_drop: float
    accuracy_before: float
    accuracy_after: float
    parameters_before: int
    parameters_after: int

    @property
    def folded(self) -> tuple[str, ...]:
        """The names of the layers that were folded, in this order."""
        return tuple(trial.layer for trial in self.trials if trial.folded)

    @property
    def kept(self) -> tuple[str, ...]:
        """The names of the layers that are AW-convolutions still."""
        return tuple(trial.layer for trial in self.trials if not trial.folded)

    def table(self) -> Table:
        """A row for each layer, in the order in which they were tried."""
        headings = ("layer", "weights", "varies by image", "by weight", "accuracy alone", "so far", "")
        rows = [
            (
                trial.layer,
                "x".join(map(str, trial.shape)),
                f"{100 * trial.variation:.2f} %",
                f"{100 * trial.spread:.2f} %",
                f"{trial.accuracy_alone:.2f} %",
                f"{trial.accuracy_so_far:.2f} %",
                "folded" if trial.folded else "kept",
            )
            for trial in self.trials
        ]
        note = (
            f"{len(self.folded)} of {len(self.trials)} AW-convolutions folded: accuracy {self.accuracy_before:.2f} % "
            f"before, {self.accuracy_after:.2f} % after, on {self.images:,} images (max_drop {self.max_drop:g}); "
            f"{self.parameters_before:,} parameters before, {self.parameters_after:,} after"
        )
        return Table(headings, rows, "llrrrrl", note=note)

    def __str__(self) -> str:
        return self.table().plain()


def fold(model: nn.Module, data: Iterable[Any], max_drop: float = 0.1) -> FoldReport:
    """Makes plain convolutions of the AW-convolutions of a classifier whose attention matters least, in place.

    A folded layer has the weights K (1 + mean A), where the mean is over the images of the data (K mean A in the form
    without residual, and the relative map of ``init="identity"`` in its own form, K (1 + mean A')). A gain
    over input channels is part of it: each weight is multiplied by the mean of (1 + A) (1 + g). That is exact where
    the attention is the same for every image, and keeps what it says of channels and taps. Bias, padding, dtype,
    ``requires_grad`` and training mode stay.

    Layers are tried in order of least loss: by the accuracy of the network with the layer alone folded, the highest
    first; where that is the same, as with few images, by the mean cross-entropy, the lowest first. Each is folded in
    turn and the network, with all those folded before, evaluated. A layer that takes its accuracy below the limit is
    an AW-convolution again, and the next one is tried. So the accuracy at the end was measured, too.

    The layers are chosen by these images: measure what you report on others. The network is evaluated in evaluation
    mode, without gradients; statistics of norms do not move. It takes at most 2 L passes over the data for L
    AW-convolutions, and no more than L + 1 where none can be folded.

    Methods that fold layers (``reparameterize``, ``fuse``, ...), which :func:`awconv.convert` makes errors of, work
    again in modules without an AW-convolution.

    Args:
        model: a classifier, from images to logits, shape (N, classes).
        data: batches ``(images, labels)``, the same in each pass, such as a DataLoader or a list: images as the model
            takes them, labels class indices of shape (N,). They are moved to the device of the model's parameters.
        max_drop: how much the top-1 accuracy on the data may fall, in percentage points, from 0 to 100. At 100 each
            layer is folded, and the network is a plain one.

    Returns:
        What was measured, layer by layer.

    Raises:
        TypeError: the model is no module, or the data cannot be iterated, or only once.
        ValueError: the model has no AW-convolution, or one has hooks, is parametrised, of a class of its own, or does
            not run; the data are empty or no such batches, or differ between passes; the outputs are no logits, or not
            finite; or ``max_drop`` is out of range. The model is left as it was.

    Examples:
        >>> import timm
        >>> import torch
        >>> import awconv
        >>> model = timm.create_model("aw_resnet8_cifar", num_classes=10)
        >>> data = [(torch.randn(8, 3, 32, 32), torch.arange(8)) for _ in range(2)]
        >>> report = awconv.fold(model, data, max_drop=100)  # a plain network
        >>> len(report.folded), len(report.kept), type(model.layer1[0].conv1).__name__
        (6, 0, 'Conv2d')
    """
    layers = replaceable_layers(model, "fold")
    check_data(data)
    if not isinstance(max_drop, Real) or not 0 <= max_drop <= 100:  # which NaN is not, either
        raise ValueError(f"fold: max_drop must be a number of percentage points from 0 to 100, got {max_drop!r}")
    parameters = _count(model)
    plain: dict[nn.Module, nn.Module] = {}
    try:
        # Compiled, it would be compiled anew for each choice of layers.
        with evaluation_mode(model) as modes, torch.no_grad(), torch.compiler.set_stance("force_eager"):
            with gathered(layers) as gains:
                before = evaluate(model, data)
            for name, layer in layers.items():
                plain[layer] = folded_layer(layer, gains[name].mean())
                modes[plain[layer]] = modes[layer]
            search = _Search(model, data, plain, before, float(max_drop))
            trials = search.run(layers, gains)
    except BaseException:
        replace_layers(model, {new: old for old, new in plain.items()})
        raise
    restore_folding(model)
    if any(trial.folded for trial in trials):
        forget_layers(model)
    return FoldReport(
        trials=tuple(trials),
        images=before.images,
        max_drop=float(max_drop),
        accuracy_before=before.accuracy,
        accuracy_after=search.now.accuracy,
        parameters_before=parameters,
        parameters_after=_count(model),
    )


class _Search:
    """Which layers are folded.

    Args:
        model: the network.
        data: its images.
        plain: the plain layer of each AW-convolution.
        before: the score of the network as it was.
        max_drop: in percentage points.

    Attributes:
        now: the score of the network as it is.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Any],
        plain: Mapping[nn.Module, nn.Module],
        before: Score,
        max_drop: float,
    ) -> None:
        self.model, self.data, self.plain = model, data, plain
        self.before = self.now = before
        self.max_drop = max_drop

    def run(self, layers: Mapping[str, AWConv], gains: Mapping[str, GainStatistics]) -> list[FoldTrial]:
        """Folds the layers that may be; a trial for each, in order of least loss."""
        alone = {}
        for name, layer in layers.items():
            alone[name] = self._with_folded(layer)
            self._unfold(layer)
        trials: list[FoldTrial] = []
        for name in sorted(layers, key=lambda name: (-alone[name].correct, alone[name].cross_entropy)):
            if any(trial.folded for trial in trials):
                score = self._with_folded(layers[name])
            else:  # it would be the same measurement again
                score = alone[name]
                self._fold(layers[name])
            folded = self.before.accuracy - score.accuracy <= self.max_drop + _ROUNDING
            if folded:
                self.now = score
            else:
                self._unfold(layers[name])
            trials.append(
                FoldTrial(
                    layer=name,
                    shape=tuple(layers[name].weight.shape),
                    variation=gains[name].variation(),
                    spread=gains[name].spread(),
                    accuracy_alone=alone[name].accuracy,
                    accuracy_so_far=score.accuracy,
                    folded=folded,
                )
            )
        return trials

    def _fold(self, layer: nn.Module) -> None:
        replace_layers(self.model, {layer: self.plain[layer]})

    def _unfold(self, layer: nn.Module) -> None:
        replace_layers(self.model, {self.plain[layer]: layer})

    def _with_folded(self, layer: nn.Module) -> Score:
        """The score of the network with one layer more folded, which stays so."""
        self._fold(layer)
        score = evaluate(self.model, self.data)
        if score.images != self.before.images:
            raise ValueError(
                f"fold: data must be the same in each pass; they had {self.before.images} images in the first and "
                f"{score.images} in a later one"
            )
        return score


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


_ROUNDING = 1e-9  # of percentages, far less than an image's share of them
