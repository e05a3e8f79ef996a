"""The images that an explanation shows, and where in them the class is found."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from awconv.explain.cam import NoFeatureMapError, grad_cam
from awconv.explain.images import Images
from awconv.explain.measure import Measured
from awconv.tasks import ClassificationTask


@dataclass(frozen=True)
class Heat:
    """Grad-CAM of the images that are shown.

    Attributes:
        maps: from 0 to 1, shape (shown, H, W); None if the network has no feature map for it.
        obstacle: why there are none.
    """

    maps: Tensor | None
    obstacle: str = ""


def chosen(images: Images, measured: Measured, other: Measured | None, most: int) -> list[int]:
    """The images to show: those that tell most come first.

    At most half of them are those on which two networks disagree, or whose class attention decides; a quarter wrong
    ones; the rest of classes that were not shown yet, as far as there are some.
    """
    predicted, beside = measured.predictions, measured.mean_predictions if other is None else other.predictions
    telling: list[int] = (predicted != beside).nonzero().flatten().tolist()
    if images.targets is not None:  # first where one of both is right
        one_right = ((predicted == images.targets) != (beside == images.targets)).tolist()
        telling.sort(key=lambda index: not one_right[index])
    found = telling[: most // 2]
    if images.targets is not None:
        wrong = (predicted != images.targets).nonzero().flatten().tolist()
        found += [index for index in wrong if index not in found][: most // 4]
    classes = (predicted if images.targets is None else images.targets).tolist()
    rest = [index for index in range(len(images)) if index not in found]
    shown = {classes[index] for index in found}
    new = []
    for index in rest:
        if classes[index] not in shown:
            shown.add(classes[index])
            new.append(index)
    return (found + new + [index for index in rest if index not in new])[:most]


def heat_of(task: ClassificationTask, images: Images, indices: list[int], batch_size: int) -> Heat:
    """Grad-CAM of some images, for the class that the network predicts."""
    maps = []
    try:
        for start in range(0, len(indices), batch_size):
            pixels = images.pixels[indices[start : start + batch_size]]
            maps.append(grad_cam(task.evaluated, task.normalised(pixels.to(task.device))))
    except NoFeatureMapError as error:
        return Heat(None, str(error))
    return Heat(torch.cat(maps))
