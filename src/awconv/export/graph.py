"""The module that is exported: a copy of the network, and what stands before it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from awconv.export.detector import DetectorGraph, exportable_operations
from awconv.fuse import fuse
from awconv.ops import exports
from awconv.tasks import ClassificationTask, Task

Format = Literal["onnx", "openvino", "pt2"]


@dataclass(frozen=True)
class Inputs:
    """What the exported network takes.

    Attributes:
        size: channels, height and width.
        batch: the number of images; None for any.
        dynamic_size: any height and width.
        uint8: bytes, which the graph normalises.
        detector: whether it is a detector's, which also takes the image's size without its padding.
    """

    size: tuple[int, int, int]
    batch: int | None
    dynamic_size: bool
    uint8: bool
    detector: bool = False

    @property
    def names(self) -> list[str]:
        """Of the graph's inputs."""
        return ["images", "size"] if self.detector else ["images"]

    def examples(self) -> tuple[Tensor, ...]:
        """Images of zeros, shape (N, channels, H, W), and for a detector their height and width. An example of one
        image would fix a batch of any size to 1."""
        images = torch.zeros(self.batch or 2, *self.size, dtype=torch.uint8 if self.uint8 else torch.float32)
        return (images, torch.tensor(self.size[1:], dtype=torch.float32)) if self.detector else (images,)

    def dynamic_shapes(self) -> tuple[dict[int, Any], ...] | None:
        """For ``torch.export``."""
        axes: dict[int, Any] = {} if self.batch is not None else {0: torch.export.Dim("batch")}
        if self.dynamic_size:  # a network may want sizes that its strides divide, which names would forbid
            axes |= dict.fromkeys((2, 3), torch.export.Dim.AUTO)
        return (axes, {})[: len(self.names)] if axes else None

    @property
    def other_size(self) -> tuple[int, int, int]:
        """Another size of images, to try a network for any size with."""
        channels, height, width = self.size
        return channels, height * 3 // 2, width * 2

    def is_dynamic(self, axis: int) -> bool:
        """Whether an axis of the images, counted from the batch's, may have any size."""
        return (axis == 0 and self.batch is None) or (axis >= 2 and self.dynamic_size)

    def refuse_constant(self, axis: int, size: int) -> NoReturn:
        """Reports that an axis that was to have any size has become a constant.

        Raises:
            ValueError: always.
        """
        what, mend = ("batch size", "--batch=1") if axis == 0 else ("size", "--size=fixed")
        raise ValueError(f"the network takes images of one {what} only, {size}; {mend} exports it for one")


class Normalising(nn.Module):
    """A network that takes bytes.

    Args:
        network: takes normalised images.
        mean: of each channel, of values from 0 to 255, shape (channels, 1, 1).
        std: standard deviation of each channel, likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())

    def forward(self, images: Tensor) -> Tensor:
        """Images, uint8 of shape (N, channels, H, W), to logits, shape (N, classes)."""
        logits: Tensor = self.network((images.float() - self.mean) / self.std)
        return logits


@contextmanager
def prepared(network: nn.Module, form: exports.Runtime | None, batch: int | None) -> Iterator[nn.Module]:
    """A copy of a network, fused for inference; it is exported inside, in the form that suits a runtime."""
    with torch.inference_mode(False), torch.no_grad(), exports.exporting_for(form, batch):
        yield fuse(copy.deepcopy(network).float())


@contextmanager
def exportable(task: Task, inputs: Inputs, form: exports.Runtime | None) -> Iterator[nn.Module]:
    """The module to export for a classifier or a detector; it is exported inside, in the form for a runtime."""
    with prepared(task.evaluated, form, inputs.batch) as network:
        if isinstance(task, ClassificationTask):
            yield Normalising(network, task.mean, task.std).eval() if inputs.uint8 else network
        else:
            with exportable_operations():
                yield DetectorGraph(network).eval()
