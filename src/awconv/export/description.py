"""What a trained network takes, and what its file says of it."""

from __future__ import annotations

from typing import Any, Literal

import torch

from awconv.export.detector import DIVISOR
from awconv.export.graph import Inputs
from awconv.export.metadata import Metadata
from awconv.tasks import ClassificationTask, DetectionTask, Task
from awconv.version import __version__


def inputs_of(task: Task, batch: Literal["dynamic"] | int, dynamic_size: bool, uint8: bool) -> Inputs:
    """The input of an exported network.

    Args:
        task: of the network.
        batch: the number of images, or dynamic.
        dynamic_size: any height and width.
        uint8: bytes.

    Raises:
        ValueError: the network does not take these.
    """
    if batch != "dynamic" and not 1 <= batch <= 2**16:
        raise ValueError(f"batch must be dynamic or a number of at least 1, got {batch}")
    if isinstance(task, DetectionTask):
        return _of_detector(task, batch, dynamic_size, uint8)
    assert isinstance(task, ClassificationTask)
    channels, height, width = task.input_size
    if channels not in (1, 3):
        raise ValueError(f"a network for images of 1 or 3 channels is exported, got one for {channels}")
    inputs = Inputs((channels, height, width), None if batch == "dynamic" else batch, dynamic_size, uint8)
    if dynamic_size:
        _check_other_size(task, inputs)
    return inputs


def _check_other_size(task: ClassificationTask, inputs: Inputs) -> None:
    """Raises a ValueError if the network takes images of one size only."""
    try:
        with torch.inference_mode():
            task(torch.zeros(1, *inputs.other_size, dtype=torch.uint8))
    except Exception as error:  # networks fail in ways of their own
        raise ValueError(
            f"{task.network_name} takes images of one size only, so --size must be fixed: {error}"
        ) from error


def _of_detector(task: DetectionTask, batch: Literal["dynamic"] | int, dynamic_size: bool, uint8: bool) -> Inputs:
    if batch not in ("dynamic", 1):
        raise ValueError(f"batch must be 1 for a detector, got {batch}")
    if uint8:
        raise ValueError("uint8 is for classifiers: a detector takes images that are padded after they are normalised")
    if task.detector == "ssd300":
        if dynamic_size:
            raise ValueError("size must be fixed for ssd300, which sees all images at 300x300 pixels")
        height, width = task.network.transform.fixed_size[::-1]  # type: ignore[union-attr,index]
    else:
        height, width = (-(-side // DIVISOR) * DIVISOR for side in (_shorter(task), task.max_size))
    return Inputs((3, int(height), int(width)), 1, dynamic_size, False, detector=True)


def _shorter(task: DetectionTask) -> int:
    return task.min_size[-1] if isinstance(task.min_size, tuple) else task.min_size


def metadata_of(task: Task, inputs: Inputs, precision: Literal["fp32", "fp16", "int8"]) -> Metadata:
    """What the file of an exported network says of it."""
    common: dict[str, Any] = dict(
        awconv=__version__,
        network=task.network_name,
        input_size=inputs.size,
        dynamic_size=inputs.dynamic_size,
        batch=inputs.batch,
        uint8=inputs.uint8,
        precision=precision,
    )
    if isinstance(task, ClassificationTask):
        return Metadata(
            kind="classifier",
            classes=tuple(task.classes),
            mean=tuple(map(float, task.channel_means)),
            std=tuple(map(float, task.channel_deviations)),
            crop_pct=float(task.crop_pct),
            interpolation=task.interpolation,
            **common,
        )
    assert isinstance(task, DetectionTask)
    network: Any = task.network
    ssd = task.detector == "ssd300"
    return Metadata(
        kind="detector",
        classes=tuple(task.classes),
        mean=tuple(map(float, network.transform.image_mean)),
        std=tuple(map(float, network.transform.image_std)),
        crop_pct=1.0,
        interpolation="bilinear",
        score_threshold=float(getattr(network, "roi_heads", network).score_thresh),
        min_size=0 if ssd else _shorter(task),
        max_size=0 if ssd else task.max_size,
        stretched=ssd,
        **common,
    )
