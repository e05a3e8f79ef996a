"""``awconv bench detector``: detectors with AW backbones beside those with plain ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from awconv.bench.model import FIRST_MAPS, Side, check_aw_networks, measure
from awconv.bench.report import (
    Format,
    Measurement,
    check_device,
    check_memory,
    check_range,
    names,
    numbers,
    print_measurements,
)
from awconv.layers import AW_LAYERS
from awconv.models.detection import DETECTORS
from awconv.models.registry import BASELINES
from awconv.ops.choose import ALGORITHMS

_OBJECTS = 8  # boxes an image, about COCO's mean


def bench_detector(
    networks: Sequence[str],
    size: str = "800x1333",
    batch: str = "1",
    work: str = "forward,step",
    detector: Literal["faster_rcnn", "ssd300"] = "faster_rcnn",
    algorithm: str = "auto",
    amp: Literal["off", "bfloat16", "float16"] = "off",
    device: str = "cpu",
    rounds: int = 5,
    format: Format = "table",
) -> int:
    """Measures the runtime of detectors with AW backbones relative to plain ones, interleaved.

    Weights are random. The AW detector computes what the plain one does (``init="identity"``), so that both have as
    many proposals. Norms are frozen and the first stages are not trained, as in fine-tuning.

    Args:
        networks: the backbones' names, such as aw_resnet50.
        size: height and width of the images, in pixels. Faster R-CNN does not resize them.
        batch: images; several numbers, with commas, make rows for each.
        work: with commas: ``forward`` (evaluation), ``step`` (forward, backward, in training).
        detector: ``faster_rcnn`` or ``ssd300``.
        algorithm: that the AW backbones use, such as ``fused``; auto by default.
        amp: dtype of autocast.
        device: cpu or cuda.
        rounds: how often each is timed.
        format: a table, the same as Markdown, or JSON with all figures.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: an argument is out of range, or a backbone is no AW network.
    """
    check_device(device)
    check_range(rounds=rounds)
    check_aw_networks("networks", networks)
    works = names("work", work, ("forward", "step"))
    names("algorithm", algorithm, ("auto", *ALGORITHMS))
    batches = numbers("batch", batch)
    height, width = _sides("size", size)
    arguments: dict[str, Any] = dict(trainable_layers="usual")
    if detector == "faster_rcnn":
        arguments |= dict(norm="frozen", min_size=min(height, width), max_size=max(height, width))
    for images in batches:
        check_memory(FIRST_MAPS * images * 3 * height * width, device, batch=images, size=size)
    measurements: list[Measurement] = []
    for name in networks:
        detectors = matched_detectors(detector, name, **arguments)
        for images in batches:
            input = torch.rand(images, 3, height, width, device=device)
            plain = DetectorSide(detectors["plain"], None, input, amp, device)
            sides = {"plain": plain, "aw": DetectorSide(detectors["aw"], algorithm, input, amp, device)}
            subject = f"{detector}, {name}, {size}, batch {images}"
            for kind in works:
                measurements += measure(subject, sides, kind, rounds, device)
    print_measurements(measurements, device, format)
    return 0


def _sides(name: str, text: str) -> list[int]:
    sides = numbers(name, text.replace("x", ","))
    if len(sides) != 2:
        raise ValueError(f"{name} must be a height and a width such as 800x1333, got {text!r}")
    return sides


def matched_detectors(
    detector: Literal["faster_rcnn", "ssd300"], backbone: str, **arguments: Any
) -> dict[str, nn.Module]:
    """The detectors ``"plain"`` and ``"aw"``, with the same random weights, which detect the same to rounding.

    The attention is a constant, to which it is relative, whatever form the backbone was made in.

    Args:
        detector: ``faster_rcnn`` or ``ssd300``.
        backbone: an AW network.
        **arguments: of the detector.
    """
    plain, aw = (DETECTORS[detector](name, **arguments) for name in (BASELINES[backbone], backbone))
    aw.load_state_dict(aw.state_dict() | plain.state_dict())  # its own branches, and nothing else of it
    for layer in aw.modules():
        if isinstance(layer, AW_LAYERS):
            for branch in layer.branches():
                branch.start_as_identity()
    return {"plain": plain, "aw": aw}


class DetectorSide(Side):
    """A detector with its images and some boxes, ready to be timed."""

    def forward(self) -> None:
        """In evaluation."""
        self.network.eval()
        with torch.inference_mode(), self.settings():
            self.network(list(self.input))

    def step(self) -> None:
        """Forward and backward in training."""
        self.network.train().zero_grad(set_to_none=True)
        with self.settings():
            losses: dict[str, Tensor] = self.network(list(self.input), [self._target() for _ in self.input])
            torch.stack(list(losses.values())).sum().backward()

    def _target(self) -> dict[str, Tensor]:
        height, width = self.input.shape[2:]
        corner = torch.linspace(0, 0.6, _OBJECTS, device=self.input.device)[:, None]
        box = torch.cat([corner, corner, corner + 0.3, corner + 0.3], 1)
        return {
            "boxes": box * torch.tensor([width, height] * 2, device=self.input.device),
            "labels": torch.arange(1, _OBJECTS + 1, device=self.input.device),
        }
