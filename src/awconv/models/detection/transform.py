"""What torchvision's detectors do to images first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.transform import GeneralizedRCNNTransform


class NarrowImageError(ValueError):
    """An image of which nothing is left when its longer side fits the detector."""


class Uint8Transform(GeneralizedRCNNTransform):
    """torchvision's transform, which also takes uint8, with a third of the memory, and says which image is too narrow.

    Raises:
        NarrowImageError: an image would have no pixel left across after resizing.
    """

    def normalize(self, image: Tensor) -> Tensor:
        """Images of 0 to 1, or uint8, in the units that the backbone was trained with."""
        if image.dtype != torch.uint8:
            normalised: Tensor = super().normalize(image)
            return normalised
        mean, std = (
            torch.tensor(values, device=image.device)[:, None, None] for values in (self.image_mean, self.image_std)
        )
        # In its own place: a large photograph takes a gigabyte, and uint8 / 255 two.
        return image.to(torch.get_default_dtype()).div_(255).sub_(mean).div_(std)

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """To the size that the detector works at."""
        height, width = image.shape[-2:]
        if self.fixed_size is None and min(height, width) * self.max_size < max(height, width):
            raise NarrowImageError(
                f"{width}x{height} pixels shrink to less than one in width or height when the longer side is reduced "
                f"to {self.max_size}, the network's max_size; cut the image into parts"
            )
        resized: tuple[Tensor, dict[str, Tensor] | None] = super().resize(image, target)
        return resized


def take_uint8(detector: GeneralizedRCNN | SSD) -> None:
    """Gives a detector of torchvision the transform of this file."""
    old: Any = detector.transform
    names = ("min_size", "max_size", "image_mean", "image_std", "size_divisible", "fixed_size", "_skip_resize")
    detector.transform = Uint8Transform(**{name: getattr(old, name) for name in names})
