"""Compares an exported detector with the network that it came from, on real images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou
from torchvision.transforms.v2.functional import pil_to_tensor

from awconv.export.check import CheckError
from awconv.export.detector import found_objects
from awconv.export.exported import ExportedDetector
from awconv.export.images import Images
from awconv.tasks import DetectionTask

# The largest share of objects that may be lost, and the largest difference of a score, of one that is found again.
# Objects whose scores are equal but for rounding may change places at the limit of their number.
BOUNDS = {"fp32": (0.01, 1e-3), "fp16": (0.1, 5e-2)}
_OVERLAP = 0.9  # of the boxes of one object, at least
_MOST = 50  # images


@dataclass(frozen=True)
class ObjectAgreement:
    """How near an exported detector comes to its network.

    Attributes:
        images: number of images that were compared.
        objects: that PyTorch finds.
        lost: of these, in the file, and of the file's in PyTorch.
        difference: the largest difference of a score of an object that both find.
    """

    images: int
    objects: int
    lost: int
    difference: float

    def described(self, images: Images) -> str:
        """The figures, in a line."""
        return (
            f"on {self.images:,} images of {images.name}, all but {self.lost:,} of {self.objects:,} objects are the "
            f"same, and their scores differ from PyTorch's by {self.difference:.1e} at most"
        )


def compare_objects(exported: ExportedDetector, task: DetectionTask, images: Images) -> ObjectAgreement:
    """Compares on whole images and, where the file takes any size, on one that is turned by a quarter.

    Args:
        exported: the file.
        task: of the network that it came from, on the CPU.
        images: real images, of which 50 at most are compared.

    Raises:
        CheckError: they differ by more than the file's precision explains, or PyTorch finds nothing to compare.
    """
    pictures = [pil_to_tensor(picture.convert("RGB")) for picture in images.pictures(images.chosen(_MOST))]
    if exported.metadata.dynamic_size:
        pictures.append(pictures[0].transpose(1, 2).contiguous())
    objects, lost, difference = 0, 0, 0.0
    for picture in pictures:
        batch, size = exported.inputs(picture)
        with torch.inference_mode():
            expected = found_objects(task.network, batch, tuple(map(int, size)))
        before = torch.tensor(picture.shape[1:]) / size
        expected = expected | {"boxes": expected["boxes"] * before.flip(0).repeat(2)}
        (got,) = exported([picture])
        objects += len(expected["labels"])
        matched = _matched(expected, got)
        lost += len(expected["labels"]) - len(matched) + max(0, len(got["labels"]) - len(expected["labels"]))
        difference = max([difference, *matched])
    agreement = ObjectAgreement(len(pictures), objects, lost, difference)
    if not objects:
        raise CheckError(
            f"PyTorch's network finds nothing in the {len(pictures)} images of {images.name}, so nothing can be "
            "compared; give --check=FOLDER with images of its objects"
        )
    share, largest = BOUNDS[exported.metadata.precision]
    if lost > share * objects or not difference <= largest:
        raise CheckError(
            f"the exported network does not find what PyTorch does: on {len(pictures)} images of {images.name}, at "
            f"most {100 * share:g} % of {objects} objects may be lost, got {lost}, and scores may differ by "
            f"{largest:g}, got {difference:.2g}; nothing is written"
        )
    return agreement


def _matched(expected: dict[str, Tensor], got: dict[str, Tensor]) -> list[float]:
    """For each object that is found again, with the same class and an overlap of 90 %, the difference of its scores."""
    if not len(expected["labels"]) or not len(got["labels"]):
        return []
    overlap = box_iou(expected["boxes"], got["boxes"])
    same = expected["labels"][:, None] == got["labels"]
    apart = (expected["scores"][:, None] - got["scores"]).abs()
    apart = torch.where(same & (overlap >= _OVERLAP), apart, torch.inf)
    nearest = apart.min(1).values
    return [float(value) for value in nearest[nearest.isfinite()]]
