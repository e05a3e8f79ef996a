"""Compares an exported file with the network that it came from, on real images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from awconv.export.exported import ExportedClassifier
from awconv.export.graph import Inputs
from awconv.export.images import Images
from awconv.tasks import ClassificationTask

# The largest difference of a logit that is accepted, relative to the largest logit. Of one computation rounded in two
# ways, the logits of deep networks differ by 1e-5; halves have 11 bits, and 8 bits are the user's to judge.
BOUNDS = {"fp32": 1e-4, "fp16": 3e-2, "int8": 0.5}
_BATCH = 8
_MOST = 5000  # images


class CheckError(ValueError):
    """An exported file that does not compute what its network does."""


@dataclass
class Agreement:
    """How near an exported file comes to its network.

    Attributes:
        images: number of images that were compared.
        difference: the largest difference of a logit, relative to the largest logit.
        same: images for which both give the same class.
        right: images that the network classifies rightly, and those that the file does; None without labels.
    """

    images: int
    difference: float
    same: int
    right: tuple[int, int] | None


def compare(exported: ExportedClassifier, task: ClassificationTask, inputs: Inputs, images: Images) -> Agreement:
    """Compares on batches of one image and of more and, where the file takes any size, on images of another size.

    Args:
        exported: the file.
        task: of the network that it came from, on the CPU.
        inputs: what it was exported for.
        images: real images, of which 5,000 at most are compared.

    Raises:
        CheckError: they differ by more than the file's precision explains, or the file gives no finite numbers.
        ValueError: no image can be decoded.
    """
    chosen = images.chosen(_MOST)
    size = list(inputs.size)
    sizes = [(chosen[:1], size), (chosen[1:] or chosen, size)]
    if inputs.dynamic_size:
        sizes.append((chosen[:3], list(inputs.other_size)))
    total, largest, difference, same, seen = 0, 0.0, 0.0, 0, []
    right = [0, 0]
    for indices, its_size in sizes:
        for batch, numbers in images.batches(indices, _BATCH, its_size, task):
            expected, got = _reference(task, batch), exported(batch)
            if not got.isfinite().all():
                raise CheckError(f"the exported network gives NaN or infinity on {images.name}; nothing is written")
            largest = max(largest, float(expected.abs().max()))
            difference = max(difference, float((expected - got).abs().max()))
            if its_size == size:
                classes = [logits.argmax(1).tolist() for logits in (expected, got)]
                total += len(numbers)
                same += sum(one == other for one, other in zip(*classes, strict=True))
                seen += list(zip(numbers, *classes, strict=True))
    labels = images.labels
    if labels is not None:
        right = [sum(row[column] == labels[row[0]] for row in seen) for column in (1, 2)]
    agreement = Agreement(
        total, difference / max(largest, 1e-30), same, None if labels is None else (right[0], right[1])
    )
    bound = BOUNDS[exported.metadata.precision]
    if not agreement.difference <= bound:
        raise CheckError(
            f"the exported network does not compute what PyTorch does: on {total} of {images.name}, logits must agree "
            f"to {bound:g} of the largest ({largest:.4g}) in {exported.metadata.precision}, and differ by "
            f"{agreement.difference:.2g}; nothing is written"
        )
    return agreement


def _reference(task: ClassificationTask, images: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = task(images)
    return logits.float()


def described(agreement: Agreement, images: Images) -> str:
    """The figures, in a line."""
    text = (
        f"on {agreement.images:,} images of {images.name}, logits differ from PyTorch's by {agreement.difference:.1e} "
        f"of the largest at most, and {agreement.same:,} classes are the same"
    )
    if agreement.right is not None:
        before, after = (100 * count / agreement.images for count in agreement.right)
        text += f"; accuracy {before:.2f} % in PyTorch, {after:.2f} % in the file"
    return text
