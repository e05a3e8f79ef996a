"""A trained network, ready to use: from a checkpoint, a published folder, an adapter, or a name."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from awconv.extras import require

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Loaded:
    """A network with what its use needs.

    Attributes:
        network: in evaluation mode, on the CPU. A classifier takes normalised images, shape (N, channels, H, W), and
            gives logits, shape (N, classes). A detector takes a list of images and gives a dictionary for each: boxes
            (x1, y1, x2, y2 in pixels), labels (from 1) and scores.
        classes: the names of the classes, by index; of a detector, ``classes[label - 1]``.
        transform: the preprocessing, from a Pillow image to the network's input for it, a transform of torchvision. It
            turns the image upright by its EXIF orientation. A classifier's resizes, crops and normalises as its
            evaluation did: float32, shape ``input_size``. A detector's only makes a tensor: uint8, shape (3, H, W).
        input_size: channels, height and width of a classifier's input; None for a detector, which takes any size.

    Examples:
        >>> import awconv
        >>> loaded = awconv.load("aw_resnet8_cifar.digits")
        >>> loaded.input_size, len(loaded.classes)
        ((1, 8, 8), 10)
    """

    network: nn.Module
    classes: list[str]
    transform: Callable[[Image.Image], Tensor]
    input_size: tuple[int, int, int] | None


def load(
    source: str | os.PathLike[str],
    *,
    pretrained: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
) -> Loaded:
    """Loads a trained network with its classes and its preprocessing (extra ``train``).

    Nothing in a file can run code. Averaged weights (``model.ema_decay``) are taken if there are some.

    Args:
        source: a checkpoint of ``awconv fit`` or ``compare``; the folder of a training, whose newest checkpoint is
            taken; what ``awconv publish`` or timm's ``save_for_hf`` wrote, a folder or an adapter; a name with weights
            in timm, such as ``"aw_resnet8_cifar.digits"`` or ``"resnet50"``; or a network on Hugging Face's hub,
            ``"hf-hub:OWNER/NAME"`` or ``"hf-hub:OWNER/NAME@REVISION"``.
        pretrained: a file of weights: the base of an adapter, or those of a name, in the place of timm's.
        image_size: height and width for a classifier's images, in pixels, if not those that it was trained on.

    Raises:
        FileNotFoundError: there is no such file, folder or name; the message names similar names.
        ModuleNotFoundError: the extra is not installed.
        ValueError: the file is broken or something else, the weights belong to another network, the base is another
            one, the network does not take the size, or the hub has no such network or cannot be reached.

    Examples:
        >>> import awconv
        >>> from PIL import Image
        >>> loaded = awconv.load("aw_resnet8_cifar.digits")
        >>> image = loaded.transform(Image.new("L", (20, 30)))
        >>> image.shape, loaded.network(image[None]).shape, loaded.classes[:3]
        (torch.Size([1, 8, 8]), torch.Size([1, 10]), ['0', '1', '2'])
    """
    require("lightning", extra="train")
    from torchvision.transforms import v2

    from awconv.data.transforms import Decoded, Fitted
    from awconv.sources import load_task
    from awconv.tasks import ClassificationTask

    task: Any = load_task(source, pretrained, image_size)
    if not isinstance(task, ClassificationTask):
        return Loaded(task.network.eval(), list(task.classes), v2.Compose([Decoded()]), None)
    transform = v2.Compose(
        [
            Fitted(task.input_size[0], task.input_size[1], task.crop_pct, task.interpolation),
            v2.ToDtype(torch.float32),
            v2.Normalize(task.mean.flatten().tolist(), task.std.flatten().tolist()),
        ]
    )
    channels, height, width = task.input_size
    return Loaded(task.evaluated.eval(), list(task.classes), transform, (channels, height, width))
